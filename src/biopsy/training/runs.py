"""Runs: one training each, as a folder; what was asked, what happened, what came out."""

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Required

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, NonNegativeInt, model_validator
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, FileFormatError, PackError, RunError
from biopsy.core.files import create_directory, read_json, sha256_file, write_atomic, write_json
from biopsy.core.loaders import parse_json, read_text, validate
from biopsy.core.tables import read_csv_table, write_csv
from biopsy.data.packs import Pack, is_pack
from biopsy.data.predictions import FrozenThreshold, PredictionsInfo, read_predictions
from biopsy.models.classifier import Classifier
from biopsy.recipes import DEFINING_TABLES, Recipe, load_recipe, recipe_toml
from biopsy.recipes.schema import Decision

FORMAT = "biopsy-run/1"
DOCUMENT = "run.json"
MAX_LOG_BYTES = 2**26  # 64 MiB: 100,000 epochs
_SUBSETS = ("train", "validation", "test", "")
SETTLED_BEFORE = {
    "decision.calibration": "none",
    "decision.operating_points": Decision().operating_points,
    "as_published.calibration": "none",
    "preprocessing.feed": "recipe",
    "model.tta": "none",
    "model.context": 0.0,
    "train.nesterov": False,
    "train.label_smoothing": 0.0,
    "train.ema_decay": 0.0,
}
"""Settings younger than the first runs, and the values with which those runs answer the same question."""


class EpochRecord(TypedDict, total=False):
    """What is logged of an epoch; a probe has but one, with the penalty that was chosen and its features."""

    epoch: Required[int]
    step: int
    loss: float
    accuracy: float
    binary_accuracy: float
    val_loss: float
    val_accuracy: float
    val_binary_accuracy: float
    val_auroc: float | None
    auroc: float | None
    lr: float
    best: bool
    images_per_s: float
    seconds: float
    time_left_s: float
    penalty: float
    features: str
    feature_seconds: float
    n_features: int
    run: str
    """For a caller's ``on_epoch``: path of the run, and of a study's its recipe, fold and seed."""
    recipe: str
    fold: int | None
    seed: int


class _Count(BaseModel):
    patches: NonNegativeInt
    groups: int | None
    per_class: dict[str, NonNegativeInt]


class _Split(BaseModel):
    name: str
    protocol: str
    fold: int | None
    unit: Literal["patient", "slide", "patch"]
    as_published: bool
    test_is_validation: bool = False
    patients_overlap: bool | None
    subsets: dict[str, _Count]


class _Pack(BaseModel):
    path: str
    name: str
    dataset: str
    content_sha256: str
    n_patches: NonNegativeInt
    unit: Literal["patient", "slide", "patch"]


class _Weights(BaseModel):
    pretrained: bool
    sha256: str | None


class _Document(BaseModel):
    """What ``run.json`` must hold; the rest is for people."""

    id: str
    status: Literal["running", "interrupted", "failed", "finished"]
    recipe: str
    seed: int
    split: _Split
    pack: _Pack
    weights: _Weights
    epochs: NonNegativeInt
    epochs_done: NonNegativeInt
    seconds: float = Field(ge=0)
    started: str
    environment: dict[str, object]
    chosen_epoch: int | None = None
    threshold: FrozenThreshold | None = None
    files: dict[str, str] = {}

    @model_validator(mode="after")
    def _check(self) -> "_Document":
        if self.status == "finished" and (
            self.chosen_epoch is None or "threshold" not in self.model_fields_set
        ):
            raise ValueError("a finished run has chosen_epoch and threshold")
        return self


