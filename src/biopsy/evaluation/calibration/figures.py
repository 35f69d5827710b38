"""Reliability before and after calibration, and the curve that says whether acting on a model pays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.plotting.style import BASELINE, MUTED, NEGATIVE, POSITIVE, new_figure, styled


@styled
def draw_calibration(
    bins: Sequence[Mapping[str, Any]], *, positive: str = "positive", level: float = 0.95
) -> Figure:
    """Draw a reliability table: promised against found, with the interval of each bin.

    Args:
        bins: ``mean_prob`` and ``observed`` (``value``, ``low``, ``high``) each, as in `metrics.json`.
        positive: Name of the positive class.
        level: Nominal coverage of the intervals.

    Raises:
        MetricError: If there is no bin.
    """
    if not bins:
        raise MetricError("no bin of probabilities is there to draw: evaluate at least one patch")
    figure, axes = new_figure(height_in=4.1)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="right")
    known = [one for one in bins if one["observed"]["low"] is not None]
    if known:
        at = [one["mean_prob"] for one in known]
        low, high = ([one["observed"][end] for one in known] for end in ("low", "high"))
        label = f"{100 * level:g} % interval"
        axes.vlines(at, low, high, color=POSITIVE, alpha=0.45, linewidth=1.6, label=label)
    promised = [one["mean_prob"] for one in bins]
    found = [one["observed"]["value"] for one in bins]
    axes.plot(promised, found, "-o", color=POSITIVE, markersize=4.5, linewidth=1.1, label="this model")
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel=f"promised probability of {positive}",
        ylabel=f"share of {positive} found",
    )
    axes.legend(loc="upper left")
    return figure


@styled
def draw_decision_curve(curve: Mapping[str, Any], *, level: float = 0.95) -> Figure:
    """Draw net benefit against the threshold probability, beside treating all and treating none.

    Args:
        curve: ``thresholds``, ``model``, ``treat_all`` and ``marked`` (``threshold``, ``low``, ``high``), as
            `metrics.json` holds them.
        level: Nominal coverage of the intervals.

    Raises:
        MetricError: If the curve has no point.
    """
    at = np.asarray(curve["thresholds"], float)
    if not len(at):
        raise MetricError("the decision curve has no threshold: give at least one")
    model, treat_all = (np.asarray(curve[name], float) for name in ("model", "treat_all"))
    figure, axes = new_figure(height_in=3.6)
    known = [one for one in curve["marked"] if one["low"] is not None]
    if known:
        low, high = ([one[end] for one in known] for end in ("low", "high"))
        marks = [one["threshold"] for one in known]
        axes.fill_between(
            marks, low, high, color=POSITIVE, alpha=0.16, linewidth=0, label=f"{100 * level:g} % interval"
        )
    axes.plot(at, treat_all, color=NEGATIVE, linewidth=1.2, linestyle=(0, (4, 2)), label="act on all")
    axes.axhline(0, color=BASELINE, linewidth=1.2, label="act on none")
    axes.plot(at, model, color=POSITIVE, label="act on what the model calls")
    top = max(float(model.max()), float(treat_all.max()), 0.01)
    axes.set(
        xlim=(0, 1),
        ylim=(-0.25 * top, 1.15 * top),
        xlabel="threshold probability: from which one would act",
        ylabel="net benefit, true positives per patch",
    )
    axes.legend(loc="upper right")
    return figure
