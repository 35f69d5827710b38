"""How the command line prints, and the arguments and options that several commands share."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, Protocol

import typer

MAX_MESSAGE = 900  # characters of an error or warning
MAX_NAMED = 20  # skipped files named one by one before the rest is only counted

KNOWN_ERROR, USAGE, SKIPPED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes beside 0: known error, wrong usage, finished but input was skipped, Ctrl-C."""


def say(text: str) -> None:
    """Print a line of progress or log."""
    print(text, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print a known error as one line and leave with its exit code."""
    say("error: " + _cut(" ".join(message.split())))
    raise typer.Exit(KNOWN_ERROR)


def _cut(message: str) -> str:
    """Cut a message that holds a cell or name of any length."""
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."


def interrupted(how_to_go_on: str) -> NoReturn:
    """Say how to go on after Ctrl-C, and leave."""
    say(f"interrupted; {how_to_go_on}")
    raise typer.Exit(INTERRUPTED)


def print_json(document: object) -> None:
    """Print a document as JSON: arrays become lists, paths text, non-finite numbers null."""

    def convert(value: object) -> object:
        if isinstance(value, Mapping):
            return dict(value)
        return value.tolist() if hasattr(value, "tolist") else str(value)

    text = json.dumps(document, default=convert)
    finite = json.loads(text, parse_constant=lambda constant: None)  # noqa: TID251 - our own text
    printed = json.dumps(finite, indent=2, ensure_ascii=False)
    try:
        printed.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        printed = json.dumps(finite, indent=2)  # escapes what the stream cannot hold
    print(printed)


def print_table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> None:
    """Print rows as a table whose columns line up; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = []
    for name, *values in zip(header, *cells, strict=True):
        width = max(len(value) for value in (name, *values))
        is_numeric = all(value[:1].isdigit() or value[:1] in ("", "-") for value in values)
        columns.append(
            [value.rjust(width) if is_numeric else value.ljust(width) for value in (name, *values)]
        )
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())


def print_blocks(rows: Iterable[Mapping[str, object]]) -> None:
    """Print each row under its name, one line a key."""
    for row in rows:
        print(row["name"])
        for key, value in row.items():
            if isinstance(value, Mapping):
                value = ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
            if key != "name" and value not in (None, ""):
                print(f"  {key}: {_cell(value)}")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def name_skipped(skipped: Sequence[Mapping[str, str]], where: str) -> None:
    """Name and count the input that could not be read, and leave with exit code 3 if there was any."""
    for item in skipped[:MAX_NAMED]:
        say(_cut(f"skipped {item['source']}: {item['reason']}"))
    if len(skipped) > MAX_NAMED:
        say(f"... and {len(skipped) - MAX_NAMED:,} more, all named in {where}")
    if skipped:
        one = len(skipped) == 1
        inputs = "1 input" if one else f"{len(skipped):,} inputs"
        say(f"{inputs} could not be read and {'was' if one else 'were'} skipped")
        raise typer.Exit(SKIPPED)


class OnProgress(Protocol):
    """Moves the bar to ``done`` of ``total``; ``what`` says what is being done, where that changes."""

    def __call__(self, done: int, total: int | None, what: str | None = None) -> None:
        """Show it."""


@contextlib.contextmanager
def progress(what: str, *, unit: str = "patches") -> Iterator[OnProgress]:
    """Show one bar with rate and time left on stderr; silent where that is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, what=None: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else "")

    columns = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), Rate())
    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what=None: bar.update(task, completed=done, total=total, description=what)


class StderrHandler(logging.Handler):
    """Prints log records on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(level + _cut(record.getMessage()))


def show_log() -> None:
    """Print what the library logs, once a record."""
    logger = logging.getLogger("biopsy")
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [StderrHandler()]
    logger.propagate = False


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
Data = Annotated[
    Path | None, typer.Option(help="A pack, or an archive to make one from.", metavar="PACK|SOURCE")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PackPath = Annotated[Path, typer.Argument(metavar="PACK", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a recipe's value; may be repeated.", metavar="KEY=VALUE"),
]
SplitName = Annotated[str | None, typer.Option(help="Name of a split of the pack.")]
TrustModel = Annotated[
    str | None,
    typer.Option(help="Hash of a WSInfer model's TorchScript, whose code may then run.", metavar="SHA256"),
]


def comma_list(text: str | None) -> tuple[str, ...]:
    """Read ``"a,b"`` as ``("a", "b")``; nothing is an empty list."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def seed_list(text: str, flag: str = "--seeds") -> tuple[int, ...]:
    """Read ``"0,1,2"`` as ``(0, 1, 2)``."""
    try:
        seeds = tuple(int(part) for part in comma_list(text))
    except ValueError:
        seeds = ()
    if not seeds:
        raise typer.BadParameter(f"{flag} {text!r} is no list of whole numbers such as 0,1,2")
    return seeds
