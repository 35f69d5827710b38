"""One slide in numbers: areas, the range that calibration allows, the largest region, what was left open."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from biopsy.slides.maps import SlideMap
from biopsy.slides.regions import Region

SURE, POSSIBLE = 0.9, 0.1
"""Probabilities between which calibration leaves open whether a cell is positive."""


def summarise(slide_map: SlideMap, regions: Sequence[Region], *, is_calibrated: bool) -> dict[str, Any]:
    """Give areas in mm2 and shares of what was mapped.

    ``positive`` holds the area called positive at the threshold and, where probabilities are calibrated,
    ``expected_mm2`` (the sum of the probabilities: what they promise on average) and the range from the area
    that is positive with probability .9 or more (``low_mm2``) to that with .1 or more (``high_mm2``).

    Args:
        slide_map: The map.
        regions: Its regions, as `find_regions` gives them.
        is_calibrated: Whether the classifier's probabilities were calibrated on patients of their own.
    """
    pred, cell_mm2 = slide_map.cells_pred(), slide_map.cell_mm2
    n_cells = int((pred != -1).sum())
    classes = {}
    for index, name in enumerate(slide_map.class_names):
        own = [region for region in regions if region.class_name == name]
        classes[name] = {
            "area_mm2": float((pred == index).sum() * cell_mm2),
            "share": float((pred == index).sum() / n_cells),
            "n_regions": len(own),
            "largest_region_mm2": max((region.area_mm2 for region in own), default=0.0),
        }
    return {
        "n_patches": len(slide_map),
        "n_cells": n_cells,
        "cell_um": slide_map.grid.cell_um,
        "mapped_mm2": n_cells * cell_mm2,
        "classes": classes,
        "abstained_share": float((pred == -2).sum() / n_cells),
        "positive": _measure_positive(slide_map, pred, is_calibrated),
    }


def compare_with_target(slide_map: SlideMap, target: np.ndarray) -> dict[str, Any]:
    """Compare a map of two classes with the annotated class of its patches, ``(n_patches,)``."""
    from sklearn.metrics import roc_auc_score  # imports for a second

    positive = slide_map.positive_index
    assert positive is not None
    is_positive, prob = target == positive, slide_map.probs[:, positive]
    called = prob >= np.float32(slide_map.threshold if slide_map.threshold is not None else 0.5)
    return {
        "n_positive": int(is_positive.sum()),
        "auroc": float(roc_auc_score(is_positive, prob)) if len(set(is_positive.tolist())) == 2 else None,
        "tp": int((called & is_positive).sum()),
        "fp": int((called & ~is_positive).sum()),
        "fn": int((~called & is_positive).sum()),
        "tn": int((~called & ~is_positive).sum()),
    }


def _measure_positive(slide_map: SlideMap, pred: np.ndarray, is_calibrated: bool) -> dict[str, Any] | None:
    positive = slide_map.positive_index
    if positive is None:
        return None
    prob = slide_map.cells()[..., positive]
    prob, cell_mm2 = prob[~np.isnan(prob)], slide_map.cell_mm2
    found: dict[str, Any] = {
        "class": slide_map.positive_class,
        "threshold": slide_map.threshold,
        "area_mm2": float((pred == positive).sum() * cell_mm2),
        "expected_mm2": None,
        "low_mm2": None,
        "high_mm2": None,
        "reason": "the classifier's probabilities are not calibrated",
    }
    if is_calibrated:
        found |= {
            "expected_mm2": float(prob.sum(dtype=float) * cell_mm2),
            "low_mm2": float((prob >= SURE).sum() * cell_mm2),
            "high_mm2": float((prob >= POSSIBLE).sum() * cell_mm2),
            "reason": None,
        }
    return found
