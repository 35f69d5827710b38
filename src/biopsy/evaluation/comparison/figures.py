"""Differences between classifiers with their intervals: a row a metric, a colour a classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.plotting.style import INK, SERIES_COLOURS, WIDTH_IN, legend_above, new_figure, shorten, styled

# Those that live between bounds of like width, so that one axis serves them all.
SHOWN = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "F1, macro",
    "mcc": "Matthews corr.",
    "brier": "Brier (less is better)",
    "ece": "ECE (less is better)",
}


@styled
def draw_differences(differences: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw differences from a reference: a dot and its interval; a hollow dot has no interval.

    Args:
        differences: As in ``comparison.json``: ``of``, ``to`` and ``metrics``, each with ``value``, ``low``
            and ``high``. With several seeds a thin bar shows least and greatest difference.

    Raises:
        MetricError: If there is nothing to draw.
    """
    if not differences:
        raise MetricError("there is no difference to draw: two classifiers make one")
    names = [name for name in SHOWN if any(one["metrics"].get(name) for one in differences)]
    figure, axes = new_figure(WIDTH_IN, 1.3 + (0.16 + 0.2 * len(differences)) * len(names))
    step = 0.7 / len(differences)
    for place, one in enumerate(differences):
        colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
        label: str | None = shorten(one["of"], 40)
        for row, name in enumerate(names):
            result = one["metrics"][name]
            if result["value"] is None or np.isnan(result["value"]):
                continue
            at = row + (place - (len(differences) - 1) / 2) * step
            has_interval = result["low"] is not None
            seeds = result.get("over_seeds") or {}
            if seeds.get("n", 0) > 1:
                axes.plot([seeds["min"], seeds["max"]], [at] * 2, color=colour, linewidth=5, alpha=0.25)
            if has_interval:
                axes.plot([result["low"], result["high"]], [at] * 2, color=colour, linewidth=1.6)
            axes.plot(
                result["value"],
                at,
                "o",
                color=colour,
                markersize=5.5,
                markerfacecolor=colour if has_interval else "white",
                markeredgewidth=1.2,
                label=label,
            )
            label = None
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.margins(x=0.06)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.01), max(high, 0.01))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [SHOWN[name] for name in names])
    axes.set_xlabel(f"Difference from {shorten(differences[0]['to'], 30)}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    legend_above(axes, 1)
    return figure
