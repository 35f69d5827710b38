"""Pointing: does a map mark the tumour, where it is known which pixels are tumour?"""

import numpy as np

from biopsy.core.errors import DataError


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
