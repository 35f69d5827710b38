"""The same numbers within groups of patches that a joined column names: site, scanner, age, grade."""

from typing import Any

import numpy as np
import pandas as pd

from biopsy.data.packs import COLUMNS, Pack
from biopsy.statistics.intervals import estimate_patch_metrics

SHOWN = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
MOST_VALUES = 12
RELABELLED = ("label_before", "label_by", "label_at")
PCAM = ("coord_x", "coord_y", "tumor_patch", "center_tumor_patch")  # place and label once more
OWN_COLUMNS = {*COLUMNS, "own_side", "row", "label_share", *RELABELLED, *PCAM}


def measure_subgroups(
    pack: Pack, rows: np.ndarray, probs: np.ndarray, threshold: dict[str, Any] | None, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Give the metrics of every value of every joined column.

    Numbers with more than `MOST_VALUES` distinct values are cut at their quartiles over the judged patches;
    text with more is left out. ``site_id`` counts as a joined column.

    Args:
        pack: With the joined columns in its table.
        rows: The judged patches.
        probs: Their probabilities, ``(n, n_classes)``.
        threshold: The frozen one; None (more than two classes) gives no subgroups.
        seed: Of bootstrap draws.

    Returns:
        Column -> value -> ``n_patches``, ``n_patients`` and `SHOWN` metrics with intervals over patients.
    """
    positive = pack.positive_index
    if positive is None or threshold is None:
        return {}
    table = pack.table.iloc[rows]
    truth, prob, groups = (
        (pack.target[rows] == positive).astype(int),
        probs[:, positive],
        pack.group_ids[rows],
    )
    found: dict[str, dict[str, Any]] = {}
    for column in [name for name in table.columns if name == "site_id" or name not in OWN_COLUMNS]:
        labels = _label(table[column])
        if labels is None:
            continue
        found[column] = {}
        for value in sorted(labels.dropna().unique()):
            chosen = labels.eq(value).fillna(False).to_numpy(bool)
            metrics = estimate_patch_metrics(
                truth[chosen], prob[chosen], groups[chosen], threshold["value"], seed=seed, unit=pack.unit
            )
            found[column][str(value)] = {
                "n_patches": int(chosen.sum()),
                "n_patients": len(np.unique(groups[chosen])),
                "patch": {name: metrics[name].to_dict() for name in SHOWN},
            }
    return found


def _label(column: pd.Series) -> pd.Series | None:
    """Give each patch the name of its subgroup, or None for a column that makes none."""
    n_values = column.nunique()
    if n_values < 2:
        return None
    if n_values <= MOST_VALUES:
        return column.astype("string")
    if pd.api.types.is_numeric_dtype(column):
        return pd.qcut(column.astype(float), 4, duplicates="drop").astype("string")
    return None
