"""Output of the command line: log, progress, tables, JSON."""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biopsy.core.errors import UserFileError
from biopsy.core.results import Output, number, to_text

if TYPE_CHECKING:
    from biopsy.training.runs import EpochRecord

MAX_MESSAGE = 900  # characters of an error or warning

log = logging.getLogger("biopsy.cli")


class StderrHandler(logging.Handler):
    """Prints log records on whatever stderr is at that moment; what the library repeats, once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record: as one line, or in full where a format was set."""
        line = record.getMessage()
        if record.levelno == logging.INFO and record.name != log.name:
            if line in self.printed:
                return
            self.printed.add(line)
        if self.formatter is not None:
            line = self.format(record)
        elif record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {cut(' '.join(line.split()))}"
        print(line, file=sys.stderr, flush=True)


def cut(message: str) -> str:
    """Cut a message that holds a cell or name of any length."""
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."


def set_up_log(*, quiet: bool = False, verbose: bool = False, file: Path | None = None) -> None:
    """Send what the library and the command line log to stderr, and all of it to a file.

    Raises:
        OSError: If the file cannot be written.
        UserFileError: If it exists and is not such a log.
    """
    if file is not None and file.is_file() and not _is_log(file):
        raise UserFileError(file, "foreign", "is not a log of biopsy: name another file for --log-file")
    logger = logging.getLogger("biopsy")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in logger.handlers:
        handler.close()
    printing = StderrHandler(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    in_full = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    if verbose:
        printing.setFormatter(in_full)
    logger.handlers[:] = [printing]
    if file is not None:
        keeping = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        keeping.setFormatter(in_full)
        logger.addHandler(keeping)


def _is_log(file: Path) -> bool:
    with open(file, "rb") as log:
        return re.match(rb"$|\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ biopsy", log.read(80)) is not None


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


def show(result: Any, *, as_json: bool) -> int:
    """Warn of the problems of what a public function returned, print it, and return the exit code."""
    for problem in result.problems() if isinstance(result, Output) else ():
        log.warning("%s", problem)
    if as_json:
        print_json(_document(result))
    elif result is not None:
        print(_text(result))
    return result.exit_code if isinstance(result, Output) else 0


def _document(result: Any) -> object:
    match result:
        case Output():
            return result.to_json()
        case None:  # a server that was stopped
            return {}
        case Path():
            return {"path": result}
        case [Path(), *_]:
            return {"paths": result}
    return result


def _text(result: Any) -> str:
    match result:
        case Output():
            return to_text(result.blocks())
        case Path():
            return str(result)
        case [Path(), *_]:
            return "\n".join(map(str, result))
    return "\n".join(line for row in result for line in list_entries(row))


def list_entries(row: Mapping[str, object]) -> list[str]:
    """Return the name of a row, and one line for each other entry that is known."""
    lines = [str(row["name"])]
    for key, value in row.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {number(item)}" for name, item in value.items())
        if key != "name" and value not in (None, ""):
            lines.append(f"  {key}: {number(value)}")
    return lines


class EpochLines:
    """Prints each epoch's record as one aligned line on stderr, under the run it belongs to."""

    def __init__(self) -> None:
        self.run: str | None = None

    def __call__(self, record: "EpochRecord") -> None:
        if record["run"] != self.run:
            self.run = record["run"]
            log.info("run %s", self.run)
        log.info("%s", epoch_line(record))


def epoch_line(record: "EpochRecord") -> str:
    """Return an epoch's record as one line: loss, metrics, learning rate, speed, time left.

    That of a logistic regression has loss and metrics only, that of pre-training no metrics.
    """
    if "spread" in record:
        progress = f"epoch {record['epoch']:3d}  loss {record['loss']:7.4f}  spread {record['spread']:.3f}"
        return "  ".join([progress, *_pace(record)])
    auroc, is_probe = record["val_auroc"], "penalty" in record
    parts = [
        f"logistic regression on {record['n_features']:,} features a patch, L2 penalty {record['penalty']:g}:"
        if is_probe
        else f"epoch {record['epoch']:3d}",
        f"loss {record['loss']:7.4f}",
        f"accuracy {record['accuracy']:.3f}",
        f"val loss {record['val_loss']:7.4f}",
        f"accuracy {record['val_accuracy']:.3f}",
        "auroc     -" if auroc is None else f"auroc {auroc:.3f}",
    ]
    if is_probe:  # fitted at once: no epochs, rate or time left
        return "  ".join(parts)
    return "  ".join([*parts, *_pace(record)]) + ("  best so far" if record["best"] else "")


def _pace(record: "EpochRecord") -> list[str]:
    return [
        f"lr {record['lr']:.2e}",
        f"{record['images_per_s']:7,.0f} images/s",
        f"{timedelta(seconds=round(record['time_left_s']))} left",
    ]


@contextlib.contextmanager
def progress(what: str, *, unit: str = "patches") -> Iterator[Callable[..., None]]:
    """Show one bar with rate and time left on stderr, where that is a terminal.

    The callback takes what is done and what there is in all, or the progress of a download.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *state: None
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

        def advance(done: Any, total: int | None = None) -> None:
            if unit == "bytes":
                step = f"{done.step} {done.file}"
                bar.update(task, completed=done.done_bytes, total=done.total_bytes, description=step)
            else:
                bar.update(task, completed=done, total=total)

        yield advance
