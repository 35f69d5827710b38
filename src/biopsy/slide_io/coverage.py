"""Coverage of the rectangles of a grid by a mask or polygons."""

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

_BLOCK = 32  # rectangles per side that are intersected with one piece of a polygon


def share_of_mask(
    mask: np.ndarray, left: np.ndarray, top: np.ndarray, width: float, height: float
) -> np.ndarray:
    """Return the fraction of each rectangle covered by a mask.

    Args:
        mask: bool ``(H, W)``.
        left: Left edges in pixels of the mask, ``(n_columns,)``, may be fractional.

    Returns:
        Fractions ``(n_rows, n_columns)``.

    Example:
        >>> share_of_mask(np.array([[True, False]]), np.array([0.0, 0.5]), np.array([0.0]), 1, 1)
        array([[1. , 0.5]])
    """
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    np.cumsum(np.cumsum(mask, axis=0), axis=1, out=total[1:, 1:])
    rows = _interpolate(total, top + height) - _interpolate(total, top)
    return (_interpolate(rows.T, left + width) - _interpolate(rows.T, left)).T / (width * height)


def share_of_polygon(
    polygon: BaseGeometry, left: np.ndarray, top: np.ndarray, width: float, height: float
) -> np.ndarray:
    """Return the fraction of each rectangle covered by a polygon, exactly.

    Args:
        left: Left edges in units of the polygon, ascending, ``(n_columns,)``.

    Returns:
        Fractions ``(n_rows, n_columns)``.

    Example:
        >>> share_of_polygon(shapely.box(0, 0, 15, 10), np.array([0, 10]), np.array([0]), 10, 10)
        array([[1. , 0.5]])
    """
    shares = np.zeros((len(top), len(left)))
    for first_row in range(0, len(top), _BLOCK):
        for first_column in range(0, len(left), _BLOCK):
            rows, columns = slice(first_row, first_row + _BLOCK), slice(first_column, first_column + _BLOCK)
            x, y = np.meshgrid(left[columns], top[rows])
            bounds = shapely.box(x.min(), y.min(), x.max() + width, y.max() + height)
            piece = polygon.intersection(bounds)
            if piece.area >= bounds.area * (1 - 1e-12):
                shares[rows, columns] = 1
            elif piece.area > 0:
                shapely.prepare(piece)
                rectangles = shapely.box(x, y, x + width, y + height)
                shares[rows, columns] = shapely.area(shapely.intersection(piece, rectangles)) / (
                    width * height
                )
    return shares


def _interpolate(total: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Interpolate a cumulative sum at fractional positions of its first axis."""
    position = np.clip(position, 0, len(total) - 1)
    low = np.minimum(position.astype(np.int64), len(total) - 2)
    part = (position - low)[:, None]
    return total[low] * (1 - part) + total[low + 1] * part
