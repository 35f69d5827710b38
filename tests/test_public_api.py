"""The command line and the functions are one thing: same names, same parameters, same defaults."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import biopsy
from biopsy.cli import app

ROOT = typer.main.get_command(app)
VERBS = ROOT.commands  # type: ignore[attr-defined]
COMMANDS = {name.replace("-", "_"): command for name, command in VERBS.items()}

ONLY_COMMAND_LINE = {"as_json"}  # how a result is printed
ONLY_FUNCTION = {"on_progress", "on_epoch", "transform"}  # functions: a command line has none
FLAGS = {"as_json": "--json", "overrides": "--set"}


def spell(default: object) -> object:
    """Write a default as the command line would: nothing, a text, a number, or a list with commas."""
    if default is inspect.Parameter.empty or default in (None, (), [], ""):
        return None
    if isinstance(default, tuple | list):
        return ",".join(map(str, default))
    return str(default) if isinstance(default, Path) else default


def parameters_of(function: object) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)  # type: ignore[arg-type]


def public_functions() -> set[str]:
    functions = {name for name in biopsy.__all__ if inspect.isfunction(getattr(biopsy, name))}
    return functions - {"evaluate_predictions"}  # of arrays; of a table it is `biopsy evaluate`


def test_every_command_is_a_function_and_every_function_a_command():
    assert set(COMMANDS) == public_functions()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_takes_what_its_function_takes(name):
    command = parameters_of(COMMANDS[name].callback)
    function = parameters_of(getattr(biopsy, name))
    assert set(command) - ONLY_COMMAND_LINE == set(function) - ONLY_FUNCTION


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_defaults_are_the_same(name):
    function = parameters_of(getattr(biopsy, name))
    for parameter, item in parameters_of(COMMANDS[name].callback).items():
        if parameter not in ONLY_COMMAND_LINE:
            assert spell(item.default) == spell(function[parameter].default), parameter


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_flags_are_spelled_as_parameters(name):
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            flag = FLAGS.get(parameter.name, f"--{parameter.name.replace('_', '-')}")
            assert parameter.opts == [flag]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_functions_are_typed_and_documented(name):
    function = getattr(biopsy, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Parameter.empty
    assert all(item.annotation is not inspect.Parameter.empty for item in signature.parameters.values())
    assert function.__doc__ and COMMANDS[name].help
    kinds = [item.kind for item in signature.parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) <= 2


def test_public_names_are_all_there_and_listed():
    for name in biopsy.__all__:
        assert getattr(biopsy, name) is not None
    assert set(biopsy.__all__) <= set(dir(biopsy))
    assert list(biopsy.__all__) == sorted(biopsy.__all__)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="trian"):
        _ = biopsy.trian


def test_errors_can_be_caught_by_their_public_names():
    from biopsy.core import errors

    members = inspect.getmembers(errors, inspect.isclass)
    tree = {name for name, item in members if item.__module__ == errors.__name__}
    assert tree <= set(biopsy.__all__)


def test_importing_the_package_and_any_help_load_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "import biopsy\n"
        "from biopsy.cli import app\n"
        f"for arguments in [[], *([name] for name in {sorted(VERBS)})]:\n"
        "    result = CliRunner().invoke(app, [*arguments, '--help'])\n"
        "    assert result.exit_code == 0 and result.stdout.strip() and not result.stderr, arguments\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'sklearn', 'scipy', 'cv2', 'h5py', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
