"""Record of a self-supervised pre-training, and the check that its patients are not tested."""

from pathlib import Path
from typing import Literal, NotRequired

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from biopsy.core.errors import SplitError
from biopsy.core.files import read_json
from biopsy.core.loaders import validate
from biopsy.core.text import count
from biopsy.data.packs import Pack, Unit
from biopsy.data.splits import Split
from biopsy.models.classifier import StartWeights
from biopsy.models.weights import find_weights_file
from biopsy.recipes import Recipe
from biopsy.training.runs import EpochRecord, SeenPatients

FORMAT, DOCUMENT = "biopsy-pretraining/1", "pretraining.json"


class PretrainingPack(TypedDict):
    """The pack of a pre-training."""

    dataset: str
    content_sha256: str
    is_synthetic: bool


class PretrainingSplit(TypedDict):
    """The split of a pre-training."""

    name: str
    protocol: str
    unit: Unit
    fold: int | None


class PretrainingInfo(TypedDict):
    """Content of ``pretraining.json``."""

    format: str
    status: Literal["running", "finished"]
    config_sha256: str
    recipe: str
    network: str
    start: StartWeights
    seen: NotRequired[list[SeenPatients]]
    """Patients of the model of its initial weights, and of those from which that one learned."""
    pack: PretrainingPack
    split: PretrainingSplit
    seed: int
    epochs: PositiveInt
    neighbours: float
    crop: float
    positives: Literal["neighbours", "same patch"]
    n_patches: PositiveInt
    n_with_neighbours: NonNegativeInt
    unit: Unit
    patients: list[str] | None
    """Ids of the unit, None without patients and slides."""
    log: list[EpochRecord]
    warnings: list[str]
    weights_sha256: str | None
    environment: dict[str, str | int | None]


def read_pretraining(path: Path) -> PretrainingInfo:
    """Read ``pretraining.json``.

    Raises:
        FileFormatError: If it was changed, or is something else.
    """
    return validate(path, PretrainingInfo, read_json(path, format=FORMAT, remedy="remove the folder"))


def require_unseen(recipe: Recipe, pack: Pack, split: Split, fold: int | None) -> None:
    """Refuse initial weights that were pre-trained on patches of test or validation patients.

    Recognised by the record beside the weights, if it is of the same pack. Without patients and slides it has
    no ids, and split and fold must be the same.

    Raises:
        SplitError: With the first such patient, or the other split.
    """
    weights = find_weights_file(recipe.model.weights) if recipe.model.pretrained else None
    if weights is None or not (weights.is_file() and weights.with_name(DOCUMENT).is_file()):
        return
    info = read_pretraining(weights.with_name(DOCUMENT))
    if info["pack"]["content_sha256"] != pack.info.content_sha256:
        return
    if info["patients"] is None:
        theirs = info["split"]
        if (theirs["name"], theirs["fold"]) != (split.name, fold):
            which = "" if theirs["fold"] is None else f", fold {theirs['fold']}"
            raise SplitError(
                f"the weights {weights} were pre-trained on split {theirs['name']!r}{which}, whose training "
                "patches may be in the validation or test subset: pre-train on this split and fold",
                "overlap",
            )
        return
    held_out = pack.group_ids[np.isin(split.subsets(pack, fold), ("validation", "test"))]
    seen = np.intersect1d(held_out, info["patients"])
    if len(seen):
        raise SplitError(
            f"the weights {weights} were pre-trained on {count(len(seen), pack.unit)} of the validation or "
            f"test subset, first {seen[0]}: pre-train on this split and fold",
            "overlap",
        )
