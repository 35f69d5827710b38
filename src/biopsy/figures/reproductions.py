"""What was published, what it comes to here, and what the leak adds to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.figures.style import BASELINE, INK, MUTED, NEGATIVE, POSITIVE, RULE, WIDTH_IN, shorten, styled

PANELS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
ROW_IN = 0.3
MARKS: Mapping[str, dict[str, Any]] = {
    "published": {"marker": "D", "color": INK, "markerfacecolor": "white", "markeredgewidth": 1.4},
    "as published": {"marker": "o", "color": POSITIVE},
    "patients apart": {"marker": "o", "color": NEGATIVE},
    "colour alone": {"marker": "s", "color": BASELINE, "markerfacecolor": "white", "markeredgewidth": 1.4},
}


@styled
def draw_reproduction(papers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw, for each recipe, the claim and both arms in three metrics, and the leak of each slide.

    Args:
        papers: Recipe to its entry in ``metrics.json`` of a reproduction.

    Raises:
        MetricError: If there is no recipe.
    """
    if not papers:
        raise MetricError("a reproduction without a recipe cannot be drawn")
    leaks = {
        (name, str(slide["tested"])): slide["auroc"]["values"]
        for name, entry in papers.items()
        for slide in entry["leak"]["slides"]
    }
    heights = [0.55 + ROW_IN * len(papers)] * len(PANELS)
    heights += [0.55 + ROW_IN * 0.8 * len(leaks)] if leaks else []
    figure = Figure(figsize=(WIDTH_IN, 0.5 + sum(heights)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for axes, metric in zip(panels, PANELS, strict=False):
        _draw_arms(axes, papers, metric)
    if leaks:
        _draw_leaks(panels[-1], leaks)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in MARKS if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside upper center", ncols=2)
    return figure


def _draw_arms(axes: Axes, papers: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    """A row a recipe: diamond the publication, dots ours with the spread over seeds or the interval."""
    for row, entry in enumerate(papers.values()):
        if row:
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        apart, published = entry["apart"], entry["published"]
        interval = (apart["interval"] or {}).get(metric) or {}
        claimed = entry["corrected"].get(metric, entry["claim"].get(metric))
        _mark(axes, "published", claimed, row - 0.22)
        _mark(axes, "as published", published[metric]["mean"], row - 0.07, _reach(published[metric]))
        _mark(axes, "patients apart", apart[metric]["mean"], row + 0.1, _reach(apart[metric], interval))
        if metric == "auroc":
            _mark(axes, "colour alone", apart["colour_auroc"], row + 0.26)
    _frame(axes, [shorten(name, 22) for name in papers], PANELS[metric])
    axes.set_xlim(right=1.0)


def _mark(
    axes: Axes, kind: str, value: float | None, row: float, reach: tuple[float, float] | None = None
) -> None:
    if value is None:
        return
    if reach is not None:
        axes.plot(reach, [row, row], color=MARKS[kind]["color"], linewidth=2, alpha=0.45)
    axes.plot([value], [row], linestyle="none", markersize=5.5, label=kind, **MARKS[kind])


def _reach(
    spread: Mapping[str, float | None], interval: Mapping[str, float | None] | None = None
) -> tuple[float, float] | None:
    """Give the interval over patients, where there is none the range over seeds."""
    for found, low, high in ((interval or {}, "low", "high"), (spread, "min", "max")):
        ends = found.get(low), found.get(high)
        if ends[0] is not None and ends[1] is not None:
            return ends[0], ends[1]
    return None


def _draw_leaks(axes: Axes, leaks: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """A row a slide of a recipe: each seed's gain from training patches of that slide, and their mean."""
    names, last = [], None
    for row, ((recipe, tested), values) in enumerate(leaks.items()):
        axes.plot(
            values, [row] * len(values), "o", color=POSITIVE, markersize=5, alpha=0.6, markeredgewidth=0
        )
        axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.8)
        names.append(
            f"{shorten(recipe, 22)}  {shorten(tested, 10)}" if recipe != last else shorten(tested, 10)
        )
        if last not in (None, recipe):
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        last = recipe
    axes.axvline(0, color=MUTED, linewidth=0.9)
    _frame(axes, names, "AUROC gained by the leak; a dot is a seed")


def _frame(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
