"""Results of commands: text and tables for a terminal, a notebook and reports, a JSON document, problems.

What a public function returns derives from `Output`, by which it is printed wherever it is shown.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import pandas as pd

FAILED, SKIPPED = 1, 3
"""Exit codes: the result is negative; input that could not be read was skipped."""
MAX_NAMED = 20  # skipped inputs that are named
NOTE_WIDTH = 110  # characters of a line below a table in a terminal


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        rows: Rows of cells, one per column.
        caption: Title above the table.
        note: Note below the table.
        text_columns: Number of text columns on the left; the others are numeric.
        fold: If given, the table is collapsed under this title.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""
    text_columns: int = 1
    fold: str = ""


class Output(ABC):
    """What a public function returns, as it is printed."""

    @abstractmethod
    def blocks(self) -> Iterable[str | Table]:
        """Return the lines and tables of its text."""

    @abstractmethod
    def to_json(self) -> object:
        """Return the document of ``--json``."""

    def problems(self) -> list[str]:
        """Return what a reader must be warned of."""
        return []

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, `FAILED` or `SKIPPED`."""
        return 0

    def _repr_html_(self) -> str:
        return "".join(map(_to_html, self.blocks()))


class Written(Output):
    """What was written, printed as its path."""

    path: Path

    def blocks(self) -> Iterable[str | Table]:
        return [str(self.path)]

    def to_json(self) -> object:
        return {"path": self.path}


@dataclass(frozen=True, eq=False, repr=False)
class Result(Output, Mapping[str, object]):
    """Result of a command: ``result[key]`` is an entry of the JSON document that the command writes.

    Attributes:
        document: The content of the JSON document.
    """

    document: Mapping[str, object]

    def __getitem__(self, key: str) -> object:
        return self.document[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.document)

    def __len__(self) -> int:
        return len(self.document)

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """Return the result as a table."""

    def to_json(self) -> dict[str, object]:
        """Return the content of the JSON document."""
        return dict(self.document)

    def __repr__(self) -> str:
        return to_text(self.blocks())


def name_skipped(skipped: Sequence[Mapping[str, str]], listing: Path) -> list[str]:
    """Return one line per input that could not be read, up to a number, and their count.

    Args:
        skipped: ``source`` and ``reason`` of each.
        listing: The file that lists all.
    """
    lines = [f"skipped {item['source']}: {item['reason']}" for item in skipped[:MAX_NAMED]]
    if len(skipped) > MAX_NAMED:
        lines.append(f"{len(skipped) - MAX_NAMED:,} more skipped inputs are listed in {listing}")
    n = len(skipped)
    return [*lines, "1 input was skipped" if n == 1 else f"{n:,} inputs were skipped"] if n else []


def to_text(blocks: Iterable[str | Table]) -> str:
    """Return blocks as the text of a terminal."""
    return "\n".join(line for block in blocks for line in _text_lines(block))


_NUMBER = re.compile(r"$|-$|[-+]?[.\d][\d.,e+-]*( |%|$)")  # a number, or no value


def _text_lines(block: str | Table) -> list[str]:
    """Return the lines of a block; the columns of a table line up, numbers to the right."""
    if isinstance(block, str):
        return [block]
    columns = []
    for name, *values in zip(block.columns, *block.rows, strict=True):
        width = max(len(value) for value in (name, *values))
        is_numeric = all(_NUMBER.match(value) for value in values)
        columns.append(
            [value.rjust(width) if is_numeric else value.ljust(width) for value in (name, *values)]
        )
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    title = block.caption or block.fold
    caption = [f"\n{title}:"] if title else []
    return [*caption, *lines, *(part for line in block.note.splitlines() for part in wrap(line, NOTE_WIDTH))]


def _to_html(block: str | Table) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    header = "".join(f"<th>{escape(name)}</th>" for name in block.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
    caption = f"<caption>{escape(block.caption)}</caption>" if block.caption else ""
    note = "".join(f"<p>{escape(line)}</p>" for line in block.note.splitlines())
    return f"<table>{caption}<thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>{note}"


def number(value: object, digits: int = 3) -> str:
    """Format a number: integers with thousands separators, floats with ``digits`` decimals, None as a dash.

    Example:
        >>> number(8151), number(0.84236), number(None)
        ('8,151', '0.842', '-')
    """
    if value is None or isinstance(value, bool):
        return "-" if value is None else "yes" if value else "no"
    if not isinstance(value, int | float) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{digits}f}" if math.isfinite(value) else "-"
    return str(value)


def signed(value: float | None) -> str:
    """Format a difference with its sign; a dash if undefined.

    Example:
        >>> signed(0.0423), signed(None)
        ('+0.042', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:+.3f}"


def interval_text(low: float | None, high: float | None, reason: str | None) -> str:
    """Format an interval, or the reason why there is none."""
    if low is None or high is None:
        return explain_missing(reason) if reason else "no interval"
    return f"{number(low)} to {number(high)}"


def explain_missing(reason: str) -> str:
    """Return the reason why an interval, or the metric, is missing."""
    return reason if reason.startswith("undefined") else f"no interval: {reason}"
