"""Report section on misclassified patches: counts, location, associated properties, and galleries."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from biopsy.core.text import capitalize, class_title, count, plural
from biopsy.evaluation.errors.case_views import errors, hide_errors, load_errors
from biopsy.evaluation.errors.hypotheses.measure import ERROR_HYPOTHESES, Hypotheses, Hypothesis
from biopsy.evaluation.errors.measure import (
    AGAINST,
    KINDS,
    CaseView,
    ErrorContrast,
    ErrorRecord,
    Errors,
    GalleryPatch,
)
from biopsy.evaluation.neighbours import SHOWN
from biopsy.evaluation.patch_properties import property_name
from biopsy.plotting.style import jpeg
from biopsy.reporting.document import Block, Bullets, Case, Cases, Section, Text, number
from biopsy.reporting.elements import make_table, pick_label
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import Result, section

THUMBNAIL_PX = 144
ERRORS = {"fn": ("false negatives", "true positives"), "fp": ("false positives", "true negatives")}


@section(
    "errors",
    order=70,
    errors=Result(
        load_errors,
        hide_errors,
        title="Error analysis",
        command="biopsy errors {run}",
        make=errors,
        applies=lambda run: run.info["threshold"] is not None,
    ),
)
def describe_errors(facts: RunFacts) -> Section | None:
    """Return the counts of errors, the properties associated with them, and the patches."""
    record = facts.result("errors", ErrorRecord)
    if record is None:
        return None
    document = record.document
    blocks: list[Block] = [Text(_describe_counts(facts, document)), *_describe_zones(document)]
    blocks += _describe_contrasts(document)
    tested = facts.result("hypotheses", Hypotheses)
    answers = [_describe_hypothesis(item) for item in (tested.hypotheses if tested else ())]
    if any(answers):
        blocks.append(Bullets([answer for answer in answers if answer]))
    return Section("errors", "Error analysis", blocks + _galleries(facts, record))


def _describe_counts(facts: RunFacts, document: Errors) -> str:
    n = document["counts"]
    return (
        f"{number(n['fn'] + n['fp'])} of {number(document['n_patches'])} patches are misclassified: "
        f"{number(n['fn'])} of {number(n['fn'] + n['tp'])} {facts.positive} patches are false negatives, and "
        f"{number(n['fp'])} of {number(n['fp'] + n['tn'])} {facts.negative} patches are false positives."
    )


def _describe_zones(document: Errors) -> list[Block]:
    """Return the errors at annotated borders and away from them."""
    zones, unit = document["zones"], document["unit"]
    if not zones:
        return [
            Text("The patches have no coordinates; errors at annotated borders cannot be counted.", "note")
        ]
    rows: list[list[object]] = []
    several = unit != "patch" and document["n_groups"] > 1
    for name, zone in zones.items():
        means = zone.patient if several and zone.patient else {}
        rates = [level[metric] for level in (zone.patch, means) for metric in SHOWN if metric in level]
        rows.append([name, zone.n_patches, zone.fn, zone.fp, *rates])
    columns = ["zone", "patches", "false negatives", "false positives", "sensitivity", "specificity"]
    if several:
        columns += [f"{name}, mean of {plural(unit)}" for name in SHOWN]
    errors = {name: zone.fn + zone.fp for name, zone in zones.items()}
    patches = {name: zone.n_patches for name, zone in zones.items()}
    caption = "Errors at annotated borders and elsewhere"
    if "border" in zones and any(errors.values()):
        share, size = (counts["border"] / sum(counts.values()) for counts in (errors, patches))
        caption = f"{share:.0%} of the errors, but {size:.0%} of the patches, lie at an annotated border"
    note = (
        "Border: at least one of the eight neighbours on the slide has another label, so that the label is "
        "less certain; deep: all neighbours in the data have the same label. 95 % intervals in brackets."
    )
    return [make_table(columns, rows, caption=caption, note=note)]


def _describe_contrasts(document: Errors) -> list[Block]:
    """Return the properties associated with errors."""
    contrasts, unit = document["contrasts"], document["unit"]
    if not document["n_comparisons"]:
        return [Text("No comparison: no class has both misclassified and correct patches.", "note")]
    within = unit != "patch"
    rows = [
        [
            ERRORS[result.errors][0],
            property_name(result.property),
            number(result.mean_chosen, _digits(result)),
            number(result.mean_others, _digits(result)),
            result.within if within else result.auroc,
            result.verdict,
        ]
        for result in contrasts
        if result.n_chosen and result.n_others
    ]
    chance = f"P(wrong > right) within a {unit} (AUC)" if within else "P(wrong > right) (AUC)"
    columns = ["errors", "property", "mean, errors", "mean, correct", chance, "difference"]
    note_start = (
        "P(wrong > right): probability that a misclassified patch has a higher value than a correct patch "
        f"of the same class and {unit}, averaged over {plural(unit)}"
        if within
        else "P(wrong > right): probability that a misclassified patch has a higher value than a correct "
        "patch of the same class. Without patient ids the unit is the patch, and intervals are too narrow"
    )
    units = "; ".join(f"{property_name(name)}: {text}" for name, text in document["properties"].items())
    compared = {result.property for result in contrasts}
    unmeasured = [property_name(name) for name in document["properties"] if name not in compared]
    left_out = (
        f" Not measured, because the pixel size (µm) is unknown: {', '.join(unmeasured)}."
        if unmeasured
        else ""
    )
    note = (
        f"{note_start}; 0.5: no difference. The 95 % intervals are simultaneous over "
        f"{document['n_comparisons']} comparisons ({document['level_each']:.2%} each). Associations need not "
        "be causal. Measured on "
        f"{number(document['n_measured'])} patches. {units}.{left_out}"
    )
    return [
        Text(_describe_verdicts(contrasts)),
        make_table(columns, rows, caption="Properties associated with errors", note=note, text_columns=2),
        *_by_group(contrasts, unit),
    ]


def _digits(contrast: ErrorContrast) -> int:
    return 0 if max(abs(contrast.mean_chosen), abs(contrast.mean_others)) >= 20 else 3


def _describe_verdicts(contrasts: Sequence[ErrorContrast]) -> str:
    """Return one sentence per kind of error."""
    sentences = []
    for kind in AGAINST:
        results = [result for result in contrasts if result.errors == kind and result.n_chosen]
        clear = [
            f"{result.verdict} {property_name(result.property)}"
            for result in results
            if result.verdict in ("higher", "lower")
        ]
        wrong, right = ERRORS[kind]
        if clear:
            sentences.append(f"{wrong.capitalize()} have {', '.join(clear)} than {right}.")
        elif results and all(result.verdict == "inconclusive" for result in results):
            sentences.append(
                f"Inconclusive: too few {wrong} to test which properties are associated with them."
            )
        elif results:
            sentences.append(f"No property is significantly associated with {wrong}.")
    return " ".join(sentences)


def _by_group(contrasts: Sequence[ErrorContrast], unit: str) -> list[Block]:
    rows = [
        [f"{property_name(result.property)}, {ERRORS[result.errors][0]}", name, *item.values()]
        for result in contrasts
        for name, item in result.by_group.items()
        if not np.isnan(item["auroc"])
    ]
    groups = {row[1] for row in rows}
    if len(groups) < 2:
        return []
    columns = ["property", unit, "errors", "correct", "P(wrong > right) (AUC)"]
    return [make_table(columns, rows, text_columns=2, fold=f"Properties of errors within each {unit}")]


def _describe_hypothesis(hypothesis: Hypothesis) -> str:
    if hypothesis.name not in ERROR_HYPOTHESES:
        return ""
    return f"{capitalize(hypothesis.source)}: “{hypothesis.claim}” {hypothesis.answer}"


def _galleries(facts: RunFacts, record: ErrorRecord) -> list[Block]:
    titles = {
        "fn": f"False negatives: {facts.positive} predicted {facts.negative}",
        "fp": f"False positives: {facts.negative} predicted {facts.positive}",
        "uncertain": "Least certain: probability closest to the threshold",
    }
    counts = record.document["counts"]
    blocks: list[Block] = []
    for kind, title in titles.items():
        entries = record.document["galleries"][kind]
        if not entries:
            blocks.append(Text(f"{title}: none."))
            continue
        suffix = (
            f" ({len(entries)} of {number(counts[kind])}, most confident first)"
            if kind in counts
            else f" ({len(entries)})"
        )
        blocks.append(Cases(title + suffix, _group_cases(record, entries)))
    if record.views and any(isinstance(block, Cases) for block in blocks):
        blocks.insert(0, Text(_explain_pictures(facts, record), "note"))
    return blocks


def _explain_pictures(facts: RunFacts, record: ErrorRecord) -> str:
    reference = record.document["training_reference"]
    return (
        "Each row: the patch, its saliency map, its position on the slide where known, and the nearest "
        f"three of {count(reference['n'], 'training patch')} in the penultimate layer of the network, with "
        f"class, patient and distance ({reference['distance']}). Below: probability of {facts.positive}, "
        "patch id, and properties that are unusual among correctly classified patches of its class (the "
        f"share of them with a lower or higher value). {record.caption}"
    )


def _group_cases(record: ErrorRecord, entries: Sequence[GalleryPatch]) -> list[tuple[str, list[Case]]]:
    table = record.table
    rows = table.assign(who=pick_label(table)).set_index(table["patch_id"].astype(str))
    groups: dict[str, list[Case]] = {}
    for entry in entries:
        row = rows.loc[entry["patch_id"]]
        lines = [
            number(float(row["prob"])),
            entry["patch_id"],
            KINDS[row["kind"]],
            *_reasons(entry, row),
        ]
        pictures = _pictures(record.views.get(entry["patch_id"]), entry)
        groups.setdefault(row["who"], []).append(Case(pictures, lines))
    return list(groups.items())


def _reasons(entry: GalleryPatch, row: Any) -> list[str]:
    lines = [
        f"{property_name(item['property'])} {_digits_of(item['value'])}, "
        f"{'higher' if item['rank'] > 0.5 else 'lower'} than in {max(item['rank'], 1 - item['rank']):.0%}"
        for item in entry["unusual"]
    ]
    return lines + (["at an annotated border"] if str(row["zone"]) == "border" else [])


def _digits_of(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _pictures(case_view: CaseView | None, entry: GalleryPatch) -> list[tuple[bytes, str]]:
    if case_view is None:
        return []
    saliency = "saliency (constant)" if case_view.is_constant else "saliency"
    pictures = [(_encode(case_view.patch), "patch"), (_encode(case_view.overlay), saliency)]
    if case_view.overview is not None:
        pictures.append((_encode(case_view.overview), "on the slide"))
    for image, neighbour in zip(case_view.nearest, entry["nearest"], strict=True):
        title, owner = class_title(neighbour["class"]), neighbour["patient_id"] or neighbour["slide_id"] or ""
        caption = f"{title} {owner} {neighbour['distance']:.2f}".replace("  ", " ")
        pictures.append((_encode(image), caption))
    return pictures


def _encode(image: np.ndarray) -> bytes:
    """Encode a picture as JPEG, reduced to `THUMBNAIL_PX`: a page holds some hundred of them."""
    scale = THUMBNAIL_PX / max(image.shape[:2])
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
    return jpeg(image, quality=76)
