"""Measurements on a sample of a run's evaluated patches, whose results are stored in the run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from typing_extensions import TypedDict

from biopsy.core.errors import DataError
from biopsy.core.files import read_json
from biopsy.core.loaders import Model, validate
from biopsy.core.seeds import make_rng
from biopsy.data.predictions import PredictionsInfo
from biopsy.models.networks import describe
from biopsy.training.runs import Run

MAX_MEASURED = 5_000  # patches whose properties are measured
MAX_PREDICTED, MIN_PREDICTED = 1_000, 100  # patches that are predicted again
MAX_MULTIPLICATIONS = 5e11  # of one pass over these: some seconds on two cores


class ResultKey(TypedDict):
    """The predictions from which a result was computed."""

    format: str
    subset: str
    n_patches: int
    classifier_sha256: str
    seed: int


def result_key(
    run: Run, format: str, subset: str, frame: pd.DataFrame, metadata: PredictionsInfo
) -> ResultKey:
    """Return the entries that identify the predictions from which a result was computed."""
    return {
        "format": format,
        "subset": subset,
        "n_patches": len(frame),
        "classifier_sha256": metadata["classifier_sha256"],
        "seed": run.info["seed"],
    }


def read_result(path: Path, key: Mapping[str, object], record: type[Model]) -> Model | None:
    """Return a stored result with all entries of a key; None if there is none."""
    try:
        result = read_json(path, format=str(key["format"]))
        is_current = all(result.get(name) == value for name, value in key.items())
        return validate(path, record, result) if is_current else None
    except DataError:
        return None


def affordable_patches(
    network: nn.Module,
    input_px: int,
    multiplications: float = MAX_MULTIPLICATIONS,
    limits: tuple[int, int] = (MIN_PREDICTED, MAX_PREDICTED),
) -> int:
    """Return the number of patches that a network can predict with a number of multiplications."""
    per_patch = sum(
        row.parameters * np.prod(row.output_shape[1:], dtype=float) for row in describe(network, input_px)
    )
    return int(np.clip(multiplications / max(per_patch, 1), *limits))


def draw_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Return at most ``most`` of ``n`` rows, drawn without replacement, in order."""
    if n <= most:
        return np.arange(n)
    return np.sort(make_rng(seed, "hypotheses", most).choice(n, most, replace=False))
