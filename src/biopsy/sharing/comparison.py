"""The page of a comparison: is one better, by how much, how sure, and on which patches they part."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from biopsy.sharing.cases import encode_patch, pick_label
from biopsy.sharing.differences import ComparisonFacts, list_differences, say_p, say_verdict
from biopsy.sharing.document import (
    Block,
    Bullets,
    Facts,
    Gallery,
    Headline,
    Patch,
    Picture,
    Pictures,
    ReportDocument,
    Section,
    Summary,
    Table,
    Text,
    interval_of,
    metric_label,
    number,
)
from biopsy.sharing.report import HIDDEN, NOT_FOR

MOST_SHOWN = 12  # patches of each kind in the gallery
LONG_TABLE = 16
SEEDS_SHOWN = ("auroc", "accuracy", "balanced_accuracy", "sensitivity", "specificity")


def report_of_comparison(facts: ComparisonFacts) -> ReportDocument:
    """Compose the page of a comparison."""
    m = facts.document
    size = f"{number(m['n_patches'])} patches"
    if facts.unit != "patch":
        size += f" of {number(m['n_patients'])} {facts.units}"
    sections = [
        _describe_differences(facts),
        _describe_seeds(facts),
        _describe_groups(facts),
        *_describe_changed(facts),
        _describe_rivals(facts),
    ]
    return ReportDocument(
        title=" and ".join(rival["name"] for rival in m["rivals"]),
        subtitle=f"A comparison on the same {size}; the reference is {m['reference']}",
        summary=_summarise(facts),
        sections=[section for section in sections if section is not None],
        warnings=_warn_reader(facts),
        footer="Written by biopsy.",
    )


def _summarise(facts: ComparisonFacts) -> Summary:
    m, name = facts.document, facts.document["metric"]
    label = metric_label(name, len(m["class_names"]))
    heads = [
        Headline(f"{label} of {rival['name']}", value["value"], value["low"], value["high"], value["reason"])
        for rival in m["rivals"][:3]
        for value in [rival["patch"][name]]
    ]
    return Summary(
        question=f"Is {label} of {' or '.join(one['of'] for one in m['differences'])} better than that of "
        f"{m['reference']}, on the same patches?",
        headlines=heads,
        unit=facts.unit,
        findings=[
            *(say_verdict(m, one) for one in m["differences"]),
            "Two intervals that overlap say nothing of a difference: the paired one below does, for what "
            f"makes a {facts.unit} hard for both cancels in it.",
            *([HIDDEN] if facts.ids_hidden else []),
        ],
        not_for=NOT_FOR,
    )


def _warn_reader(facts: ComparisonFacts) -> list[str]:
    warnings = [
        f"{rival['name']}: patients stand on more than one side of its split, so its numbers say nothing "
        "about a new patient."
        for rival in facts.document["rivals"]
        if rival.get("patients_overlap")
    ]
    if facts.unit == "patch":
        warnings.append(
            "The data name neither patients nor slides: the unit is the patch, and intervals are too narrow "
            "wherever patches belong together."
        )
    if any(len(rival["seeds"]) < 3 for rival in facts.document["rivals"]):
        warnings.append(
            "Fewer than three training seeds: a difference between recipes may be luck of a seed."
        )
    return warnings


def _describe_differences(facts: ComparisonFacts) -> Section:
    m = facts.document
    caption = (
        f"Difference from {m['reference']}, with {m['interval']['level']:.0%} intervals over {facts.units}, "
        "each taken alone; a hollow dot has none. A pale bar: least and greatest over seeds."
    )
    blocks: list[Block] = [Pictures([Picture(caption, facts.figure)], across=1)]
    several = len(m["differences"]) > 1
    for one in m["differences"]:
        rows, reasons = [], dict[str, None]()
        for row in list_differences({**m, "differences": [one]}):
            found = one["metrics"][row["metric"]]
            if found["low"] is None and found["reason"]:
                reasons[found["reason"]] = None
            rows.append(
                [
                    metric_label(row["metric"], len(m["class_names"])),
                    number(row["reference_value"]),
                    number(row["value"]),
                    _signed(found["value"]),
                    "none" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}",
                    say_p(found["p"]),
                    *([say_p(found["p_holm"])] if several else []),
                ]
            )
        note = (
            f"p: paired Student's t, with the standard error that weighting the {facts.units} anew gives. "
            + (
                f"Corrected: Holm over {len(m['differences'])} comparisons, metric by metric. "
                if several
                else ""
            )
            + f"{metric_label(m['metric'], len(m['class_names']))} was to answer, the others stand beside it."
        )
        if reasons:
            note += f" No interval: {'; '.join(reasons)}."
        columns = [
            "metric",
            one["to"],
            one["of"],
            "difference",
            "interval",
            "p",
            *(["corrected"] if several else []),
        ]
        blocks.append(Table(columns, rows, caption=f"{one['of']} against {one['to']}", note=note))
    return Section("differences", "Differences", blocks)


def _signed(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:+.3f}"


def _describe_seeds(facts: ComparisonFacts) -> Section | None:
    m = facts.document
    rows = []
    for one in m["differences"]:
        for name, found in one["metrics"].items():
            seeds = found["over_seeds"]
            if name in SEEDS_SHOWN and seeds["n"] > 1:
                rows.append(
                    [
                        one["of"],
                        metric_label(name, len(m["class_names"])),
                        _signed(seeds["mean"]),
                        number(seeds["sd"]),
                        f"{_signed(seeds['min'])} to {_signed(seeds['max'])}",
                        f"{seeds['n']} seeds" if seeds["paired"] else f"{seeds['n']} pairs of seeds",
                    ]
                )
    if not rows:
        return None
    note = (
        "How far the difference moves when both are trained again; the interval over patients says nothing "
        "of that. Where both have the same seeds, seed by seed; else every seed against every other."
    )
    columns = ["classifier", "metric", "mean difference", "sd over seeds", "least to greatest", "of"]
    return Section("seeds", "Seeds", [Table(columns, rows, note=note, text_columns=2)])


def _describe_groups(facts: ComparisonFacts) -> Section | None:
    m = facts.document
    if not m["by_group"]:
        return None
    blocks: list[Block] = []
    first, *_, last = m["by_group"][0]["values"][m["reference"]]
    first_label, last_label = (metric_label(name, len(m["class_names"])) for name in (first, last))
    for one in m["differences"]:
        rows = []
        for entry in m["by_group"]:
            values, seeds = entry["values"], entry["differences"][one["of"]][first]
            rows.append(
                [
                    entry["group"],
                    number(entry["n_patches"]),
                    number(values[one["to"]][first]),
                    number(values[one["of"]][first]),
                    _signed(seeds["mean"]),
                    number(seeds["sd"]),
                    "-" if seeds["n"] < 2 else f"{_signed(seeds['min'])} to {_signed(seeds['max'])}",
                    _signed(entry["differences"][one["of"]][last]["mean"]),
                ]
            )
        columns = [facts.unit, "patches", one["to"], one["of"], f"gain in {first_label}", "sd over seeds"]
        columns += ["least to greatest", f"gain in {last_label}"]
        title = f"{one['of']} against {one['to']}, {facts.unit} by {facts.unit}"
        long = len(rows) > LONG_TABLE
        note = (
            f"{first_label}, mean of seeds. A dash: not defined, because only one class occurs, or one seed."
        )
        blocks.append(
            Table(columns, rows, caption="" if long else title, note=note, fold=title if long else "")
        )
    return Section("groups", f"{facts.unit.capitalize()} by {facts.unit}", blocks)


def _describe_changed(facts: ComparisonFacts) -> list[Section]:
    changed, found = facts.changed, facts.document.get("changed")
    if changed is None or not found:
        return []
    lost, gained = found["turned_wrong"], found["turned_right"]
    p = say_p(found["mcnemar_p_if_patches_were_independent"])
    blocks: list[Block] = [
        Facts(
            [
                ("right by both", number(found["both_right"])),
                ("wrong by both", number(found["both_wrong"])),
                ("turned from right to wrong", number(lost)),
                ("turned from wrong to right", number(gained)),
            ],
            caption=f"From {found['before']} to {found['after']}",
        ),
        Text(
            f"If patches were independent, McNemar's exact test would give p {p}; they are not, and the "
            "paired difference of accuracy above is the answer over patients.",
            "note",
        ),
    ]
    kinds = ("by_class", "by_group") if found["by_group"] else ("by_class",)
    for key in kinds:
        rows = [
            [name, *(number(one[k]) for k in ("n_patches", "turned_wrong", "turned_right"))]
            for name, one in found[key].items()
        ]
        what = "class" if key == "by_class" else facts.unit
        fold = f"{len(rows)} {what}s, one by one" if len(rows) > LONG_TABLE else ""
        blocks.append(Table([what, "patches", "to wrong", "to right"], rows, fold=fold))
    if facts.get_patch is not None:
        for kind in ("wrong", "right"):
            part = changed[changed["turned"] == kind].head(MOST_SHOWN)
            if len(part):
                n = lost if kind == "wrong" else gained
                caption = f"Turned {kind} ({len(part)} of {number(n)}, the most changed first)"
                note = "Under a patch: its class, and that class's probability before and after."
                blocks.append(Gallery(caption, _group_patches(facts.get_patch, part), note))
    return [Section("changed", "What changed, patch by patch", blocks)]


def _group_patches(
    get_patch: Callable[[str], np.ndarray], rows: pd.DataFrame
) -> Sequence[tuple[str, Sequence[Patch]]]:
    groups: dict[str, list[Patch]] = {}
    for who, row in zip(pick_label(rows), rows.to_dict("records"), strict=True):
        moved = f"{number(row['prob_true_before'])} → {number(row['prob_true_after'])}"
        lines = [f"{row['target']}: {moved}", row["patch_id"]]
        groups.setdefault(who, []).append(Patch(encode_patch(get_patch(row["patch_id"])), lines))
    return list(groups.items())


def _describe_rivals(facts: ComparisonFacts) -> Section:
    m = facts.document
    rows = [
        [
            rival["name"],
            rival["recipe"],
            rival["kind"],
            rival["split"],
            ", ".join(map(str, rival["seeds"])),
            number(rival["patch"]["auroc"]["value"]),
            interval_of(rival["patch"]["auroc"]),
        ]
        for rival in m["rivals"]
    ]
    columns = ["name", "recipe", "kind", "split", "seeds", "AUROC", "interval"]
    notes = Bullets(
        [
            f"Intervals: {m['interval']['method']}, {m['interval']['level']:.0%}, over {facts.units}.",
            f"Correction: {m['correction']}.",
            "A study's numbers are means over its seeds; its folds are put together, each run at its own "
            "threshold.",
        ]
    )
    return Section("compared", "What was compared", [Table(columns, rows, text_columns=5), notes])
