"""Sections of the report on saliency and its faithfulness."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from biopsy.evaluation.explanation.examples import Explained, draw_sheet, hide_explained, load_explained
from biopsy.evaluation.explanation.explain import explain
from biopsy.evaluation.explanation.faithfulness import read_faithfulness
from biopsy.evaluation.explanation.figures import draw_removal
from biopsy.plotting.style import svg
from biopsy.reporting.document import Block, Bullets, Picture, Pictures, Section, Table, Text, number
from biopsy.reporting.elements import Footnotes
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import Result, section

MOST_GROUPS = 24  # patients listed one by one


@section(
    "explanation",
    order=100,
    explanation=Result(
        load_explained, hide_explained, title="Saliency", command="biopsy explain {run}", make=explain
    ),
)
def describe_attention(facts: RunFacts) -> Section | None:
    """Some patches called wrong and some called right, with maps superimposed on the tissue."""
    explained: Explained | None = facts.results.get("explanation")
    if explained is None or explained.examples.empty:
        return None
    right = (explained.examples["kind"] == "right").to_numpy()
    pictures = []
    for name, chosen, title in (
        ("wrong", ~right, "Called wrong: the surest mistakes of each kind in turn."),
        ("right", right, "Called right: drawn at random from each class."),
    ):
        if chosen.any():
            sheet = draw_sheet(explained, np.flatnonzero(chosen).tolist(), explained.illustrations)
            caption = (
                f"{title} Above each: true class, probability of {facts.positive}, patch."
                if facts.is_binary
                else f"{title} Above each: true class, probability of the class that was called, patch."
            )
            pictures.append(Picture(caption, svg(sheet, f"explained-{name}")))
    blocks: list[Block] = [
        Text(
            "Maps are superimposed on the patch in grey. Colours run from none to the 99th percentile: of "
            "each patch for itself where there is one map a patch, of all patches shown for a channel. Where "
            "a map has a sign, grey is 0, blue speaks against the class and yellow for it."
        ),
        Pictures(pictures),
        Bullets([part.caption for part in explained.illustrations]),
        Text(
            "Such maps are a way to look, not evidence: a network that has learned nothing gives maps too. "
            + (
                "Whether these mean anything has not been tested here: `biopsy explain RUN --faithfulness` "
                "does it."
                if facts.results.get("faithfulness") is None
                else "Whether these mean anything is the question of the next chapter."
            ),
            "note",
        ),
    ]
    return Section("explanation", "What the network looks at", blocks)


TITLES = {"random": "random", "edges": "edges"}


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
    """A plain sentence, a row and two curves for every method that was tested."""
    found = facts.results.get("faithfulness")
    if found is None:
        return None
    settings, methods = found["settings"], found["methods"]
    baselines = {each["name"]: each for each in found["baselines"]}
    which = f"called {found['positive_class']}" if found["positive_class"] else "of any class"
    units = "" if found["unit"] == "patch" else f" of {number(found['n_groups'])} {found['unit']}(s)"
    blocks: list[Block] = [
        Bullets([each["answer"] for each in methods]),
        Text(
            f"Measured on {number(found['n_patches'])} patches{units}, {which}, of the {found['side']} side, "
            f"drawn with seed {found['seed']}. A patch is cut into {settings['cells']} x {settings['cells']} "
            "cells. Deletion takes them away in the order in which a map marks them and puts the blurred "
            "patch in their place; insertion begins with the blurred patch and gives them back. The class's "
            f"probability is {number(found['prob']['untouched'])} on untouched patches and "
            f"{number(found['prob']['blurred'])} on blurred ones, on average. A gain is half the difference "
            "of the areas under both curves, against maps in random order and against a detector of edges, "
            "which asks no network."
        ),
        Pictures([Picture(_caption(found), svg(_draw(methods, baselines), "faithfulness"))], across=1),
        _table_of_gains(methods, baselines),
        _table_of_randomisation(methods, settings),
    ]
    if found["refused"]:
        blocks.append(Text(" ".join(f"Not tested: {each['reason']}." for each in found["refused"]), "note"))
    return Section("faithfulness", "Do the maps mean anything", blocks)


def _draw(methods: list[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]]) -> Any:
    def pair(each: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        return each["deletion"]["curve"], each["insertion"]["curve"]

    return draw_removal(
        {each["title"]: pair(each) for each in methods},
        {TITLES[name]: pair(each) for name, each in baselines.items()},
    )


def _caption(found: Mapping[str, Any]) -> str:
    return (
        f"Mean probability of the class over {number(found['n_patches'])} patches as what a map marks most "
        "is deleted first (left) or inserted first (right)."
    )


def _table_of_gains(methods: list[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Any]]) -> Table:
    rows, reasons = [], Footnotes()
    for each in methods:
        areas = [number(each[name]["value"]) for name in ("deletion", "insertion")]
        gains = [reasons.estimate(each["gain"][name]) for name in TITLES]
        rows.append([each["title"], *areas, *gains, *(number(each["n_better"][name]) for name in TITLES)])
    for name, each in baselines.items():
        areas = [number(each[key]["value"]) for key in ("deletion", "insertion")]
        rows.append([TITLES[name], *areas, "-", "-", "-", "-"])
    columns = ["", "deletion", "insertion", "gain over random", "gain over edges", "better than random"]
    note = (
        "Deletion and insertion: area under the curve. Gains are paired, patch by patch. The last two "
        f"columns count patches.{reasons.text}"
    )
    return Table([*columns, "than edges"], rows, caption="What taking marked cells away costs", note=note)


def _table_of_randomisation(methods: list[Mapping[str, Any]], settings: Mapping[str, Any]) -> Table:
    steps = [step["from_layer"] for step in methods[0]["randomised"]] if methods else []
    rows = []
    for place, name in enumerate(steps):
        cells = [each["randomised"][place] for each in methods]
        rows.append([name, *(f"{c['rank_correlation']:.2f} / {c['ssim']:.2f}" for c in cells)])
    note = (
        "From the last layer to the first, the weights of the named layer and of all behind it are drawn "
        f"anew (Adebayo et al. 2018), and the maps of {settings['n_randomised']} patches compared with those "
        "of the trained network: rank correlation / structural similarity. A map that stays alike shows the "
        "picture, not what was learned."
    )
    return Table(
        ["random from", *(each["title"] for each in methods)],
        rows,
        caption="Maps of a network that forgets",
        note=note,
    )
