"""Reliability diagrams."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.plotting.style import DASHED, MODEL, MUTED, legend_above, new_figure, styled


@styled
def draw_calibration(
    bins: Sequence[Mapping[str, Any]], *, positive: str | None = "positive", level: float = 0.95
) -> Figure:
    """Draw observed frequency against predicted probability, with the interval of each bin.

    Args:
        bins: ``mean_prob`` and ``observed`` (``value``, ``low``, ``high``) each, as in `metrics.json`.
        positive: Name of the positive class; None where the bins are of the predicted class.
        level: Nominal coverage of the intervals.

    Raises:
        MetricError: If there is no bin.
    """
    if not bins:
        raise MetricError("no bins to draw: evaluate at least one patch")
    figure, axes = new_figure(height_in=4.1)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=DASHED, label="perfect calibration")
    known = [one for one in bins if one["observed"]["low"] is not None]
    if known:
        at = [one["mean_prob"] for one in known]
        low, high = ([one["observed"][end] for one in known] for end in ("low", "high"))
        label = f"{100 * level:g} % interval"
        axes.vlines(at, low, high, color=MODEL, alpha=0.45, linewidth=1.6, label=label)
    promised = [one["mean_prob"] for one in bins]
    result = [one["observed"]["value"] for one in bins]
    axes.plot(promised, result, "-o", color=MODEL, markersize=4.5, linewidth=1.1, label="this model")
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel=f"Predicted probability of {positive}" if positive else "Probability of the predicted class",
        ylabel=f"Observed frequency of {positive}" if positive else "Accuracy",
    )
    legend_above(axes)
    return figure
