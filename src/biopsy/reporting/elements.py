"""Elements that several sections share: the table of metrics, footnotes, labels and pictures of patches."""

from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
import pandas as pd

from biopsy.core.text import capitalize, count, plural
from biopsy.data.ledger import OpeningCount
from biopsy.plotting.style import jpeg, png
from biopsy.reporting.document import (
    Picture,
    Pictures,
    Table,
    explain_missing,
    interval_of,
    metric_label,
    number,
)
from biopsy.statistics.metrics import METRICS
from biopsy.statistics.multiclass import MULTICLASS_METRICS
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import Metrics, PooledMetrics
from biopsy.training.runs import RunInfo
from biopsy.training.study import StudyInfo

LONG_TABLE = 30  # rows
WITHOUT_IDS = (
    "The data have neither patient nor slide ids: the unit is the patch, and intervals are too narrow if "
    "patches are correlated."
)
"""Warning for results with the patch as the unit."""


class Footnotes:
    """Reasons for missing intervals, listed once below a table and referenced by letters."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def interval(self, estimate: Interval) -> str:
        """Format an interval, or ``none (a)`` with the reason in a note."""
        reason = estimate.reason
        if estimate.low is not None or not reason:
            return interval_of(estimate)
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f"none ({ascii_lowercase[self._reasons.index(reason)]})"

    def estimate(self, estimate: Interval) -> str:
        """Format a value and its interval: ``0.842 (0.790 to 0.890)``, or ``0.842 (a)``."""
        interval = self.interval(estimate).removeprefix("none ")
        return f"{number(estimate.value)} {interval if interval.startswith('(') else f'({interval})'}"

    @property
    def text(self) -> str:
        """One sentence per reason, with its letter, each after a space."""
        lettered = zip(ascii_lowercase, self._reasons, strict=False)
        return "".join(f" ({letter}) {capitalize(explain_missing(reason))}." for letter, reason in lettered)


def make_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    caption: str = "",
    note: str = "",
    text_columns: int = 1,
    fold: str = "",
    fold_long: bool = False,
) -> Table:
    """Return a table of values.

    Numbers are formatted by `number`, estimates with their interval. Reasons for missing intervals follow the
    note.

    Args:
        fold_long: Whether a table of more than `LONG_TABLE` rows is collapsed under its caption.
    """
    reasons = Footnotes()
    cells = [[_format_cell(value, reasons) for value in row] for row in rows]
    if fold_long and len(rows) > LONG_TABLE:
        caption, fold = "", caption
    return Table(columns, cells, caption, (note + reasons.text).strip(), text_columns, fold)


def _format_cell(value: object, reasons: Footnotes) -> str:
    if isinstance(value, str):
        return value
    return reasons.estimate(value) if isinstance(value, Interval) else number(value)


def table_of_metrics(
    metrics: Metrics | PooledMetrics, on_subset: str = " on the test subset", *, brief: bool = False
) -> Table:
    """Return the table of all metrics, pooled over patches and as means over patients.

    Args:
        brief: Of the metrics within patients, only mean and worst.
    """
    patient = metrics.patient if isinstance(metrics, Metrics) else None
    unit, rows, reasons = metrics.interval.unit, [], Footnotes()
    for name, estimate in metrics.patch.items():
        label = metric_label(name, len(metrics.class_names))
        row: list[object] = [label, estimate.value, reasons.interval(estimate)]
        if patient and name in patient:
            within = patient[name]
            row += [within.value, *([] if brief else [reasons.interval(within), within.median]), within.worst]
            row += [] if brief else [within.n_defined]
        elif patient:
            row += [None] * 2 if brief else [None, "-", *[None] * 3]
        rows.append(row)
    columns = ["metric", "all patches", "95 % interval"]
    if patient:
        columns += [f"mean of {plural(unit)}", *([] if brief else ["95 % interval", "median"]), "worst"]
        columns += [] if brief else [plural(unit)]
    note = f"Intervals: {metrics.interval.method}, unit {unit}."
    if isinstance(metrics, Metrics) and metrics.ece_floor is not None:
        note += f" ECE expected of a perfectly calibrated model: {number(metrics.ece_floor)}."
    return make_table(columns, rows, caption=f"Metrics{on_subset}", note=note + reasons.text)


def picture(svg: str, caption: str, *, fold: str = "") -> Pictures:
    """Return a single figure, as SVG from `plotting.style.svg`, with its caption."""
    return Pictures([Picture(caption, svg)], across=1, fold=fold)


def table_of_meanings(metrics: Metrics) -> Table:
    """Return what each metric of an evaluation is, in a few words."""
    registry = METRICS if len(metrics.class_names) == 2 else MULTICLASS_METRICS
    rows = [[registry[name].label, registry[name].meaning] for name in metrics.patch if name in registry]
    return Table(["metric", "meaning"], rows, text_columns=2, fold="What the metrics mean")


def pick_label(rows: pd.DataFrame) -> list[str]:
    """Return the group of each row: ``patient 8863``, else ``slide ..``, else an empty string."""
    for kind in ("patient", "slide"):
        column = f"{kind}_id"
        if column in rows and rows[column].notna().any():
            return [f"{kind} {name}" if pd.notna(name) else f"{kind} unknown" for name in rows[column]]
    return [""] * len(rows)


def encode_patch(image: np.ndarray) -> bytes:
    """Encode a patch for a page: small ones as PNG, large ones as JPEG."""
    return png(image) if max(image.shape[:2]) <= 64 else jpeg(image)


AS_PUBLISHED_OVERLAP = (
    "Patient overlap between subsets, as published: the results do not generalise to new patients."
)
"""Warning of a study whose split is that of a publication."""


def synthetic_warning(is_synthetic: bool | None) -> str:
    """Return the sentence that follows the result of a synthetic pack; empty for any other."""
    return " The patients are synthetic: this says nothing about real tissue." if is_synthetic else ""


def written_by(info: RunInfo | StudyInfo | None) -> str:
    """Return the last line of a report, with the version that ``run.json`` or ``study.json`` names."""
    version = info["environment"].get("biopsy", "") if info else ""
    return f"Written by biopsy {version}".strip() + "."


def describe_openings(ledger: OpeningCount | None) -> str:
    """Describe how often the test subset has been evaluated."""
    if ledger is None:
        return "This subset is not in the ledger of test evaluations."
    text = f"This test subset has been evaluated {count(ledger['times'], 'time')}"
    text += f", by {count(ledger['runs'], 'run')}"
    if ledger["kept_with"] == "run":
        text += "; the pack is read-only, so the ledger is kept with the run and may be incomplete"
    return f"{text}. Repeated evaluation makes test results optimistic."


RULES = {
    "youden": "highest sensitivity + specificity",
    "argmax": "probability 0.5",
    "cost": "minimum cost, a false negative costing {} false positives",
    "sensitivity": "sensitivity of {}",
    "specificity": "specificity of {}",
}


def describe_rule(rule: str) -> str:
    name, _, requested = rule.partition("=")
    return RULES[name].format(requested) if name in RULES else rule
