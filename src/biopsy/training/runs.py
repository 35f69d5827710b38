"""Runs: folders with settings, log and classifier of one training."""

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Required, cast

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from biopsy.core.errors import FileFormatError, PackError, RunError, raising
from biopsy.core.files import create_directory, read_json, sha256_file, write_atomic, write_json
from biopsy.core.loaders import parse_json, read_text, validate
from biopsy.core.results import Written
from biopsy.core.tables import read_csv_table, write_csv
from biopsy.core.version import __version__
from biopsy.data.packs import Pack, Unit, is_pack
from biopsy.data.predictions import FixedThreshold, PredictionsInfo, read_predictions
from biopsy.models.classifier import Classifier, StartWeights
from biopsy.models.hardware import Precision
from biopsy.recipes import DEFINING_TABLES, Recipe, load_recipe, recipe_toml
from biopsy.recipes.schema import Decision
from biopsy.training.metrics import FORMAT as METRICS_FORMAT
from biopsy.training.metrics import Metrics

FORMAT = "biopsy-run/1"
DOCUMENT = "run.json"
MAX_LOG_BYTES = 2**26  # 64 MiB: 100,000 epochs
_SUBSETS = ("train", "validation", "test", "")
DEFAULTS_BEFORE = {
    "decision.calibration": "none",
    "decision.operating_points": Decision().operating_points,
    "as_published.calibration": "none",
    "preprocessing.feed": "recipe",
    "model.tta": "none",
    "model.context": 0.0,
    "model.lora_rank": 0,
    "augmentation.rand_stain_na": 0.0,
    "augmentation.rand_augment_n": 0,
    "augmentation.rand_augment_magnitude": 5.0,
    "augmentation.blur_px": 0.0,
    "augmentation.cutout": 0.0,
    "train.nesterov": False,
    "train.single_class_weight": 0.25,
    "train.patch_weights": "",
    "train.teacher": "",
    "train.teacher_weight": 0.5,
    "train.teacher_temperature": 1.0,
    "train.label_smoothing": 0.0,
    "train.ema_decay": 0.0,
}
"""Settings added since the first version, with the values that are equivalent to it, for cached runs."""


class EpochRecord(TypedDict, total=False):
    """Log record of an epoch; a probe has one record, with penalty and features.

    Of pre-training it has no accuracy and validation, but the spread of the embeddings.
    """

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
    spread: float
    penalty: float
    features: str
    feature_seconds: float
    n_features: int
    run: str
    """For ``on_epoch``: path of the run, and in studies recipe, fold and seed."""
    recipe: str
    fold: int | None
    seed: int


OnEpoch = Callable[[EpochRecord], None]


class PatchCounts(TypedDict):
    """Numbers of patches, of groups (patients or slides), and of patches of each class."""

    patches: NonNegativeInt
    groups: int | None
    per_class: dict[str, NonNegativeInt]


class RunSplit(TypedDict, total=False):
    """Split of a run."""

    name: Required[str]
    protocol: Required[str]
    fold: Required[int | None]
    unit: Required[Unit]
    as_published: Required[bool]
    test_is_validation: bool
    patients_overlap: Required[bool | None]
    subsets: Required[dict[str, PatchCounts]]
    used: PatchCounts
    """Training patches of an epoch."""
    class_shares: dict[str, float]
    """Shares of the classes in training, where sampling by patient or patch weights change them."""


class RunPack(TypedDict, total=False):
    """Pack of a run."""

    path: Required[str]
    name: Required[str]
    dataset: Required[str]
    content_sha256: Required[str]
    synthetic: bool
    n_patches: Required[NonNegativeInt]
    n_patients: int | None
    unit: Required[Unit]


class NormalisationRecord(TypedDict):
    """Whether running statistics of batch normalisation had converged, and whether they were replaced."""

    settled: bool
    disagreement: float
    reestimated: bool
    n_patches: int


class RunInput(TypedDict, total=False):
    """A file, or classifiers, that a setting of ``[train]`` names."""

    source: Required[str]
    sha256: Required[str]
    warning: str


class SeenPatients(TypedDict, total=False):
    """Patients on whom a model was trained; for a classifier without its run, at most the pack is known."""

    model: Required[str]
    """Path of the model, or name of a classifier that ships or is on the hub."""
    dataset: str
    content_sha256: str
    """Of its pack."""
    unit: Unit
    subsets_sha256: str
    """Hash of the subsets of the patches of its pack."""
    train: list[str]
    """Ids of the unit; not of patches."""
    validation: list[str]


