"""What share of each rectangle of a grid is covered: by a mask, by polygons."""

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

_BLOCK = 32  # rectangles a side that are compared with one piece cut out of a polygon


def share_of_mask(
    mask: np.ndarray, left: np.ndarray, top: np.ndarray, width: float, height: float
) -> np.ndarray:
    """Return the share of a mask that is true in every rectangle.

    Args:
        mask: bool ``(H, W)``.
        left: Left edges in pixels of the mask, ``(n_columns,)``; fractions count.
        top: Upper edges, ``(n_rows,)``.
        width: Of every rectangle, in pixels of the mask.

    Returns:
        Shares ``(n_rows, n_columns)``.

    Example:
        >>> share_of_mask(np.array([[True, False]]), np.array([0.0, 0.5]), np.array([0.0]), 1, 1)
        array([[1. , 0.5]])
    """
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    np.cumsum(np.cumsum(mask, axis=0), axis=1, out=total[1:, 1:])
    rows = _read(total, top + height) - _read(total, top)
    return (_read(rows.T, left + width) - _read(rows.T, left)).T / (width * height)


def share_of_polygon(
    polygon: BaseGeometry, left: np.ndarray, top: np.ndarray, width: float, height: float
) -> np.ndarray:
    """Return the share of every rectangle that lies in a polygon, by its exact area.

    Args:
        polygon: Valid; with holes, or several in one.
        left: Left edges in the polygon's units, rising, ``(n_columns,)``.
        top: Upper edges, rising, ``(n_rows,)``.

    Returns:
        Shares ``(n_rows, n_columns)``.

    Example:
        >>> share_of_polygon(shapely.box(0, 0, 15, 10), np.array([0, 10]), np.array([0]), 10, 10)
        array([[1. , 0.5]])
    """
    shares = np.zeros((len(top), len(left)))
    for first_row in range(0, len(top), _BLOCK):
        for first_column in range(0, len(left), _BLOCK):
            rows, columns = slice(first_row, first_row + _BLOCK), slice(first_column, first_column + _BLOCK)
            x, y = np.meshgrid(left[columns], top[rows])
            around = shapely.box(x.min(), y.min(), x.max() + width, y.max() + height)
            piece = polygon.intersection(around)
            if piece.area >= around.area * (1 - 1e-12):
                shares[rows, columns] = 1
            elif piece.area > 0:
                shapely.prepare(piece)
                rectangles = shapely.box(x, y, x + width, y + height)
                shares[rows, columns] = shapely.area(shapely.intersection(piece, rectangles)) / (
                    width * height
                )
    return shares


def _read(total: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Read a running total at fractional places of its first axis."""
    place = np.clip(place, 0, len(total) - 1)
    low = np.minimum(place.astype(np.int64), len(total) - 2)
    part = (place - low)[:, None]
    return total[low] * (1 - part) + total[low + 1] * part
