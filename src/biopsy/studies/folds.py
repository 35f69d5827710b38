"""Studies over folds and seeds: many runs, one question, one table."""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biopsy.data.packs import Pack
from biopsy.data.splits import Split, find_split, list_splits, make_split, save_split
from biopsy.errors import RunError, TrainingDiverged
from biopsy.files import write_json
from biopsy.judging.evaluation import evaluate
from biopsy.learning.fitting import OnEpoch
from biopsy.learning.recipes import Recipe, load_recipe, recipe_toml
from biopsy.learning.runs import Run
from biopsy.learning.training import choose_split, open_data, train
from biopsy.studies.records import DOCUMENT, FORMAT, Study
from biopsy.studies.tables import write_tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One run of a study: which recipe, fold and seed."""

    recipe: str
    fold: int | None
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        fold = "" if self.fold is None else f"-f{self.fold}"
        return f"{self.recipe}{fold}-s{self.seed}"


def study(
    recipes: Sequence[str | Path | Recipe],
    data: Pack | Path | str,
    *,
    split: str | None = None,
    folds: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    set: Iterable[str] = (),
    name: str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    on_epoch: OnEpoch | None = None,
) -> Study:
    """Train and judge recipes over folds and seeds, and pool what they say of patients they have not seen.

    The same command goes on where an interrupted one stopped: finished runs are kept, half-trained ones are
    resumed. A run whose loss diverges is named under ``failed`` in ``study.json``; the others go on.

    Args:
        recipes: Names, TOML files or recipes.
        data: A pack, or what `biopsy.prepare` reads.
        split: Name of a split of the pack; its folds are all run.
        folds: Number of folds, where the split is yet to be made by patient.
        seeds: Training seeds; at least three for a headline figure.
        set: ``"table.key=value"`` changes, made in every recipe.
        name: Name of the study under ``studies/``.
        out: The study's own folder instead.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        on_epoch: Called with each epoch's record, which also names ``run``, ``recipe``, ``fold``, ``seed``.

    Raises:
        RunError: If the folder holds a study that asked something else.
    """
    changed = tuple(set)
    loaded = [load_recipe(recipe, changed) for recipe in ([recipes] if isinstance(recipes, str) else recipes)]
    by_name = {recipe.name: recipe for recipe in loaded}
    if not loaded or not seeds:
        raise RunError("a study needs at least one recipe and one seed")
    if len(by_name) < len(loaded):
        raise RunError("two recipes of a study have the same name: change `name` in one of the files")
    pack = open_data(data)
    chosen = _find_split(pack, split, folds, loaded)
    found = _open(_place(loaded, chosen, name, out), loaded, pack, chosen, tuple(seeds))
    failed: dict[str, str] = {}
    for question in _list_questions(loaded, chosen, seeds):
        path = found.path / "runs" / question.name

        def note(record: dict[str, Any], question: Question = question) -> None:
            if on_epoch:
                on_epoch(record | asdict(question))

        try:
            run = _answer(path, by_name[question.recipe], pack, chosen, question, device, note)
        except TrainingDiverged as error:
            logger.warning("%s: %s", question.name, error)
            failed[question.name] = str(error)
            continue
        if not (run.path / "evaluation" / "metrics.json").exists():
            evaluate(run)
        write_tables(found)
    write_tables(found)
    found.update(status="finished", failed=failed)
    return found


def _list_questions(recipes: Sequence[Recipe], split: Split, seeds: Sequence[int]) -> list[Question]:
    """Give every run of the study, seed by seed, so that an early look sees every fold."""
    folds: Sequence[int | None] = range(split.n_folds) if split.n_folds else (None,)
    return [Question(r.name, fold, seed) for seed, r, fold in itertools.product(seeds, recipes, folds)]


def _answer(
    path: Path, recipe: Recipe, pack: Pack, split: Split, question: Question, device: str, on_epoch: OnEpoch
) -> Run:
    if not path.exists():
        return train(
            recipe,
            pack,
            split=split.name,
            fold=question.fold,
            seed=question.seed,
            out=path,
            device=device,
            on_epoch=on_epoch,
        )
    run = Run.open(path)
    if run.info["status"] == "finished":
        return run
    return train(resume=run, device=device, on_epoch=on_epoch)


def _find_split(pack: Pack, name: str | None, folds: int | None, recipes: Sequence[Recipe]) -> Split:
    if folds is None:
        splits = [choose_split(pack, name, recipe) for recipe in recipes]
        if len({_hash(split) for split in splits}) > 1:
            raise RunError(f"the recipes were not published on one split: make a study of each, {name}")
        return splits[0]
    name = name or f"folds-{folds}"
    if name in list_splits(pack):
        split = find_split(pack, name)
        if split.n_folds != folds:
            raise RunError(
                f"split {name!r} has {split.n_folds} folds, {folds} were asked for: name another split"
            )
        return split
    split = make_split(pack, protocol="folds", name=name, n_folds=folds)
    try:
        save_split(pack, split)
    except OSError as error:
        raise RunError(f"split {name!r} cannot be kept in {pack.path.name}: {error.strerror}") from None
    return split


def _hash(split: Split) -> str:
    return hashlib.sha256(split.table.to_csv(index=False).encode()).hexdigest()


def _place(recipes: Sequence[Recipe], split: Split, name: str | None, out: Path | str | None) -> Path:
    if out is not None:
        return Path(out)
    name = name or "-".join([*(recipe.name for recipe in recipes), split.name])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(
            f"a study cannot be called {name!r}: use letters, digits, dots, dashes and underscores"
        )
    return Path("studies") / name


def _open(path: Path, recipes: Sequence[Recipe], pack: Pack, split: Split, seeds: tuple[int, ...]) -> Study:
    """Make the study's folder, or check that it asks the same question; seeds and recipes may be added."""
    asked: dict[str, Any] = {
        "format": FORMAT,
        "name": path.name,
        "status": "running",
        "question": "folds and seeds",
        "split": {
            "name": split.name,
            "protocol": split.protocol,
            "n_folds": split.n_folds,
            "seed": split.seed,
            "sha256": _hash(split),
            "parameters": split.parameters,
            "patients_overlap": split.overlap,
        },
        "pack": {
            "path": str(pack.path.resolve()),
            "name": pack.path.name,
            "content_sha256": pack.info.content_sha256,
        },
        "recipes": {recipe.name: recipe_toml(recipe) for recipe in recipes},
        "seeds": sorted({*seeds}),
    }
    if (path / DOCUMENT).exists():
        found = Study.open(path).info
        for what, old, new in (
            ("pack", found["pack"]["content_sha256"], asked["pack"]["content_sha256"]),
            ("split", found["split"].get("sha256"), asked["split"]["sha256"]),
            *(
                (f"recipe {name}", text, asked["recipes"].get(name, text))
                for name, text in found["recipes"].items()
            ),
        ):
            if old != new:
                raise RunError(f"{path} asked about another {what}: give this study another --name")
        asked["recipes"] = {**found["recipes"], **asked["recipes"]}
        asked["seeds"] = sorted({*found["seeds"], *seeds})
    elif path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and holds no study: give this study another --name")
    write_json(path / DOCUMENT, asked)
    return Study.open(path)
