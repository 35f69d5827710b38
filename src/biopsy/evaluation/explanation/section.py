"""Sections of the report on saliency and its faithfulness."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.core.text import class_title, count_patches
from biopsy.evaluation.explanation.examples import (
    Explained,
    count_constant,
    draw_sheet,
    hide_explained,
    load_explained,
)
from biopsy.evaluation.explanation.explain import explain
from biopsy.evaluation.explanation.faithfulness import (
    CurveResult,
    Faithfulness,
    MethodResult,
    read_faithfulness,
)
from biopsy.plotting.style import BASELINE, INK, SERIES_COLOURS, WIDTH_IN, styled, svg
from biopsy.reporting.document import (
    Block,
    Bullets,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    number,
)
from biopsy.reporting.elements import make_table, picture
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import Result, section


@section(
    "explanation",
    order=100,
    explanation=Result(
        load_explained, hide_explained, title="Saliency", command="biopsy explain {run}", make=explain
    ),
)
def describe_attention(facts: RunFacts) -> Section | None:
    """Return misclassified and correct patches with superimposed saliency maps."""
    explained = facts.result("explanation", Explained)
    if explained is None or explained.examples.empty:
        return None
    right = (explained.examples["kind"] == "correct").to_numpy()
    pictures = []
    for name, chosen, title in (
        ("wrong", ~right, "Misclassified patches: the most confident errors of each kind."),
        ("right", right, "Correctly classified patches, drawn at random from each class."),
    ):
        if chosen.any():
            sheet = draw_sheet(explained, np.flatnonzero(chosen).tolist(), explained.illustrations)
            caption = (
                f"{title} p: probability of {facts.positive}."
                if facts.is_binary
                else f"{title} p: probability of the predicted class."
            )
            pictures.append(Picture(caption, svg(sheet, f"explained-{name}")))
    blocks: list[Block] = [
        Text(
            "A saliency map shows which pixels of a patch influence the prediction; it is drawn over the "
            "patch in grey. Its colours run from 0 to the 99th percentile of the map (channel activations: "
            "of all patches shown). In maps with a sign, grey is 0, yellow supports the class and blue "
            "opposes it."
        ),
        *_warn_constant(explained),
        Pictures(pictures),
        Bullets([part.caption for part in explained.illustrations]),
        Text(
            "Saliency maps are not evidence by themselves: an untrained network produces them as well. "
            + (
                "Their faithfulness has not been tested for this run (`biopsy explain RUN --faithfulness`)."
                if facts.results.get("faithfulness") is None
                else "Their faithfulness is tested in the next section."
            ),
            "note",
        ),
    ]
    return Section("explanation", "Saliency", blocks)


def _warn_constant(explained: Explained) -> list[Block]:
    counts = count_constant(explained)
    if not counts:
        return []
    listed = ", ".join(f"{title} in {n} of {total} patches" for title, (n, total) in counts.items())
    text = f"Constant maps, with the same value at every pixel, highlight nothing: {listed}."
    return [Text(text, "warning")]


TITLES = {"random": "random order", "edges": "edge detector"}


@section(
    "faithfulness",
    order=110,
    faithfulness=Result(
        read_faithfulness,
        title="Faithfulness of the saliency maps",
        command="biopsy explain {run} --faithfulness",
    ),
)
def describe_faithfulness(facts: RunFacts) -> Section | None:
    """Return a sentence, a table row and two curves for every tested method."""
    result = facts.result("faithfulness", Faithfulness)
    if result is None:
        return None
    settings, methods = result.settings, result.methods
    baselines = {item.name: item for item in result.baselines}
    patches = f"predicted {class_title(result.positive_class)}" if result.positive_class else "of any class"
    size = count_patches(result.n_patches, result.n_groups, result.unit)
    caption = (
        f"Mean probability of the class over {number(result.n_patches)} patches when the most salient cells "
        "are deleted first (left) or inserted first (right)."
    )
    blocks: list[Block] = [
        Bullets([item.answer for item in methods]),
        Text(
            f"Measured on {size}, {patches}, of the "
            f"{result.subset} subset (seed {result.seed}). Each patch is divided into "
            f"{settings.cells} x {settings.cells} cells. Deletion replaces cells by the blurred patch, "
            "the most salient first; insertion restores them, starting from the blurred patch (Petsiuk et "
            f"al. 2018). The mean probability of the class is {number(result.prob['untouched'])} on the "
            f"original patches and {number(result.prob['blurred'])} on the blurred ones. "
            "Gain of a method: "
            "half the difference of the areas under its two curves, minus the same of a random order, and "
            "of an edge detector, which does not know the network."
        ),
        picture(svg(_draw(methods, baselines), "faithfulness"), caption),
        _table_of_gains(methods, baselines),
        _table_of_randomisation(methods, settings.n_randomised),
    ]
    if result.refused:
        blocks.append(Text(" ".join(f"Not tested: {item['reason']}." for item in result.refused), "note"))
    return Section("faithfulness", "Faithfulness of the saliency maps", blocks)


def _draw(methods: Sequence[MethodResult], baselines: Mapping[str, CurveResult]) -> Figure:
    def curves(result: CurveResult) -> tuple[list[float], list[float]]:
        return result.deletion.curve, result.insertion.curve

    return draw_deletion_insertion(
        {method.title: curves(method) for method in methods},
        {TITLES[name]: curves(baseline) for name, baseline in baselines.items()},
    )


def _table_of_gains(methods: Sequence[MethodResult], baselines: Mapping[str, CurveResult]) -> Table:
    rows = [
        [
            *(item.title, item.deletion.value, item.insertion.value),
            *(item.gain[name] for name in TITLES),
            *(item.n_better[name] for name in TITLES),
        ]
        for item in methods
    ]
    rows += [
        [TITLES[name], item.deletion.value, item.insertion.value, *[None] * 4]
        for name, item in baselines.items()
    ]
    columns = ["method", "deletion", "insertion", "gain over random", "gain over edges", "better than random"]
    note = (
        "Deletion and insertion: area under the curve. Gains are paired by patch. The last two columns "
        "count patches."
    )
    return make_table([*columns, "than edges"], rows, caption="Deletion and insertion", note=note)


def _table_of_randomisation(methods: Sequence[MethodResult], n_randomised: int) -> Table:
    steps = [step.from_layer for step in methods[0].randomised] if methods else []
    rows = []
    for index, name in enumerate(steps):
        cells = [item.randomised[index] for item in methods]
        rows.append([name, *(f"{c.rank_correlation:.2f} / {c.ssim:.2f}" for c in cells)])
    note = (
        "The weights of the named layer and of all later layers are randomised, and the maps of "
        f"{n_randomised} patches compared with those of the trained network: rank correlation / "
        "structural similarity (SSIM). Maps that stay similar depend on the image, not on what was learned."
    )
    return Table(
        ["randomised from", *(item.title for item in methods)],
        rows,
        caption="Cascading weight randomisation (Adebayo et al. 2018)",
        note=note,
    )


_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_BASELINE_LINES = ("-", ":")


@styled
def draw_deletion_insertion(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    baselines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> Figure:
    """Draw the mean deletion curves (left) and insertion curves (right).

    Args:
        curves: Deletion and insertion curve by title of the method, from no cell to all.
        baselines: The same for the baselines, drawn in grey.

    Raises:
        MetricError: If there is no curve.
    """
    if not curves:
        raise MetricError("no curve to draw: no method was tested", "empty")
    figure = Figure(figsize=(WIDTH_IN, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    grey = [(BASELINE, line, 2.2) for line in _BASELINE_LINES]
    colours, lines = cycle(SERIES_COLOURS), cycle(_LINES)
    coloured = [(next(colours), next(lines), 1.4) for _ in curves]
    headings = (("deleted", "deletion: lower is better"), ("inserted", "insertion: higher is better"))
    for column, (panel, (verb, heading)) in enumerate(zip(panels, headings, strict=True)):
        for series, styles in ((baselines, grey), (curves, coloured)):
            for (title, pair), (colour, line, width) in zip(series.items(), styles, strict=False):
                y, style = pair[column], {"color": colour, "linestyle": line}
                panel.plot(np.linspace(0, 1, len(y)), y, label=title, linewidth=width, **style)
        panel.set(xlim=(0, 1), ylim=(0, 1), title=heading)
        panel.set_xlabel(f"Share of cells {verb}", color=INK)
    panels[0].set_ylabel("Mean probability")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
