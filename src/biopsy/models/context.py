"""Context: each patch's logits averaged with those of the patches around it on the same slide.

The weight of a neighbour falls exponentially with its distance, and the weights of the patches that are there
sum to one. A missing neighbour (background, the border of a fragment) therefore neither adds nor takes away:
a patch without neighbours keeps its own logits, and the shape of the tissue says nothing about its class.
Nothing is fitted, so nothing is learned from another patient's neighbourhood.
"""

import numpy as np
import pandas as pd

CELLS = 4
"""Cells of the averaging grid along a patch's side: distances are exact for strides of 1, 1/2 and 1/4."""
REACH = 5
"""Decay lengths beyond which a neighbour counts nothing: its weight there is below 1 %."""


def average_neighbours(
    logits: np.ndarray, table: pd.DataFrame, *, patch_px: int, length: float
) -> np.ndarray:
    """Return the logits averaged over the neighbourhood of each patch.

    Args:
        logits: ``(n, n_classes)``, of *all* patches of a slide that are known.
        table: ``x`` and ``y`` of each patch in patch pixels, ``slide_id`` and ``patient_id``. A patch that
            lacks coordinates or a slide keeps its logits.
        patch_px: Side of a patch in the same pixels.
        length: Distance, in patch sides, at which a neighbour's weight is ``1 / e`` of the patch's own.
    """
    averaged = logits.astype(np.float64)
    for rows, places in find_slides(table):
        averaged[rows] = _average_slide(averaged[rows], places / patch_px, length)
    return averaged.astype(logits.dtype)


def has_coordinates(table: pd.DataFrame) -> bool:
    """Return whether any patch has coordinates on a slide."""
    return {"x", "y", "slide_id", "patient_id"} <= set(table) and bool(_is_placed(table).any())


def find_slides(table: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each slide its rows ``(n,)`` and their coordinates ``(n, 2)``, where they have any."""
    slide = table["slide_id"].fillna(table["patient_id"])
    placed = np.flatnonzero(_is_placed(table))
    places = table[["x", "y"]].iloc[placed].to_numpy(float)
    parts = pd.Series(np.arange(len(placed))).groupby(slide.iloc[placed].to_numpy(str)).indices
    return [(placed[part], places[part]) for part in parts.values()]


def _is_placed(table: pd.DataFrame) -> pd.Series:
    known = table["slide_id"].notna() | table["patient_id"].notna()
    return table[["x", "y"]].notna().all(axis=1) & known


def _average_slide(logits: np.ndarray, places: np.ndarray, length: float) -> np.ndarray:
    """Average over one slide; ``places`` are in patch sides."""
    from scipy.signal import fftconvolve  # imports for half a second

    cells = np.rint((places - places.min(axis=0)) * CELLS).astype(int)
    column, row = cells.T
    shape = (row.max() + 1, column.max() + 1)
    reach = int(np.ceil(REACH * length * CELLS))
    offset = np.arange(-reach, reach + 1) / CELLS
    distance = np.hypot(offset[:, None], offset)
    kernel = np.exp(-distance / length) * (distance <= REACH * length)
    sums = []
    for values in (np.ones(len(logits)), *logits.T):
        grid = np.zeros(shape)
        np.add.at(grid, (row, column), values)
        sums.append(fftconvolve(grid, kernel, mode="same")[row, column])
    return np.stack(sums[1:], axis=1) / sums[0][:, None]
