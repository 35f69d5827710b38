"""Coordinates of patches on their slides: patches by slide, and the step of their grid."""

import numpy as np
import pandas as pd

REACH = 1.25
"""Largest distance of neighbours in x and in y, in grid steps: the eight, including the diagonal ones."""

Slides = list[tuple[np.ndarray, np.ndarray]]


def has_coordinates(table: pd.DataFrame) -> bool:
    """Return whether any patch has coordinates on a slide."""
    return {"x", "y", "slide_id", "patient_id"} <= set(table) and bool(_has_coordinates(table).any())


def find_slides(table: pd.DataFrame) -> Slides:
    """Return, for each slide, its rows ``(n,)`` of the table and their coordinates ``(n, 2)`` as (x, y).

    Patches without coordinates, or without both ``slide_id`` and ``patient_id``, are left out.
    """
    slide = table["slide_id"].fillna(table["patient_id"])
    rows = np.flatnonzero(_has_coordinates(table))
    coordinates = table[["x", "y"]].iloc[rows].to_numpy(float)
    parts = pd.Series(np.arange(len(rows))).groupby(slide.iloc[rows].to_numpy(str)).indices
    return [(rows[part], coordinates[part]) for part in parts.values()]


def find_step(slides: Slides) -> float:
    """Return the most frequent Chebyshev distance from a patch to its nearest neighbour."""
    from scipy.spatial import cKDTree  # slow import

    nearest = [np.empty(0)]
    for _, positions in slides:
        distinct = np.unique(positions, axis=0)
        if len(distinct) > 1:
            nearest.append(cKDTree(distinct).query(distinct, k=2, p=np.inf)[0][:, 1])
    distances, times = np.unique(np.concatenate(nearest), return_counts=True)
    return float(distances[times.argmax()]) if len(times) else 1.0


def _has_coordinates(table: pd.DataFrame) -> pd.Series:
    has_slide = table["slide_id"].notna() | table["patient_id"].notna()
    return table[["x", "y"]].notna().all(axis=1) & has_slide
