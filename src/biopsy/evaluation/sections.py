"""Sections of the report on performance: metrics, curves, decisions, patients, slides."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError
from biopsy.core.text import class_title, count, plural
from biopsy.evaluation.figures import (
    draw_confusion,
    draw_confusion_matrix,
    draw_decision_curve,
    draw_patient_metric,
    draw_patient_probs,
    draw_precision_recall,
    draw_roc,
)
from biopsy.plotting.slides import ALL_PANELS, draw_slide
from biopsy.plotting.style import svg
from biopsy.reporting.document import (
    Block,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    metric_label,
    number,
    signed,
)
from biopsy.reporting.elements import describe_rule, make_table, picture, table_of_meanings, table_of_metrics
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section
from biopsy.slide_io.mosaic import stitch, stitch_values
from biopsy.statistics.multiclass import ClassReport
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import AtPrevalence, DecisionCurve, GroupMetrics, OperatingPoint, Subgroup


@section("numbers", order=10)
def describe_numbers(facts: RunFacts) -> Section:
    """Return every metric with its interval, the classification report, and the confusion."""
    blocks: list[Block] = [
        table_of_metrics(facts.metrics, facts.on_subset),
        table_of_meanings(facts.metrics),
        table_of_classes(facts.metrics.classification_report, _describe_decision_rule(facts)),
    ]
    if facts.metrics.confusion_matrix is None:
        blocks.append(Pictures(_confusion_pictures(facts)))
    else:
        blocks += [
            _table_of_one_against_rest(facts.metrics.one_vs_rest or {}),
            picture_of_confusion(facts.metrics.confusion_matrix, facts.class_titles),
        ]
    return Section("numbers", "Performance", blocks)


def picture_of_confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Pictures:
    """Return the confusion matrix of more than two classes as a figure."""
    caption = (
        "Patches by true class (rows) and predicted class (columns), with the share of the true class. The "
        "diagonal is correct."
    )
    return picture(svg(draw_confusion_matrix(np.asarray(matrix), class_names), "confusion"), caption)


def table_of_classes(report: Sequence[ClassReport], note: str = "") -> Table:
    """Return the classification report: precision, recall and F1 of each class, and their averages."""
    rows = [[class_title(row.name), row.precision, row.recall, row.f1, row.n] for row in report]
    columns = ["class", "precision", "recall", "F1", "patches"]
    return make_table(columns, rows, caption="Classification report", note=note)


def _describe_decision_rule(facts: RunFacts) -> str:
    if not facts.is_binary:
        return "Each patch is assigned the class of highest probability."
    threshold = "decision threshold" if facts.is_run else "threshold"
    return (
        f"At the {threshold}, {number(facts.threshold)}. The recall of {facts.positive} is the sensitivity, "
        f"that of {facts.negative} the specificity."
    )


def _table_of_one_against_rest(per_class: Mapping[str, Mapping[str, Interval]]) -> Table:
    names = ("auroc", "sensitivity", "specificity", "ppv", "f1")
    return make_table(
        ["class", *(metric_label(key) for key in names)],
        [[class_title(name), *(metrics[key] for key in names)] for name, metrics in per_class.items()],
        caption="Each class against the rest",
        note="The class is taken as positive, all others together as negative. 95 % intervals in brackets.",
    )


def _confusion_pictures(facts: RunFacts) -> list[Picture]:
    kind = "decision threshold" if facts.is_run else "threshold"
    parts = (
        ("confusion", f"At the {kind}, {number(facts.threshold)}.", facts.metrics.confusion),
        ("at_half", "At threshold 0.5.", facts.metrics.at_half),
    )
    return [
        Picture(
            caption,
            svg(draw_confusion(**vars(counts), negative=facts.negative, positive=facts.positive), name),
        )
        for name, caption, counts in parts
        if counts
    ]


@section("curves", order=20)
def describe_curves(facts: RunFacts) -> Section | None:
    """Return ROC and precision-recall curves, for two classes that both occur."""
    target = facts.is_positive
    if not facts.is_binary or not 0 < target.sum() < len(target):
        return None
    prob = facts.predictions["prob"].to_numpy(float)
    sensitivity, specificity, ppv = (
        facts.pooled[name].value for name in ("sensitivity", "specificity", "ppv")
    )
    pictures = [
        Picture(
            "ROC curve: sensitivity against the false positive rate (1 - specificity) at every threshold.",
            svg(draw_roc(target, prob, operating_point=(sensitivity, specificity)), "roc"),
        ),
        Picture(
            f"Precision-recall curve of {facts.positive}. A model without skill has the precision of the "
            "dashed line, the prevalence.",
            svg(draw_precision_recall(target, prob, operating_point=(sensitivity, ppv)), "pr"),
        ),
    ]
    return Section("curves", "Discrimination", [Pictures(pictures)])


@section("decisions", order=40)
def describe_decisions(facts: RunFacts) -> Section | None:
    """Return operating points and their drift, predictive values at a prevalence, and the decision curve."""
    points, curve = facts.metrics.operating_points, facts.metrics.decision_curve
    if not points or not curve:
        return None
    blocks: list[Block] = [table_of_points(points, facts.metrics.subset)]
    if facts.metrics.at_prevalence:
        blocks.append(table_at_prevalence(facts.metrics.at_prevalence))
    caption = (
        f"Decision curve (Vickers and Elkin 2006) for {facts.positive} at the prevalence of these patches. "
        "Net benefit: true positives minus false positives, weighted by the odds of the threshold "
        "probability, per patch. The model is useful where its curve lies above acting on all and on none."
    )
    figure = svg(draw_decision_curve(curve), "decision-curve")
    blocks += [picture(figure, caption), Text(describe_benefit(curve))]
    return Section("decisions", "Decision thresholds and net benefit", blocks)


def table_of_points(points: Sequence[OperatingPoint], subset: str | None) -> Table:
    rows: list[list[object]] = [[describe_rule(point.rule), point.threshold] for point in points]
    chosen_on = points[0].chosen_on
    if subset in (None, chosen_on):
        names = ("sensitivity", "specificity", "ppv", "npv")
        return make_table(
            ["rule", "threshold", *(metric_label(name) for name in names)],
            [
                [*row, *(point.achieved[name] for name in names)]
                for row, point in zip(rows, points, strict=True)
            ],
            caption="Operating points" if subset else "Operating point",
            note=f"Every threshold was chosen on these {subset} patches: expect less on others."
            if subset
            else "The threshold was given with the predictions, or is 0.5.",
        )
    columns = ["rule", "threshold"]
    for name in ("sensitivity", "specificity"):
        columns += [f"{name} {chosen_on}", f"{name} {subset}", "drift"]
        for row, point in zip(rows, points, strict=True):
            row += [point.where_chosen[name], point.achieved[name], signed(point.drift[name])]
    return make_table(
        columns,
        rows,
        caption="Operating points",
        note=f"Every threshold was chosen on the {chosen_on} subset and kept; the first one is the decision "
        f"threshold. Drift: {subset} minus {chosen_on}. 95 % intervals in brackets.",
    )


def table_at_prevalence(at_prevalence: AtPrevalence) -> Table:
    return make_table(
        ["rule", "positive predictive value", "negative predictive value"],
        [[describe_rule(point.rule), point.ppv, point.npv] for point in at_prevalence.points],
        caption=f"Predictive values at a prevalence of {100 * at_prevalence.prevalence:g} %",
        note="By Bayes' rule from sensitivity and specificity above. 95 % intervals in brackets.",
    )


def describe_benefit(curve: DecisionCurve) -> str:
    """Return the threshold probabilities at which net benefit exceeds that of acting on all or on none."""
    points = [(point.threshold, point.gain) for point in curve.marked]
    spans = _join_thresholds([(at, gain.compare(0) == "higher") for at, gain in points])
    if spans:
        return (
            "Net benefit is higher than that of acting on all or on no patches, with the whole 95 % interval "
            f"of the difference above 0, at threshold probabilities of {spans}."
        )
    higher = _join_thresholds([(at, gain.value > 0) for at, gain in points])
    if not higher:
        return "At no threshold probability is net benefit higher than that of acting on all or no patches."
    reason = next((gain.reason for _, gain in points if gain.value > 0 and gain.low is None), None)
    return (
        f"Net benefit is estimated to be higher than that of acting on all or on no patches at {higher}, but "
        + (
            f"this has no interval: {reason}."
            if reason
            else "the 95 % intervals of the difference include 0."
        )
    )


def _join_thresholds(points: Sequence[tuple[float, bool]]) -> str:
    """Format ranges of selected thresholds, such as ``0.10 to 0.35, 0.50``; empty if none is selected."""
    spans: list[list[float]] = []
    for (at, chosen), follows in zip(points, [False, *(chosen for _, chosen in points)], strict=False):
        if chosen and follows:
            spans[-1][1] = at
        elif chosen:
            spans.append([at, at])
    return ", ".join(f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}" for low, high in spans)


MAX_SLIDES = 4
PANEL_NAMES = {
    "tissue": "Tissue",
    "target": "Annotated classes",
    "prob": "Map of predicted probabilities",
    "error": "Map of errors",
}
SLIDE_SIDE_PX = 640


@section("patients", order=60)
def describe_patients(facts: RunFacts) -> Section | None:
    """Return results per patient or slide, and per subgroup."""
    blocks: list[Block] = []
    if facts.metrics.groups:
        describe = _blocks_by_group if facts.is_binary else _classes_by_group
        blocks += describe(facts, facts.metrics.groups)
    if facts.metrics.subgroups:
        blocks.append(table_of_subgroups(facts.metrics.subgroups, len(facts.class_names), facts.unit))
    if not blocks:
        return None
    heading = "Per-slide results" if facts.unit == "slide" else "Per-patient results"
    return Section("patients", heading, blocks)


def _blocks_by_group(facts: RunFacts, groups: Sequence[GroupMetrics]) -> list[Block]:
    aurocs = draw_patient_metric(
        [group.id for group in groups],
        np.array([group.values["auroc"] for group in groups]),
        np.array([group.n_patches for group in groups]),
        metric="AUROC",
        overall=facts.pooled["auroc"],
    )
    has_group = facts.group_ids.notna().to_numpy()
    probs = draw_patient_probs(
        facts.group_ids[has_group].astype(str).tolist(),
        facts.is_positive[has_group],
        facts.predictions["prob"].to_numpy(float)[has_group],
        class_names=(facts.negative, facts.positive),
        threshold=facts.threshold,
    )
    pictures = [
        Picture(
            f"AUROC within each {facts.unit}. Larger dots: more patches. Band and dashed line: AUROC of all "
            "patches together with its interval.",
            svg(aurocs, "patient-auroc"),
        ),
        Picture(
            f"Predicted probabilities within each {facts.unit}: median (circle), interquartile range (thick "
            "line) and 5th to 95th percentile (thin line).",
            svg(probs, "patient-probs"),
        ),
    ]
    metrics = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
    rows = [
        [
            group.id,
            group.n_patches,
            list(group.per_class.values())[facts.positive_index],
            *(group.values[key] for key in metrics),
        ]
        for group in groups
    ]
    columns = [facts.unit, "patches", facts.positive, *(metric_label(key) for key in metrics)]
    note = "Dash: undefined, because only one class occurs."
    return [Pictures(pictures), table_by_group(facts.unit, columns, rows, note=note)]


def _classes_by_group(facts: RunFacts, groups: Sequence[GroupMetrics]) -> list[Block]:
    """Return the table of patients for more than two classes: true classes and accuracy."""
    rows = []
    for group in groups:
        counts = sorted(zip(facts.class_titles, group.per_class.values(), strict=True), key=lambda x: -x[1])
        classes = ", ".join(f"{title} ({n:,})" for title, n in counts if n)
        rows.append([group.id, classes, group.n_patches, group.n_correct, group.values["accuracy"]])
    columns = [facts.unit, "true classes (patches)", "patches", "correct", "accuracy"]
    return [table_by_group(facts.unit, columns, rows, text_columns=2)]


def table_by_group(
    unit: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    note: str = "",
    text_columns: int = 1,
) -> Table:
    """Return a table with one row per patient or slide, collapsed if it is long."""
    caption = f"Metrics of each {unit} ({len(rows)})"
    return make_table(columns, rows, caption=caption, note=note, text_columns=text_columns, fold_long=True)


def table_of_subgroups(subgroups: Mapping[str, Mapping[str, Subgroup]], n_classes: int, unit: str) -> Table:
    results = [
        (column, value, result) for column, values in subgroups.items() for value, result in values.items()
    ]
    metrics = list(results[0][2].patch)[:3]
    return make_table(
        [
            "column",
            "subgroup",
            "patches",
            plural(unit),
            *(metric_label(name, n_classes) for name in metrics),
        ],
        [
            [column, value, result.n_patches, result.n_patients, *(result.patch[name] for name in metrics)]
            for column, value, result in results
        ],
        caption="Subgroups",
        note=f"95 % intervals in brackets, each by itself: not corrected for {len(results)} subgroups. About "
        "one in twenty misses the true value by chance.",
        text_columns=2,
    )


@section("slides", order=80)
def describe_slides(facts: RunFacts) -> Section | None:
    """Return maps of up to four slides, those with both classes and most patches first."""
    table = facts.predictions
    if not facts.is_binary or facts.get_patch is None or facts.patch_px is None:
        return None
    if not {"x", "y"} <= set(table) or not table[["x", "y"]].notna().all(axis=1).any():
        return None
    column = "slide_id" if "slide_id" in table and table["slide_id"].notna().any() else "patient_id"
    located = table.assign(is_positive=facts.is_positive)[
        table[["x", "y"]].notna().all(axis=1) & table[column].notna()
    ]
    if located.empty:
        return None
    counts = located.groupby(column)["is_positive"].agg(["nunique", "size"])
    chosen = counts.sort_values(["nunique", "size"], ascending=False, kind="stable").head(MAX_SLIDES).index
    kind = column.removesuffix("_id")
    blocks: list[Block] = []
    for name in chosen:
        rows = located[located[column] == name]
        n_positive = number(int(rows["is_positive"].sum()))
        caption = f"{kind.capitalize()} {name}: {count(len(rows), 'patch')}, {n_positive} {facts.positive}"
        try:
            pictures = _slide_pictures(facts, rows, f"slide-{name}")
        except DataError as error:
            blocks.append(Text(f"{caption}. Not drawn: {error}.", "note"))
        else:
            blocks.append(Pictures(pictures, across=4, caption=caption))
    left_out = len(counts) - len(chosen)
    if left_out:
        blocks.append(
            Text(
                f"{left_out} more are not shown; slides with both classes and most patches are shown first.",
                "note",
            )
        )
    return Section("slides", "Predictions on the slides", blocks)


def _slide_pictures(facts: RunFacts, rows: pd.DataFrame, name: str) -> list[Picture]:
    assert facts.get_patch is not None and facts.patch_px is not None
    x, y = rows["x"].to_numpy(float), rows["y"].to_numpy(float)
    target = stitch_values(rows["is_positive"], x, y, patch_px=facts.patch_px)
    prob = stitch_values(rows["prob"], x, y, patch_px=facts.patch_px)
    side = max(np.ptp(x), np.ptp(y)) + facts.patch_px
    patches = map(facts.get_patch, rows["patch_id"].astype(str))
    tissue = stitch(patches, x, y, patch_px=facts.patch_px, scale=min(1.0, SLIDE_SIDE_PX / side))
    um_per_cell = None if facts.mpp is None else facts.mpp * facts.patch_px
    pictures = []
    for panel in ALL_PANELS:
        figure = draw_slide(
            tissue,
            target,
            prob,
            um_per_cell=um_per_cell,
            class_names=(facts.negative, facts.positive),
            threshold=facts.threshold,
            panels=[panel],
        )
        pictures.append(Picture("", svg(figure, f"{name}-{panel}"), alt=f"{PANEL_NAMES[panel]} of {name}"))
    return pictures