class RunInfo(TypedDict, total=False):
    """Content of ``run.json``."""

    format: str
    id: Required[str]
    status: Required[Literal["running", "interrupted", "failed", "finished"]]
    reason: str
    """Why training was interrupted or failed."""
    command: str
    recipe: Required[str]
    seed: Required[int]
    split: Required[RunSplit]
    pack: Required[RunPack]
    parameters: dict[str, int]
    weights: Required[StartWeights]
    inputs: dict[str, RunInput]
    """Files and classifiers that settings of ``[train]`` name, by setting."""
    seen: list[SeenPatients]
    """Patients of the models of which it took its initial weights or learned, and of theirs."""
    epochs: Required[NonNegativeInt]
    epochs_done: Required[NonNegativeInt]
    started: Required[str]
    seconds: Required[Annotated[float, Field(ge=0)]]
    environment: Required[dict[str, str | int | None]]
    device: str
    precision: Precision
    processes: int
    transform: str | None
    config_sha256: str | None
    """Hash of what defines the result; None if it cannot be reused."""
    mlflow_run: str
    chosen_epoch: int | None
    stopped_early: bool
    batch_norm: NormalisationRecord | None
    warnings: list[str]
    threshold: FixedThreshold | None
    classifier_sha256: str
    recalibrated: dict[str, str]
    files: dict[str, str]
    """Hashes of files of the run by name."""


