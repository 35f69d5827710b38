"""Confusion: what was called what, with the quadrants named."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from biopsy.core.errors import MetricError
from biopsy.figures.style import INK, MUTED, NEGATIVE, POSITIVE, WIDTH_IN, new_figure, shorten, styled


@styled
def draw_confusion(tp: int, fp: int, fn: int, tn: int, *, negative: str, positive: str) -> Figure:
    """Draw the four quadrants with their names, counts and shares of the true class.

    Args:
        tp: Positive patches called positive.
        fp: Negative patches called positive.
        fn: Positive patches called negative: a cancer missed, the error that costs most.
        tn: Negative patches called negative.
        negative: Name of the negative class.
        positive: Name of the positive class.
    """
    figure, axes = new_figure(height_in=3.1)
    rows = (
        (positive, (tp, "true positive"), (fn, "false negative")),
        (negative, (fp, "false positive"), (tn, "true negative")),
    )
    for row, (truth, *cells) in enumerate(rows):
        total = sum(count for count, _ in cells)
        for column, (count, name) in enumerate(cells):
            share = count / total if total else float("nan")
            _draw_cell(axes, column, row, NEGATIVE if row == column else POSITIVE, share)
            axes.text(column, row - 0.23, name, ha="center", va="center", fontsize=9)
            axes.text(column, row + 0.03, f"{count:,}", ha="center", va="center", fontsize=16)
            shown = f"{share:.1%} of {shorten(truth, 14)}" if total else f"no {shorten(truth, 14)} patch"
            axes.text(column, row + 0.29, shown, ha="center", va="center", fontsize=8.5, color=INK)
    _label_cells(axes, [f"called\n{shorten(positive)}", f"called\n{shorten(negative)}"], [positive, negative])
    return figure


@styled
def draw_confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of any number of classes, shaded by the share of the true class.

    Args:
        counts: Patches, shape ``(n_classes, n_classes)``, true class by row, called class by column.
        class_names: One name a class.

    Raises:
        MetricError: If the shape does not fit the names.
    """
    counts = np.asarray(counts)
    n_classes = len(class_names)
    if counts.shape != (n_classes, n_classes):
        raise MetricError(f"a confusion matrix of shape {counts.shape} does not fit {n_classes} class names")
    side = max(WIDTH_IN, 0.62 * n_classes + 1.4)
    figure, axes = new_figure(side, max(3.1, 0.55 * n_classes + 1.4))
    for row in range(n_classes):
        total = counts[row].sum()
        for column in range(n_classes):
            share = counts[row, column] / total if total else float("nan")
            _draw_cell(axes, column, row, NEGATIVE if row == column else POSITIVE, share)
            shown = f"{counts[row, column]:,}"
            if np.isfinite(share):
                shown += f"\n{share:.0%}"
            axes.text(column, row, shown, ha="center", va="center", fontsize=8.5, linespacing=1.3)
    names = [shorten(name, 12 if n_classes <= 3 else 18) for name in class_names]
    _label_cells(axes, names, names)
    if n_classes > 3:
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="left", rotation_mode="anchor")
    axes.set_xlabel("predicted class", color=MUTED)
    axes.set_ylabel("true class", color=MUTED)
    axes.xaxis.set_label_position("top")
    return figure


def _draw_cell(axes: Axes, column: int, row: int, colour: str, share: float) -> None:
    strength = 0.06 + 0.34 * (share if np.isfinite(share) else 0.0)
    tint = tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))
    axes.add_patch(
        FancyBboxPatch(
            (column - 0.46, row - 0.45),
            0.92,
            0.9,
            boxstyle="round,pad=0,rounding_size=0.05",
            fc=tint,
            ec="none",
        )
    )


def _label_cells(axes: Axes, columns: list[str], rows: list[str]) -> None:
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [f"{shorten(name)}" for name in rows])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_ylabel("truth", color=MUTED)
    axes.grid(False)
    axes.spines[:].set_visible(False)
