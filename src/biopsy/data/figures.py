"""Figures of class counts by subset and by patient."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from biopsy.core.errors import MetricError
from biopsy.plotting.style import (
    MUTED,
    WIDTH_IN,
    class_colour,
    legend_above,
    name_rows,
    new_figure,
    shorten,
    styled,
)


@styled
def draw_subsets(subsets: Sequence[str], counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw the number of patches per subset and class, annotated with count and percentage."""
    counts = np.asarray(counts)
    if counts.shape != (len(subsets), len(class_names)):
        raise MetricError(
            f"counts {counts.shape} do not fit {len(subsets)} subsets x {len(class_names)} classes", "shape"
        )
    height = 0.8 / len(class_names)
    figure, axes = new_figure(WIDTH_IN, 1.0 + 0.22 * max(len(subsets), 2) * max(len(class_names), 2))
    for index, name in enumerate(class_names):
        rows = np.arange(len(subsets)) + (index - (len(class_names) - 1) / 2) * height
        colour = class_colour(index)
        axes.barh(rows, counts[:, index], height=0.9 * height, color=colour, label=shorten(name))
        for row, count, total in zip(rows, counts[:, index], counts.sum(axis=1), strict=True):
            share = f" ({count / total:.0%})" if total else ""
            axes.annotate(
                f"{count:,}{share}",
                (count, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=8,
            )
    axes.set_xlabel("Patches")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(0, 1.32 * max(int(counts.max(initial=0)), 1))  # space for the annotations
    name_rows(axes, [shorten(subset) for subset in subsets])
    legend_above(axes)
    return figure


NAMED_ROWS = 45  # largest number of patients drawn with names


@styled
def draw_balance(patient_ids: Sequence[object], counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw the number of patches per patient and class, in descending order."""
    counts = np.asarray(counts)
    if counts.shape != (len(patient_ids), len(class_names)):
        raise MetricError(
            f"counts {counts.shape} do not fit {len(patient_ids)} patients x {len(class_names)} classes",
            "shape",
        )
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    figure, axes = open_rows(len(order), legend_rows=-(-len(class_names) // 2))
    left = np.zeros(len(order))
    for index, name in enumerate(class_names):
        values = counts[order, index]
        axes.barh(
            np.arange(len(order)),
            values,
            left=left,
            height=0.72,
            color=class_colour(index),
            label=shorten(name),
        )
        left += values
    axes.set_xlabel("Patches")
    name_patient_rows(axes, [patient_ids[index] for index in order])
    legend_above(axes, len(class_names))
    return figure


def open_rows(n_rows: int, row_in: float = 0.2, legend_rows: int = 1) -> tuple[Figure, Axes]:
    """Return a figure with one row per patient, high enough for their names."""
    rows_in = max(n_rows, 3) * row_in if n_rows <= NAMED_ROWS else 5.0
    return new_figure(WIDTH_IN, 0.8 + 0.2 * legend_rows + rows_in)


def name_patient_rows(axes: Axes, names: Sequence[object]) -> None:
    """Label each row with its name, or the axis with the number of rows."""
    if len(names) <= NAMED_ROWS:
        name_rows(axes, [shorten(name) for name in names], margin=0.4)
    else:
        axes.set_ylabel(f"{len(names)} patients, sorted")
        axes.set_yticks([])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
