"""The parts of a report, as plain records without HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from biopsy.core.results import Table as Table
from biopsy.core.results import explain_missing as explain_missing
from biopsy.core.results import interval_text
from biopsy.core.results import number as number
from biopsy.core.results import signed as signed
from biopsy.statistics.metrics import METRICS
from biopsy.statistics.multiclass import MULTICLASS_METRICS
from biopsy.statistics.resampling import Interval


def metric_label(name: str, n_classes: int = 2) -> str:
    """Return the display name of a metric, or ``name`` if it is unknown.

    Example:
        >>> metric_label("f1"), metric_label("f1_macro", n_classes=3)
        ('F1 of the positive class', 'F1, macro')
    """
    metrics = METRICS if n_classes == 2 else MULTICLASS_METRICS
    return metrics[name].label if name in metrics else name


@dataclass(frozen=True)
class Headline:
    """A metric in the summary.

    Attributes:
        estimate: The value (0 to 1, or NaN) with its interval.
        beside: A comparison or explanation.
        mark: Value of the comparison, a tick on the scale.
    """

    label: str
    estimate: Interval
    beside: str = ""
    mark: float | None = None

    @property
    def is_defined(self) -> bool:
        return not math.isnan(self.estimate.value)

    @property
    def interval(self) -> str:
        return interval_of(self.estimate)


@dataclass(frozen=True)
class Summary:
    """The summary: the result in one sentence, and its metrics."""

    verdict: str
    headlines: Sequence[Headline]
    unit: str
    findings: Sequence[str] = ()


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
    """Names and values; collapsed under the title ``fold``, if given."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str]]
    caption: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG text (only from ``plotting.style.svg``) or an image as bytes, with its caption.

    ``alt`` is the description for screen readers, if the caption is not sufficient.
    """

    caption: str
    svg: str = ""
    image: bytes = b""
    alt: str = ""


@dataclass(frozen=True)
class Pictures:
    """Figures side by side on a wide screen, at most ``across`` in a row (4: two on screen, four in print).

    With ``fold``, they are collapsed under that title.
    """

    kind: ClassVar[str] = "pictures"
    items: Sequence[Picture]
    across: int = 2
    caption: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Patch:
    """One patch of a gallery: the encoded image, and lines of text below."""

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
    """One patch in detail: encoded images with captions, side by side, and lines of text below."""

    pictures: Sequence[tuple[bytes, str]]
    lines: Sequence[str]


@dataclass(frozen=True)
class Cases:
    """Patches in detail, in named groups; all after the first ``n_open`` are collapsed."""

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

    def _pick(self, indices: range) -> list[tuple[str, list[Case]]]:
        picked, start = [], 0
        for heading, cases in self.groups:
            chosen = [case for index, case in enumerate(cases, start) if index in indices]
            start += len(cases)
            if chosen:
                picked.append((heading, chosen))
        return picked


@dataclass(frozen=True)
class Listing:
    """Preformatted text: a command or a settings file; collapsed under the title ``fold``, if given."""

    kind: ClassVar[str] = "listing"
    text: str
    fold: str = ""


@dataclass(frozen=True)
class ChecklistItem:
    """An item of a checklist: its number, text, and the sections that address it (id and heading)."""

    number: str
    text: str
    sections: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Checklist:
    """Items of a guideline with links to sections, collapsed."""

    kind: ClassVar[str] = "checklist"
    title: str
    items: Sequence[ChecklistItem]


Block = Text | Bullets | Facts | Table | Pictures | Gallery | Cases | Listing | Checklist


@dataclass(frozen=True)
class Section:
    """A section; ``id`` is its anchor."""

    id: str
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class ReportDocument:
    """A whole report; the subtitle names the evaluated data, warnings (limitations) are below the verdict.

    Sections that are None are left out. With ``ids_hidden``, the page says that ids are replaced by numbers.
    """

    title: str
    subtitle: str
    summary: Summary
    sections: Sequence[Section | None]
    warnings: Sequence[str] = ()
    footer: str = ""
    ids_hidden: bool = False


def interval_of(estimate: Interval | None) -> str:
    """Format an interval, or why there is none; a dash without an estimate."""
    return "-" if estimate is None else interval_text(estimate.low, estimate.high, estimate.reason)
