"""The report of a study: all runs, the spread over seeds, and the pooled out-of-fold metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.core.text import capitalize, count, plural
from biopsy.evaluation.figures import draw_confusion
from biopsy.evaluation.provenance_sections import describe_reproduction
from biopsy.evaluation.sections import picture_of_confusion, table_by_group, table_of_classes
from biopsy.models.weights import title_recipe
from biopsy.plotting.style import (
    BASELINE,
    INK,
    MODEL,
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
    Headline,
    Listing,
    ReportDocument,
    Section,
    Summary,
    Text,
    metric_label,
    number,
    signed,
)
from biopsy.reporting.elements import (
    AS_PUBLISHED_OVERLAP,
    make_table,
    picture,
    synthetic_warning,
    table_of_metrics,
    written_by,
)
from biopsy.reporting.facts import StudyFacts, hide_study
from biopsy.training.metrics import FoldResults

RUN_COLUMNS = {
    "fold": "fold",
    "seed": "seed",
    "n_patches": "patches",
    "auroc": "AUROC",
    "baseline_auroc": "colour-only baseline",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "f1_macro": "F1, macro",
    "threshold": "threshold",
    "chosen_epoch": "selected epoch",
}


def report_of_study(facts: StudyFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Return the report of a study.

    Args:
        hide_ids: Replace patient, slide and patch ids by numbers.
    """
    if hide_ids and not facts.ids_hidden:
        facts = hide_study(facts)
    m, table, results = facts.metrics, facts.table, facts.fold_results
    by_fold = results.by_fold.assign(fold=name_folds(results.by_fold))
    facts = replace(
        facts, table=table.assign(fold=name_folds(table)), fold_results=replace(results, by_fold=by_fold)
    )
    sections = [
        _describe_folds(facts),
        _describe_groups(facts),
        _describe_pooled(facts),
        _describe_runs(facts),
        Section("recipe", "Recipe", [Listing(facts.recipe_toml, fold="All settings (TOML)")])
        if facts.recipe_toml
        else None,
        describe_reproduction(facts.study),
    ]
    return ReportDocument(
        title=title_recipe(facts.recipe) if facts.recipe else "A study",
        subtitle=f"Study {facts.study.get('name', '')}: {count(len(by_fold), 'fold')}, "
        f"{count(results.n_seeds, 'seed')}, {count(len(table), 'run')}; "
        f"{count(m.n_patches, 'patch')} of {count(m.n_patients, facts.unit)}",
        summary=_summarise(facts),
        sections=sections,
        warnings=_warn_reader(facts),
        footer=written_by(facts.study),
        ids_hidden=facts.ids_hidden,
    )


def name_folds(table: pd.DataFrame) -> list[str]:
    """Return a name for the fold of each run: the tested ids if there are few, else index and number."""
    if "tested" not in table:
        return [str(fold) for fold in table["fold"]]
    tested = table["tested"].astype(str)
    is_counted = tested.str.fullmatch(r"\d+ (patients?|slides?|patch|patches)")
    names = []
    for fold, tested_ids, is_count in zip(table["fold"], tested, is_counted, strict=True):
        if is_count:
            names.append(f"{fold} ({tested_ids})")
        else:
            names.append(tested_ids if 1 <= len(tested_ids) <= 24 else str(fold))
    return names


def _summarise(facts: StudyFacts) -> Summary:
    pooled, n_classes = facts.pooled, len(facts.class_names)
    names = ("sensitivity", "specificity") if n_classes == 2 else ("accuracy", "balanced_accuracy")
    note = _compare_with_folds(facts.fold_results)
    is_synthetic = facts.study["pack"].get("synthetic")
    return Summary(
        verdict=_state_verdict(facts) + synthetic_warning(is_synthetic),
        headlines=[
            Headline(
                f"{capitalize(facts.ranking_metric)}, out-of-fold predictions pooled",
                pooled["auroc"],
                beside=note,
            ),
            *(Headline(metric_label(name).capitalize(), pooled[name]) for name in names),
        ],
        unit=facts.unit,
        findings=[
            f"Intervals are over {plural(facts.unit)}; the spread over seeds is that of repeated training.",
        ],
    )


