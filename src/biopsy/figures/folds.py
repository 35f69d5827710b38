"""Folds and seeds of a study: spread between trainings beside spread between folds."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.figures.style import BASELINE, INK, NEGATIVE, WIDTH_IN, new_figure, shorten, styled


@styled
def draw_folds(
    folds: Sequence[object],
    values: np.ndarray,
    *,
    metric: str = "AUROC",
    baseline: Mapping[object, float] | None = None,
) -> Figure:
    """Draw one number of every run: a row a fold, a dot a seed, a bar their mean.

    Args:
        folds: The fold of each run, shape ``(n_runs,)``; rows keep the order of first appearance.
        values: The metric of each run, shape ``(n_runs,)``; NaN is left out.
        metric: Its name, on the axis.
        baseline: Value of the colour-only baseline by fold, drawn as a grey diamond.

    Raises:
        MetricError: If there are not as many folds as values.
    """
    values = np.asarray(values, dtype=float)
    if len(folds) != len(values) or not len(values):
        raise MetricError(f"{len(folds)} folds have {len(values)} values; one a run is needed")
    names = list(dict.fromkeys(folds))
    figure, axes = new_figure(WIDTH_IN, 1.2 + 0.36 * max(len(names), 2))
    seen = values[np.isfinite(values)].tolist()
    for row, name in enumerate(names):
        part = np.array([value for fold, value in zip(folds, values, strict=True) if fold == name])
        part = np.sort(part[np.isfinite(part)])
        spread = 0.09 * (np.arange(len(part)) % 3 - 1) if len(part) > 1 else np.zeros(len(part))
        axes.plot(
            part,
            row + spread,
            "o",
            color=NEGATIVE,
            markersize=6,
            alpha=0.75,
            markeredgewidth=0,
            label="one seed" if row == 0 else None,
        )
        if len(part):
            axes.plot(
                [part.mean()] * 2,
                [row - 0.26, row + 0.26],
                color=INK,
                linewidth=1.8,
                label="mean of seeds" if row == 0 else None,
            )
    if baseline:
        known = [
            (baseline[name], row) for row, name in enumerate(names) if np.isfinite(baseline.get(name, np.nan))
        ]
        seen += [value for value, _ in known]
        axes.plot(
            *zip(*known, strict=True) if known else ([], []),
            "D",
            color=BASELINE,
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.4,
            label="colour alone",
        )
    axes.axvline(0.5, color=BASELINE, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlim(min([0.48, *seen]) - 0.02, 1.01)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.set_xlabel(metric)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.1, columnspacing=1.2)
    return figure
