"""The same numbers within groups of patches that a joined column names: site, scanner, age, grade."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from biopsy.data.packs import COLUMNS
from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.intervals import estimate_metrics

SHOWN = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
SHOWN_OF_CLASSES = ("accuracy", "balanced_accuracy", "f1_macro", "auroc")
MOST_VALUES = 12
RELABELLED = ("label_before", "label_by", "label_at")
PCAM = ("coord_x", "coord_y", "tumor_patch", "center_tumor_patch")  # place and label once more
OWN_COLUMNS = {*COLUMNS, "own_side", "row", "label_share", *RELABELLED, *PCAM}


def pick_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a pack's table that were joined, and ``site_id``."""
    return table[[name for name in table.columns if name == "site_id" or name not in OWN_COLUMNS]]


def measure_subgroups(
    scored: ScoredPatches, columns: pd.DataFrame, *, seed: int, level: float = 0.95
) -> dict[str, dict[str, Any]]:
    """Return the metrics of every value of every column.

    Numbers with more than `MOST_VALUES` distinct values are cut at their quartiles over the judged patches;
    text with more is left out.

    Args:
        scored: The judged patches.
        columns: What is known of each, a row a patch in the same order.
        seed: Of bootstrap draws.
        level: Nominal coverage.

    Returns:
        Column -> value -> ``n_patches``, ``n_patients`` and ``patch``: the metrics of `SHOWN` (for more than
        two classes `SHOWN_OF_CLASSES`) with intervals over patients, each by itself (`describe_intervals`).
    """
    shown = SHOWN_OF_CLASSES if scored.positive_class is None else SHOWN
    result: dict[str, dict[str, Any]] = {}
    for column in columns:
        labels = _label(columns[column])
        if labels is None:
            continue
        result[str(column)] = {}
        for value in sorted(labels.dropna().unique()):
            part = scored.take(labels.eq(value).fillna(False).to_numpy(bool))
            metrics = estimate_metrics(part.sample(), seed=seed, names=shown, level=level, unit=scored.unit)
            result[str(column)][str(value)] = {
                "n_patches": len(part),
                "n_patients": len(np.unique(part.group_ids)),
                "patch": {name: interval.to_dict() for name, interval in metrics.items()},
            }
    return result


def describe_intervals(subgroups: Mapping[str, Mapping[str, Any]], level: float) -> dict[str, Any] | None:
    """Return the entry ``subgroup_intervals`` of ``metrics.json``: intervals are not simultaneous."""
    n_subgroups = sum(map(len, subgroups.values()))
    return {"level": level, "n_subgroups": n_subgroups, "corrected": False} if n_subgroups else None


def _label(column: pd.Series) -> pd.Series | None:
    """Return the name of each patch's subgroup, or None for a column that makes none."""
    n_values = column.nunique()
    if n_values < 2:
        return None
    if n_values <= MOST_VALUES:
        return column.astype("string")
    if pd.api.types.is_numeric_dtype(column):
        return pd.qcut(column.astype(float), 4, duplicates="drop").astype("string")
    return None
