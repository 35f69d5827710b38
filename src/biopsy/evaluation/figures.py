"""Figures of an evaluation: confusion, ranking curves, reliability, per-patient results."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from sklearn.metrics import precision_recall_curve, roc_curve

from biopsy.core.errors import MetricError
from biopsy.data.figures import NAMED_ROWS, name_patient_rows, open_rows
from biopsy.plotting.style import (
    BASELINE,
    DASHED,
    INK,
    MODEL,
    MUTED,
    NEGATIVE,
    POSITIVE,
    WIDTH_IN,
    annotate,
    legend_above,
    new_figure,
    shorten,
    styled,
)
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import DecisionCurve


@styled
def draw_confusion(tp: int, fp: int, fn: int, tn: int, *, negative: str, positive: str) -> Figure:
    """Draw the confusion matrix of two classes, with counts and shares of the true class."""
    figure, axes = new_figure(height_in=3.1)
    rows = {
        positive: {"true positive": tp, "false negative": fn},
        negative: {"false positive": fp, "true negative": tn},
    }
    for row, (truth, cells) in enumerate(rows.items()):
        total, name = sum(cells.values()), shorten(truth, 14)
        for column, (kind, count) in enumerate(cells.items()):
            _draw_cell(axes, column, row, count, total)
            axes.text(column, row - 0.23, kind, fontsize=9, ha="center", va="center")
            axes.text(column, row + 0.03, f"{count:,}", fontsize=16, ha="center", va="center")
            share = f"{count / total:.1%} of {name}" if total else f"no {name} patch"
            axes.text(column, row + 0.29, share, fontsize=8.5, color=INK, ha="center", va="center")
    _label_cells(axes, [f"predicted\n{shorten(name)}" for name in rows], list(rows))
    return figure


@styled
def draw_confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of any number of classes, shaded by the share of the true class.

    Args:
        counts: Patches, shape ``(n_classes, n_classes)``, true class by row, predicted class by column.

    Raises:
        MetricError: If the shape does not match the names.
    """
    counts, n_classes = np.asarray(counts), len(class_names)
    if counts.shape != (n_classes, n_classes):
        raise MetricError(
            f"a confusion matrix of shape {counts.shape} does not fit {n_classes} class names", "shape"
        )
    figure, axes = new_figure(max(WIDTH_IN, 0.62 * n_classes + 1.4), max(3.1, 0.55 * n_classes + 1.4))
    for (row, column), count in np.ndenumerate(counts):
        total = counts[row].sum()
        _draw_cell(axes, column, row, count, total)
        text = f"{count:,}\n{count / total:.0%}" if count else "0"
        colour = INK if count else MUTED
        axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8.5, linespacing=1.3)
    names = [shorten(name, 12 if n_classes <= 3 else 22) for name in class_names]
    _label_cells(axes, names, names)
    if n_classes > 3:
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="left", rotation_mode="anchor")
    axes.set_xlabel("Predicted class", color=MUTED)
    axes.xaxis.set_label_position("top")
    return figure


def _draw_cell(axes: Axes, column: int, row: int, count: int, total: int) -> None:
    """Shade a cell by the share of the true class; the diagonal, which is correct, is framed."""
    strength = 0.04 + 0.46 * (count / total if total else 0.0)
    tint = tuple(1 - strength * (1 - channel) for channel in to_rgb(MODEL))
    axes.add_patch(
        FancyBboxPatch(
            (column - 0.46, row - 0.45),
            0.92,
            0.9,
            boxstyle="round,pad=0,rounding_size=0.05",
            fc=tint,
            ec=INK if row == column else "none",
            linewidth=0.9,
        )
    )


def _label_cells(axes: Axes, columns: list[str], rows: list[str]) -> None:
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [shorten(name, 22) for name in rows])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_ylabel("True class", color=MUTED)
    axes.grid(False)
    axes.spines[:].set_visible(False)


