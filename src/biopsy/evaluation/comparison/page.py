"""The page of a model comparison: paired differences with intervals, and changed predictions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.core.text import count_patches, plural
from biopsy.evaluation.comparison.measure import RECIPES, ComparisonDocument, ModelDifference, SeedSpread
from biopsy.plotting.style import (
    INK,
    SERIES_COLOURS,
    WIDTH_IN,
    legend_above,
    name_rows,
    new_figure,
    shorten,
    styled,
    svg,
)
from biopsy.reporting.document import (
    Block,
    Bullets,
    Facts,
    Gallery,
    Headline,
    Patch,
    ReportDocument,
    Section,
    Summary,
    Table,
    Text,
    interval_of,
    metric_label,
    number,
    signed,
)
from biopsy.reporting.elements import WITHOUT_IDS, encode_patch, make_table, pick_label, picture
from biopsy.reporting.facts import make_pseudonymizer

ALPHA = 0.05
ONE_SEED = (
    "With a single training seed this compares two trained networks and gives no p-value for the recipes: "
    "train each with at least three seeds."
)


@dataclass(frozen=True)
class ComparisonFacts:
    """Input of the page of a comparison.

    Attributes:
        document: The content of ``comparison.json``.
        changed: The patches with changed predictions, for two models; else None.
        get_patch: Returns a patch ``(H, W, 3)`` uint8 by its ``patch_id``; None shows no patches.
        predictions: A table of predictions, for the ids of the tested patches.
        ids_hidden: Whether ids have been replaced by numbers.
    """

    document: ComparisonDocument
    changed: pd.DataFrame | None
    get_patch: Callable[[str], np.ndarray] | None
    predictions: pd.DataFrame
    ids_hidden: bool = False

    @property
    def unit(self) -> str:
        return self.document.unit

    @property
    def units(self) -> str:
        return plural(self.unit)

    @cached_property
    def figure(self) -> str:
        """Figure of the differences, as SVG."""
        return svg(draw_differences(self.document.differences), "differences")


def hide_comparison(facts: ComparisonFacts) -> ComparisonFacts:
    """Replace every id in a comparison by a number."""
    pseudonymizer = make_pseudonymizer(facts.predictions, facts.document.pack["content_sha256"])
    show, changed = facts.get_patch, facts.changed
    if changed is not None:
        changed = pseudonymizer.table(changed.assign(_order=range(len(changed)))).sort_values("_order")
        changed = changed.drop(columns="_order").reset_index(drop=True)
    return replace(
        facts,
        document=pseudonymizer.nested(facts.document),
        changed=changed,
        get_patch=None if show is None else lambda alias: show(pseudonymizer.original("patch", alias)),
        predictions=pseudonymizer.table(facts.predictions),
        ids_hidden=True,
    )


def tabulate_differences(document: ComparisonDocument) -> pd.DataFrame:
    """Return one row per classifier and metric: values, difference, interval, p, variability over seeds."""
    values = {model.name: model.patch for model in document.models}
    return pd.DataFrame(
        [
            {
                "classifier": difference.of,
                "reference": difference.to,
                "metric": name,
                "reference_value": values[difference.to][name].value,
                "value": values[difference.of][name].value,
                "difference": result.value,
                **{key: getattr(result, key) for key in ("low", "high", "p", "p_holm")},
                **{f"seeds_{key}": getattr(result.over_seeds, key) for key in ("n", "sd", "min", "max")},
                "reason": result.reason,
            }
            for difference in document.differences
            for name, result in difference.metrics.items()
        ]
    )


def describe_verdict(document: ComparisonDocument, difference: ModelDifference) -> str:
    """Return the result of a comparison in the primary metric, as a sentence."""
    result, label = difference.metrics[document.metric], _label(document, document.metric)
    model, reference, units = difference.of, difference.to, plural(document.unit)
    if math.isnan(result.value):
        return f"{label} of {model} and {reference} cannot be compared: {result.reason}."
    if result.p == 1 and result.value == 0:
        samples = f"leave-one-{document.unit}-out sample"
        return f"{model} and {reference} have identical {label} (also in every {samples})."
    side = "above" if result.value > 0 else "below"
    amount = f"{label} of {model} is {abs(result.value):.3f} {side} that of {reference}"
    if result.low is None or result.p_holm is None:
        return f"{amount}; {result.reason}, so this does not generalise to other {units}."
    level, of_recipes = document.interval.level, difference.compares == RECIPES
    over = f"{units} and seeds" if of_recipes else units
    interval = f"{level:.0%} interval over {over} {result.low:+.3f} to {result.high:+.3f}"
    interval += f", p {format_p(result.p_holm)}"
    several = " after Holm's correction" if len(document.differences) > 1 else ""
    if result.p_holm < ALPHA:
        verdict = "significant" if of_recipes else "significant for these two trained networks"
    else:
        verdict = "no significant difference; equivalence is not established"
    alone = "" if of_recipes else f" {ONE_SEED}"
    return f"{amount} ({interval}{several}): {verdict}.{alone}"


def format_p(p: float | None) -> str:
    """Format a p-value.

    Example:
        >>> format_p(0.0304), format_p(0.00002), format_p(None)
        ('0.030', '< 0.001', '-')
    """
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


MAX_SHOWN = 12  # patches of each kind in the gallery
SEEDS_SHOWN = ("auroc", "accuracy", "balanced_accuracy", "sensitivity", "specificity")


def report_of_comparison(facts: ComparisonFacts) -> ReportDocument:
    m = facts.document
    size, seeds = count_patches(m.n_patches, m.n_patients, facts.unit), table_of_seeds(m)
    sections = [
        _describe_differences(facts),
        Section("seeds", "Variability over seeds", [seeds]) if seeds else None,
        _describe_groups(facts),
        _describe_changed(facts),
        _describe_models(facts),
    ]
    return ReportDocument(
        title=" and ".join(model.name for model in m.models),
        subtitle=f"A comparison on the same {size}; the reference is {m.reference}",
        summary=_summarise(facts),
        sections=sections,
        warnings=_warn_reader(facts),
        footer="Written by biopsy.",
        ids_hidden=facts.ids_hidden,
    )


def _summarise(facts: ComparisonFacts) -> Summary:
    m, name = facts.document, facts.document.metric
    return Summary(
        verdict=" ".join(describe_verdict(m, difference) for difference in m.differences),
        headlines=[
            Headline(f"{_label(m, name)} of {model.name}", model.patch[name]) for model in m.models[:3]
        ],
        unit=facts.unit,
        findings=[
            "Use the interval of the paired difference below to compare models; overlap of the separate "
            f"intervals is not a test, because difficult {facts.units} affect both models.",
        ],
    )


def _warn_reader(facts: ComparisonFacts) -> list[str]:
    warnings = [
        f"{model.name}: patient overlap between subsets; the results do not generalise to new patients."
        for model in facts.document.models
        if model.patients_overlap
    ]
    if facts.unit == "patch":
        warnings.append(WITHOUT_IDS)
    seeds = min(len(model.seeds) for model in facts.document.models)
    if seeds == 1:
        warnings.append(ONE_SEED)
    elif seeds < 3:
        warnings.append("Fewer than three training seeds: intervals over seeds are wide and uncertain.")
    return warnings


def _describe_differences(facts: ComparisonFacts) -> Section:
    m = facts.document
    caption = (
        f"Difference from {m.reference}, with unadjusted {m.interval.level:.0%} intervals over "
        f"{facts.units}, and over seeds where both models have several (hollow dots: no interval). "
        "Pale bars: range over seeds."
    )
    tables = [table_of_difference(m, difference) for difference in m.differences]
    return Section("differences", "Differences", [picture(facts.figure, caption), *tables])


def _label(m: ComparisonDocument, metric: str) -> str:
    return metric_label(metric, len(m.class_names))


def _format_range(seeds: SeedSpread) -> str:
    return "-" if seeds.n < 2 else f"{signed(seeds.min)} to {signed(seeds.max)}"


def table_of_difference(m: ComparisonDocument, difference: ModelDifference) -> Table:
    """Return the metrics of a model and of its reference, with the paired differences."""
    n_comparisons = len(m.differences)
    models = {model.name: model.patch for model in m.models}
    rows = [
        [
            _label(m, name),
            models[difference.to][name].value,
            models[difference.of][name].value,
            signed(result.value),
            "none" if result.low is None else f"{result.low:+.3f} to {result.high:+.3f}",
            format_p(result.p),
            *([format_p(result.p_holm)] if n_comparisons > 1 else []),
        ]
        for name, result in difference.metrics.items()
    ]
    note = (
        f"Intervals and p of {difference.compares}: paired Student's t, with the standard error from "
        f"resampling {plural(m.unit)}"
        + (" and the variance between seeds. " if difference.compares == RECIPES else ". ")
        + (f"Adjusted p: Holm over {n_comparisons} comparisons, per metric. " if n_comparisons > 1 else "")
        + f"{_label(m, m.metric)} is the primary metric, the others are secondary."
    )
    results = difference.metrics.values()
    reasons = dict.fromkeys(result.reason for result in results if result.low is None and result.reason)
    if reasons:
        note += f" No interval: {'; '.join(reasons)}."
    columns = ["metric", difference.to, difference.of, "difference", "95 % interval", "p"]
    columns += ["adjusted p"] if n_comparisons > 1 else []
    return make_table(columns, rows, caption=f"{difference.of} against {difference.to}", note=note)


def table_of_seeds(m: ComparisonDocument) -> Table | None:
    """Return the differences between trainings; None where no model has several seeds."""
    rows = [
        [
            difference.of,
            _label(m, name),
            signed(seeds.mean),
            seeds.sd,
            _format_range(seeds),
            f"{seeds.n} seeds" if seeds.paired else f"{seeds.n} pairs of seeds",
        ]
        for difference in m.differences
        for name in SEEDS_SHOWN
        if name in difference.metrics
        for seeds in [difference.metrics[name].over_seeds]
        if seeds.n > 1
    ]
    if not rows:
        return None
    note = (
        f"Variability of the difference between trainings, part of intervals over {plural(m.unit)} and "
        "seeds. Paired by seed where both have the same seeds, otherwise every pair of seeds."
    )
    columns = ["classifier", "metric", "mean difference", "SD over seeds", "range", "of"]
    return make_table(columns, rows, note=note, text_columns=2)


def _describe_groups(facts: ComparisonFacts) -> Section | None:
    m = facts.document
    if not m.by_group:
        return None
    tables = [table_of_groups(m, difference) for difference in m.differences]
    return Section("groups", f"Per-{facts.unit} results", tables)


def table_of_groups(m: ComparisonDocument, difference: ModelDifference) -> Table:
    """Return the metrics of a model and of its reference within each patient or slide."""
    first, *_, last = m.by_group[0].values[m.reference]
    to, of, rows = difference.to, difference.of, []
    for entry in m.by_group:
        values, differences = entry.values, entry.differences[of]
        seeds = differences[first]
        row: list[object] = [entry.group, entry.n_patches, values[to][first], values[of][first]]
        row += [signed(seeds.mean), seeds.sd, _format_range(seeds)]
        rows.append([*row, signed(differences[last].mean)])
    columns = [m.unit, "patches", to, of, f"difference in {_label(m, first)}", "SD over seeds", "range"]
    columns.append(f"difference in {_label(m, last)}")
    note = f"{_label(m, first)}, mean of seeds. Dash: undefined, with a single class or a single seed."
    caption = f"{of} against {to}, per {m.unit}"
    return make_table(columns, rows, caption=caption, note=note, fold_long=True)


def _describe_changed(facts: ComparisonFacts) -> Section | None:
    changed, result = facts.changed, facts.document.changed
    if changed is None or not result:
        return None
    n_changed = {"wrong": result.turned_wrong, "right": result.turned_right}
    p = format_p(result.mcnemar_p_if_patches_were_independent)
    blocks: list[Block] = [
        Facts(
            [
                ("correct by both", number(result.both_right)),
                ("wrong by both", number(result.both_wrong)),
                ("correct to wrong", number(n_changed["wrong"])),
                ("wrong to correct", number(n_changed["right"])),
            ],
            caption=f"From {result.before} to {result.after}",
        ),
        Text(
            f"McNemar's exact test, which assumes independent patches, gives p {p}; use the paired "
            "difference of accuracy above, which accounts for patients.",
            "note",
        ),
    ]
    for unit, counts in (("class", result.by_class), (facts.unit, result.by_group)):
        if counts:
            rows = [[name, *vars(turned).values()] for name, turned in counts.items()]
            columns = [unit, "patches", "correct to wrong", "wrong to correct"]
            blocks.append(make_table(columns, rows, caption=f"Changes per {unit}", fold_long=True))
    for kind, title in (("wrong", "Correct to wrong"), ("right", "Wrong to correct")):
        part = changed[changed["turned"] == kind].head(MAX_SHOWN)
        if facts.get_patch is not None and len(part):
            caption = f"{title} ({len(part)} of {number(n_changed[kind])}, largest change first)"
            note = "Below each patch: true class and its probability, before and after."
            blocks.append(Gallery(caption, _group_patches(facts.get_patch, part), note))
    return Section("changed", "Changed predictions", blocks)


def _group_patches(
    get_patch: Callable[[str], np.ndarray], rows: pd.DataFrame
) -> Sequence[tuple[str, Sequence[Patch]]]:
    groups: dict[str, list[Patch]] = {}
    for label, row in zip(pick_label(rows), rows.to_dict("records"), strict=True):
        probs = f"{number(row['prob_true_before'])} → {number(row['prob_true_after'])}"
        lines = [f"{row['target']}: {probs}", row["patch_id"]]
        groups.setdefault(label, []).append(Patch(encode_patch(get_patch(row["patch_id"])), lines))
    return list(groups.items())


def _describe_models(facts: ComparisonFacts) -> Section:
    m = facts.document
    rows = [
        [
            *(model.name, model.recipe, model.kind, model.split),
            ", ".join(map(str, model.seeds)),
            model.patch["auroc"].value,
            interval_of(model.patch["auroc"]),
        ]
        for model in m.models
    ]
    columns = ["name", "recipe", "kind", "split", "seeds", "AUROC", "interval"]
    notes = Bullets(
        [
            f"Intervals: {m.interval.method}, {m.interval.level:.0%}, over {facts.units}.",
            f"Multiple comparisons: {m.correction}.",
            "Metrics of a study are means over seeds; its folds are pooled, each run at its own threshold.",
        ]
    )
    return Section("compared", "Models compared", [make_table(columns, rows, text_columns=5), notes])


# Metrics with similar ranges, which can share one axis.
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
def draw_differences(differences: Sequence[ModelDifference]) -> Figure:
    """Draw differences from the reference with intervals; hollow dots have no interval.

    Args:
        differences: Of each model. With several seeds, a pale bar shows the range over seeds.

    Raises:
        MetricError: If there is nothing to draw.
    """
    if not differences:
        raise MetricError("no difference to draw: expected at least two classifiers", "empty")
    names = [name for name in SHOWN if any(name in difference.metrics for difference in differences)]
    figure, axes = new_figure(WIDTH_IN, 1.3 + (0.16 + 0.2 * len(differences)) * len(names))
    step = 0.7 / len(differences)
    for index, difference in enumerate(differences):
        colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
        label: str | None = shorten(difference.of, 40)
        for row, name in enumerate(names):
            result = difference.metrics[name]
            if math.isnan(result.value):
                continue
            at = row + (index - (len(differences) - 1) / 2) * step
            has_interval, seeds = result.low is not None, result.over_seeds
            if seeds.n > 1:
                axes.plot(np.array([seeds.min, seeds.max]), [at] * 2, color=colour, linewidth=5, alpha=0.25)
            if has_interval:
                axes.plot(np.array([result.low, result.high]), [at] * 2, color=colour, linewidth=1.6)
            axes.plot(
                result.value,
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
    name_rows(axes, [SHOWN[name] for name in names], margin=0.4)
    axes.set_xlabel(f"Difference from {shorten(differences[0].to, 30)}")
    legend_above(axes, 1)
    return figure
