"""Runs of a study: their specifications, the folder of the study, and the loop that trains them in turn."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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
from biopsy.training.fit import OnEpoch
from biopsy.training.runs import DOCUMENT as RUN
from biopsy.training.runs import EpochRecord, Run
from biopsy.training.study import DOCUMENT, FORMAT, Study
from biopsy.training.train import train

logger = logging.getLogger(__name__)

OUTPUTS = ("table.csv", "runs.csv", "figure.png")
"""What a study writes for people to open, and perhaps to change."""
STUDY = "study"
"""Claim of the process that writes what stands in the study's own folder."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a study.

    Attributes:
        name: Of the run's folder.
        recipe: With every change made.
        split: How patches are divided.
        fold: The fold that tests, for a split with folds.
        seed: Of training.
        about: What else sets the run apart from the others of its study.
    """

    name: str
    recipe: Recipe
    split: Split
    fold: int | None
    seed: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return which run of the study it is."""
        return {"recipe": self.recipe.name, "fold": self.fold, "seed": self.seed, **self.about}


def run_all(
    study: Study,
    pack: Pack,
    specs: Iterable[RunSpec],
    write_tables: Callable[[Study], None],
    *,
    draw: Callable[[Study], Figure] | None = None,
    judge: bool = True,
    device: str,
    on_epoch: OnEpoch | None,
    shard: str | None = None,
    engine: Engine = "local",
    address: str | None = None,
) -> Study:
    """Train and judge what has not been yet; write the study's tables after every run, its figure at the end.

    Finished runs are kept, half-trained ones are resumed; one whose loss diverges is named under ``failed``.
    Specifications may be made while runs finish. Without ``judge`` the test subset is not evaluated.
    Processes that are at one study share the runs that are known; each ends when all are done. With the
    engine ``ray`` the processes of a cluster train one run each at a time, under its claim.

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
            return _is_done(path, judge=judge) or _has_failed(path, since=started)

        def show() -> None:
            if claims.take(STUDY):
                _write(Study.open(study.path), write_tables)
                claims.release(STUDY)

        def work(names: Iterator[str]) -> None:
            for name in names:
                path = study.path / "runs" / name
                _train_and_evaluate(path, by_name[name], pack, device, on_epoch, judge=judge)
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
                rest = [by_name[name] for name in names if not is_finished(name)]
                _train_on_ray(study.path, rest, pack, pick_device(device), address, started, judge, show)
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
    judge: bool,
    show: Callable[[], None],
) -> None:
    """Train and judge runs in the processes of a Ray cluster.

    Args:
        path: Of the study.
        show: Called after every run.

    Raises:
        RunError: If the processes of a run died at every attempt; the other runs are finished first.
    """
    prepare = partial(
        _prepare_worker, path.resolve(), pack.path.resolve(), device.partition(":")[0], started, judge
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
    study: Path, pack_path: Path, device: str, started: float, judge: bool, n_cores: int
) -> Callable[[RunSpec], None]:
    pack = Pack.open(pack_path)

    def train_one(spec: RunSpec) -> None:
        path = study / "runs" / spec.name
        with Claims(study) as claims, claims.wait_for(spec.name):
            if not _is_done(path, judge=judge) and not _has_failed(path, since=started):
                _train_and_evaluate(path, spec, pack, device, None, judge=judge)

    return train_one


def _write(
    study: Study, write_tables: Callable[[Study], None], draw: Callable[[Study], Figure] | None = None
) -> None:
    with hold_outputs(study.path, *OUTPUTS, adopt=True):
        write_tables(study)
        if draw and (study.path / "metrics.json").exists():
            write_atomic(study.path / "figure.png", png(draw(study)))


def _is_done(path: Path, *, judge: bool) -> bool:
    if judge:
        return (path / "evaluation" / "metrics.json").exists()
    return (path / RUN).exists() and Run.open(path).info["status"] == "finished"


def _has_failed(path: Path, *, since: float) -> bool:
    """Return whether the loss of a run has diverged after some time."""
    document = path / RUN
    return (
        document.exists() and document.stat().st_mtime >= since and Run.open(path).info["status"] == "failed"
    )


def _train_and_evaluate(
    path: Path, spec: RunSpec, pack: Pack, device: str, on_epoch: OnEpoch | None, *, judge: bool
) -> None:
    def note(record: EpochRecord) -> None:
        if on_epoch:
            on_epoch({**record, **spec.describe()})  # type: ignore[typeddict-item]

    try:
        run = _run(path, spec, pack, device, note)
    except TrainingDiverged as error:
        logger.warning("%s: %s", spec.name, error)
        return
    if judge and not _is_done(path, judge=True):
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
    """Build every network that a study asks for, so that a wrong setting stops it before anything is trained.

    Raises:
        RecipeError: If a network cannot be built, or the weights it starts from are not there.
    """
    seen = set()
    for recipe in recipes:
        requested = (recipe.model.model_dump_json(), recipe.preprocessing.input_px)
        if requested not in seen:
            make_network(recipe, len(pack.class_names), seed=0)
            seen.add(requested)


def place_study(name: str, out: Path | str | None) -> Path:
    """Return a study's folder: ``out``, else ``studies/<name>``.

    Raises:
        RunError: If the name is none for a folder.
    """
    if out is not None:
        return Path(out)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(
            f"a study cannot be called {name!r}: use letters, digits, dots, dashes and underscores"
        )
    return Path("studies") / name


def open_study(
    path: Path,
    *,
    kind: str,
    pack: Pack,
    recipes: Sequence[Recipe],
    seeds: Iterable[int],
    same: Mapping[str, Any],
    split: Split | None = None,
) -> Study:
    """Make a study's folder, or check that it asks the same; seeds and recipes may be added.

    Args:
        pack: What is learned from and judged on.
        recipes: Before what the study itself changes in them.
        same: What else must be the same when the study is gone on with: name to value, as JSON keeps it.
        split: The split that all runs follow, where there is one.

    Raises:
        RunError: If the folder holds a study that asked something else.
    """
    requested: dict[str, Any] = {
        "format": FORMAT,
        "name": path.name,
        "status": "running",
        "question": kind,
        **same,
        "split": None if split is None else describe_split(split),
        "pack": {
            "path": str(pack.path.resolve()),
            "name": pack.path.name,
            "content_sha256": pack.info.content_sha256,
            "synthetic": pack.info.is_synthetic,
        },
        "recipes": {recipe.name: recipe_toml(recipe) for recipe in recipes},
        "seeds": sorted({*seeds}),
    }
    if (path / DOCUMENT).exists():
        result = Study.open(path).info
        _require_same(path, result, requested, tuple(same))
        requested["recipes"] = {**result["recipes"], **requested["recipes"]}
        requested["seeds"] = sorted({*result["seeds"], *requested["seeds"]})
        requested = {**result, **requested}
    elif not is_vacant(path):
        raise RunError(f"{path} is not empty and holds no study: give this study another --name")
    write_json(path / DOCUMENT, requested)
    return Study.open(path)


def _require_same(path: Path, found: dict[str, Any], asked: dict[str, Any], same: Sequence[str]) -> None:
    if found["question"] != asked["question"]:
        raise RunError(f"{path} is a study of {found['question']}: give this one another --name")
    for what, old, new in (
        ("pack", found["pack"]["content_sha256"], asked["pack"]["content_sha256"]),
        *((key.replace("_", " "), found.get(key), asked[key]) for key in same),
        ("split", (found["split"] or {}).get("sha256"), (asked["split"] or {}).get("sha256")),
        *(
            (f"recipe {name}", text, asked["recipes"].get(name, text))
            for name, text in found["recipes"].items()
        ),
    ):
        if old != new:
            raise RunError(f"{path} asked about another {what}: give this study another --name")


def describe_split(split: Split) -> dict[str, Any]:
    """Return the entry of a split in ``study.json``."""
    return {
        "name": split.name,
        "protocol": split.protocol,
        "n_folds": split.n_folds,
        "seed": split.seed,
        "sha256": hash_split(split),
        "parameters": split.parameters,
        "patients_overlap": split.overlap,
    }


def hash_split(split: Split) -> str:
    """Return a hash of who stands in which subset."""
    return hashlib.sha256(split.table.to_csv(index=False).encode()).hexdigest()
