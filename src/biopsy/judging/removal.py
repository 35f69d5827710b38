"""Deletion and insertion: what becomes of a class's probability as a patch is taken away and given back.

Petsiuk, Das and Saenko 2018 (RISE), sec. 3.3, with two choices of ours. A patch is taken away in cells, not
in pixels, so that every order, random ones too, removes pieces of the same size and shape. And what is taken
away is replaced by the patch itself, blurred until no nucleus is left: black or white holes are something a
network has an opinion on.
"""

from collections.abc import Callable

import cv2
import numpy as np

CELLS = 12  # to a side: of an IDC patch of 200 um a cell is 17 um, about a nucleus with its surroundings
STEPS = 12  # points of a curve beside the untouched patch
BLUR = 1 / 10  # standard deviation as a share of the patch's side

Ask = Callable[[np.ndarray], np.ndarray]


def blur_patches(patches: np.ndarray) -> np.ndarray:
    """Blur patches, uint8 ``(n, H, W, 3)``, so far that only slow colour is left."""
    spread = BLUR * max(patches.shape[1:3])
    blurred = np.empty_like(patches)
    for patch, out in zip(patches, blurred, strict=True):
        cv2.GaussianBlur(patch, (0, 0), spread, dst=out, borderType=cv2.BORDER_REPLICATE)
    return blurred


def rank_cells(maps: np.ndarray) -> np.ndarray:
    """Give the rank of every pixel's cell, 0 for the cell that a map marks most.

    Args:
        maps: ``(n, H, W)``; a cell counts by its mean. Cells of equal value follow each other from the upper
            left to the lower right.

    Returns:
        int ``(n, H, W)``, from 0 to ``CELLS ** 2 - 1``.
    """
    cell = _cell_of_pixels(maps.shape[1:])
    sizes = np.bincount(cell.ravel(), minlength=CELLS**2)
    ranks = np.empty(maps.shape, int)
    for values, out in zip(maps, ranks, strict=True):
        mean = np.bincount(cell.ravel(), values.ravel(), CELLS**2) / np.maximum(sizes, 1)
        order = np.argsort(-mean, kind="stable")
        place = np.empty(CELLS**2, int)
        place[order] = np.arange(CELLS**2)
        out[...] = place[cell]
    return ranks


def trace_removal(
    ask: Ask, patches: np.ndarray, blurred: np.ndarray, ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give the class's probability as cells are deleted, and as they are inserted, in an order.

    Args:
        ask: Gives the probability of the class in question for patches ``(n * m, H, W, 3)``, of which the
            first ``m`` are versions of the first patch and so on.
        patches: uint8 ``(n, H, W, 3)``.
        blurred: What is left of them where everything is taken away.
        ranks: As `rank_cells` gives them.

    Returns:
        Two arrays ``(n, STEPS + 1)``: at share 0, 1 / STEPS, ... 1 of the cells deleted; and inserted.
    """
    bounds = np.arange(STEPS + 1) / STEPS * CELLS**2
    taken = ranks[:, None] < bounds[:, None, None]  # (n, STEPS + 1, H, W)
    whole, empty = patches[:, None], blurred[:, None]
    curves = []
    for first, then in ((whole, empty), (empty, whole)):
        versions = np.where(taken[..., None], then, first)
        curves.append(ask(versions.reshape(-1, *patches.shape[1:])).reshape(len(patches), -1))
    return curves[0], curves[1]


def area_under(curves: np.ndarray) -> np.ndarray:
    """Give the mean height of curves ``(n, STEPS + 1)`` by trapezia, ``(n,)``."""
    return (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2


def _cell_of_pixels(shape: tuple[int, ...]) -> np.ndarray:
    """Give the cell that each pixel belongs to, ``(H, W)``."""
    rows, columns = (np.arange(side) * CELLS // side for side in shape)
    return rows[:, None] * CELLS + columns
