"""Figures of an evaluation: confusion, ranking curves, reliability, per-patient results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from sklearn.metrics import precision_recall_curve, roc_curve

from biopsy.core.errors import MetricError
from biopsy.data.figures import NAMED_ROWS, name_rows, open_rows
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


@styled
def draw_confusion(tp: int, fp: int, fn: int, tn: int, *, negative: str, positive: str) -> Figure:
    """Draw the confusion matrix of two classes, with counts and shares of the true class.

    Args:
        tp: Number of true positives.
        fp: Number of false positives.
        fn: Number of false negatives.
        tn: Number of true negatives.
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
            _draw_cell(axes, column, row, share)
            axes.text(column, row - 0.23, name, ha="center", va="center", fontsize=9)
            axes.text(column, row + 0.03, f"{count:,}", ha="center", va="center", fontsize=16)
            share_text = f"{share:.1%} of {shorten(truth, 14)}" if total else f"no {shorten(truth, 14)} patch"
            axes.text(column, row + 0.29, share_text, ha="center", va="center", fontsize=8.5, color=INK)
    _label_cells(
        axes, [f"predicted\n{shorten(positive)}", f"predicted\n{shorten(negative)}"], [positive, negative]
    )
    return figure


@styled
def draw_confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of any number of classes, shaded by the share of the true class.

    Args:
        counts: Patches, shape ``(n_classes, n_classes)``, true class by row, predicted class by column.

    Raises:
        MetricError: If the shape does not match the names.
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
            _draw_cell(axes, column, row, share)
            shown = f"{counts[row, column]:,}" + (f"\n{share:.0%}" if counts[row, column] else "")
            colour = INK if counts[row, column] else MUTED
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "linespacing": 1.3}
            axes.text(column, row, shown, color=colour, **style)
    names = [shorten(name, 12 if n_classes <= 3 else 22) for name in class_names]
    _label_cells(axes, names, names)
    if n_classes > 3:
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="left", rotation_mode="anchor")
    axes.set_xlabel("Predicted class", color=MUTED)
    axes.set_ylabel("True class", color=MUTED)
    axes.xaxis.set_label_position("top")
    return figure


