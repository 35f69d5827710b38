"""Patients: who brings how much, and on whom the model fails."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.figures.style import (
    CLASS_COLOURS,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    WIDTH_IN,
    new_figure,
    shorten,
    styled,
)

NAMED_ROWS = 45  # more patients than this are drawn as ranks, without names


@styled
def draw_balance(patient_ids: Sequence[object], counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw patches per patient and class, the patient with most first.

    Args:
        patient_ids: One id a row.
        counts: Patches, shape ``(n_patients, n_classes)``.
        class_names: One name a column.

    Raises:
        MetricError: If the shape does not fit.
    """
    counts = np.asarray(counts)
    if counts.shape != (len(patient_ids), len(class_names)):
        raise MetricError(
            f"counts {counts.shape} do not fit {len(patient_ids)} patients x {len(class_names)} classes"
        )
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    figure, axes = _open_rows(len(order))
    left = np.zeros(len(order))
    for index, name in enumerate(class_names):
        values = counts[order, index]
        axes.barh(
            np.arange(len(order)),
            values,
            left=left,
            height=0.72,
            color=CLASS_COLOURS[index % len(CLASS_COLOURS)],
            label=shorten(name),
        )
        left += values
    axes.set_xlabel("patches")
    _name_rows(axes, [patient_ids[index] for index in order])
    _legend_above(axes, len(class_names))
    return figure


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
    """Draw one number a patient, best first, dots larger where there are more patches.

    Args:
        patient_ids: One id a patient.
        values: The metric, shape ``(n_patients,)``; NaN where it is not defined for a patient.
        n_patches: Patches of each patient, written beside the dot.
        metric: Name of the metric, on the axis.
        overall: The pooled value, a vertical line.
        interval: Its interval, a band behind the dots.

    Raises:
        MetricError: If there are not as many values and counts as patients.
    """
    values, n_patches = np.asarray(values, dtype=float), np.asarray(n_patches)
    if not len(patient_ids) == len(values) == len(n_patches):
        raise MetricError(
            f"{len(patient_ids)} patients have {len(values)} values and {len(n_patches)} counts"
        )
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")
    defined = np.isfinite(values[order])
    rows = np.arange(len(order))
    figure, axes = _open_rows(len(order))
    if interval is not None:
        axes.axvspan(*interval, color=MUTED, alpha=0.14, linewidth=0, label="95 % interval")
    if overall is not None:
        axes.axvline(
            overall, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"all patches {overall:.3f}"
        )
    size = 14 + 60 * n_patches[order] / max(int(n_patches.max(initial=1)), 1)
    axes.scatter(
        values[order][defined], rows[defined], s=size[defined], color=NEGATIVE, zorder=3, linewidth=0
    )
    if len(order) <= NAMED_ROWS:
        for row in rows[~defined]:
            axes.annotate(
                "not defined",
                (0.02, row),
                (0, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=8,
                xycoords=("axes fraction", "data"),
            )
        for row, count in zip(rows, n_patches[order], strict=True):
            axes.annotate(
                f"{count:,}",
                (1.0, row),
                (4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=8,
                annotation_clip=False,
            )
        axes.annotate(
            "patches",
            (1.0, 1.0),
            (4, 3),
            xycoords="axes fraction",
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
        )
    axes.set_xlabel(metric)
    shown = [*values[np.isfinite(values)], *(interval or ()), *([] if overall is None else [overall])]
    axes.set_xlim(min(shown, default=0.0) - 0.04, max([1.0, *shown]) + 0.02)
    _name_rows(axes, [patient_ids[index] for index in order])
    _legend_above(axes, 2)
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
    """Draw the spread of probabilities in every patient, positive and negative patches apart.

    A dot is the median, a thick line the middle half, a thin line the middle nine tenths.

    Args:
        patient_ids: One id a *patch*, shape ``(n,)``.
        target: 0 or 1, shape ``(n,)``.
        prob: Probability of the positive class, shape ``(n,)``.
        class_names: Name of the negative and of the positive class.
        threshold: The frozen threshold, a vertical line.
    """
    who, target, prob = np.array([str(name) for name in patient_ids]), np.asarray(target), np.asarray(prob)
    names = np.unique(who)
    medians = np.array([np.median(prob[who == name]) for name in names])
    names = names[np.argsort(-medians, kind="stable")]
    figure, axes = _open_rows(len(names), row_in=0.26)
    for value, (label, colour, offset) in enumerate(
        zip(class_names, (NEGATIVE, POSITIVE), (0.16, -0.16), strict=True)
    ):
        spreads = []
        for row, name in enumerate(names):
            part = prob[(who == name) & (target == value)]
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
        axes.axvline(
            threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.2f}"
        )
    axes.set(xlabel=f"probability of {shorten(class_names[1], 24)}", xlim=(-0.015, 1.015))
    _name_rows(axes, names.tolist())
    _legend_above(axes, 3)
    return figure


def _open_rows(n_rows: int, row_in: float = 0.2) -> tuple[Figure, Axes]:
    named = n_rows <= NAMED_ROWS
    return new_figure(WIDTH_IN, 1.0 + max(n_rows, 3) * row_in if named else 6.0)


def _name_rows(axes: Axes, names: Sequence[object]) -> None:
    n_rows = len(names)
    axes.set_ylim(n_rows - 0.4, -0.6)
    if n_rows <= NAMED_ROWS:
        axes.set_yticks(range(n_rows), [shorten(name) for name in names])
    else:
        axes.set_ylabel(f"{n_rows} patients, in order")
        axes.set_yticks([])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _legend_above(axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=min(columns, 3),
            borderaxespad=0.1,
            columnspacing=1.2,
        )
