"""Patches on their slide: neighbours by label, errors at annotated borders, pictures in context."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from scipy.spatial import cKDTree

from biopsy.data.packs import Pack
from biopsy.evaluation.scored import ScoredPatches
from biopsy.plotting.style import class_colour
from biopsy.slide_io.mosaic import stitch
from biopsy.statistics.intervals import PatientSummary, estimate_metrics, estimate_patient_metrics
from biopsy.statistics.resampling import Interval

REACH = 1.25  # steps of the grid: a patch has eight neighbours, up, down, left, right and diagonal
ZONES = {
    "border": "at least one of the eight neighbours has another label",
    "deep": "all neighbours that there are have the same label",
}
SHOWN = ("sensitivity", "specificity")

Slides = list[tuple[np.ndarray, np.ndarray]]


def place_on_slides(table: pd.DataFrame) -> Slides:
    """Return, for each slide, its rows ``(n,)`` of the table and their places ``(n, 2)``, in x and y.

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
    """Return for each patch whether it lies at the annotated border.

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


@dataclass(frozen=True)
class Zone:
    """Errors in one of `ZONES`: over its patches, and as means over patients (None without ids)."""

    n_patches: int
    n_positive: int
    n_groups: int
    fn: int
    fp: int
    patch: dict[str, Interval]
    patient: dict[str, PatientSummary] | None


def measure_zones(zone: np.ndarray, scored: ScoredPatches, threshold: float) -> dict[str, Zone]:
    """Count errors at the annotated border apart from those deep inside, for each of `ZONES` that occurs.

    Args:
        zone: As `find_zones` gives it, ``(n,)``; patches without one are left out.
        scored: The patches, of two classes.
        threshold: From which a patch is predicted positive.
    """
    result, zones = {}, pd.Series(zone, dtype="string")
    for name in ZONES:
        chosen = zones.eq(name).fillna(False).to_numpy(bool)
        if not chosen.any():
            continue
        part = scored.take(chosen)
        truth, wrong = part.is_positive, part.pred != part.target
        patient = None
        if part.unit != "patch":
            means = estimate_patient_metrics(truth, part.prob, part.group_ids, threshold, unit=part.unit)
            patient = {metric: means[metric] for metric in SHOWN}
        result[name] = Zone(
            n_patches=len(part),
            n_positive=int(truth.sum()),
            n_groups=part.n_groups,
            fn=int((wrong & (truth == 1)).sum()),
            fp=int((wrong & (truth == 0)).sum()),
            patch=estimate_metrics(part.sample(), SHOWN, **part.resampling),
            patient=patient,
        )
    return result


def rank_label_issues(counts: np.ndarray, target: np.ndarray, probs: np.ndarray) -> pd.DataFrame:
    """Return how many witnesses speak against each label.

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


OVERVIEW_PX = 112
AROUND_PX = 260
STEPS_AROUND = 2
_INK, _PAPER = (31, 41, 51), (255, 255, 255)


class SlideViews:
    """Small pictures of the slides of a pack; None for a patch without coordinates."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._overviews: dict[int, tuple[np.ndarray, float]] = {}

    def overview(self, row: int) -> np.ndarray | None:
        """Return the whole slide, about `OVERVIEW_PX` wide or high, with a box where a patch lies."""
        if self._slide_of[row] < 0:
            return None
        index = int(self._slide_of[row])
        places = self._slides[index][1]
        if index not in self._overviews:
            self._overviews[index] = self._stitch(index)
        small, scale = self._overviews[index]
        image = small.copy()
        left, top = (self._place(row) - places.min(axis=0)) * scale
        side = max(self._pack.info.patch_px * scale, 5)
        middle = np.array([left, top]) + self._pack.info.patch_px * scale / 2
        corner, opposite = (np.rint(middle + sign * (side / 2 + 2)).astype(int).tolist() for sign in (-1, 1))
        cv2.rectangle(image, corner, opposite, _PAPER, 3)
        cv2.rectangle(image, corner, opposite, _INK, 1)
        return image

    def surroundings(self, row: int) -> np.ndarray | None:
        """Return a patch in a dark box and those around it, each framed in the colour of its label."""
        if self._slide_of[row] < 0:
            return None
        rows, places = self._slides[int(self._slide_of[row])]
        offset = places - self._place(row)
        near = (np.abs(offset) <= (STEPS_AROUND + 0.25) * self._step).all(axis=1)
        patch_px = self._pack.info.patch_px
        room = 2 * STEPS_AROUND * self._step + patch_px
        scale = AROUND_PX / room
        image = np.full((AROUND_PX, AROUND_PX, 3), 255, np.uint8)
        for other, (x, y) in zip(rows[near], offset[near] + STEPS_AROUND * self._step, strict=True):
            self._lay(image, int(other), x, y, scale)
        first, last = (round((STEPS_AROUND * self._step + more) * scale) for more in (0, patch_px))
        cv2.rectangle(image, (first - 3, first - 3), (last + 2, last + 2), _INK, 5)
        middle = STEPS_AROUND * self._step
        self._lay(image, row, middle, middle, scale)
        return image

    def _lay(self, image: np.ndarray, row: int, x: float, y: float, scale: float) -> None:
        width, height = self._pack.sizes[row]
        left, top, right, bottom = np.rint(np.array([x, y, x + width, y + height]) * scale).astype(int)
        if min(left, top) < 0 or max(right, bottom) > AROUND_PX + 1:
            return  # off the grid and cut by the frame
        right, bottom = min(right, AROUND_PX), min(bottom, AROUND_PX)
        patch = np.ascontiguousarray(self._pack.patches[row, :height, :width])
        image[top:bottom, left:right] = cv2.resize(
            patch, (right - left, bottom - top), interpolation=cv2.INTER_AREA
        )
        index = int(self._pack.target[row])
        colour = [round(255 * part) for part in to_rgb(class_colour(index))]
        thick = 2 if index == 0 else 4  # told apart in a grey print too
        cv2.rectangle(image, (left + 1, top + 1), (right - 2, bottom - 2), colour, thick)

    def _stitch(self, index: int) -> tuple[np.ndarray, float]:
        rows, places = self._slides[index]
        patch_px = self._pack.info.patch_px
        scale = min(1.0, OVERVIEW_PX / (np.ptp(places, axis=0).max() + patch_px))
        patches = (self._true_patch(int(row)) for row in rows)
        return stitch(patches, places[:, 0], places[:, 1], patch_px=patch_px, scale=scale), scale

    def _true_patch(self, row: int) -> np.ndarray:
        width, height = self._pack.sizes[row]
        return self._pack.patches[row, :height, :width]

    def _place(self, row: int) -> np.ndarray:
        return self._pack.table[["x", "y"]].iloc[row].to_numpy(float)

    @cached_property
    def _slides(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return place_on_slides(self._pack.table)

    @cached_property
    def _step(self) -> float:
        return find_step(self._slides)

    @cached_property
    def _slide_of(self) -> np.ndarray:
        result = np.full(len(self._pack), -1)
        for index, (rows, _) in enumerate(self._slides):
            result[rows] = index
        return result