@styled
def draw_roc(
    target: np.ndarray, prob: np.ndarray, *, operating_point: tuple[float, float] | None = None
) -> Figure:
    """Draw the ROC curve: sensitivity against 1 - specificity.

    Args:
        target: 0 or 1, shape ``(n,)``; both must occur.
        prob: Probability of the positive class, shape ``(n,)``.
        operating_point: ``(sensitivity, specificity)`` at the decision threshold, marked on the curve.

    Raises:
        MetricError: If only one class occurs.
    """
    target, prob = _check_pair(target, prob)
    figure, axes = new_figure(height_in=4.1)
    false_positive_rate, sensitivity, _ = roc_curve(target, prob)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=DASHED, label="chance")
    axes.plot(false_positive_rate, sensitivity, color=MODEL, label="this model")
    if operating_point is not None and np.isfinite(operating_point).all():
        reached, specificity = operating_point
        axes.plot([1 - specificity], [reached], "o", color=INK, markersize=6, label="decision threshold")
    _frame_unit_square(axes, "1 - specificity", "Sensitivity")
    legend_above(axes)
    return figure


@styled
def draw_precision_recall(
    target: np.ndarray, prob: np.ndarray, *, operating_point: tuple[float, float] | None = None
) -> Figure:
    """Draw the precision-recall curve, with the prevalence as baseline.

    Args:
        target, prob: As of `draw_roc`.
        operating_point: ``(sensitivity, ppv)`` at the decision threshold.

    Raises:
        MetricError: If only one class occurs.
    """
    target, prob = _check_pair(target, prob)
    figure, axes = new_figure(height_in=4.1)
    prevalence = float(target.mean())
    baseline = f"baseline: prevalence {prevalence:.2f}"
    axes.axhline(prevalence, color=MUTED, linewidth=0.9, linestyle=DASHED, label=baseline)
    ppv, sensitivity, _ = precision_recall_curve(target, prob, drop_intermediate=True)
    axes.step(sensitivity, ppv, where="post", color=MODEL, label="this model")
    if operating_point is not None:
        axes.plot(*operating_point, "o", color=INK, markersize=6, label="decision threshold")
    _frame_unit_square(axes, "Recall (sensitivity)", "Precision (positive predictive value)")
    legend_above(axes, 2)
    return figure


