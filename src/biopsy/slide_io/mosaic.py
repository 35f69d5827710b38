"""Reassembly of patches with coordinates into slides."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from biopsy.core.errors import DataError

MAX_PIXELS = 100_000_000
MAX_CELLS = 10_000_000
"""Largest number of cells of a grid: a slide of 75 mm x 25 mm in cells of 14 um."""


def paste(canvas: np.ndarray, image: np.ndarray, left: int, top: int) -> None:
    """Copy an image onto a canvas, cropped to the canvas; ``left`` and ``top`` may be negative."""
    image = image[max(0, -top) :, max(0, -left) :]
    left, top = max(0, left), max(0, top)
    window = canvas[top : top + image.shape[0], left : left + image.shape[1]]
    window[:] = image[: window.shape[0], : window.shape[1]]


def stitch(
    patches: Iterable[np.ndarray],
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    patch_px: int,
    scale: float = 1.0,
) -> np.ndarray:
    """Return an image of patches at their coordinates, with the least ``x`` and ``y`` at its corner.

    Patches are read one at a time. Later patches cover earlier ones.

    Args:
        patches: Images ``(h, w, 3)`` uint8; may be smaller than ``patch_px`` at the edge of the slide.
        x, y: Left and upper edge of each patch in pixels, shape ``(n,)``.
        scale: Output pixels per patch pixel, in (0, 1].

    Returns:
        The image ``(H, W, 3)`` uint8.
    """
    if not 0 < scale <= 1:
        raise DataError(f"scale {scale!r} is not in (0, 1]")
    x, y = _check_coordinates(x, y)
    left = np.round((x - x.min()) * scale).astype(int)
    top = np.round((y - y.min()) * scale).astype(int)
    right = np.round((x - x.min() + patch_px) * scale).astype(int).clip(left + 1)
    bottom = np.round((y - y.min() + patch_px) * scale).astype(int).clip(top + 1)
    width, height = int(right.max()), int(bottom.max())
    if width * height > MAX_PIXELS:
        raise DataError(f"the slide would be {width:,} x {height:,} pixels; pass a scale below {scale:g}")
    image = np.full((height, width, 3), 255, np.uint8)
    n_laid = 0
    for index, patch in enumerate(patches):
        if index >= len(x):
            raise DataError(f"more patches than the {len(x)} coordinates were given")
        if scale == 1:
            paste(image, patch, left[index], top[index])
        else:
            h, w = patch.shape[:2]
            # edges are rounded, not sizes, to avoid gaps
            w = max(1, round((right[index] - left[index]) * min(w / patch_px, 1)))
            h = max(1, round((bottom[index] - top[index]) * min(h / patch_px, 1)))
            small = cv2.resize(np.ascontiguousarray(patch), (w, h), interpolation=cv2.INTER_AREA)
            paste(image, small, left[index], top[index])
        n_laid += 1
    if n_laid != len(x):
        raise DataError(f"{n_laid} patches have {len(x)} coordinates; one pair per patch is needed")
    return image


def stitch_values(
    values: Sequence[float] | np.ndarray,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    patch_px: int,
) -> np.ndarray:
    """Return the values of patches on the grid of the slide, one cell per patch.

    Returns:
        Grid ``(rows, columns)`` float64, NaN without a patch; patches in one cell are averaged.
    """
    x, y = _check_coordinates(x, y)
    check_extent(x, y, patch_px)
    values = np.asarray(values, dtype=float)
    if len(values) != len(x):
        raise DataError(f"{len(values)} values have {len(x)} coordinates; one pair per patch is needed")
    column = np.floor((x - x.min()) / patch_px).astype(int)
    row = np.floor((y - y.min()) / patch_px).astype(int)
    total = np.zeros((row.max() + 1, column.max() + 1))
    count = np.zeros(total.shape)
    np.add.at(total, (row, column), values)
    np.add.at(count, (row, column), 1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def check_extent(x: np.ndarray, y: np.ndarray, step_px: float) -> None:
    """Refuse coordinates whose grid would have more than `MAX_CELLS` cells."""
    n_columns, n_rows = (int(np.ptp(axis) // step_px) + 1 for axis in (x, y))
    if n_columns * n_rows > MAX_CELLS:
        far = int(np.argmax(np.abs(x - np.median(x)) + np.abs(y - np.median(y))))
        raise DataError(
            f"{len(x):,} patches span a grid of {n_columns:,} x {n_rows:,} cells, more than {MAX_CELLS:,}"
            f"; check the coordinates, such as x={x[far]:.0f}, y={y[far]:.0f}"
        )


def _check_coordinates(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or not len(x):
        raise DataError(f"{len(x)} x and {len(y)} y coordinates were given; one pair per patch is needed")
    missing = int((~np.isfinite(x) | ~np.isfinite(y)).sum())
    if missing:
        raise DataError(f"{missing} of {len(x)} patches have no coordinates; exclude them before stitching")
    return x, y
