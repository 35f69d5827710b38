"""Nuclei and outlines drawn onto a grid with soft edges, positions in micrometres."""

from collections.abc import Sequence

import cv2
import numpy as np

from biopsy.data.phantom.noise import Floats

_CHUNK = 1 << 20  # stamp pixels drawn at once, bounds memory
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


def stamp_nuclei(shape: tuple[int, int], origin_um: tuple[float, float], um: float, nuclei: Floats) -> Floats:
    """Draw soft ellipses onto an empty grid; where they overlap the darker one shows.

    Args:
        shape: Height and width of the grid.
        origin_um: Position of the grid's corner.
        um: Micrometres per pixel.
        nuclei: (n, 6): x, y, long and short radius in micrometres, angle in radians, amount of stain.
    """
    canvas = np.zeros(shape[0] * shape[1], np.float32)
    order = np.argsort(nuclei[:, 2], kind="stable")
    sizes = np.ceil(nuclei[order, 2] / um + 0.5).astype(int)
    for half in np.unique(sizes):
        group = nuclei[order[sizes == half]]
        step = max(_CHUNK // (2 * half + 1) ** 2, 1)
        for start in range(0, len(group), step):
            _stamp(canvas, shape, origin_um, um, group[start : start + step], int(half))
    return canvas.reshape(shape)


def _stamp(
    canvas: Floats,
    shape: tuple[int, int],
    origin_um: tuple[float, float],
    um: float,
    nuclei: Floats,
    half: int,
) -> None:
    x = (nuclei[:, 0] - np.float32(origin_um[0])) / np.float32(um) - np.float32(0.5)
    y = (nuclei[:, 1] - np.float32(origin_um[1])) / np.float32(um) - np.float32(0.5)
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    window = np.arange(-half, half + 1)
    dx = (window - (x - column)[:, None]).astype(np.float32)[:, None, :]
    dy = (window - (y - row)[:, None]).astype(np.float32)[:, :, None]
    cos, sin = np.cos(nuclei[:, 4])[:, None, None], np.sin(nuclei[:, 4])[:, None, None]
    long_px, short_px = (nuclei[:, k, None, None] / np.float32(um) for k in (2, 3))
    away = np.sqrt(((cos * dx + sin * dy) / long_px) ** 2 + ((cos * dy - sin * dx) / short_px) ** 2)
    value = np.clip((1 - away) * np.sqrt(long_px * short_px) + 0.5, 0, 1) * nuclei[:, 5, None, None]
    rows = (row[:, None] + window)[:, :, None]
    columns = (column[:, None] + window)[:, None, :]
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1]) & (value > 0)
    np.maximum.at(canvas, (rows * shape[1] + columns)[inside], value[inside])


def fill_outlines(
    shape: tuple[int, int],
    origin_um: tuple[float, float],
    um: float,
    outlines: Sequence[Floats],
    levels: Sequence[float] | None = None,
) -> Floats:
    """Fill closed outlines, each (n, 2) in micrometres, with a level in [0, 1] (1 without ``levels``)."""
    canvas = np.zeros(shape, np.uint8)
    for i, outline in enumerate(outlines):
        if len(outline) < 3:
            continue
        points = ((outline - np.array(origin_um, np.float32)) / np.float32(um) - 0.5) * (1 << _SHIFT)
        level = 255 if levels is None else round(255 * levels[i])
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], level, cv2.LINE_AA, _SHIFT)
    return canvas.astype(np.float32) * np.float32(1 / 255)
