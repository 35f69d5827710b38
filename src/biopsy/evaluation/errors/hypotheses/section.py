"""Report section on the hypotheses published with the recipes."""

from collections.abc import Mapping

from biopsy.core.text import capitalize, count, plural
from biopsy.evaluation.errors.hypotheses.measure import (
    ColourShare,
    Hypotheses,
    Hypothesis,
    PropertyContrast,
    measure_hypotheses,
    read_hypotheses,
)
from biopsy.evaluation.errors.measure import MAX_GROUPS
from biopsy.evaluation.patch_properties import PROPERTIES
from biopsy.reporting.document import Block, Section, Table, Text, number
from biopsy.reporting.elements import make_table
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import Result, section
from biopsy.statistics.resampling import Interval


@section(
    "hypotheses",
    order=120,
    hypotheses=Result(
        read_hypotheses,
        title="Published hypotheses about errors and saliency",
        command="biopsy errors {run} --hypotheses",
        make=measure_hypotheses,
        applies=lambda run: bool(run.recipe.origin.claim) and run.info["threshold"] is not None,
    ),
)
def describe_hypotheses(facts: RunFacts) -> Section | None:
    """Return each published hypothesis, whether the data support it, and the numbers."""
    result = facts.result("hypotheses", Hypotheses)
    if result is None:
        return None
    is_sample = result.n_measured < result.n_patches or result.n_predicted < result.n_patches
    size = (
        f" Measured on {number(result.n_measured)} of {count(result.n_patches, 'patch')} (seed "
        f"{result.seed}); hypotheses about saliency on {number(result.n_predicted)}."
    )
    blocks: list[Block] = [
        Text(
            "The publication of this recipe states hypotheses about errors and saliency. Each is tested "
            f"here on the {result.subset} subset, with 95 % intervals over "
            f"{plural(result.unit)}." + (size if is_sample else "")
        )
    ]
    entries = result.hypotheses
    for entry in entries:
        blocks.append(Text(f"\u201c{entry.claim}\u201d ({entry.source}). {entry.answer}"))
    compared = [(entry, measure) for entry in entries for measure in entry.measures]
    if compared:
        blocks.append(_table_of_contrasts(compared, result.unit))
    for entry in entries:
        if entry.auroc and entry.saliency:
            blocks += [_table_of_colour(entry.auroc, entry.note), _table_of_saliency(entry.saliency)]
    blocks += _tables_by_group(compared, result.unit)
    return Section("hypotheses", "Published hypotheses", blocks)


def _table_of_contrasts(compared: list[tuple[Hypothesis, PropertyContrast]], unit: str) -> Table:
    rows = [
        [
            f"{m.property}: {m.chosen} and {m.others}",
            f"{number(m.n_chosen)} / {number(m.n_others)}",
            f"{number(m.mean_chosen)} / {number(m.mean_others)}",
            m.difference_sd,
            m.auroc,
            *([m.within] if unit != "patch" else []),
        ]
        for _, m in compared
    ]
    columns = ["comparison", "patches", "means", "difference in SD", "AUROC"]
    columns += [f"AUROC within {plural(unit)}, mean"] if unit != "patch" else []
    units = "; ".join(
        f"{name}: {PROPERTIES[name]}" for name in dict.fromkeys(m.property for _, m in compared)
    )
    notes = " ".join(dict.fromkeys(entry.note for entry, _ in compared))
    note = (
        "Differences above 0 and AUROC above 0.5 support the hypothesis: less stain in false negatives, "
        f"more heterogeneity in false positives. {capitalize(units)}. {notes}"
    )
    return make_table(columns, rows, caption="Stain and heterogeneity of errors", note=note)


def _table_of_colour(auroc: Mapping[str, Mapping[str, Interval]], note: str) -> Table:
    return make_table(
        ["patches", "AUROC", "difference"],
        [[name, result["auroc"], result.get("difference")] for name, result in auroc.items()],
        caption="AUROC without colour",
        note=f"Differences are paired, over the same patches. {note}",
    )


def _table_of_saliency(saliency: Mapping[str, ColourShare]) -> Table:
    return make_table(
        ["pixels", "share of the area", "share of the saliency", "ratio"],
        [[colour, share.area_share, share.saliency_share, share.ratio] for colour, share in saliency.items()],
        caption="Saliency by colour",
        note="Blue and yellow: a b* of CIELAB beyond -10 and 10; purple counts as blue. A ratio of 1: "
        "saliency is independent of colour.",
    )


def _tables_by_group(compared: list[tuple[Hypothesis, PropertyContrast]], unit: str) -> list[Block]:
    rows = [
        [f"{measure.property}, {measure.chosen}", name, *values.values()]
        for _, measure in compared
        for name, values in list(measure.by_group.items())[:MAX_GROUPS]
    ]
    if not rows:
        return []
    columns = ["property", unit, "errors", "correct", "AUROC"]
    note = "Dash: only one of the two groups occurs."
    return [make_table(columns, rows, text_columns=2, fold=f"Per-{unit} results", note=note)]
