"""Random fields and random points over the plane, the same wherever a picture is cut and at any pixel size.

A field is a table of random numbers laid over the plane and repeated; a point set is one jittered point per
cell of a grid. Both are looked up by position, so two overlapping regions agree without sharing state.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

_TABLE = 211  # cells per repeat, prime: two fields of unlike scale do not repeat together


class Field:
    """A smooth random field of mean 0 and spread near 1, one random number per ``scale_um`` cell."""

    def __init__(self, rng: np.random.Generator, scale_um: float, stretch: float = 1.0) -> None:
        table = 1.35 * rng.standard_normal(
            (_TABLE, _TABLE), dtype=np.float32
        )  # interpolation lowers the spread
        self._table = np.pad(table, 3, mode="wrap")
        self._per_um = (1.0 / (scale_um * stretch), 1.0 / scale_um)

    def at(self, x_um: Floats, y_um: Floats) -> Floats:
        """Return the field at points; both arrays ``(H, W)`` in micrometres, ``stretch`` acts along x."""
        column, row = (_wrap(axis, per_um) for axis, per_um in zip((x_um, y_um), self._per_um, strict=True))
        return np.asarray(cv2.remap(self._table, column, row, cv2.INTER_CUBIC), np.float32)


def _wrap(axis_um: Floats, per_um: float) -> Floats:
    """Return the table's column or row at each point; the table has a margin of 3 for the interpolation."""
    turns = axis_um * np.float32(per_um / _TABLE)
    turns -= np.floor(turns)
    turns *= np.float32(_TABLE)
    turns += np.float32(3)
    return turns


class Points(NamedTuple):
    """Points in micrometres with seven uniform numbers each, drawn for whatever the caller needs."""

    x_um: Floats
    y_um: Floats
    draws: Floats  # (n, 7), uniform in [0, 1)


class Jitter:
    """One random point in every cell of a grid of ``spacing_um``."""

    def __init__(self, rng: np.random.Generator, spacing_um: float, amount: float = 0.9) -> None:
        self.spacing_um = spacing_um
        self._amount = np.float32(amount)
        self._table = rng.random((_TABLE, _TABLE, 9), dtype=np.float32)

    def within(self, x_um: float, y_um: float, width_um: float, height_um: float) -> Points:
        """Return the points of every cell that touches a rectangle."""
        columns = np.arange(np.floor(x_um / self.spacing_um), np.ceil((x_um + width_um) / self.spacing_um))
        rows = np.arange(np.floor(y_um / self.spacing_um), np.ceil((y_um + height_um) / self.spacing_um))
        column, row = (axis.ravel().astype(np.int64) for axis in np.meshgrid(columns, rows))
        drawn = self._table[row % _TABLE, column % _TABLE]
        # Every second row is shifted by half a cell: hexagonal packing shows no grid.
        x = (column + 0.5 * (row % 2) + 0.5 + self._amount * (drawn[:, 0] - 0.5)) * self.spacing_um
        y = (row + 0.5 + self._amount * (drawn[:, 1] - 0.5)) * self.spacing_um
        return Points(x.astype(np.float32), y.astype(np.float32), drawn[:, 2:])
