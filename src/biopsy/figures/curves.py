"""Curves of one run: ranking, calibration, and how training went."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from biopsy.core.errors import MetricError
from biopsy.figures.style import (
    BASELINE,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    TRAIN,
    VALIDATION,
    WIDTH_IN,
    new_figure,
    styled,
)
from biopsy.statistics.calibration import N_BINS, reliability_bins

QUANTITIES: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "loss": ((("loss", "training"), ("val_loss", "validation")), "loss"),
    "accuracy": ((("accuracy", "training"), ("val_accuracy", "validation")), "share of patches called right"),
    "auroc": ((("auroc", "training"), ("val_auroc", "validation")), "AUROC"),
    "lr": ((("lr", "learning rate"),), "learning rate"),
}


@styled
def draw_roc(
    target: np.ndarray,
    prob: np.ndarray,
    *,
    label: str = "this model",
    operating_point: tuple[float, float] | None = None,
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw sensitivity against 1 - specificity.

    Args:
        target: 0 or 1, shape ``(n,)``; both must occur.
        prob: Probability of the positive class, shape ``(n,)``.
        label: Name of the curve.
        operating_point: ``(sensitivity, specificity)`` at the frozen threshold, marked on the curve.
        band: ``(false_positive_rate, low, high)`` of the curve's interval.

    Raises:
        MetricError: If only one class occurs.
    """
    target, prob = _check_pair(target, prob)
    figure, axes = new_figure(height_in=4.1)
    if band is not None:
        axes.fill_between(*band, color=POSITIVE, alpha=0.16, linewidth=0, label="95 % interval")
    false_positive_rate, sensitivity, _ = roc_curve(target, prob)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="chance")
    axes.plot(false_positive_rate, sensitivity, color=POSITIVE, label=label)
    if operating_point is not None:
        reached, specificity = operating_point
        axes.plot([1 - specificity], [reached], "o", color=INK, markersize=6, label="frozen threshold")
    _frame_unit_square(axes)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.legend(loc="lower right")
    return figure


@styled
def draw_precision_recall(
    target: np.ndarray,
    prob: np.ndarray,
    *,
    label: str = "this model",
    operating_point: tuple[float, float] | None = None,
) -> Figure:
    """Draw positive predictive value against sensitivity, above the floor that the prevalence sets.

    Args:
        target: 0 or 1, shape ``(n,)``; both must occur.
        prob: Probability of the positive class, shape ``(n,)``.
        label: Name of the curve.
        operating_point: ``(sensitivity, ppv)`` at the frozen threshold.

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
        linestyle=(0, (4, 3)),
        label=f"floor: prevalence {prevalence:.2f}",
    )
    ppv, sensitivity, _ = precision_recall_curve(target, prob, drop_intermediate=True)
    axes.step(sensitivity, ppv, where="post", color=POSITIVE, label=label)
    if operating_point is not None:
        axes.plot(*operating_point, "o", color=INK, markersize=6, label="frozen threshold")
    _frame_unit_square(axes)
    axes.set(xlabel="sensitivity (recall)", ylabel="positive predictive value (precision)")
    axes.legend(loc="lower left")
    return figure


@styled
def draw_reliability(
    target: np.ndarray,
    prob: np.ndarray,
    *,
    n_bins: int = N_BINS,
    class_names: Sequence[str] = ("negative", "positive"),
) -> Figure:
    """Draw how often the positive class was found against how often it was promised.

    Args:
        target: 0 or 1, shape ``(n,)``.
        prob: Probability of the positive class, shape ``(n,)``.
        n_bins: Bins of equal mass, those of the calibration error.
        class_names: Name of the negative and of the positive class.

    Raises:
        MetricError: If a target is not 0 or 1, or a probability is not finite.
    """
    target, prob = _check_pair(target, prob, both_classes=False)
    bins = reliability_bins(target, prob, n_bins=n_bins)
    figure = Figure(figsize=(WIDTH_IN, 4.3), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.6, 1))
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="perfect")
    upper.plot(
        bins.mean_prob, bins.observed, "-o", color=POSITIVE, markersize=4.5, linewidth=1.1, label="this model"
    )
    upper.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), ylabel="share found positive")
    upper.legend(loc="upper left")
    edges = np.linspace(0, 1, 41)
    lower.hist(
        [prob[target == 0], prob[target == 1]],
        bins=edges.tolist(),
        stacked=True,
        color=[NEGATIVE, POSITIVE],
        label=list(class_names),
    )
    lower.set(xlabel="predicted probability of the positive class", ylabel="patches")
    lower.legend(loc="upper center", ncols=2)
    lower.grid(False)
    return figure


@styled
def draw_training(
    records: Sequence[Mapping[str, object]],
    *,
    chosen_epoch: int | None = None,
    quantities: Sequence[str] = ("loss", "accuracy"),
) -> Figure:
    """Draw what the training log holds against epochs.

    Args:
        records: One mapping an epoch, with ``epoch`` and any of ``loss val_loss accuracy val_accuracy auroc
            val_auroc lr``.
        chosen_epoch: The epoch whose weights were kept, marked with a line.
        quantities: Panels, from ``loss accuracy auroc lr``, side by side.

    Raises:
        MetricError: If there is no record, or a quantity is unknown.
    """
    if not records:
        raise MetricError("no epoch is in the training log: train for one epoch at least")
    unknown = [name for name in quantities if name not in QUANTITIES]
    if unknown:
        raise MetricError(f"unknown quantity {unknown[0]!r}; known: {', '.join(QUANTITIES)}")
    figure = Figure(figsize=(WIDTH_IN * len(quantities), 3.1), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        _draw_quantity(axes, records, quantity, chosen_epoch)
    return figure


def _draw_quantity(
    axes: Axes, records: Sequence[Mapping[str, object]], quantity: str, chosen_epoch: int | None
) -> None:
    series, ylabel = QUANTITIES[quantity]
    n_epochs = len({record["epoch"] for record in records})
    marker = "o" if n_epochs < 8 else None
    for (key, label), colour in zip(series, (TRAIN, VALIDATION), strict=False):
        points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
        if points:
            epochs, values = np.array(points, dtype=float).T
            axes.plot(epochs, values, color=colour, label=label, marker=marker, markersize=4)
    if chosen_epoch is not None:
        axes.axvline(
            chosen_epoch,
            color=BASELINE,
            linewidth=1,
            linestyle=(0, (2, 2)),
            label=f"kept: epoch {chosen_epoch}",
        )
    if quantity == "lr":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.legend(loc="best")


def _check_pair(
    target: np.ndarray, prob: np.ndarray, *, both_classes: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    target, prob = np.asarray(target), np.asarray(prob, dtype=float)
    found = set(np.unique(target).tolist())
    if not found <= {0, 1}:
        raise MetricError(f"targets are {sorted(found)}; a binary curve needs 0 and 1")
    if both_classes and found != {0, 1}:
        raise MetricError(f"only class {sorted(found)} occurs; a ranking curve needs both classes")
    if not np.isfinite(prob).all():
        raise MetricError(f"{int((~np.isfinite(prob)).sum())} probabilities are not finite")
    return target.astype(int), prob


def _frame_unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal")
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
