"""Do maps point at the tumour, where its pixels are known: the highest point, and the share of the map."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biopsy.core.errors import DataError
from biopsy.core.files import plain
from biopsy.phantom.cohort import PATCH_PX, paint_patient, plan_cohort
from biopsy.phantom.slides import MPP, SlidePainter
from biopsy.statistics.resampling import clustered_mean

MIXED = (0.05, 0.95)  # share of tumour in patches where pointing at it can be right or wrong


def judge_pointing(
    maps: np.ndarray, truth: np.ndarray, group_ids: np.ndarray, *, seed: int, unit: str
) -> dict[str, Any]:
    """Say how often the highest point of a map lies in tumour, and how much of the map.

    Only patches of which some but not all is tumour are asked.

    Args:
        maps: ``(n, H, W)``.
        truth: Where tumour is, bool ``(n, H, W)``.
        group_ids: Patient (slide, patch) of each patch.
        seed: Of bootstrap draws.
        unit: What a group is.
    """
    share = truth.mean(axis=(1, 2))
    mixed = (share > MIXED[0]) & (share < MIXED[1])
    if not mixed.any():
        return {"n_patches": 0}
    found, groups = point_at(maps[mixed], truth[mixed]), group_ids[mixed]
    shares = {
        name: clustered_mean(values, groups, seed=seed, unit=unit, bounds=(0.0, 1.0))
        for name, values in found.items()
    }
    gains = {
        f"{name}_gain": clustered_mean(found[name] - found["area"], groups, seed=seed, unit=unit)
        for name in ("hit", "mass")
    }
    counts = {"n_patches": int(mixed.sum()), "n_groups": len(np.unique(groups))}
    return plain({**counts, **shares, **gains})


def point_at(maps: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Ask of each map whether its highest point lies in the tumour, and how much of it does.

    Args:
        maps: ``(n, H, W)``; what is below 0 speaks against the tumour and counts as nothing.
        truth: Where tumour is, bool ``(n, H, W)``.

    Returns:
        One value a patch: ``hit`` (1 where the highest point lies in tumour; several highest points count by
        their share), ``mass`` (share of the map in tumour; that of an empty map is spread evenly) and
        ``area`` (share of the patch that is tumour: what a map knowing nothing would reach in both).

    Raises:
        DataError: If the shapes differ.
    """
    maps, truth = np.clip(np.asarray(maps, float), 0, None), np.asarray(truth, bool)
    if maps.shape != truth.shape or maps.ndim != 3:
        raise DataError(f"maps {maps.shape} and truth {truth.shape} are not of the same patches")
    highest = maps == maps.max(axis=(1, 2), keepdims=True)
    maps = np.where(maps.sum(axis=(1, 2), keepdims=True) > 0, maps, 1.0)
    return {
        "hit": (highest & truth).sum(axis=(1, 2)) / highest.sum(axis=(1, 2)),
        "mass": (maps * truth).sum(axis=(1, 2)) / maps.sum(axis=(1, 2)),
        "area": truth.mean(axis=(1, 2)),
    }


def find_tumour_cells(
    places: Iterable[tuple[str, int, int]],
    *,
    n_patients: int = 12,
    patches_per_patient: float = 250,
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Return which pixels of a cohort's patches are tumour cells: the truth that no label tells.

    Args:
        places: Patient and place (x, y as in the patches' names) of each patch.
        n_patients: As the cohort was made, like the next two.
        patches_per_patient: Mean number of patches.
        seed: The cohort's seed.

    Returns:
        ``(n, 50, 50)``.

    Raises:
        ValueError: If a patient is not of that cohort.
    """
    plan = {entry[0]: entry for entry in plan_cohort(n_patients, patches_per_patient, seed)}
    painters: dict[str, SlidePainter] = {}
    masks = []
    for patient, x, y in places:
        if patient not in plan:
            raise ValueError(f"patient {patient!r} is not of this cohort: {next(iter(plan))} and the next")
        if patient not in painters:
            painters[patient], _ = paint_patient(seed, *plan[patient])
        masks.append(painters[patient].nests(x - 1, y - 1, PATCH_PX, PATCH_PX, MPP))
    return np.array(masks, bool).reshape(-1, PATCH_PX, PATCH_PX)