def _draw_cell(axes: Axes, column: int, row: int, share: float) -> None:
    """Shade a cell by the share of the true class; the diagonal, which is correct, is framed."""
    strength = 0.04 + 0.46 * (share if np.isfinite(share) else 0.0)
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
    target: np.ndarray,
    prob: np.ndarray,
    *,
    label: str = "this model",
    operating_point: tuple[float, float] | None = None,
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw the ROC curve: sensitivity against 1 - specificity.

    Args:
        target: 0 or 1, shape ``(n,)``; both must occur.
        prob: Probability of the positive class, shape ``(n,)``.
        operating_point: ``(sensitivity, specificity)`` at the decision threshold, marked on the curve.
        band: ``(false_positive_rate, low, high)`` of the curve's interval.

    Raises:
        MetricError: If only one class occurs.
    """
    target, prob = _check_pair(target, prob)
    figure, axes = new_figure(height_in=4.1)
    if band is not None:
        axes.fill_between(*band, color=MODEL, alpha=0.16, linewidth=0, label="95 % interval")
    false_positive_rate, sensitivity, _ = roc_curve(target, prob)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=DASHED, label="chance")
    axes.plot(false_positive_rate, sensitivity, color=MODEL, label=label)
    if operating_point is not None:
        reached, specificity = operating_point
        axes.plot([1 - specificity], [reached], "o", color=INK, markersize=6, label="decision threshold")
    _frame_unit_square(axes)
    axes.set(xlabel="1 - specificity", ylabel="Sensitivity")
    legend_above(axes)
    return figure


@styled
def draw_precision_recall(
    target: np.ndarray,
    prob: np.ndarray,
    *,
    label: str = "this model",
    operating_point: tuple[float, float] | None = None,
) -> Figure:
    """Draw the precision-recall curve, with the prevalence as baseline.

    Args:
        target: 0 or 1, shape ``(n,)``; both must occur.
        prob: Probability of the positive class, shape ``(n,)``.
        operating_point: ``(sensitivity, ppv)`` at the decision threshold.

    Raises:
        MetricError: If only one class occurs.
    """
    target, prob = _check_pair(target, prob)
    figure, axes = new_figure(height_in=4.1)
    prevalence = float(target.mean())
    axes.axhline(
        prevalence,
        color=MUTED,
        linewidth=0.9,
        linestyle=DASHED,
        label=f"baseline: prevalence {prevalence:.2f}",
    )
    ppv, sensitivity, _ = precision_recall_curve(target, prob, drop_intermediate=True)
    axes.step(sensitivity, ppv, where="post", color=MODEL, label=label)
    if operating_point is not None:
        axes.plot(*operating_point, "o", color=INK, markersize=6, label="decision threshold")
    _frame_unit_square(axes)
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    legend_above(axes, 2)
    return figure


def _check_pair(target: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target, prob = np.asarray(target), np.asarray(prob, dtype=float)
    classes = set(np.unique(target).tolist())
    if not classes <= {0, 1}:
        raise MetricError(f"targets are {sorted(classes)}; a binary curve needs 0 and 1")
    if classes != {0, 1}:
        raise MetricError(f"only class {sorted(classes)} occurs; a ranking curve needs both classes")
    if not np.isfinite(prob).all():
        raise MetricError(f"{int((~np.isfinite(prob)).sum())} probabilities are not finite")
    return target.astype(int), prob


def _frame_unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal")
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))


@styled
def draw_patient_metric(
    patient_ids: Sequence[object],
    values: np.ndarray,
    n_patches: np.ndarray,
    *,
    metric: str,
    overall: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Figure:
    """Draw a metric per patient, best first; larger dots for more patches.

    Args:
        patient_ids: One id per patient.
        values: The metric, shape ``(n_patients,)``; NaN if undefined for a patient.
        n_patches: Number of patches of each patient, shown next to the dot.
        metric: Name of the metric, on the axis.
        overall: The pooled value, a vertical line.
        interval: Its interval, a band behind the dots.

    Raises:
        MetricError: If the numbers of values, counts and patients differ.
    """
    values, n_patches = np.asarray(values, dtype=float), np.asarray(n_patches)
    if not len(patient_ids) == len(values) == len(n_patches):
        raise MetricError(
            f"{len(patient_ids)} patients have {len(values)} values and {len(n_patches)} counts"
        )
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")
    defined = np.isfinite(values[order])
    rows = np.arange(len(order))
    figure, axes = open_rows(len(order))
    if interval is not None:
        axes.axvspan(*interval, color=MUTED, alpha=0.14, linewidth=0, label="95 % interval")
    if overall is not None:
        axes.axvline(overall, color=INK, linewidth=1, linestyle=DASHED, label=f"all patches {overall:.3f}")
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
    shown = [*values[np.isfinite(values)], *(interval or ()), *([] if overall is None else [overall])]
    axes.set_xlim(min(shown, default=0.0) - 0.04, max([1.0, *shown]) + 0.02)
    name_rows(axes, [patient_ids[index] for index in order])
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
        target: 0 or 1, shape ``(n,)``.
        prob: Probability of the positive class, shape ``(n,)``.
        class_names: Name of the negative and of the positive class.
        threshold: The decision threshold, a vertical line.
    """
    patient_of_patch, target, prob = (
        np.array([str(name) for name in patient_ids]),
        np.asarray(target),
        np.asarray(prob),
    )
    names = np.unique(patient_of_patch)
    medians = np.array([np.median(prob[patient_of_patch == name]) for name in names])
    names = names[np.argsort(-medians, kind="stable")]
    figure, axes = open_rows(len(names), row_in=0.26)
    for value, (label, colour, offset) in enumerate(
        zip(class_names, (NEGATIVE, POSITIVE), (0.16, -0.16), strict=True)
    ):
        spreads = []
        for row, name in enumerate(names):
            part = prob[(patient_of_patch == name) & (target == value)]
            if len(part):
                spreads.append((row + offset, *np.quantile(part, [0.05, 0.25, 0.5, 0.75, 0.95])))
        if spreads:
            rows, q05, q25, q50, q75, q95 = np.array(spreads).T
            axes.hlines(rows, q05, q95, color=colour, linewidth=0.9)
            axes.hlines(rows, q25, q75, color=colour, linewidth=3.2)
            axes.plot(
                q50, rows, "o", color="white", markeredgecolor=colour, markersize=4.5, label=shorten(label)
            )
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=DASHED, label=f"threshold {threshold:.2f}")
    axes.set(xlabel=f"Predicted probability of {shorten(class_names[1], 24)}", xlim=(-0.015, 1.015))
    name_rows(axes, names.tolist())
    legend_above(axes, 3)
    return figure


@styled
def draw_decision_curve(curve: Mapping[str, Any], *, level: float = 0.95) -> Figure:
    """Draw net benefit against the threshold probability, with treating all and treating none.

    Args:
        curve: ``thresholds``, ``model``, ``treat_all`` and ``marked`` (``threshold``, ``low``, ``high``), as
            in `metrics.json`.

    Raises:
        MetricError: If the curve has no point.
    """
    at = np.asarray(curve["thresholds"], float)
    if not len(at):
        raise MetricError("the decision curve has no threshold: give at least one")
    model, treat_all = (np.asarray(curve[name], float) for name in ("model", "treat_all"))
    figure, axes = new_figure(height_in=3.6)
    bounded = [point for point in curve["marked"] if point["low"] is not None]
    if bounded:
        low, high = ([point[end] for point in bounded] for end in ("low", "high"))
        marks = [point["threshold"] for point in bounded]
        axes.fill_between(
            marks, low, high, color=MODEL, alpha=0.16, linewidth=0, label=f"{100 * level:g} % interval"
        )
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
