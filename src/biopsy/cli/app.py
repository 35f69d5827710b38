"""The application: one command per public function, common options, exit codes of errors."""

import contextlib
import gc
import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter, Token

import biopsy
from biopsy.cli.console import EpochLines, log, progress, set_up_log, show
from biopsy.cli.signatures import PublicFunction, list_functions, read_function, read_summary
from biopsy.core.errors import BiopsyError
from biopsy.core.launch import read_launch

KNOWN_ERROR, USAGE, INTERRUPTED = 1, 2, 130

GROUPS = {
    "Start": ("demo", "list", "doctor"),
    "Data": ("fetch", "prepare", "inspect", "split", "label_issues"),
    "Training": ("train", "pretrain", "study", "sweep", "probe", "reproduce", "import_keras"),
    "Evaluation": ("evaluate", "calibrate", "compare", "errors", "explain", "verify", "report"),
    "Prediction": ("predict", "slide", "next", "view", "serve", "export", "publish"),
}
"""Public functions that are commands, under the headings of the help."""
COMMANDS = {name: group for group, names in GROUPS.items() for name in names}
OPTIONS = frozenset({"data", "out"})
"""Positional parameters of functions that are options of commands, except ``out`` of ``export``."""
VERBATIM = frozenset({"overrides", "grid", "search", "patch"})
"""Lists whose values may hold commas: the option is repeated instead."""
METAVARS = {"overrides": "KEY=VALUE", "grid": "KEY=VALUE,...", "search": "KEY=LOW..HIGH"}

HELP = """Train, evaluate, explain and run breast-histopathology patch classifiers.

Research use only: not a medical device, not for diagnosis."""

Flag = Parameter(negative=(), show_default=False)
Common = Group("Common options", sort_key=99)


