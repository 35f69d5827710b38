"""Context: averaging of logits over neighbouring patches on the same slide.

Weights decay exponentially with distance and are normalised over the existing patches, so that missing
neighbours (background, tissue borders) have no influence: an isolated patch keeps its logits. There are no
fitted parameters.
"""

import numpy as np
import pandas as pd

CELLS = 4
"""Grid cells per patch side; distances are exact for strides of 1, 1/2 and 1/4 patch."""
REACH = 5
"""Radius in decay lengths, at which the weight is below 1 %."""


def average_neighbours(
    logits: np.ndarray, table: pd.DataFrame, *, patch_px: int, length: float
) -> np.ndarray:
    """Return the logits averaged over the neighbourhood of each patch.

    Args:
        logits: ``(n, n_classes)``, of *all* patches of a slide.
        table: ``x`` and ``y`` in pixels, ``slide_id`` and ``patient_id``. Patches without coordinates or
            slide keep their logits.
        patch_px: Side of a patch in the same pixels.
        length: Decay length in patch sides.
    """
    averaged = logits.astype(np.float64)
    for rows, coordinates in find_slides(table):
        averaged[rows] = _average_slide(averaged[rows], coordinates / patch_px, length)
    return averaged.astype(logits.dtype)


def has_coordinates(table: pd.DataFrame) -> bool:
    """Return whether any patch has coordinates on a slide."""
    return {"x", "y", "slide_id", "patient_id"} <= set(table) and bool(_has_coordinates(table).any())


def find_slides(table: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows ``(n,)`` of each slide and their coordinates ``(n, 2)``."""
    slide = table["slide_id"].fillna(table["patient_id"])
    rows = np.flatnonzero(_has_coordinates(table))
    coordinates = table[["x", "y"]].iloc[rows].to_numpy(float)
    parts = pd.Series(np.arange(len(rows))).groupby(slide.iloc[rows].to_numpy(str)).indices
    return [(rows[part], coordinates[part]) for part in parts.values()]


def _has_coordinates(table: pd.DataFrame) -> pd.Series:
    has_slide = table["slide_id"].notna() | table["patient_id"].notna()
    return table[["x", "y"]].notna().all(axis=1) & has_slide


def _average_slide(logits: np.ndarray, coordinates: np.ndarray, length: float) -> np.ndarray:
    """Return averaged logits of one slide; ``coordinates`` are in patch sides."""
    from scipy.signal import fftconvolve  # slow import

    cells = np.rint((coordinates - coordinates.min(axis=0)) * CELLS).astype(int)
    column, row = cells.T
    shape = (row.max() + 1, column.max() + 1)
    radius = int(np.ceil(REACH * length * CELLS))
    offset = np.arange(-radius, radius + 1) / CELLS
    distance = np.hypot(offset[:, None], offset)
    kernel = np.exp(-distance / length) * (distance <= REACH * length)
    sums = []
    for values in (np.ones(len(logits)), *logits.T):
        grid = np.zeros(shape)
        np.add.at(grid, (row, column), values)
        sums.append(fftconvolve(grid, kernel, mode="same")[row, column])
    return np.stack(sums[1:], axis=1) / sums[0][:, None]