def _check_pair(target: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target, prob = np.asarray(target), np.asarray(prob, dtype=float)
    classes = set(np.unique(target).tolist())
    if not classes <= {0, 1}:
        raise MetricError(f"targets are {sorted(classes)}; a binary curve needs 0 and 1", "target")
    if classes != {0, 1}:
        raise MetricError(
            f"only class {sorted(classes)} occurs; a ranking curve needs both classes", "undefined"
        )
    if not np.isfinite(prob).all():
        raise MetricError(f"{int((~np.isfinite(prob)).sum())} probabilities are not finite", "prob")
    return target.astype(int), prob


def _frame_unit_square(axes: Axes, xlabel: str, ylabel: str) -> None:
    limits, ticks = (-0.015, 1.015), np.linspace(0, 1, 6)
    axes.set(xlim=limits, ylim=limits, xticks=ticks, yticks=ticks, xlabel=xlabel, ylabel=ylabel)
    axes.set_aspect("equal")


@styled
def draw_patient_metric(
    patient_ids: Sequence[object],
    values: np.ndarray,
    n_patches: np.ndarray,
    *,
    metric: str,
    overall: Interval | None = None,
) -> Figure:
    """Draw a metric per patient, best first; larger dots for more patches.

    Args:
        values: The metric, shape ``(n_patients,)``; NaN if undefined for a patient.
        n_patches: Number of patches of each patient, shown next to the dot.
        metric: Name of the metric, on the axis.
        overall: The pooled value, a vertical line, and its interval, a band behind the dots.

    Raises:
        MetricError: If the numbers of values, counts and patients differ.
    """
    values, n_patches = np.asarray(values, dtype=float), np.asarray(n_patches)
    if not len(patient_ids) == len(values) == len(n_patches):
        raise MetricError(
            f"{len(patient_ids)} patients have {len(values)} values and {len(n_patches)} counts", "shape"
        )
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")
    defined = np.isfinite(values[order])
    rows = np.arange(len(order))
    figure, axes = open_rows(len(order))
    shown = values[np.isfinite(values)].tolist()
    if overall is not None and overall.low is not None and overall.high is not None:
        axes.axvspan(overall.low, overall.high, color=MUTED, alpha=0.14, linewidth=0, label="95 % interval")
        shown += [overall.low, overall.high]
    if overall is not None and np.isfinite(overall.value):
        label = f"all patches {overall.value:.3f}"
        axes.axvline(overall.value, color=INK, linewidth=1, linestyle=DASHED, label=label)
        shown.append(overall.value)
    size = 14 + 60 * n_patches[order] / max(int(n_patches.max(initial=1)), 1)
    axes.scatter(values[order][defined], rows[defined], s=size[defined], color=MODEL, zorder=3, linewidth=0)
    if len(order) <= NAMED_ROWS:
        beside = ("axes fraction", "data")
        for row in rows[~defined]:
            annotate(axes, "not defined", (0.02, row), va="center", xycoords=beside)
        for row, count in zip(rows, n_patches[order], strict=True):
            annotate(axes, f"{count:,}", (1.0, row), (4, 0), va="center", xycoords=beside)
        annotate(axes, "patches", (1.0, 1.0), (4, 3), xycoords="axes fraction")
    axes.set_xlabel(metric)
    axes.set_xlim(min(shown, default=0.0) - 0.04, max([1.0, *shown]) + 0.02)
    name_patient_rows(axes, [patient_ids[index] for index in order])
    legend_above(axes, 2)
    return figure


@styled
def draw_patient_probs(
    patient_ids: Sequence[object],
    target: np.ndarray,
    prob: np.ndarray,
    *,
    class_names: Sequence[str] = ("negative", "positive"),
    threshold: float | None = None,
) -> Figure:
    """Draw the distribution of probabilities per patient, for positive and negative patches.

    Dot: median; thick line: interquartile range; thin line: 5th to 95th percentile.

    Args:
        patient_ids: One id per *patch*, shape ``(n,)``.
        target, prob: As of `draw_roc`.
        class_names: Name of the negative and of the positive class.
        threshold: The decision threshold, a vertical line.
    """
    table = pd.DataFrame({"target": np.asarray(target), "prob": np.asarray(prob)})
    table["id"] = [str(name) for name in patient_ids]
    medians = table.groupby("id")["prob"].median().sort_values(ascending=False, kind="stable")
    row_of = pd.Series(np.arange(len(medians)), medians.index)
    figure, axes = open_rows(len(medians), row_in=0.26)
    styles = zip(class_names, (NEGATIVE, POSITIVE), (0.16, -0.16), strict=True)
    for value, (label, colour, offset) in enumerate(styles):
        of_class = table[table["target"] == value].groupby("id")["prob"]
        spreads = of_class.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
        if len(spreads):
            rows, (q05, q25, q50, q75, q95) = row_of[spreads.index] + offset, spreads.to_numpy().T
            axes.hlines(rows, q05, q95, color=colour, linewidth=0.9)
            axes.hlines(rows, q25, q75, color=colour, linewidth=3.2)
            label = shorten(label)
            axes.plot(q50, rows, "o", color="white", markeredgecolor=colour, markersize=4.5, label=label)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=DASHED, label=f"threshold {threshold:.2f}")
    axes.set(xlabel=f"Predicted probability of {shorten(class_names[1], 24)}", xlim=(-0.015, 1.015))
    name_patient_rows(axes, medians.index.tolist())
    legend_above(axes, 3)
    return figure


@styled
def draw_decision_curve(curve: DecisionCurve) -> Figure:
    """Draw net benefit against the threshold probability, with treating all and treating none.

    Args:
        curve: ``thresholds``, ``model``, ``treat_all`` and ``marked`` (``threshold``, ``low``, ``high``), as
            in `metrics.json`.

    Raises:
        MetricError: If the curve has no point.
    """
    at = np.asarray(curve.thresholds, float)
    if not len(at):
        raise MetricError("the decision curve has no threshold: give at least one", "empty")
    model, treat_all = (np.asarray(values, float) for values in (curve.model, curve.treat_all))
    figure, axes = new_figure(height_in=3.6)
    bounded = [point for point in curve.marked if point.low is not None]
    if bounded:
        low, high = np.array([(point.low, point.high) for point in bounded], float).T
        marks = [point.threshold for point in bounded]
        axes.fill_between(marks, low, high, color=MODEL, alpha=0.16, linewidth=0, label="95 % interval")
    axes.plot(at, treat_all, color=INK, linewidth=1.2, linestyle=DASHED, label="act on all patches")
    axes.axhline(0, color=BASELINE, linewidth=1.2, label="act on none")
    axes.plot(at, model, color=MODEL, label="act on predicted positives")
    top = max(float(model.max()), float(treat_all.max()), 0.01)
    axes.set(
        xlim=(0, 1),
        ylim=(-0.25 * top, 1.15 * top),
        xlabel="Threshold probability",
        ylabel="Net benefit (true positives per patch)",
    )
    legend_above(axes, 2)
    return figure