def build_app(names: Iterable[str] = COMMANDS, *, quote: str = "", only_list: bool = False) -> App:
    """Return the application with some commands.

    Args:
        quote: Stands around code in the help.
        only_list: Whether to leave out the parameters of commands, which the list of commands does not show.
    """
    app = App(
        name="biopsy",
        help=HELP,
        version=lambda: f"biopsy {biopsy.__version__}",
        help_format="plaintext",
        group_arguments=Group("Arguments", sort_key=1),
        group_parameters=Group("Options", sort_key=2),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    app.meta.suppress_keyboard_interrupt = False  # else cyclopts exits while options are parsed
    functions = list_functions()
    groups = {name: Group(name, sort_key=index) for index, name in enumerate(GROUPS)}
    for name in names:
        function = (read_summary if only_list else read_function)(*functions[name])
        command = _as_command(name, function, _format_doc(function, quote))
        app.command(command, name=name.replace("_", "-"), group=groups[COMMANDS[name]])
    app.command(_install_completion(app), name="--install-completion")
    app.meta.default(_make_launcher(app))
    return app


def _install_completion(app: App) -> Callable[..., None]:
    def install_completion(shell: Literal["bash", "zsh", "fish", "powershell"] | None = None) -> None:
        """Install shell completion, and name the file.

        Args:
            shell: Shell (default: the current one).
        """
        print(app.install_completion(shell=shell))

    return install_completion


def _format_doc(function: PublicFunction, quote: str) -> str:
    """Return a docstring without line breaks, with parameters written as options."""
    text, _, rest = function.doc.partition("\nArgs:\n")
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    doc = f"{text}\n\nArgs:\n" + re.sub(r"\n {8}(?=\S)", " ", rest)

    def write_code(code: re.Match[str]) -> str:
        parameter = function.signature.parameters.get(code[1])
        is_option = parameter is not None and parameter.kind is parameter.KEYWORD_ONLY
        return f"{quote}{_flag(code[1]) if is_option or code[1] in OPTIONS else code[1]}{quote}"

    doc = re.sub(r"``(.+?)``", write_code, doc)
    return doc if quote else re.sub(r"`(.+?)`", r"\1", doc)


def _flag(name: str) -> str:
    return "--set" if name == "overrides" else f"--{name.replace('_', '-')}"


def _as_command(name: str, function: PublicFunction, doc: str) -> Callable[..., None]:
    """Return a function whose signature has the types that the command line parses."""

    def command(*args: Any, **kwargs: Any) -> None: ...

    parameters = [_as_parameter(name, item) for item in function.signature.parameters.values()]
    parameters.sort(key=lambda item: item.kind)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    command.__name__, command.__doc__ = name, doc
    command.callbacks = function.callbacks  # type: ignore[attr-defined]
    return command


def _as_parameter(command: str, item: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter of the command line: argument or option, name, parser of lists."""
    kind, hint, default = item.kind, item.annotation, item.default
    is_list = "Sequence" in str(hint)
    if kind is item.POSITIONAL_OR_KEYWORD and (command, item.name) != ("export", "out"):
        kind = item.KEYWORD_ONLY if item.name in OPTIONS else item.POSITIONAL_ONLY
        if is_list and kind is item.POSITIONAL_ONLY:  # may stand before and after options
            required = Parameter(required=default is item.empty)
            item_type = Annotated[get_args(hint)[0], required]  # type: ignore[valid-type]
            return item.replace(kind=item.VAR_POSITIONAL, annotation=item_type, default=item.empty)
    if (command, item.name) == ("slide", "out"):  # optional in Python, where one slide's map is returned
        default = item.empty
    parameter = Parameter(
        name="--set" if item.name == "overrides" else None,
        metavar=METAVARS.get(item.name),
        converter=_split_commas if is_list and item.name not in VERBATIM else None,
        negative=None if default is True else (),
        show_default=_spell if default not in (item.empty, None, (), False) else False,
    )
    return item.replace(kind=kind, annotation=Annotated[hint, parameter], default=default)


def _spell(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _split_commas(hint: Any, tokens: Sequence[Token]) -> tuple[Any, ...]:
    """Read ``"0,1,2"``, or several of them, as a list; nothing is an empty list."""
    texts = [part.strip() for token in tokens for part in token.value.split(",")]
    if texts == [""]:
        return ()
    texts = [text for text in texts if text]
    numbers = "int" in str(hint)
    if not texts or (numbers and not all(re.fullmatch(r"[+-]?\d+", text) for text in texts)):
        kind = "whole numbers" if numbers else "values"
        raise ValueError(f"expected {kind} separated by commas, such as {'0,1,2' if numbers else 'a,b'}")
    return tuple(map(int, texts)) if numbers else tuple(texts)


def _make_launcher(app: App) -> Callable[..., int]:
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        as_json: Annotated[bool, Parameter("--json", group=Common), Flag] = False,
        quiet: Annotated[bool, Parameter(("--quiet", "-q"), group=Common), Flag] = False,
        verbose: Annotated[bool, Parameter(("--verbose", "-v"), group=Common), Flag] = False,
        log_file: Annotated[Path | None, Parameter(group=Common)] = None,
        accept_licence: Annotated[str | None, Parameter(group=Common)] = None,
    ) -> int:
        """Run a command.

        Args:
            tokens: The command and its arguments.
            as_json: Print the result as JSON.
            quiet: Print results, warnings and errors only: no progress, no log.
            verbose: Print the log in full, with time, module and the traceback of an error.
            log_file: File to which the full log is appended.
            accept_licence: Weight licences to accept (comma-separated).
        """
        set_up_log(quiet=quiet or read_launch().rank > 0, verbose=verbose, file=log_file)
        if quiet:  # the bars of libraries that download
            os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        if accept_licence is not None:
            os.environ["BIOPSY_ACCEPT_LICENCE"] = accept_licence
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        if command.__name__ not in COMMANDS:  # help, completion
            return command(*bound.args, **bound.kwargs) or 0
        log.debug("biopsy %s: %s", biopsy.__version__, shlex.join(tokens))
        return _run_command(command, dict(bound.arguments), as_json=as_json, quiet=quiet)

    return launch


def _run_command(command: Any, arguments: Mapping[str, object], *, as_json: bool, quiet: bool) -> int:
    """Call the public function with the given arguments, and print its result."""
    name, launch = command.__name__, read_launch()
    if launch.world_size > 1 and name != "train":
        raise CycloptsError(
            msg=f"{launch.world_size} processes were started together, which only `biopsy train` can use; "
            "share slides, studies and sweeps with --shard I/N"
        )
    if name == "train" and "resume" not in arguments and not {"recipe", "data"} <= set(arguments):
        raise CycloptsError(msg="train needs a recipe and --data PACK, or --resume RUN")
    try:
        with _watch(name, command.callbacks, quiet=quiet) as callbacks:
            result = getattr(biopsy, name)(**arguments, **callbacks)
    except KeyboardInterrupt as stop:
        resumable = name == "train" and stop.args
        step = (
            f"continue with `biopsy train --resume {stop.args[0]}`"
            if resumable
            else "run the same command again"
        )
        log.error("interrupted: finished work is kept; %s", step)
        return INTERRUPTED
    except BiopsyError as error:
        error.args = (_name_options(str(error), command, arguments),)
        raise
    return show(result, as_json=as_json) if launch.rank == 0 else 0


def _name_options(message: str, command: Any, arguments: Mapping[str, object]) -> str:
    """Return a message with arguments of Python (``data=``) as options; what the user wrote is kept."""
    options = [
        item.name for item in command.__signature__.parameters.values() if item.kind is item.KEYWORD_ONLY
    ]
    values = " ".join(map(str, arguments.values()))

    def write_option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if value and match[0].rstrip(":,;.") in values:
            return match[0]
        return f"{_flag(name)} {value}".rstrip() if value != "True" else _flag(name)

    return re.sub(rf"(?<![^\s(`])({'|'.join(options)})=(\S*)", write_option, message)


@contextlib.contextmanager
def _watch(name: str, callbacks: Sequence[str], *, quiet: bool) -> Iterator[dict[str, Callable[..., None]]]:
    """Return the callbacks by which a function's progress is shown."""
    if "on_epoch" in callbacks:
        yield {"on_epoch": EpochLines()}
    elif "on_progress" in callbacks and not quiet:
        with progress(name, unit="bytes" if name == "fetch" else "patches") as advance:
            yield {"on_progress": advance}
    else:
        yield {}


def run(arguments: Sequence[str]) -> int:
    """Run a command line, and return its exit code; errors of this package are printed in one line."""
    set_up_log()
    try:
        names: Iterable[str] = [name for name in COMMANDS if name.replace("_", "-") in arguments] or COMMANDS
        if [*arguments] == ["--version"]:
            names = ()
        app = build_app(names, only_list=[*arguments] in ([], ["--help"], ["-h"]))
        return app.meta(arguments, exit_on_error=False, print_error=False) or 0
    except CycloptsError as error:
        log.error("%s", _describe_usage(error))
        return USAGE
    except KeyboardInterrupt:
        log.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (BiopsyError, OSError) as error:
        log.debug("traceback", exc_info=True)
        log.error("%s", _describe(error))
        return KNOWN_ERROR


def _describe_usage(error: CycloptsError) -> str:
    """Return the message of a wrong command line; of a parameter that was left out, which one is needed."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        command = " ".join(["biopsy", *(error.command_chain or ())])
        if error.keyword is None and not error.argument.tokens and not error.unused_tokens:
            return f"`{command}` needs {error.argument.name} (`{command} --help`)"
    return str(error)


def _describe(error: BiopsyError | OSError) -> str:
    """Return the message of an error; for one of the operating system, its paths and reason."""
    if isinstance(error, BiopsyError):
        return str(error)
    paths = " -> ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
    return ": ".join(part for part in (paths, error.strerror or str(error)) if part)


def main() -> None:
    """Run the command line; characters that a stream cannot encode are escaped."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = KNOWN_ERROR
    finally:
        if "torch" not in sys.modules:  # whose libraries must be unloaded in order
            gc.freeze()  # no garbage collection on exit
    sys.exit(code)