def _compare_with_folds(results: FoldResults) -> str:
    """Return the mean of folds, its range over seeds, and that of the baseline."""
    if results.metric != "auroc":
        return "not defined within folds, of which none tests every class"
    seeds, colour = results.over_seeds, results.baseline_auroc
    text = f"mean of folds: {number(seeds.mean)}"
    if results.n_seeds > 1:
        text += f" ({number(seeds.min)} to {number(seeds.max)} over {results.n_seeds} seeds)"
    return text if colour is None else f"{text}; colour-only baseline, mean of folds: {number(colour)}"


def _state_verdict(facts: StudyFacts) -> str:
    """Return the result in one sentence: the mean over folds and seeds, and the colour-only baseline."""
    population = f"On {count(facts.n_groups, facts.unit)}"
    if facts.unit != "patch" and not facts.patients_overlap:
        population += ", each left out of training in one fold"
    n_classes = len(facts.class_names)
    task = f"{facts.positive} patches" if n_classes == 2 else f"{n_classes} classes"
    results = facts.fold_results
    runs = f"{count(len(results.by_fold), 'fold')} and {count(results.n_seeds, 'seed')}"
    metric = facts.ranking_metric if results.metric == "auroc" else "accuracy"
    text = (
        f"{population}, the model recognises {task} with a mean {metric} of {number(results.over_seeds.mean)}"
    )
    text += f" ({runs})"
    if results.baseline_auroc is None:
        return f"{text}."
    return f"{text}; a colour-only baseline reaches {number(results.baseline_auroc)}."


def _warn_reader(facts: StudyFacts) -> list[str]:
    warnings = []
    if facts.patients_overlap:
        warnings.append(AS_PUBLISHED_OVERLAP)
    ours, colour = facts.fold_results.over_seeds.mean, facts.fold_results.baseline_auroc
    if ours is not None and colour is not None and colour >= ours:
        warnings.append(
            f"A colour-only baseline reaches a mean AUROC of {number(colour)} (this model: {number(ours)}); "
            "the model may rely on staining rather than morphology."
        )
    return warnings


def _describe_folds(facts: StudyFacts) -> Section:
    table, results = facts.table, facts.fold_results
    name, by_fold = metric_label(results.metric), results.by_fold.set_index("fold")
    baseline = by_fold["baseline_auroc"].to_dict() if "baseline_auroc" in by_fold else None
    figure = draw_folds(
        table["fold"].tolist(), table[results.metric].to_numpy(float), metric=name, baseline=baseline
    )
    rows = []
    for fold, result in by_fold.iterrows():
        values = [float(result[key]) for key in ("mean", "min", "max")]
        beside = [] if baseline is None else [result["baseline_auroc"], signed(result["gain"])]
        rows.append([str(fold), *values, int(result["n_seeds"]), *beside])
    columns = ["fold", "mean of seeds", "minimum", "maximum", "seeds"]
    columns += [] if baseline is None else ["colour-only baseline", "difference"]
    note = "" if baseline is None else "The difference is paired by test patch."
    chance = "; dotted line: chance" if results.metric == "auroc" else ""
    caption = f"{capitalize(name)} of every run, by fold. A dot is a run with one seed{chance}."
    table_of_folds = make_table(columns, rows, caption=f"{capitalize(name)} by fold", note=note)
    return Section("folds", "Folds and seeds", [picture(svg(figure, "folds"), caption), table_of_folds])


def _describe_groups(facts: StudyFacts) -> Section | None:
    """Return results per patient or slide, mean over seeds, with the baseline on the same patches."""
    if not facts.groups:
        return None
    rows = []
    for group in facts.groups:
        spread = "-" if group.mean is None else f"{number(group.min)} to {number(group.max)}"
        colour = group.baseline_auroc
        gain = None if group.mean is None or colour is None else group.mean - colour
        beside = [colour, signed(gain)] if facts.is_binary else []
        rows.append([group.id, group.n_patches, group.mean, spread, *beside])
    unit = "slide" if facts.unit == "slide" else "patient"
    metric = "AUROC" if facts.is_binary else "accuracy"
    columns = [unit, "patches", f"{metric}, mean of seeds", "range over seeds"]
    columns += ["colour-only baseline", "difference"] if facts.is_binary else []
    note = "Dash: undefined, because only one class occurs, or not measured." if facts.is_binary else ""
    return Section("groups", f"Per-{unit} results", [table_by_group(unit, columns, rows, note=note)])


