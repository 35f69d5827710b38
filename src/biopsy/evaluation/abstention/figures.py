"""Abstention: risk against coverage, and what was promised beside what each patient got."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.plotting.style import BASELINE, DASHED, INK, MODEL, MUTED, legend_above, new_figure, styled
from biopsy.statistics.risk_coverage import risk_coverage_curve

FEWEST_DRAWN = 0.02  # share kept below which a curve is a handful of patches, and jumps


@styled
def draw_risk_coverage(
    wrong: np.ndarray,
    confidence: np.ndarray,
    *,
    intervals: Sequence[Mapping[str, float | None]] = (),
    kept: tuple[float, float] | None = None,
) -> Figure:
    """Draw the error among the kept against the share of patches kept, the surest first.

    Args:
        wrong: Which patches were called wrongly, shape ``(n,)``.
        confidence: Of each call, shape ``(n,)``.
        intervals: ``coverage``, ``value``, ``low``, ``high`` at some shares, drawn as bars.
        kept: ``(coverage, risk)`` of the conformal sets, marked.

    Raises:
        MetricError: If there are no patches, or a confidence is no number.
    """
    curve = risk_coverage_curve(wrong, confidence)
    figure, axes = new_figure(height_in=3.9)
    drawn = curve.coverage >= FEWEST_DRAWN
    axes.plot(100 * curve.coverage[drawn], 100 * curve.risk[drawn], color=MODEL, label="this model")
    share = np.linspace(FEWEST_DRAWN, 1, 200)
    error = curve.risk[-1]
    axes.plot(
        100 * share,
        100 * np.maximum(0, share - (1 - error)) / share,
        color=MUTED,
        linewidth=1,
        linestyle=DASHED,
        label="optimal order",
    )
    axes.axhline(100 * error, color=BASELINE, linewidth=1, linestyle=(0, (1, 2)), label="random order")
    for bar in intervals:
        if bar.get("low") is not None:
            x, low, high = (100 * float(bar[name] or 0) for name in ("coverage", "low", "high"))
            axes.plot([x, x], [low, high], color=MODEL, linewidth=3.5, alpha=0.3, solid_capstyle="butt")
    if kept is not None:
        axes.plot(100 * kept[0], 100 * kept[1], "o", color=INK, markersize=6, label="conformal sets")
    axes.set(xlim=(0, 101.5), xlabel="Coverage (%)", ylabel="Selective risk: error rate (%)")
    axes.set_ylim(bottom=0)
    legend_above(axes, 2)
    return figure


@styled
def draw_coverage(
    ours: np.ndarray | None, plain: np.ndarray | None, promised: float, *, unit: str = "patient"
) -> Figure:
    """Draw the share of each patient's patches whose set holds the true class, worst patient first.

    Args:
        ours: One share a patient, of sets with the patient as the unit; None where they were refused.
        plain: The same of sets that take patches as independent.
        promised: What was promised on the mean over patients.
        unit: What is drawn: patient or slide.

    Raises:
        MetricError: If there is nothing to draw.
    """
    drawn = [
        (f"{unit} as the unit", ours, MODEL),
        ("patch as the unit (naive)", plain, BASELINE),
    ]
    if all(values is None or not len(values) for _, values, _ in drawn):
        raise MetricError(f"no {unit} to draw")
    figure, axes = new_figure(height_in=3.9)
    for name, values, colour in drawn:
        if values is not None:
            _draw_patients(axes, np.sort(values), f"{name}: mean {100 * values.mean():.1f} %", colour)
    axes.axhline(
        100 * promised, color=INK, linewidth=1, linestyle=DASHED, label=f"target: {100 * promised:g} %"
    )
    axes.set(
        xlim=(0, 101.5),
        xlabel=f"{unit.capitalize()}s, lowest coverage first (%)",
        ylabel="Coverage: true class in set (%)",
    )
    axes.set_ylim(top=101.5)
    legend_above(axes, 2)
    return figure


def _draw_patients(axes: Axes, values: np.ndarray, label: str, colour: str) -> None:
    place = 100 * (np.arange(len(values)) + 0.5) / len(values)
    marker = "o" if len(values) <= 60 else None
    axes.plot(place, 100 * values, color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=label)
