"""Curves of deletion and insertion: a class's probability as a patch is taken away and given back."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.plotting.style import BASELINE, INK, SERIES_COLOURS, WIDTH_IN, styled

_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_BASELINE_LINES = ("-", ":")


@styled
def draw_deletion_insertion(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    baselines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> Figure:
    """Draw the mean curves of deletion at the left and of insertion at the right.

    Args:
        curves: Of each method, by what a reader calls it: deletion and insertion, from no cell to all.
        baselines: The same of the baselines, drawn in grey.

    Raises:
        MetricError: If there is no curve.
    """
    if not curves:
        raise MetricError("there is no curve to draw: no method was tested")
    figure = Figure(figsize=(WIDTH_IN, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lines = [
        (title, pair, {"color": BASELINE, "linestyle": style, "linewidth": 2.2})
        for (title, pair), style in zip(baselines.items(), _BASELINE_LINES, strict=False)
    ]
    lines += [
        (
            title,
            pair,
            {
                "color": SERIES_COLOURS[index % len(SERIES_COLOURS)],
                "linestyle": _LINES[index % len(_LINES)],
                "linewidth": 1.4,
            },
        )
        for index, (title, pair) in enumerate(curves.items())
    ]
    headings = ("deletion: lower is better", "insertion: higher is better")
    for which, (panel, heading) in enumerate(zip(panels, headings, strict=True)):
        for title, pair, look in lines:
            panel.plot(np.linspace(0, 1, len(pair[which])), pair[which], label=title, **look)
        panel.set_xlabel(f"Share of cells {('deleted', 'inserted')[which]}", color=INK)
        panel.set_title(heading)
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("Mean probability")
    handles, titles = panels[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=3)
    return figure
