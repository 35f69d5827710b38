"""Patches beside each other on a slide: whose label disagrees with its neighbours, who lies at the border."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from biopsy.statistics.intervals import estimate_metrics, estimate_patient_metrics
from biopsy.statistics.weighted_counts import sort_scores

REACH = 1.25  # steps of the grid: a patch has eight neighbours, up, down, left, right and diagonal
ZONES = {
    "border": "at least one of the eight neighbours has another label",
    "deep": "all neighbours that there are have the same label",
}
SHOWN = ("sensitivity", "specificity")

Slides = list[tuple[np.ndarray, np.ndarray]]


def place_on_slides(table: pd.DataFrame) -> Slides:
    """Give, for each slide, its rows ``(n,)`` of the table and their places ``(n, 2)``, in x and y.

    A patch without coordinates, or without ``slide_id`` and ``patient_id``, lies on none.
    """
    slide = table["slide_id"].fillna(table["patient_id"])
    placed = np.flatnonzero(table[["x", "y"]].notna().all(axis=1) & slide.notna())
    x_y = table[["x", "y"]].iloc[placed].to_numpy(float)
    parts = pd.Series(np.arange(len(placed))).groupby(slide.iloc[placed].to_numpy(str)).indices
    return [(placed[part], x_y[part]) for part in parts.values()]


def find_step(slides: Slides) -> float:
    """Return the commonest distance, the longer of x and y, from a place to the nearest one of its slide."""
    nearest = [np.empty(0)]
    for _, places in slides:
        distinct = np.unique(places, axis=0)
        if len(distinct) > 1:
            nearest.append(cKDTree(distinct).query(distinct, k=2, p=np.inf)[0][:, 1])
    distances, times = np.unique(np.concatenate(nearest), return_counts=True)
    return float(distances[times.argmax()]) if len(times) else 1.0


def count_neighbours(table: pd.DataFrame, target: np.ndarray, n_classes: int) -> np.ndarray:
    """Count the neighbours of each patch on its slide, by their label.

    Neighbours lie within `REACH` steps of the slide's grid in x and in y; a step is what `find_step` finds.

    Args:
        table: ``x``, ``y``, ``slide_id`` and ``patient_id`` of *all* patches of the slides, as in a pack's
            table.
        target: Index of the class of each, ``(n,)``.
        n_classes: How many classes there are.

    Returns:
        float ``(n, n_classes)``; NaN for a patch that lies on no slide.
    """
    counts = np.full((len(table), n_classes), np.nan)
    slides = place_on_slides(table)
    step = find_step(slides)
    for rows, places in slides:
        pairs = cKDTree(places).query_pairs(REACH * step, p=np.inf, output_type="ndarray")
        both_ways = np.concatenate([pairs, pairs[:, ::-1]])
        cell = both_ways[:, 0] * n_classes + target[rows[both_ways[:, 1]]]
        counts[rows] = np.bincount(cell, minlength=len(rows) * n_classes).reshape(len(rows), n_classes)
    return counts


def find_zones(counts: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """Say of each patch whether it lies at the annotated border.

    Patches that are not in the table cannot be counted: on a slide of which only one class was kept there is
    no border to be seen.

    Args:
        counts: As `count_neighbours` gives them.
        target: Index of the class of each, ``(n,)``.

    Returns:
        ``n_neighbours`` and ``n_against`` (of another label), null where a patch lies on no slide, and
        ``zone``, one of `ZONES`, null where it has no neighbour.
    """
    n_neighbours = counts.sum(axis=1)
    n_against = n_neighbours - counts[np.arange(len(counts)), target]
    zone = np.where(n_against > 0, "border", "deep").astype(object)
    zone[~(n_neighbours > 0)] = None
    result = pd.DataFrame({"n_neighbours": n_neighbours, "n_against": n_against}).astype("Int64")
    return result.assign(zone=pd.array(zone, dtype="string"))


def measure_zones(
    zone: np.ndarray,
    truth: np.ndarray,
    prob: np.ndarray,
    group_ids: np.ndarray,
    threshold: float,
    *,
    seed: int,
    unit: str,
) -> dict[str, dict[str, Any]]:
    """Count errors at the annotated border apart from those deep inside.

    Args:
        zone: As `find_zones` gives it, ``(n,)``; patches without one are left out.
        truth: 1 where a patch is positive.
        prob: Probability of the positive class.
        group_ids: Patient (slide, patch) of each.
        threshold: From which a patch is called positive.
        seed: Of bootstrap draws.
        unit: What a group is.

    Returns:
        For each of `ZONES` that occurs: ``n_patches``, ``n_positive``, ``n_groups``, ``fn``, ``fp``;
        ``patch``: sensitivity and specificity over its patches, with intervals over groups; ``patient``:
        their means over groups, None where the unit is the patch.
    """
    result, zones = {}, pd.Series(zone, dtype="string")
    for zone_name in ZONES:
        chosen = zones.eq(zone_name).fillna(False).to_numpy(bool)
        if not chosen.any():
            continue
        sample = truth[chosen], prob[chosen], group_ids[chosen], threshold
        called = sample[1] >= threshold
        scores = sort_scores(sample[0], sample[1], threshold, group_ids=sample[2])
        pooled = estimate_metrics(scores, seed=seed, names=SHOWN, unit=unit)
        item = None if unit == "patch" else estimate_patient_metrics(*sample, unit=unit)
        result[zone_name] = {
            "n_patches": int(chosen.sum()),
            "n_positive": int(sample[0].sum()),
            "n_groups": len(np.unique(sample[2])),
            "fn": int(((sample[0] == 1) & ~called).sum()),
            "fp": int(((sample[0] == 0) & called).sum()),
            "patch": {name: interval.to_dict() for name, interval in pooled.items()},
            "patient": None if item is None else {name: item[name].to_dict() for name in SHOWN},
        }
    return result


def rank_label_issues(counts: np.ndarray, target: np.ndarray, probs: np.ndarray) -> pd.DataFrame:
    """Say how many witnesses speak against each label.

    The witnesses are the neighbours' labels, a voice each, and a model that was not trained on the patch, one
    more voice divided as its probabilities are. With ``k`` of ``n`` voices for another class the doubt is
    ``(k + 1) / (n + 2)``, Laplace's rule of succession: 7 of 8 neighbours count for more than 1 of 1. On the
    IDC slides with labels flipped on purpose a model that weighs more than one voice makes the order worse
    (``docs/concepts/errors.md``).

    Args:
        counts: As `count_neighbours` gives them.
        target: Index of the class of each, ``(n,)``.
        probs: Probabilities ``(n, n_classes)``; NaN where no model may speak.

    Returns:
        ``suggested`` (index of the class most voices are for, other than the label), ``doubt``,
        ``n_neighbours``, ``n_for`` (neighbours of the suggested class) and ``prob`` (its probability). Where
        there is no witness, ``doubt`` is 0.5.
    """
    voices = np.nan_to_num(counts) + np.nan_to_num(probs)
    others = voices.copy()
    others[np.arange(len(target)), target] = -1
    suggested = others.argmax(axis=1)
    picked = np.arange(len(target)), suggested
    return pd.DataFrame(
        {
            "suggested": suggested,
            "doubt": (voices[picked] + 1) / (voices.sum(axis=1) + 2),
            "n_neighbours": counts.sum(axis=1),
            "n_for": counts[picked],
            "prob": probs[picked],
        }
    ).astype({"n_neighbours": "Int64", "n_for": "Int64"})
