"""Colour statistics of patches: what can be said of a patch without looking at its structure."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from biopsy.imaging.stain import separate_stains

CHANNELS = ("red", "green", "blue", "haematoxylin", "eosin")
PERCENTILES = (5, 25, 50, 75, 95)
STATISTICS = ("mean", "sd", *(f"p{percentile}" for percentile in PERCENTILES))
FEATURE_NAMES = tuple(f"{channel}_{statistic}" for channel in CHANNELS for statistic in STATISTICS)


def colour_features(
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    *,
    index: np.ndarray | None = None,
    chunk: int = 256,
) -> np.ndarray:
    """Give mean, standard deviation and percentiles of RGB and of stain amounts.

    Args:
        patches: uint8 ``(N, H, W, 3)`` RGB, may be memory-mapped.
        sizes: True ``(width, height)`` of each patch, ``(N, 2)``; the rest is padding and not counted.
        index: Which patches, ``(n,)``; all by default.
        chunk: Patches that a thread works on at once.

    Returns:
        float32 ``(n, 35)`` with the columns `FEATURE_NAMES`: RGB in 0-255, stains as
        `separate_stains` gives them.
    """
    chosen = np.arange(len(patches)) if index is None else np.asarray(index)
    features = np.empty((len(chosen), len(FEATURE_NAMES)), np.float32)

    def fill(start: int) -> None:
        rows = chosen[start : start + chunk]
        for part, images in group_by_size(patches[rows], None if sizes is None else sizes[rows]):
            features[start + part] = _describe(images)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(chosen), chunk)))
    return features


def group_by_size(patches: np.ndarray, sizes: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield patches of one true size at a time, cut to it, with their places."""
    if sizes is None:
        yield np.arange(len(patches)), patches
        return
    for width, height in np.unique(sizes, axis=0):
        part = np.flatnonzero((sizes == (width, height)).all(axis=1))
        yield part, patches[part, :height, :width]


def _describe(images: np.ndarray) -> np.ndarray:
    """Give the features of patches of one size, ``(n, 35)``."""
    stains = separate_stains(images)[..., :2]
    described = []
    for values in [images[..., channel] for channel in range(3)] + [stains[..., stain] for stain in range(2)]:
        ordered = np.sort(values.reshape(len(images), -1).astype(np.float32), axis=1)
        described += [ordered.mean(axis=1), ordered.std(axis=1)]
        described += list(_percentiles(ordered))
    return np.stack(described, axis=1)


def _percentiles(ordered: np.ndarray) -> np.ndarray:
    """Interpolate `PERCENTILES` of sorted rows as `numpy.percentile` does."""
    place = np.array(PERCENTILES) / 100 * (ordered.shape[1] - 1)
    below = np.floor(place).astype(int)
    above = np.ceil(place).astype(int)
    low, high = ordered[:, below].astype(np.float32), ordered[:, above].astype(np.float32)
    return (low + (high - low) * (place - below).astype(np.float32)).T
