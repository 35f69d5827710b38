"""Runs of a study: their specifications, the folder of the study, and the training loop."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from matplotlib.figure import Figure

from biopsy.core.claims import Claims, first_of_shard, share_work
from biopsy.core.errors import RunError, TrainingDiverged
from biopsy.core.files import check_outputs, hold_outputs, is_vacant, write_atomic, write_json
from biopsy.core.ray_engine import Engine, TaskLost, run_tasks
from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.evaluation.evaluate import evaluate
from biopsy.models.hardware import pick_device
from biopsy.models.weights import make_network
from biopsy.plotting.style import png
from biopsy.recipes import Recipe, recipe_toml
from biopsy.training.runs import DOCUMENT as RUN
from biopsy.training.runs import EpochRecord, OnEpoch, Run
from biopsy.training.study import DOCUMENT, FORMAT, Study, StudyInfo, StudySplit
from biopsy.training.train import train

logger = logging.getLogger(__name__)

OUTPUTS = ("table.csv", "runs.csv", "figure.png")
"""Outputs of a study that users may open and modify."""
STUDY = "study"
"""Claim of the process that writes the files of the study's folder."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a study.

    Attributes:
        recipe: The recipe, with all changes.
        fold: The tested fold, for a split with folds.
        about: Other entries that distinguish the run within its study.
    """

    name: str
    recipe: Recipe
    split: Split
    fold: int | None
    seed: int
    about: Mapping[str, object] = field(default_factory=dict)

    def describe(self) -> dict[str, object]:
        """Return the entries that identify the run within its study."""
        return {"recipe": self.recipe.name, "fold": self.fold, "seed": self.seed, **self.about}


def run_all(
    study: Study,
    pack: Pack,
    specs: Iterable[RunSpec],
    write_tables: Callable[[Study], None],
    *,
    draw: Callable[[Study], Figure] | None = None,
    test: bool = True,
    device: str,
    on_epoch: OnEpoch | None,
    shard: str | None = None,
    engine: Engine = "local",
    address: str | None = None,
) -> Study:
    """Train and evaluate the missing runs; write the tables after every run and the figure at the end.

    Finished runs are kept and interrupted ones resumed; runs whose loss diverges are listed under ``failed``.
    ``specs`` may be a generator that depends on finished runs. Without ``test`` the test subset is not
    evaluated. Several processes share the runs of a study; each ends when all runs are done. With the engine
    ``ray``, each process of a cluster trains one run at a time.

    Raises:
        RunError: If the processes that trained a run died at every attempt, or there is no such cluster.
    """
    batches = [specs] if isinstance(specs, Sequence) else ([spec] for spec in specs)
    by_name: dict[str, RunSpec] = {}
    check_outputs(study.path, *OUTPUTS, adopt=True)
    with Claims(study.path) as claims:
        started = claims.now()

        def is_finished(name: str) -> bool:
            path = study.path / "runs" / name
            return _is_done(path, test=test) or _has_failed(path, since=started)

        def show() -> None:
            if claims.take(STUDY):
                _write(Study.open(study.path), write_tables)
                claims.release(STUDY)

        def work(names: Iterator[str]) -> None:
            for name in names:
                path = study.path / "runs" / name
                _train_and_evaluate(path, by_name[name], pack, device, on_epoch, test=test)
                claims.release(name)
                show()

        for batch in batches:
            names = [spec.name for spec in batch]
            by_name |= {spec.name: spec for spec in batch}
            with claims.wait_for(STUDY):
                study = Study.open(study.path)
                new = {name: by_name[name].describe() for name in names}
                study.update(runs={**study.info.get("runs", {}), **new})
            if engine == "ray":
                unfinished = [by_name[name] for name in names if not is_finished(name)]
                _train_on_ray(study.path, unfinished, pack, pick_device(device), address, started, test, show)
                continue
            first = 0 if shard is None else first_of_shard(shard, len(names))
            share_work(claims, [*names[first:], *names[:first]], is_finished, work)
        with claims.wait_for(STUDY):
            study = Study.open(study.path)
            _write(study, write_tables, draw)
            runs = [run for run in study.runs() if run.path.name in by_name]
            failed = {run.path.name: run.info["reason"] for run in runs if run.info["status"] == "failed"}
            study.update(status="finished", failed=failed)
    return study


def _train_on_ray(
    path: Path,
    specs: Sequence[RunSpec],
    pack: Pack,
    device: str,
    address: str | None,
    started: float,
    test: bool,
    show: Callable[[], None],
) -> None:
    """Train and evaluate runs in the processes of a Ray cluster.

    Args:
        show: Called after every run.

    Raises:
        RunError: If the processes of a run died at every attempt; the other runs are finished first.
    """
    prepare = partial(
        _prepare_worker, path.resolve(), pack.path.resolve(), device.partition(":")[0], started, test
    )
    lost = []
    for spec, result in run_tasks(prepare, specs, address=address, device=device):
        if isinstance(result, TaskLost):
            lost.append(f"{spec.name}: {result}")
        logger.info("%s: %s", spec.name, result or "finished")
        show()
    if lost:
        raise RunError(f"{len(lost)} of {len(specs)} runs were not trained; {lost[0]}")


def _prepare_worker(
    study: Path, pack_path: Path, device: str, started: float, test: bool, n_cores: int
) -> Callable[[RunSpec], None]:
    pack = Pack.open(pack_path)

    def train_one(spec: RunSpec) -> None:
        path = study / "runs" / spec.name
        with Claims(study) as claims, claims.wait_for(spec.name):
            if not _is_done(path, test=test) and not _has_failed(path, since=started):
                _train_and_evaluate(path, spec, pack, device, None, test=test)

    return train_one


def _write(
    study: Study, write_tables: Callable[[Study], None], draw: Callable[[Study], Figure] | None = None
) -> None:
    with hold_outputs(study.path, *OUTPUTS, adopt=True):
        write_tables(study)
        if draw and (study.path / "metrics.json").exists():
            write_atomic(study.path / "figure.png", png(draw(study)))


def _is_done(path: Path, *, test: bool) -> bool:
    if test:
        return (path / "evaluation" / "metrics.json").exists()
    return (path / RUN).exists() and Run.open(path).info["status"] == "finished"


def _has_failed(path: Path, *, since: float) -> bool:
    """Return whether the loss of a run has diverged since a time."""
    document = path / RUN
    return (
        document.exists() and document.stat().st_mtime >= since and Run.open(path).info["status"] == "failed"
    )


def _train_and_evaluate(
    path: Path, spec: RunSpec, pack: Pack, device: str, on_epoch: OnEpoch | None, *, test: bool
) -> None:
    def note(record: EpochRecord) -> None:
        if on_epoch:
            on_epoch({**record, **spec.describe()})  # type: ignore[typeddict-item]

    try:
        run = _run(path, spec, pack, device, note)
    except TrainingDiverged as error:
        logger.warning("%s: %s", spec.name, error)
        return
    if test and not _is_done(path, test=True):
        evaluate(run)


def _run(path: Path, spec: RunSpec, pack: Pack, device: str, on_epoch: OnEpoch) -> Run:
    if not path.exists():
        return train(
            spec.recipe,
            pack,
            split=spec.split,
            fold=spec.fold,
            seed=spec.seed,
            out=path,
            device=device,
            on_epoch=on_epoch,
        )
    run = Run.open(path)
    if run.info["status"] == "finished":
        return run
    return train(resume=run, device=device, on_epoch=on_epoch)


def check_networks(recipes: Iterable[Recipe], pack: Pack) -> None:
    """Build every network of a study, to detect wrong settings before training.

    Raises:
        RecipeError: If a network cannot be built, or its initial weights are not available.
    """
    seen = set()
    for recipe in recipes:
        requested = (recipe.model.model_dump_json(), recipe.preprocessing.input_px)
        if requested not in seen:
            make_network(recipe, len(pack.class_names), seed=0)
            seen.add(requested)


def study_folder(name: str, out: Path | str | None) -> Path:
    """Return the folder of a study: ``out``, else ``studies/<name>``.

    Raises:
        RunError: If the name is not valid as a folder name.
    """
    if out is not None:
        return Path(out)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"study name {name!r} is invalid: use letters, digits, dots, dashes and underscores")
    return Path("studies") / name


def open_study(
    path: Path,
    *,
    kind: str,
    pack: Pack,
    recipes: Sequence[Recipe],
    seeds: Iterable[int],
    fixed: Mapping[str, object],
    split: Split | None = None,
) -> Study:
    """Create the folder of a study, or check that an existing one has the same settings.

    Args:
        recipes: The recipes, before changes by the study; recipes may be added later.
        seeds: Training seeds; seeds may be added later.
        fixed: Other settings that must not change when the study is continued: name to JSON value.
        split: The split of all runs, if there is one.

    Raises:
        RunError: If the folder contains a study with other settings.
    """
    seeds = sorted({*seeds})
    texts = {recipe.name: recipe_toml(recipe) for recipe in recipes}
    requested: dict[str, object] = {
        "format": FORMAT,
        "name": path.name,
        "status": "running",
        "question": kind,
        **fixed,
        "split": None if split is None else describe_split(split),
        "pack": {
            "path": str(pack.path.resolve()),
            "name": pack.path.name,
            "content_sha256": pack.info.content_sha256,
            "synthetic": pack.info.is_synthetic,
        },
        "recipes": texts,
        "seeds": seeds,
    }
    if (path / DOCUMENT).exists():
        result = Study.open(path).info
        _require_same(path, result, cast(StudyInfo, requested), tuple(fixed))
        requested["recipes"] = {**result["recipes"], **texts}
        requested["seeds"] = sorted({*result["seeds"], *seeds})
        requested = {**result, **requested}
    elif not is_vacant(path):
        raise RunError(f"{path} is not empty and not a study: choose another --name")
    write_json(path / DOCUMENT, requested)
    return Study.open(path)


def _require_same(path: Path, existing: StudyInfo, requested: StudyInfo, fixed: Sequence[str]) -> None:
    if existing["question"] != requested["question"]:
        raise RunError(f"{path} is a study of {existing['question']}: choose another --name")
    for setting, old, new in (
        ("pack", existing["pack"]["content_sha256"], requested["pack"]["content_sha256"]),
        *((key.replace("_", " "), existing.get(key), requested.get(key)) for key in fixed),
        ("split", *(info["split"] and info["split"].get("sha256") for info in (existing, requested))),
        *(
            (f"recipe {name}", text, requested["recipes"].get(name, text))
            for name, text in existing["recipes"].items()
        ),
    ):
        if old != new:
            raise RunError(f"{path} is a study with another {setting}: choose another --name")


def describe_split(split: Split) -> StudySplit:
    """Return the entry of a split in ``study.json``."""
    return {
        "name": split.name,
        "protocol": split.protocol,
        "n_folds": split.n_folds,
        "seed": split.seed,
        "sha256": hash_split(split),
        "parameters": dict(split.parameters),
        "patients_overlap": split.overlap,
    }


def hash_split(split: Split) -> str:
    return hashlib.sha256(split.table.to_csv(index=False).encode()).hexdigest()
