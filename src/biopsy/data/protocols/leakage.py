"""Conditions of the leakage experiment: splits with and without patches of the tested patient in training."""

from typing import Literal

import numpy as np
import pandas as pd

from biopsy.core.errors import SplitError
from biopsy.core.seeds import make_rng
from biopsy.core.text import plural
from biopsy.data.protocols.groups import Plan, Request, check_known, named_note

N_LINES = 16  # random lines through a slide, of which the one that divides it best is used


def make_leak_condition(
    request: Request, *, condition: Literal["apart", "with", "placebo"], blocked: bool
) -> Plan:
    """Make one condition of a leakage experiment; all conditions share test and validation patches.

    The tested half of the test patient is drawn per class, rounded up. With ``blocked``, it is one side of a
    random line through the slide that halves the patches of the rarer class, and patches adjacent to a test
    patch are not leaked. The order of patches has no influence.

    ``apart`` is trained without the test patient and the placebo patient. In ``with``, patches of the other
    half of the test patient, in ``placebo`` patches of the placebo patient replace training patches of the
    other patients, so that all conditions have the same number of training patches per class.

    Raises:
        SplitError: If not exactly one known test and one known validation patient are named, the tested half
            has one class only, coordinates are missing, too few patches can be replaced, or there is no
            patient for the placebo.
    """
    is_tested, is_validation, placebo_id = _resolve_leak_patients(request)
    rng = make_rng(request.seed, "leak", request.test_ids[0], "blocked" if blocked else "random")
    table, target = request.pack.table, request.pack.target
    order = np.argsort(table["patch_id"].to_numpy(str))
    rows = order[is_tested[order]]
    coordinates = table[["x", "y"]].astype("Float64").to_numpy(float, na_value=np.nan)
    test = np.zeros(len(target), bool)
    test[rows] = (
        _halve_by_line(coordinates[rows], target[rows], rng) if blocked else _draw_half(target[rows], rng)
    )
    if len(np.unique(target[test])) < 2:
        class_name = request.pack.class_names[np.bincount(target[is_tested]).argmax()]
        raise SplitError(
            f"{request.unit} {request.test_ids[0]} has {class_name} patches only: name one with both classes",
            "classes",
        )
    remaining = is_tested & ~test
    adjacent = _find_adjacent(coordinates, remaining, test, request.pack.info.patch_px)
    is_placebo = request.group_ids == placebo_id
    base = ~is_tested & ~is_validation & ~is_placebo
    leaked, placebo, replaced = np.zeros((3, len(target)), bool)
    for class_index, name in enumerate(request.pack.class_names):
        in_class = order[target[order] == class_index]
        may_leak = in_class[(remaining & ~adjacent if blocked else remaining)[in_class]]
        in_placebo, in_base = in_class[is_placebo[in_class]], in_class[base[in_class]]
        n_leaked = min(len(may_leak), len(in_placebo)) if placebo_id else len(may_leak)
        if n_leaked > len(in_base):
            raise SplitError(
                f"{n_leaked:,} {name} patches of {request.test_ids[0]} would replace {len(in_base):,} of the "
                f"other {plural(request.unit)}, which are too few; name another test {request.unit}",
                "too-few",
            )
        leaked[rng.choice(may_leak, n_leaked, replace=False)] = True
        replaced[rng.choice(in_base, n_leaked, replace=False)] = True
        if placebo_id:
            placebo[rng.choice(in_placebo, n_leaked, replace=False)] = True
    if condition == "placebo" and not placebo_id:
        raise SplitError(
            f"no {request.unit} but the tested and the validating one has patches of both classes: there is "
            "no placebo, compare with leak-apart",
            "classes",
        )
    train = (
        base if condition == "apart" else (base & ~replaced) | (leaked if condition == "with" else placebo)
    )
    subsets = np.select([test, is_validation, train], ["test", "validation", "train"], "").astype("<U10")
    has_coordinates = leaked.any() and np.isfinite(coordinates[is_tested]).all()
    note: dict[str, object] = {
        "placebo": placebo_id,
        "touching": float(adjacent[leaked].mean()) if has_coordinates else None,  # of the leaked patches
        "half": "blocked" if blocked else "random",
    }
    if condition == "with":
        note["leaked"] = int(leaked.sum())
    return subsets, named_note(request) | note


def _resolve_leak_patients(request: Request) -> tuple[np.ndarray, np.ndarray, str]:
    """Return masks of the test and validation patient's patches, and the placebo patient's id."""
    unit, test_ids, validation_ids = request.unit, request.test_ids[:1], request.val_ids
    if unit == "patch":
        raise SplitError(
            f"{request.pack.path.name} has neither patients nor slides, so leakage cannot be measured; "
            "prepare it with --patients",
            "missing",
        )
    check_known(request.test_ids + validation_ids, request.group_ids, unit)
    n_test, n_validation = len(request.test_ids), len(validation_ids)
    if n_test not in (1, 2) or n_validation != 1 or validation_ids[0] in request.test_ids:
        raise SplitError(
            f"leakage experiments need one test {unit} (optionally a second one for the placebo) and one "
            f"validation {unit}; got test {list(request.test_ids)}, validation {list(validation_ids)}",
            "patient",
        )
    is_tested, is_validation = request.group_ids == test_ids[0], request.group_ids == validation_ids[0]
    if len(request.test_ids) == 2:
        return is_tested, is_validation, request.test_ids[1]
    rarer = count_rarer_class(request.group_ids, request.pack.target)
    rarer = rarer.drop([test_ids[0], validation_ids[0]], errors="ignore")
    has_both = len(rarer) and rarer.max() > 0
    return is_tested, is_validation, str(rarer.idxmax()) if has_both else ""


def count_rarer_class(group_ids: np.ndarray, target: np.ndarray) -> pd.Series:
    """Return the patches of each group's rarer class by group; nothing if all patches are of one class."""
    counts = pd.crosstab(group_ids, target)
    return counts.min(axis=1) if counts.shape[1] > 1 else counts.iloc[:0, 0]


def _draw_half(target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random mask of half of the patches of each class, rounded up."""
    half = np.zeros(len(target), bool)
    for class_index in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == class_index))
        half[rows[: (len(rows) + 1) // 2]] = True
    return half


def _halve_by_line(coordinates: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of the patches on one side of a line that halves the rarer class.

    Of `N_LINES` random lines, the one that divides all patches most evenly is used.
    """
    if not np.isfinite(coordinates).all():
        raise SplitError(
            "patches of the test slide have no coordinates, which a blocked half requires", "missing"
        )
    names, counts = np.unique(target, return_counts=True)
    rarer = target == names[counts.argmin()]
    angles = rng.uniform(0, 2 * np.pi, N_LINES)
    projections = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ coordinates.T
    marked = projections > np.median(projections[:, rarer], axis=1, keepdims=True)
    return np.asarray(marked[np.abs(marked.mean(axis=1) - 0.5).argmin()])


def _find_adjacent(
    coordinates: np.ndarray, remaining: np.ndarray, test: np.ndarray, patch_px: int
) -> np.ndarray:
    """Return a mask of the patches of ``remaining`` adjacent to a test patch, corners included."""
    adjacent = np.zeros(len(remaining), bool)
    if remaining.any() and np.isfinite(coordinates[remaining | test]).all():
        from scipy.spatial import KDTree  # slow import

        distance, _ = KDTree(coordinates[test]).query(coordinates[remaining], p=np.inf)
        adjacent[remaining] = distance <= patch_px
    return adjacent
