"""Weights of patches in the training loss, from a csv file: ``train.patch_weights``."""

from pathlib import Path

import numpy as np
import pandas as pd

from biopsy.core.errors import FileFormatError
from biopsy.core.tables import read_csv_table
from biopsy.data.packs import Pack

COLUMNS = ["patch_id", "weight"]


def read_patch_weights(path: Path | str, pack: Pack, train: np.ndarray) -> np.ndarray:
    """Return the weight of every patch in the training loss, float32 ``(n_patches,)``.

    They are the weights of the file, 1 for patches that it does not list, divided by their mean over the
    training patches: the loss of a pass is the weighted mean, at the learning rate of the unweighted one.

    Args:
        path: csv with the columns ``patch_id`` and ``weight`` (0 or more).
        train: Rows of the training patches.

    Raises:
        FileFormatError: If a weight is negative or no finite number, a patch is listed twice, no training
            patch is listed, or all training patches of a class have the weight 0.
        PackError: If a patch is not in the pack.
    """
    table = read_csv_table(path, required=COLUMNS)
    values = pd.to_numeric(table["weight"], errors="coerce").to_numpy(float)
    if (bad := ~(np.isfinite(values) & (values >= 0))).any():
        first = table[bad].iloc[0]
        raise FileFormatError(
            path, "value", f"has the weight {first['weight']!r} of {first['patch_id']}: expected 0 or more"
        )
    if (repeated := table["patch_id"].duplicated()).any():
        raise FileFormatError(path, "duplicate", f"lists {table['patch_id'][repeated].iloc[0]} twice")
    rows = pack.rows_of(table["patch_id"])
    if not np.isin(rows, train).any():
        raise FileFormatError(path, "value", "lists no training patch of the split")
    weights = np.ones(len(pack))
    weights[rows] = values
    totals = np.bincount(pack.target[train], weights[train], minlength=len(pack.class_names))
    for index in np.unique(pack.target[train]):
        if totals[index] == 0:
            name = pack.class_names[index]
            raise FileFormatError(path, "value", f"gives all training patches of class {name!r} the weight 0")
    return (weights / weights[train].mean()).astype(np.float32)
