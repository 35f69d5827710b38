"""Kaggle's submission csv: ``id,label``, the label a probability, as its competition ranks by AUROC."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from biopsy.core.errors import DataError
from biopsy.data.predictions import write_described_csv
from biopsy.imaging.decode import IMAGE_SUFFIXES

FORMAT = "biopsy-submission/1"


def give_ids(patch_ids: Sequence[str]) -> list[str]:
    """Give each patch the id Kaggle knows it by: its file's name without folders and ending.

    Raises:
        DataError: If two patches have the same id, which Kaggle refuses.
    """
    ids = []
    for patch_id in patch_ids:
        name = patch_id.rpartition("/")[2]
        stem, dot, ending = name.rpartition(".")
        ids.append(stem if stem and (dot + ending).lower() in IMAGE_SUFFIXES else name)
    seen = pd.Series(ids, dtype=str)
    twice = seen[seen.duplicated()]
    if len(twice):
        raise DataError(f"two patches have the id {twice.iloc[0]!r}: Kaggle's csv takes each id once")
    return ids


def check_name(path: Path | str) -> Path:
    """Refuse a file that is not named as a csv."""
    path = Path(path)
    if path.suffix != ".csv":
        raise DataError(f"Kaggle takes a csv, not {path.name!r}; name the submission with .csv")
    return path


def write_submission(path: Path | str, frame: pd.DataFrame, metadata: Mapping[str, Any]) -> Path:
    """Write the probability of the positive class of each patch, in order, and ``<name>.csv.json`` beside it.

    Args:
        path: ``*.csv``.
        frame: Predictions of two classes, with ``patch_id`` and ``prob``.
        metadata: What they were made with, and what was skipped.

    Raises:
        DataError: If the ending is another one, or two patches have one id.
    """
    path = check_name(path)
    table = pd.DataFrame({"id": give_ids(frame["patch_id"].tolist()), "label": frame["prob"].to_numpy(float)})
    write_described_csv(path, table, {**metadata, "format": FORMAT})
    return path
