"""Studies: folders of several runs."""

from pathlib import Path
from typing import Literal, Required, cast

import pandas as pd
from typing_extensions import TypedDict

from biopsy.core.errors import RunError, raising
from biopsy.core.files import read_json, sha256_file, write_json
from biopsy.core.loaders import Model, validate
from biopsy.core.results import Written
from biopsy.core.tables import infer_numbers, read_csv_table, write_csv
from biopsy.data.predictions import read_predictions
from biopsy.training.runs import Run

FORMAT = "biopsy-study/1"
DOCUMENT = "study.json"


class StudySplit(TypedDict, total=False):
    """Split of a study."""

    name: Required[str]
    protocol: str
    n_folds: int
    seed: int
    sha256: str
    parameters: dict[str, object]
    patients_overlap: bool | None


class StudyPack(TypedDict, total=False):
    """Pack of a study."""

    path: str
    name: Required[str]
    content_sha256: Required[str]
    synthetic: bool


class Search(TypedDict):
    """Ranges of a search, and the seeds of each trial."""

    ranges: list[str]
    seeds: list[int]


class Plan(TypedDict):
    """Length of the runs of a recipe in a reproduction."""

    epochs: int
    steps_per_epoch: int
    updates: int
    full_updates: int
    budget_minutes: float | None
    measured: dict[str, float] | None
    """Seconds of an update, a patch and the rest of a run; None if they were not needed."""


class Paper(TypedDict):
    """A recipe of a reproduction: its publication, and the length of its runs."""

    title: str
    claim: dict[str, float]
    corrected: dict[str, float]
    published_updates: int
    method_only: bool
    """Whether its initial weights are random where the publication used pretrained ones."""
    missing: dict[str, str]
    """Why a condition is missing."""
    plan: Plan


class StudyInfo(TypedDict, total=False):
    """Content of ``study.json``."""

    format: str
    name: str
    status: Required[Literal["running", "finished"]]
    question: Required[str]
    """Kind of the study."""
    split: StudySplit | None
    pack: Required[StudyPack]
    recipes: Required[dict[str, str]]
    """TOML of each recipe, before changes by the study."""
    seeds: list[int]
    runs: dict[str, dict[str, object]]
    """Recipe, fold, seed and further entries that distinguish each run."""
    failed: dict[str, str]
    """Why runs have no result."""
    table_sha256: str
    grid: list[str]
    """Settings of a sweep."""
    fold: int | None
    search: Search | None
    papers: dict[str, Paper]
    test_patients: list[str]
    leak_seeds: list[int]
    environment: dict[str, str | int | None]
    """For reports: that of a run."""


class Study(Written):
    """A study of several runs, read from its folder.

    Attributes:
        path: The folder.
        info: Content of ``study.json``.
    """

    def __init__(self, path: Path, info: StudyInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def open(cls, path: "Path | str | Study") -> "Study":
        """Open a study.

        Raises:
            RunError: If the folder holds no study of a format that this version reads.
        """
        if isinstance(path, Study):
            return path
        path = Path(path)
        if not is_study(path):
            raise RunError(f"{path} is not a study (it has no {DOCUMENT}): make one with `biopsy study`")
        with raising(RunError):
            info = read_json(path / DOCUMENT, format=FORMAT)
            validate(path / DOCUMENT, StudyInfo, info)
            return cls(path, cast(StudyInfo, info))

    def __repr__(self) -> str:
        return f"<Study {self.path.name}: {self.info['status']}, {len(self.runs())} runs>"

    def problems(self) -> list[str]:
        return [f"failed: {run}: {reason}" for run, reason in self.info.get("failed", {}).items()]

    def update(self, **fields: object) -> None:
        """Update fields of ``study.json``."""
        self.info = cast(StudyInfo, {**self.info, **fields})
        write_json(self.path / DOCUMENT, self.info)

    def runs(self) -> list[Run]:
        """Return all runs, sorted by recipe, fold and seed, then in the requested order."""
        result = [Run.open(path.parent) for path in (self.path / "runs").glob("*/run.json")]
        requested = {name: index for index, name in enumerate(self.info.get("runs", ()))}
        return sorted(
            result,
            key=lambda run: (
                run.info["recipe"],
                run.info["split"]["fold"] or 0,
                run.info["seed"],
                requested.get(run.path.name, 0),
            ),
        )

    def evaluated_runs(self) -> list[Run]:
        """Return the runs that have been evaluated."""
        return [run for run in self.runs() if (run.path / "evaluation" / "metrics.json").exists()]

    def require_evaluated_runs(self) -> list[Run]:
        """Return the runs that have been evaluated.

        Raises:
            RunError: If there is none.
        """
        runs = self.evaluated_runs()
        if not runs:
            raise RunError(f"{self.path} has no evaluated run: repeat the command that created it")
        return runs

    def summary(self, record: type[Model]) -> Model:
        """Read ``metrics.json``, the pooled results, as the record of this kind of study."""
        path = self.path / "metrics.json"
        if not path.exists():
            raise RunError(f"{self.path} has no evaluated run: repeat the command that created it")
        return validate(path, record, read_json(path))

    def table(self) -> pd.DataFrame:
        """Read ``table.csv``.

        Raises:
            RunError: If it was changed since it was written.
        """
        path = self.path / "table.csv"
        if sha256_file(path) != self.info.get("table_sha256", sha256_file(path)):
            raise RunError(
                f"{path} was changed since it was written: go on with the command that made the study"
            )
        table = read_csv_table(path)
        empty = [name for name in table if table[name].isna().all()]
        return table.apply(infer_numbers).astype(dict.fromkeys(empty, float))

    def write_table(self, table: pd.DataFrame) -> None:
        """Write ``table.csv``, one row per run, and record its hash."""
        path = self.path / "table.csv"
        write_csv(path, table)
        if self.info.get("table_sha256") != sha256_file(path):
            self.update(table_sha256=sha256_file(path))

    def predictions(self) -> pd.DataFrame:
        """Read the pooled out-of-fold predictions, with ``recipe``, ``fold`` and ``seed``."""
        frame, _ = read_predictions(self.path / "predictions.parquet")
        return frame


def is_study(path: Path | str) -> bool:
    return (Path(path) / DOCUMENT).is_file()