class Run(Written):
    """A training run, read from its folder.

    Attributes:
        path: The folder.
        info: Content of ``run.json``: settings, pack and results.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def open(cls, path: "Path | str | Run") -> "Run":
        """Open a run.

        Raises:
            RunError: If the folder is not a run, or of an unsupported format.
        """
        if isinstance(path, Run):
            return path
        path = Path(path)
        if not (path / DOCUMENT).is_file():
            raise RunError(
                f"{path} is not a run (it has no {DOCUMENT}): make one with `biopsy train RECIPE --data PACK`"
            )
        with raising(RunError):
            remedy = "restore it, or train again"
            info = read_json(path / DOCUMENT, format=FORMAT, remedy=remedy, may_lack_hash=True)
            validate(path / DOCUMENT, RunInfo, info)
            if info["status"] == "finished" and (info.get("chosen_epoch") is None or "threshold" not in info):
                raise FileFormatError(
                    path / DOCUMENT, "value", "a finished run has chosen_epoch and threshold"
                )
        return cls(path, cast(RunInfo, info))

    @classmethod
    def create(cls, path: Path, info: RunInfo, recipe: Recipe, split: pd.DataFrame) -> "Run":
        """Create the folder of a new run with ``run.json``, ``recipe.toml`` and ``split.csv``.

        Raises:
            RunError: If the folder is not empty.
        """
        require_empty(path)
        info = {**info, "format": FORMAT}
        with create_directory(path) as partial:
            write_atomic(partial / "recipe.toml", recipe_toml(recipe))
            write_csv(partial / "split.csv", split)
            info["files"] = {name: sha256_file(partial / name) for name in ("recipe.toml", "split.csv")}
            write_json(partial / DOCUMENT, info)
        return cls(path, info)

    def __repr__(self) -> str:
        return f"<Run {self.path.name}: {self.info['status']}>"

    def update(self, **fields: object) -> None:
        """Update fields of ``run.json``."""
        self.info = cast(RunInfo, {**self.info, **fields})
        write_json(self.path / DOCUMENT, self.info)

    def hash_files(self, *names: str) -> dict[str, str]:
        """Return the entry ``files`` of ``run.json`` with updated hashes."""
        return {**self.info.get("files", {}), **{name: sha256_file(self.path / name) for name in names}}

    def require_unchanged(self, name: str) -> Path:
        """Return the path of a file of the run, verified by its hash in ``run.json``, if recorded."""
        path, recorded = self.path / name, self.info.get("files", {}).get(name)
        with raising(RunError):
            if recorded is not None and sha256_file(path) != recorded:
                raise FileFormatError(
                    path, "altered", "was changed since it was written: restore it, or train again"
                )
        return path

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, with all defaults."""
        return load_recipe(self.require_unchanged("recipe.toml"))

    @property
    def classifier(self) -> Classifier:
        """The trained classifier.

        Raises:
            RunError: If training has not finished.
        """
        self.require_finished()
        classifier = Classifier.load(self.path / "classifier")
        for name in ("classifier/classifier.json", "classifier/weights.safetensors"):
            self.require_unchanged(name)
        if classifier.decision_threshold != self.info.get("threshold"):
            raise RunError(
                f"{self.path / 'classifier'} has another threshold than {DOCUMENT} records: "
                f"choose it again with `biopsy calibrate {self.path}`"
            )
        return classifier

    def load_for_calibration(self) -> Classifier:
        """Load the classifier for a new calibration, also if an earlier one was interrupted."""
        self.require_finished()
        self.require_unchanged("classifier/weights.safetensors")
        return Classifier.load(self.path / "classifier")

    def require_finished(self) -> None:
        """Raise an error if training has not finished."""
        info = self.info
        if info["status"] != "finished":
            raise RunError(
                f"{self.path} is {info['status']} after {info['epochs_done']} of {info['epochs']} epochs: "
                f"resume with `biopsy train --resume {self.path}`"
            )

    def open_pack(self, *, verify: bool = True) -> Pack:
        """Open the pack of the run and verify its content.

        If it was moved, it is searched in the folder of the run and its parent.

        Raises:
            RunError: If it is missing or its content differs.
        """
        requested = self.info["pack"]
        folder = self.path.resolve().parent
        moved = [path / requested["name"] for path in (folder, folder.parent)]
        paths = [Path(requested["path"]), *(path for path in moved if is_pack(path))]
        failures = []
        for path in paths:
            try:
                pack = Pack.open(path)
                self._require_content(pack)
            except (PackError, RunError) as error:
                failures.append(error)
                continue
            if verify:
                pack.verify()
            return pack
        raise RunError(
            f"{self.path.name} was trained on {requested['path']}: {failures[0]}; restore that pack, set "
            "--data if the command has it, or train again"
        )

    def take_pack(self, pack: Pack) -> None:
        """Update the path of the pack.

        Raises:
            RunError: If it is another pack.
        """
        self._require_content(pack)
        self.update(pack={**self.info["pack"], "path": str(pack.path.resolve()), "name": pack.path.name})

    def _require_content(self, pack: Pack) -> None:
        expected = self.info["pack"]["content_sha256"]
        if pack.info.content_sha256 != expected:
            raise RunError(
                f"{self.path.name} was trained on another pack than {pack.path} "
                f"({expected[:12]}, not {pack.info.content_sha256[:12]})"
            )

    def subsets(self, pack: Pack) -> np.ndarray:
        """Return the subset of every patch of the pack: ``train``, ``validation``, ``test`` or ``""``."""
        path = self.require_unchanged("split.csv")
        with raising(RunError):
            split = read_csv_table(path, required=["patch_id", "subset"])
        subsets = split["subset"].fillna("")
        if split["patch_id"].tolist() != pack.table["patch_id"].tolist() or not subsets.isin(_SUBSETS).all():
            raise RunError(f"{path} does not list the patches of {pack.path}, or names unknown subsets")
        return subsets.to_numpy(str)

    @property
    def validation_subset(self) -> str:
        """Subset used for validation: ``validation``, or ``test`` if the published split did so."""
        return "test" if self.info["split"].get("test_is_validation") else "validation"

    def log(self) -> list[EpochRecord]:
        """Return one record per epoch."""
        if not (self.path / "log.jsonl").exists():
            return []
        path = self.require_unchanged("log.jsonl")
        try:
            lines = read_text(path, max_bytes=MAX_LOG_BYTES).splitlines()
            records = [parse_json(line, path, allow_nan=True) for line in lines]
            if not all(
                isinstance(record, dict) and isinstance(record.get("epoch"), int) for record in records
            ):
                raise FileFormatError(path, "value", "has a line that is not a record of an epoch")
        except FileFormatError as error:
            raise RunError(f"{error}; remove it to continue without a log") from None
        return records

    def write_log(self, records: Iterable[EpochRecord]) -> None:
        """Write the log, one line per epoch."""
        write_atomic(self.path / "log.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))

    def predictions(self, subset: str) -> tuple[pd.DataFrame, PredictionsInfo]:
        """Read the predictions of one subset and their metadata."""
        path = self.path / "predictions" / f"{subset}.parquet"
        if not path.exists():
            raise RunError(
                f"{path} does not exist: make it with `biopsy evaluate {self.path} --subset {subset}`"
            )
        frame, info = read_predictions(path)
        self.require_same_classifier(path, info.get("classifier_sha256"))
        return frame, info

    @property
    def has_test_patches(self) -> bool:
        """Whether the split has test patches, as all have but those of the protocol ``no-test``."""
        tested = self.info["split"]["subsets"].get("test")
        return tested is None or tested["patches"] > 0

    @property
    def evaluated_subset(self) -> str:
        """Subset for error analysis: ``test`` if it has been evaluated, else ``validation``."""
        return "test" if (self.path / "predictions" / "test.parquet").exists() else "validation"

    def metrics(self) -> Metrics:
        """Read ``evaluation/metrics.json``."""
        path = self.path / "evaluation" / "metrics.json"
        if not path.exists():
            if not self.has_test_patches:
                raise RunError(
                    f"{self.path} has no test metrics, since its split tests no patch: evaluate it on "
                    f"another pack with `biopsy evaluate {self.path} --data PACK`"
                )
            raise RunError(f"{self.path} has not been evaluated: `biopsy evaluate {self.path}`")
        remedy = f"run `biopsy evaluate {self.path}` again"
        document = read_json(path, format=METRICS_FORMAT, remedy=remedy)
        try:
            metrics = validate(path, Metrics, document)
        except FileFormatError as error:
            raise RunError(f"{error}; {remedy}") from None
        self.require_same_classifier(path, metrics.classifier_sha256)
        return metrics

    def require_same_classifier(self, path: Path, recorded: str | None) -> None:
        """Check that results are of the classifier of the run, if recorded."""
        current = self.info.get("classifier_sha256")
        if None not in (recorded, current) and recorded != current:
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
    inputs: Mapping[str, RunInput] | None = None,
) -> str:
    """Return a hash of everything that defines the result of a run.

    Args:
        recipe: Recipe; its defining tables are included.
        pack: Pack; the hash of its content and its classes are included.
        subsets: Subset of every patch.
        split: Entry of the split in ``run.json``.
        weights: Hash of the initial weights; None for random weights.
        inputs: Entry ``inputs`` of ``run.json``; hashes are included, paths are not.
    """
    requested = recipe.model_dump(mode="json", include=set(DEFINING_TABLES))
    for name, before in DEFAULTS_BEFORE.items():
        table, _, key = name.partition(".")
        if requested[table][key] == before:
            del requested[table][key]
    requested["train"] |= {key: file["sha256"] for key, file in (inputs or {}).items()}
    config = {
        "recipe": requested,
        "pack": pack.info.content_sha256,
        "classes": [pack.class_names, pack.info.positive_class],
        "subsets": hash_subsets(subsets),
        "split": [split["as_published"], split["test_is_validation"]],
        "seed": seed,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def hash_subsets(subsets: np.ndarray) -> str:
    """Return a hash of the subset of every patch."""
    return hashlib.sha256("\n".join(subsets.tolist()).encode()).hexdigest()


def require_empty(path: Path) -> None:
    """Check that a run can be created in a folder.

    Raises:
        RunError: If the folder is not empty.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file where the folder of a run is to be written: name another")
    if not path.exists() or not any(path.iterdir()):
        return
    try:
        is_finished = Run.open(path).info["status"] == "finished"
    except RunError:
        raise RunError(f"{path} is not empty: choose another folder") from None
    if is_finished:
        raise RunError(f"{path} holds a finished run with other settings or data: choose another folder")
    raise RunError(
        f"{path} is not empty: choose another folder, or resume with `biopsy train --resume {path}`"
    )


def find_cached_run(config_sha256: str, folders: Iterable[Path]) -> Run | None:
    """Return the finished run with a configuration among these folders, None if there is none."""
    for path in folders:
        try:
            run = Run.open(path)
        except RunError:
            continue
        if run.info["status"] == "finished" and run.info.get("config_sha256") == config_sha256:
            return run
    return None


def name_run(recipe: str, seed: int) -> str:
    """Return a unique name of a new run: recipe, seed, time and four random characters."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return f"{recipe}-s{seed}-{now}-{secrets.token_hex(2)}"


def describe_environment() -> dict[str, str | int | None]:
    """Return versions, CPU, threads and GPU."""
    import platform

    import sklearn
    import torch

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
