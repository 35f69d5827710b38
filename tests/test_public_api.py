"""The public names, and the commands that are made of the public functions without importing them."""

import inspect
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from cyclopts import App

import biopsy
from biopsy.cli import build_app
from biopsy.cli.app import COMMANDS
from biopsy.cli.signatures import list_functions, read_function
from biopsy.core.errors import DataError
from command_line import call
from refusals import refuses

HEAVY = {"torch", "numpy", "pandas", "matplotlib", "sklearn", "scipy", "cv2", "h5py", "pyarrow", "pydantic"}


@pytest.fixture(scope="module")
def app() -> App:
    return build_app()


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(biopsy, name)).parameters)


def test_every_command_is_a_function_and_every_function_a_command():
    functions = {name for name in biopsy.__all__ if inspect.isfunction(getattr(biopsy, name))}
    assert set(COMMANDS) == functions - {"evaluate_predictions"}  # of arrays; of a table it is `evaluate`
    assert set(list_functions()) == functions


@pytest.mark.parametrize("name", COMMANDS)
def test_signatures_read_from_the_source_equal_those_at_import(name):
    """Same parameters, defaults and docstring; a callback is a parameter that takes nothing from a shell."""
    read, imported = read_function(*list_functions()[name]), parameters_of(name)
    assert [*read.signature.parameters, *read.callbacks] == sorted(
        imported, key=lambda parameter: parameter in read.callbacks
    )
    for parameter, item in read.signature.parameters.items():
        assert item.default == imported[parameter].default
        assert item.kind == imported[parameter].kind
    for parameter in read.callbacks:
        assert "Callable" in str(imported[parameter].annotation)
    assert inspect.cleandoc(read.doc) == inspect.getdoc(getattr(biopsy, name))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_types_that_its_function_takes(name):
    read = read_function(*list_functions()[name])
    hints = typing.get_type_hints(getattr(biopsy, name))
    for parameter, item in read.signature.parameters.items():
        assert set(_members(item.annotation)) <= set(_members(hints[parameter])), parameter


def _members(hint: object) -> list[object]:
    """Return the plain types and choices that a type is a union or a sequence of."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return list(arguments)
    if origin in (Sequence, Iterable):
        return [("each", member) for argument in arguments for member in _members(argument)]
    return [member for argument in arguments for member in _members(argument)] or [hint]


@pytest.mark.parametrize("name", COMMANDS)
def test_parameters_are_options_of_their_name_documented_once(name, app):
    command = app[name.replace("_", "-")]
    for argument in command.assemble_argument_collection():
        parameter = argument.field_info.name
        expected = {parameter.upper(), f"--{parameter.replace('_', '-')}"}
        negative = {f"--no-{parameter}"} if argument.field_info.default is True else set()
        assert set(argument.names) <= ({"--set"} if parameter == "overrides" else expected | negative)
        assert len(re.findall(rf"^    {parameter}: \S", command.help, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_functions_are_typed_and_documented(name):
    signature = inspect.signature(getattr(biopsy, name))
    assert signature.return_annotation is not inspect.Parameter.empty
    assert all(item.annotation is not inspect.Parameter.empty for item in signature.parameters.values())
    kinds = [item.kind for item in signature.parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) <= 2


def test_public_names_are_all_there_and_listed():
    for name in biopsy.__all__:
        assert getattr(biopsy, name) is not None
    assert set(biopsy.__all__) <= set(dir(biopsy))


def test_an_unknown_name_is_refused():
    with refuses(AttributeError, name="trian"):
        _ = biopsy.trian


def test_errors_can_be_caught_by_their_public_names():
    from biopsy.core import errors

    members = inspect.getmembers(errors, inspect.isclass)
    tree = {name for name, item in members if item.__module__ == errors.__name__}
    assert tree <= set(biopsy.__all__)


def test_the_list_of_commands_is_that_of_the_whole_application(app, capsys):
    assert call("--help").stdout == call().stdout
    app.meta(["--help"])
    assert capsys.readouterr().out == call("--help").stdout


def test_importing_the_package_and_any_help_load_nothing_heavy():
    code = (
        "import sys\n"
        "from command_line import call\n"
        f"for name in {['', *COMMANDS]}:\n"
        "    result = call(*filter(None, [name.replace('_', '-'), '--help']))\n"
        "    assert result.exit_code == 0 and result.stdout.strip() and not result.stderr, name\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tests
    )
    assert done.returncode == 0, done.stderr


def test_functions_without_a_network_do_not_import_torch(make_pack):
    names = "fetch publish view serve inspect split slide list evaluate compare calibrate label_issues next"
    code = (
        "import sys, biopsy\n"
        f"for name in {names.split()}:\n"
        "    getattr(biopsy, name)\n"
        "    assert 'torch' not in sys.modules, name\n"
        "biopsy.evaluate_predictions([0, 1, 1, 0] * 9, [0.2, 0.7, 0.4, 0.3] * 9, groups=[*range(36)])\n"
        f"report = biopsy.verify({str(make_pack().path)!r})\n"
        "assert not report.exit_code and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_no_training_data_and_its_pack_is_named(trained_run):
    with refuses(DataError, trained_run.path, trained_run.info["pack"]["path"]):
        biopsy.train("idc-small", trained_run.path)


def test_a_parameter_that_is_left_out_is_named():
    left_out = call("prepare", "archive.zip")
    assert left_out.exit_code == 2 and "needs --out" in left_out.stderr
    assert "needs" not in call("prepare", "archive.zip", "--out").stderr  # which needs a value


def test_wrong_names_get_the_nearest_one():
    for wrong, right in [
        (["trian"], "train"),
        (["evaluate", "run", "--subst", "test"], "--subset"),
        (["evaluate", "run", "--subset", "tset"], "test"),
    ]:
        result = call(*wrong)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and right in result.stderr


@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=pytest.mark.slow), "fish"])
def test_completion_knows_every_command_and_option(shell, app):
    script = app.generate_completion(shell=shell)
    for name in COMMANDS:
        assert name.replace("_", "-") in script
    for option in ("subset", "trust-model", "log-file"):
        assert option in script


def test_the_reference_page_is_up_to_date():
    project = Path(__file__).resolve().parents[1]
    page = project / "docs" / "reference" / "commands.md"
    code = [sys.executable, str(page.with_name("make_commands.py")), "--print"]
    made = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    assert page.read_text(encoding="utf-8") == made, "run: python docs/reference/make_commands.py"


def test_json_of_any_command_is_json(capsys):
    listed = call("list", "recipes", "--json")
    assert json.loads(listed.stdout) == json.loads(json.dumps(biopsy.list("recipes"), default=str))
