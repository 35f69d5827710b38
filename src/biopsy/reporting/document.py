"""The parts a report is made of: plain records without HTML, so that any chapter can be written with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from biopsy.statistics.metrics import METRICS
from biopsy.statistics.multiclass import MULTICLASS_METRICS


def metric_label(name: str, n_classes: int = 2) -> str:
    """Return a metric as a reader sees it; the name where no metric has it.

    Example:
        >>> metric_label("f1"), metric_label("f1_macro", n_classes=3)
        ('F1 of the positive class', 'F1, macro')
    """
    known = METRICS if n_classes == 2 else MULTICLASS_METRICS
    return known[name].label if name in known else name


@dataclass(frozen=True)
class Headline:
    """One of the numbers on the reader's page.

    Attributes:
        label: What it is.
        value: Between 0 and 1, or None where it is not defined.
        low: Lower end of the interval, None where there is none.
        high: Upper end.
        reason: Why value or interval are missing.
        beside: What to compare it with, in words.
        mark: That comparison's value, a tick on the little scale.
    """

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    beside: str = ""
    mark: float | None = None

    @property
    def interval(self) -> str:
        return interval_text(self.low, self.high, self.reason)


@dataclass(frozen=True)
class Summary:
    """The first screen: the result in one sentence, its numbers, and what they must not be used for."""

    verdict: str
    headlines: Sequence[Headline]
    unit: str
    findings: Sequence[str] = ()
    not_for: Sequence[str] = ()


@dataclass(frozen=True)
class Text:
    """A paragraph; ``tone`` is ``plain``, ``note`` or ``warning``."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Bullets:
    """A short list."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names with their values; closed behind the title ``fold`` where one is given."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str]]
    caption: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        columns: Headings.
        rows: Cells, one a column.
        caption: What the table says, above it.
        note: Small print below it.
        text_columns: How many columns from the left hold words; the others hold numbers.
        fold: Where given, the table is closed behind this title until a reader opens it.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    note: str = ""
    text_columns: int = 1
    fold: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG text (only from ``plotting.style.svg``) or an image as bytes, with its caption.

    ``alt`` describes it to readers who cannot see it, where the caption does not.
    """

    caption: str
    svg: str = ""
    image: bytes = b""
    alt: str = ""


@dataclass(frozen=True)
class Pictures:
    """Figures side by side on a wide screen, at most ``across`` in a row (4: two on screen, four in print).

    With ``fold`` they are closed behind that title.
    """

    kind: ClassVar[str] = "pictures"
    items: Sequence[Picture]
    across: int = 2
    caption: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Patch:
    """One patch of a gallery: the encoded image, and the lines under it."""

    image: bytes
    lines: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Patches with captions, in named groups."""

    kind: ClassVar[str] = "gallery"
    caption: str
    groups: Sequence[tuple[str, Sequence[Patch]]]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One patch looked at closely: encoded pictures with a caption each, side by side, and lines below."""

    pictures: Sequence[tuple[bytes, str]]
    lines: Sequence[str]


@dataclass(frozen=True)
class Cases:
    """Patches looked at closely, in named groups; all after the first ``n_open`` are folded."""

    kind: ClassVar[str] = "cases"
    caption: str
    groups: Sequence[tuple[str, Sequence[Case]]]
    n_open: int = 6

    @property
    def n_folded(self) -> int:
        return max(0, sum(len(cases) for _, cases in self.groups) - self.n_open)

    @property
    def shown(self) -> list[tuple[str, list[Case]]]:
        return self._pick(range(self.n_open))

    @property
    def folded(self) -> list[tuple[str, list[Case]]]:
        return self._pick(range(self.n_open, self.n_open + self.n_folded))

    def _pick(self, places: range) -> list[tuple[str, list[Case]]]:
        picked, start = [], 0
        for heading, cases in self.groups:
            chosen = [case for place, case in enumerate(cases, start) if place in places]
            start += len(cases)
            if chosen:
                picked.append((heading, chosen))
        return picked


@dataclass(frozen=True)
class Listing:
    """Text as a machine reads it: a command, a settings file; closed where ``fold`` gives a title."""

    kind: ClassVar[str] = "listing"
    text: str
    fold: str = ""


@dataclass(frozen=True)
class Answer:
    """One item of a checklist: its number, what it asks, and the chapters that answer it (id and heading)."""

    number: str
    asks: str
    chapters: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Checklist:
    """Items of a guideline, each with links to where it is answered; closed until a reader opens it."""

    kind: ClassVar[str] = "checklist"
    title: str
    items: Sequence[Answer]


Block = Text | Bullets | Facts | Table | Pictures | Gallery | Cases | Listing | Checklist


@dataclass(frozen=True)
class Section:
    """A chapter. Its ``id`` is the anchor other chapters and checklists link to."""

    id: str
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class ReportDocument:
    """A whole report.

    Attributes:
        title: Of the page.
        subtitle: What was judged, in one line.
        summary: The reader's page.
        sections: Chapters in order.
        warnings: What limits the result; directly below the verdict.
        footer: Last line: what made this.
    """

    title: str
    subtitle: str
    summary: Summary
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default_factory=tuple)
    footer: str = ""


def number(value: object, digits: int = 3) -> str:
    """Write a number for a reader: counts with thousands, shares with ``digits`` decimals, else a dash.

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
    """Return a difference with its sign; a dash where there is none.

    Example:
        >>> signed(0.0423), signed(None)
        ('+0.042', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:+.3f}"


def interval_text(low: float | None, high: float | None, reason: str | None) -> str:
    """Write an interval, or why there is none."""
    if low is None or high is None:
        return explain_missing(reason) if reason else "no interval"
    return f"{number(low)} to {number(high)}"


def explain_missing(reason: str) -> str:
    """Return why an interval is missing, or the metric itself."""
    return reason if reason.startswith("undefined") else f"no interval: {reason}"


def interval_of(estimate: Mapping[str, Any] | None) -> str:
    """Write the interval of one entry of ``metrics.json``; a dash where there is no entry."""
    if not estimate:
        return "-"
    return interval_text(estimate.get("low"), estimate.get("high"), estimate.get("reason"))


def headline(
    label: str, estimate: Mapping[str, Any], *, beside: str = "", mark: float | None = None
) -> Headline:
    """Make a headline of one entry of ``metrics.json``."""
    return Headline(
        label,
        estimate.get("value"),
        estimate.get("low"),
        estimate.get("high"),
        estimate.get("reason"),
        beside,
        mark,
    )
