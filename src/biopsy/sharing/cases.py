"""Chapters that look closer: patient by patient, places on the slide."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError
from biopsy.figures.patients import draw_patient_metric, draw_patient_probs
from biopsy.figures.slides import ALL_PANELS, draw_slide
from biopsy.figures.style import jpeg, png, svg
from biopsy.imaging.mosaic import stitch, stitch_values
from biopsy.sharing.document import (
    Block,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    metric_label,
    number,
)
from biopsy.sharing.facts import RunFacts
from biopsy.sharing.numbers import Footnotes
from biopsy.statistics.intervals import measure_groups

MOST_SLIDES = 4
SLIDE_SIDE_PX = 640
LONG_TABLE = 16


def describe_patients(facts: RunFacts) -> Section | None:
    """One row a patient or slide, and every subgroup."""
    groups = facts.group_ids
    blocks: list[Block] = []
    if facts.is_binary and groups.notna().any():
        known = groups.notna().to_numpy()
        blocks += _blocks_by_group(facts, groups[known].astype(str).to_numpy(), known)
    if facts.metrics.get("subgroups"):
        blocks.append(_table_of_subgroups(facts.metrics["subgroups"], len(facts.class_names), facts.unit))
    if not blocks:
        return None
    heading = "Slide by slide" if facts.unit == "slide" else "Patient by patient"
    return Section("patients", heading, blocks)


def _blocks_by_group(facts: RunFacts, who: np.ndarray, known: np.ndarray) -> list[Block]:
    target, prob = facts.is_positive[known], facts.predictions["prob"].to_numpy(float)[known]
    names, values = measure_groups(target, prob, who, facts.threshold)
    n_patches = np.array([(who == name).sum() for name in names])
    n_positive = np.array([target[who == name].sum() for name in names])
    auroc = facts.pooled.get("auroc", {})
    interval = None if auroc.get("low") is None else (auroc["low"], auroc["high"])
    pictures = [
        Picture(
            f"AUROC within each {facts.unit}. Larger dots hold more patches.",
            svg(
                draw_patient_metric(
                    names.tolist(),
                    values["auroc"],
                    n_patches,
                    metric="AUROC",
                    overall=auroc.get("value"),
                    interval=interval,
                ),
                "patient-auroc",
            ),
        ),
        Picture(
            f"Probabilities within each {facts.unit}: dot the median, thick line the middle half, thin "
            "line the middle nine tenths.",
            svg(
                draw_patient_probs(
                    who.tolist(),
                    target,
                    prob,
                    class_names=(facts.negative, facts.positive),
                    threshold=facts.threshold,
                ),
                "patient-probs",
            ),
        ),
    ]
    shown = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
    rows = [
        [
            str(name),
            number(int(n_patches[i])),
            number(int(n_positive[i])),
            *(number(values[key][i]) for key in shown),
        ]
        for i, name in enumerate(names)
    ]
    columns = [facts.unit, "patches", facts.positive, *(metric_label(key) for key in shown)]
    title = f"{len(rows)} {facts.unit}s, one by one"
    note = "A dash: not defined, because only one class occurs."
    fold = title if len(rows) >= LONG_TABLE else ""
    return [Pictures(pictures), Table(columns, rows, caption="" if fold else title, note=note, fold=fold)]


def _table_of_subgroups(subgroups: Mapping[str, Mapping[str, Any]], n_classes: int, unit: str) -> Table:
    rows, reasons = [], Footnotes()
    shown = [name for values in subgroups.values() for found in values.values() for name in found["patch"]][
        :3
    ]
    for column, values in subgroups.items():
        for value, found in values.items():
            rows.append(
                [
                    column,
                    str(value),
                    number(found.get("n_patches")),
                    number(found.get("n_patients")),
                    *(reasons.estimate(found["patch"].get(key, {})) for key in shown),
                ]
            )
    columns = ["column", "subgroup", "patches", f"{unit}s"]
    columns += [metric_label(name, n_classes) for name in shown]
    note = f"In brackets the 95 % interval.{reasons.text}"
    return Table(columns, rows, caption="Subgroups", note=note, text_columns=2)


def pick_label(rows: pd.DataFrame) -> list[str]:
    """Name whom each row belongs to: ``patient 8863``, else ``slide ..``, else nothing."""
    for kind in ("patient", "slide"):
        column = f"{kind}_id"
        if column in rows and rows[column].notna().any():
            return [f"{kind} {name}" if pd.notna(name) else f"{kind} unknown" for name in rows[column]]
    return [""] * len(rows)


def encode_patch(image: np.ndarray) -> bytes:
    """Encode a patch for a page: small ones pixel for pixel, large ones as JPEG to keep the page small."""
    return png(image) if max(image.shape[:2]) <= 64 else jpeg(image)


def describe_slides(facts: RunFacts) -> Section | None:
    """Up to four slides put together again, those with both classes and most patches first."""
    table = facts.predictions
    if not facts.is_binary or facts.get_patch is None or facts.patch_px is None:
        return None
    if not {"x", "y"} <= set(table) or not table[["x", "y"]].notna().all(axis=1).any():
        return None
    column = "slide_id" if "slide_id" in table and table["slide_id"].notna().any() else "patient_id"
    placed = table.assign(is_positive=facts.is_positive)[
        table[["x", "y"]].notna().all(axis=1) & table[column].notna()
    ]
    if placed.empty:
        return None
    counts = placed.groupby(column)["is_positive"].agg(["nunique", "size"])
    chosen = counts.sort_values(["nunique", "size"], ascending=False, kind="stable").head(MOST_SLIDES).index
    kind = column.removesuffix("_id")
    blocks: list[Block] = []
    for name in chosen:
        rows = placed[placed[column] == name]
        n_positive = number(int(rows["is_positive"].sum()))
        caption = f"{kind.capitalize()} {name}: {number(len(rows))} patches, {n_positive} {facts.positive}"
        try:
            pictures = _slide_pictures(facts, rows, f"slide-{name}")
        except DataError as error:
            blocks.append(Text(f"{caption}. Not drawn: {error}.", "note"))
        else:
            blocks.append(Pictures(pictures, across=2, caption=caption))
    left_out = len(counts) - len(chosen)
    if left_out:
        blocks.append(
            Text(
                f"{left_out} more are not shown: those with both classes and most patches stand here.", "note"
            )
        )
    return Section("slides", "Where on the slide", blocks)


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
        pictures.append(Picture("", svg(figure, f"{name}-{panel}")))
    return pictures
