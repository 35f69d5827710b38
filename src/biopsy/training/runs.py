"""Runs: one training each, as a folder; what was asked, what happened, what came out."""

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import create_directory, read_json, write_atomic, write_json
from biopsy.core.tables import unmask_formulas, write_csv
from biopsy.data.packs import Pack
from biopsy.data.predictions import read_predictions
from biopsy.models.classifier import Classifier
from biopsy.recipes import DEFINING_TABLES, Recipe, load_recipe, recipe_toml
from biopsy.recipes.schema import Decision

FORMAT = "biopsy-run/1"
DOCUMENT = "run.json"
SETTLED_BEFORE = {
    "decision.calibration": "none",
    "decision.operating_points": Decision().operating_points,
    "as_published.calibration": "none",
    "model.tta": "none",
    "model.context": 0.0,
    "train.nesterov": False,
    "train.label_smoothing": 0.0,
    "train.ema_decay": 0.0,
}
"""Settings younger than the first runs, and the values with which those runs answer the same question."""


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
            return cls(path, read_json(path / DOCUMENT, format=FORMAT))
        except DataError as error:
            raise RunError(str(error)) from None

    @classmethod
    def create(cls, path: Path, info: Mapping[str, Any], recipe: Recipe, split: pd.DataFrame) -> "Run":
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
            write_json(partial / DOCUMENT, info)
            write_atomic(partial / "recipe.toml", recipe_toml(recipe))
            write_csv(partial / "split.csv", split)
        return cls(path, info)

    def __repr__(self) -> str:
        return f"<Run {self.path.name}: {self.info['status']}>"

    def update(self, **fields: Any) -> None:
        """Change what ``run.json`` says."""
        self.info = {**self.info, **fields}
        write_json(self.path / DOCUMENT, self.info)

    @property
    def recipe(self) -> Recipe:
        """The recipe with every default filled in, as it was trained."""
        return load_recipe(self.path / "recipe.toml")

    @property
    def classifier(self) -> Classifier:
        """The classifier that came out.

        Raises:
            RunError: If training has not finished.
        """
        self.require_finished()
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

        Raises:
            RunError: If it is gone or its content differs from what was trained on.
        """
        asked = self.info["pack"]
        try:
            pack = Pack.open(asked["path"])
        except DataError as error:
            raise RunError(f"{self.path.name} was trained on {asked['path']}: {error}") from None
        if pack.info.content_sha256 != asked["content_sha256"]:
            raise RunError(
                f"{self.path.name} was trained on another content of {asked['path']} "
                f"({asked['content_sha256'][:12]}, now {pack.info.content_sha256[:12]}): "
                "bring that pack back, or train anew"
            )
        if verify:
            pack.verify()
        return pack

    def sides(self, pack: Pack) -> np.ndarray:
        """Give the side of every patch of the pack: ``train``, ``val``, ``test`` or ``""``."""
        split = unmask_formulas(pd.read_csv(self.path / "split.csv", dtype=str, keep_default_na=False))
        if not split["patch_id"].equals(pack.table["patch_id"].astype(str)):
            raise RunError(f"{self.path / 'split.csv'} does not list the patches of {pack.path}")
        return split["side"].to_numpy(str)

    @property
    def val_side(self) -> str:
        """The side that validates: ``val``, or ``test`` where the published split had it so."""
        return "test" if self.info["split"].get("val_is_test") else "val"

    def log(self) -> list[dict[str, Any]]:
        """Give one record an epoch."""
        path = self.path / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write_log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the whole log again, one line an epoch."""
        write_atomic(self.path / "log.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))

    def predictions(self, side: str) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Read the predictions of one side and their metadata."""
        path = self.path / "predictions" / f"{side}.parquet"
        if not path.exists():
            raise RunError(f"{path} does not exist: make it with `biopsy evaluate {self.path} --side {side}`")
        return read_predictions(path)

    @property
    def judged_side(self) -> str:
        """The side whose mistakes may be looked at: ``test`` once it has been opened, until then ``val``."""
        return "test" if (self.path / "predictions" / "test.parquet").exists() else "val"

    def metrics(self) -> dict[str, Any]:
        """Read ``evaluation/metrics.json``."""
        path = self.path / "evaluation" / "metrics.json"
        if not path.exists():
            raise RunError(f"{self.path} has not been evaluated: `biopsy evaluate {self.path}`")
        return read_json(path, format="biopsy-metrics/1")


def hash_question(
    recipe: Recipe, pack: Pack, sides: np.ndarray, split: Mapping[str, Any], seed: int, weights: str | None
) -> str:
    """Give a hash of everything that defines a run's result: equal questions need one run.

    Args:
        recipe: Its defining tables count, not where it comes from.
        pack: Its content and its classes count, not where it lies.
        sides: Side of every patch.
        split: Its entry in ``run.json``: whether it is published, and whether its test side validates.
        seed: Of training.
        weights: Hash of the file that training starts from; None for random weights.
    """
    asked = recipe.model_dump(mode="json", include=set(DEFINING_TABLES))
    for name, before in SETTLED_BEFORE.items():
        table, _, key = name.partition(".")
        if asked[table][key] == before:
            del asked[table][key]
    question = {
        "recipe": asked,
        "pack": pack.info.content_sha256,
        "classes": [pack.class_names, pack.info.positive_class],
        "sides": hashlib.sha256("\n".join(sides.tolist()).encode()).hexdigest(),
        "split": [split["as_published"], split["val_is_test"]],
        "seed": seed,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def find_answer(question_sha256: str, folders: Iterable[Path]) -> Run | None:
    """Give the finished run among these folders that answers a question, None where there is none."""
    for path in folders:
        try:
            run = Run.open(path)
        except RunError:
            continue
        if run.info["status"] == "finished" and run.info.get("question_sha256") == question_sha256:
            return run
    return None


def name_run(recipe: str, seed: int) -> str:
    """Name a new run so that no other is called the same: recipe, seed, time and four random characters."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return f"{recipe}-s{seed}-{now}-{secrets.token_hex(2)}"


def describe_environment() -> dict[str, Any]:
    """Say on what a run was made: versions, processor, cores."""
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