def _describe_pooled(facts: StudyFacts) -> Section:
    blocks: list[Block] = [
        Text(
            "The test predictions of all folds and seeds, taken together. A ranking metric such as AUROC "
            "then compares probabilities of different models: read it beside the mean over folds above."
        ),
        table_of_metrics(facts.metrics),
        *_compare_pooling(facts),
    ]
    blocks.append(table_of_classes(facts.metrics.classification_report))
    if facts.metrics.confusion_matrix is not None:
        blocks.append(picture_of_confusion(facts.metrics.confusion_matrix, facts.class_titles))
    if facts.metrics.confusion:
        figure = draw_confusion(
            **vars(facts.metrics.confusion), negative=facts.negative, positive=facts.positive
        )
        caption = "Counts summed over all runs, each at its own decision threshold."
        blocks.append(picture(svg(figure, "confusion"), caption))
    return Section("pooled", "Pooled out-of-fold performance", blocks)


def _compare_pooling(facts: StudyFacts) -> list[Block]:
    """Return the pooled metrics and the means within folds, if there are several folds."""
    rows = [
        [
            metric_label(name, len(facts.class_names)),
            facts.pooled[name].value if name in facts.pooled else None,
            *(result.mean, result.min, result.max),
        ]
        for name, result in facts.within_folds.items()
        if result.n_folds > 1
    ]
    if not rows:
        return []
    note = (
        "Pooled, predictions of the models of different folds are ranked together; within folds each model "
        "is evaluated by itself (mean of seeds). They differ where the models' scores differ in scale."
    )
    columns = ["", "pooled", "mean within folds", "minimum", "maximum"]
    return [make_table(columns, rows, caption="Pooled and within folds", note=note)]


def _describe_runs(facts: StudyFacts) -> Section:
    columns = [name for name in RUN_COLUMNS if name in facts.table]
    rows = [
        [str(record[name]) if name in ("fold", "seed") else record[name] for name in columns]
        for record in facts.table[columns].to_dict("records")
    ]
    headings = [RUN_COLUMNS.get(name, metric_label(name)) for name in columns]
    table = make_table(headings, rows, caption=count(len(rows), "run"), fold_long=True)
    return Section("runs", "All runs", [table])


@styled
def draw_folds(
    folds: Sequence[object],
    values: np.ndarray,
    *,
    metric: str = "AUROC",
    baseline: Mapping[object, float] | None = None,
) -> Figure:
    """Draw a metric of every run: one row per fold, one dot per seed, a bar for the mean.

    Args:
        folds: The fold of each run, shape ``(n_runs,)``; rows keep the order of first appearance.
        values: The metric of each run, shape ``(n_runs,)``; NaN is left out.
        baseline: Value of the colour-only baseline by fold, drawn as a grey diamond.

    Raises:
        MetricError: If the numbers of folds and values differ.
    """
    values = np.asarray(values, dtype=float)
    if len(folds) != len(values) or not len(values):
        raise MetricError(f"{len(folds)} folds have {len(values)} values; expected one per run", "shape")
    names = list(dict.fromkeys(folds))
    figure, axes = new_figure(WIDTH_IN, 1.2 + 0.36 * max(len(names), 2))
    seen = values[np.isfinite(values)].tolist()
    for row, name in enumerate(names):
        part = np.array([value for fold, value in zip(folds, values, strict=True) if fold == name])
        part = np.sort(part[np.isfinite(part)])
        spread = 0.09 * (np.arange(len(part)) % 3 - 1) if len(part) > 1 else np.zeros(len(part))
        axes.plot(
            part,
            row + spread,
            "o",
            color=MODEL,
            markersize=6,
            alpha=0.75,
            markeredgewidth=0,
            label="one seed" if row == 0 else None,
        )
        if len(part):
            axes.plot(
                [part.mean()] * 2,
                [row - 0.26, row + 0.26],
                color=INK,
                linewidth=1.8,
                label="mean of seeds" if row == 0 else None,
            )
    if baseline:
        baselines = [
            (baseline[name], row) for row, name in enumerate(names) if np.isfinite(baseline.get(name, np.nan))
        ]
        seen += [value for value, _ in baselines]
        axes.plot(
            *zip(*baselines, strict=True) if baselines else ([], []),
            "D",
            color=BASELINE,
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.4,
            label="colour-only baseline",
        )
    if metric == "AUROC":
        axes.axvline(0.5, color=BASELINE, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlim(min([0.48, *seen]) - 0.02, 1.01)
    name_rows(axes, [shorten(name) for name in names])
    axes.set_xlabel(metric)
    legend_above(axes)
    return figure