class Run:
    """A training run, read from its folder.

    Attributes:
        path: The folder.
        info: What ``run.json`` says: what was asked, on which pack, and what came of it.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info

    @classmethod
    def open(cls, path: "Path | str | Run") -> "Run":
        """Open a run.

        Raises:
            RunError: If the folder holds no run of a format that this version reads.
        """
        if isinstance(path, Run):
            return path
        path = Path(path)
        if not (path / DOCUMENT).is_file():
            raise RunError(
                f"{path} is not a run (it has no {DOCUMENT}): make one with `biopsy train RECIPE --data PACK`"
            )
        try:
            remedy = "bring it back, or train again"
            info = read_json(path / DOCUMENT, format=FORMAT, remedy=remedy, may_lack_hash=True)
            validate(path / DOCUMENT, _Document, info)
        except DataError as error:
            raise RunError(str(error)) from None
        return cls(path, info)

    @classmethod
    def create(cls, path: Path, info: Mapping[str, object], recipe: Recipe, split: pd.DataFrame) -> "Run":
        """Write a new run's folder whole: ``run.json``, ``recipe.toml`` and ``split.csv``.

        Raises:
            RunError: If the folder already holds something.
        """
        if path.exists() and any(path.iterdir()):
            raise RunError(
                f"{path} is not empty: name another folder, or go on with `biopsy train --resume {path}`"
            )
        info = {"format": FORMAT, **info}
        with create_directory(path) as partial:
            write_atomic(partial / "recipe.toml", recipe_toml(recipe))
            write_csv(partial / "split.csv", split)
            info["files"] = {name: sha256_file(partial / name) for name in ("recipe.toml", "split.csv")}
            write_json(partial / DOCUMENT, info)
        return cls(path, info)

    def __repr__(self) -> str:
        return f"<Run {self.path.name}: {self.info['status']}>"

    def update(self, **fields: Any) -> None:
        """Change what ``run.json`` says."""
        self.info = {**self.info, **fields}
        write_json(self.path / DOCUMENT, self.info)

    def hash_files(self, *names: str) -> dict[str, str]:
        """Return the entry ``files`` of ``run.json`` with the hashes of files that were just written."""
        return {**self.info.get("files", {}), **{name: sha256_file(self.path / name) for name in names}}

    def require_unchanged(self, name: str) -> Path:
        """Return the path of a file of the run, refused if it is not the one that ``run.json`` records.

        Runs of the first versions recorded none.
        """
        path, recorded = self.path / name, self.info.get("files", {}).get(name)
        try:
            if recorded is not None and sha256_file(path) != recorded:
                raise FileFormatError(
                    path, "altered", "was changed since the run wrote it: bring it back, or train again"
                )
        except FileFormatError as error:
            raise RunError(str(error)) from None
        return path

    @property
    def recipe(self) -> Recipe:
        """The recipe with every default filled in, as it was trained."""
        return load_recipe(self.require_unchanged("recipe.toml"))

    @property
    def classifier(self) -> Classifier:
        """The classifier that came out.

        Raises:
            RunError: If training has not finished.
        """
        self.require_finished()
        classifier = Classifier.load(self.path / "classifier")
        for name in ("classifier/classifier.json", "classifier/weights.safetensors"):
            self.require_unchanged(name)
        if classifier.frozen != self.info.get("threshold"):
            raise RunError(
                f"{self.path / 'classifier'} has another threshold than {DOCUMENT} records: "
                f"choose it again with `biopsy calibrate {self.path}`"
            )
        return classifier

    def load_for_calibration(self) -> Classifier:
        """Read the classifier to fit all but its weights again, also where an earlier fit was cut off."""
        self.require_finished()
        self.require_unchanged("classifier/weights.safetensors")
        return Classifier.load(self.path / "classifier")

    def require_finished(self) -> None:
        """Refuse a run whose training has not finished."""
        info = self.info
        if info["status"] != "finished":
            raise RunError(
                f"{self.path} is {info['status']} after {info['epochs_done']} of {info['epochs']} epochs: "
                f"go on with `biopsy train --resume {self.path}`"
            )

    def open_pack(self, *, verify: bool = True) -> Pack:
        """Open the pack this run was trained on, and check that it still is that pack.

        Where it is no longer where it was, it is looked for beside the run and one folder further up.

        Raises:
            RunError: If it is gone or its content differs from what was trained on.
        """
        requested = self.info["pack"]
        folder = self.path.resolve().parent
        moved = [place / requested["name"] for place in (folder, folder.parent)]
        places = [Path(requested["path"]), *(place for place in moved if is_pack(place))]
        failures = []
        for place in places:
            try:
                pack = Pack.open(place)
                self._require_content(pack)
            except (PackError, RunError) as error:
                failures.append(error)
                continue
            if verify:
                pack.verify()
            return pack
        raise RunError(
            f"{self.path.name} was trained on {requested['path']}: {failures[0]}; restore that pack, name it "
            "with --data where the command takes it, or train anew"
        )

    def take_pack(self, pack: Pack) -> None:
        """Note where the pack lies now.

        Raises:
            RunError: If it is another one than the run was trained on.
        """
        self._require_content(pack)
        self.update(pack={**self.info["pack"], "path": str(pack.path.resolve()), "name": pack.path.name})

    def _require_content(self, pack: Pack) -> None:
        wanted = self.info["pack"]["content_sha256"]
        if pack.info.content_sha256 != wanted:
            raise RunError(
                f"{self.path.name} was trained on another content than that of {pack.path} "
                f"({wanted[:12]}, not {pack.info.content_sha256[:12]})"
            )

    def subsets(self, pack: Pack) -> np.ndarray:
        """Return the subset of every patch of the pack: ``train``, ``validation``, ``test`` or ``""``."""
        path = self.require_unchanged("split.csv")
        try:
            split = read_csv_table(path, required=["patch_id", "subset"])
        except FileFormatError as error:
            raise RunError(str(error)) from None
        subsets = split["subset"].fillna("")
        if split["patch_id"].tolist() != pack.table["patch_id"].tolist() or not subsets.isin(_SUBSETS).all():
            raise RunError(f"{path} does not list the patches of {pack.path}, or names unknown subsets")
        return subsets.to_numpy(str)

    @property
    def validation_subset(self) -> str:
        """The subset that validates: ``validation``, or ``test`` where the published split had it so."""
        return "test" if self.info["split"].get("test_is_validation") else "validation"

    def log(self) -> list[EpochRecord]:
        """Return one record an epoch."""
        if not (self.path / "log.jsonl").exists():
            return []
        path = self.require_unchanged("log.jsonl")
        try:
            lines = read_text(path, max_bytes=MAX_LOG_BYTES).splitlines()
            records = [parse_json(line, path, allow_nan=True) for line in lines]
            if not all(
                isinstance(record, dict) and isinstance(record.get("epoch"), int) for record in records
            ):
                raise FileFormatError(path, "value", "holds a line that is no record of an epoch")
        except FileFormatError as error:
            raise RunError(f"{error}; remove it to go without a log") from None
        return records

    def write_log(self, records: Iterable[EpochRecord]) -> None:
        """Write the whole log again, one line an epoch."""
        write_atomic(self.path / "log.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))

    def predictions(self, subset: str) -> tuple[pd.DataFrame, PredictionsInfo]:
        """Read the predictions of one subset and their metadata."""
        path = self.path / "predictions" / f"{subset}.parquet"
        if not path.exists():
            raise RunError(
                f"{path} does not exist: make it with `biopsy evaluate {self.path} --subset {subset}`"
            )
        frame, about = read_predictions(path)
        self.require_same_classifier(path, about)
        return frame, about

    @property
    def evaluated_subset(self) -> str:
        """The subset whose errors may be looked at: ``test`` once it has been opened, until then
        ``validation``."""
        return "test" if (self.path / "predictions" / "test.parquet").exists() else "validation"

    def metrics(self) -> dict[str, Any]:
        """Read ``evaluation/metrics.json``."""
        path = self.path / "evaluation" / "metrics.json"
        if not path.exists():
            raise RunError(f"{self.path} has not been evaluated: `biopsy evaluate {self.path}`")
        metrics = read_json(
            path, format="biopsy-metrics/1", remedy=f"run `biopsy evaluate {self.path}` again"
        )
        self.require_same_classifier(path, metrics)
        return metrics

    def require_same_classifier(self, path: Path, about: Mapping[str, object]) -> None:
        """Refuse numbers of another classifier than the run's; the first versions did not say of which."""
        theirs, ours = about.get("classifier_sha256"), self.info.get("classifier_sha256")
        if None not in (theirs, ours) and theirs != ours:
            raise RunError(
                f"{path} is of another classifier than the run has: run `biopsy evaluate {self.path}` again"
            )


def hash_config(
    recipe: Recipe,
    pack: Pack,
    subsets: np.ndarray,
    split: Mapping[str, object],
    seed: int,
    weights: str | None,
) -> str:
    """Return a hash of everything that defines a run's result: equal questions need one run.

    Args:
        recipe: Its defining tables count, not where it comes from.
        pack: Its content and its classes count, not where it lies.
        subsets: Side of every patch.
        split: Its entry in ``run.json``: whether it is published, and whether its test subset validates.
        weights: Hash of the file that training starts from; None for random weights.
    """
    requested = recipe.model_dump(mode="json", include=set(DEFINING_TABLES))
    for name, before in SETTLED_BEFORE.items():
        table, _, key = name.partition(".")
        if requested[table][key] == before:
            del requested[table][key]
    question = {
        "recipe": requested,
        "pack": pack.info.content_sha256,
        "classes": [pack.class_names, pack.info.positive_class],
        "subsets": hashlib.sha256("\n".join(subsets.tolist()).encode()).hexdigest(),
        "split": [split["as_published"], split["test_is_validation"]],
        "seed": seed,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def find_cached_run(config_sha256: str, folders: Iterable[Path]) -> Run | None:
    """Return the finished run among these folders that answers a question, None where there is none."""
    for path in folders:
        try:
            run = Run.open(path)
        except RunError:
            continue
        if run.info["status"] == "finished" and run.info.get("config_sha256") == config_sha256:
            return run
    return None


def name_run(recipe: str, seed: int) -> str:
    """Name a new run so that no other is called the same: recipe, seed, time and four random characters."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return f"{recipe}-s{seed}-{now}-{secrets.token_hex(2)}"


def describe_environment() -> dict[str, str | int | None]:
    """Return on what a run was made: versions, processor, cores."""
    import platform

    import sklearn
    import torch

    from biopsy import __version__

    return {
        "biopsy": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match.group(1).strip() if match else "unknown"
