"""Studies of recipes over folds and seeds."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from biopsy.core.errors import RunError
from biopsy.core.ray_engine import Engine, check_engine
from biopsy.data.packs import Pack
from biopsy.data.splits import Split, find_split, list_splits
from biopsy.data.splits import split as make_split
from biopsy.evaluation.study_tables import write_tables
from biopsy.experiments.run_specs import RunSpec, hash_split, open_study, run_all, study_folder
from biopsy.recipes import Overrides, Recipe, load_recipe, setting_lines
from biopsy.training.runs import OnEpoch
from biopsy.training.study import Study
from biopsy.training.train import choose_split, open_data


def study(
    recipes: Sequence[str | Path | Recipe],
    data: Pack | Path | str,
    *,
    split: str | None = None,
    folds: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Overrides = (),
    name: str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    shard: str | None = None,
    engine: Engine = "local",
    address: str | None = None,
    on_epoch: OnEpoch | None = None,
) -> Study:
    """Train and evaluate recipes over folds and seeds, and pool their test predictions.

    The same command continues an interrupted study: finished runs are kept, unfinished ones resumed. A run
    whose loss diverges is named under ``failed`` in ``study.json``; the others continue.

    Args:
        recipes: Names of recipes, or TOML files.
        data: Pack, or an archive to prepare.
        split: Split of the pack; all its folds are run (default: the data set's own, else by patient).
        folds: Number of folds, if the split is yet to be made by patient.
        seeds: Training seeds; at least three for a headline result.
        overrides: Changes of recipe settings, ``KEY=VALUE`` such as ``train.epochs=2``; may be repeated
            (in Python: a list or a mapping).
        name: Name of the study in ``studies/``; the same name continues it.
        out: Output folder of the study (default: ``studies/NAME``).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        shard: ``I/N``: process I of N that share the study's folder, on one machine or many. It begins with
            its share of the runs, continues with any that no other process has finished or claimed, takes
            over those of processes that died, and ends when all runs are done.
        engine: ``ray`` trains the runs on a Ray cluster (extra ``ray``), one run per core or GPU; all nodes
            must see the pack and the study's folder under the same paths.
        address: Ray cluster, such as ``HOST:6379`` (default: ``RAY_ADDRESS``, else one that runs here, else
            one that is started for this command).
        on_epoch: Called with each epoch's record, which also names ``run``, ``recipe``, ``fold``,
            ``seed``.

    Raises:
        RunError: If the folder contains a study with other settings.
        DataError: If ``shard`` is not ``I/N``.
    """
    check_engine(engine, address, shard)
    changed = setting_lines(overrides)
    loaded = [load_recipe(recipe, changed) for recipe in ([recipes] if isinstance(recipes, str) else recipes)]
    if not loaded or not seeds:
        raise RunError("a study needs at least one recipe and one seed")
    if len({recipe.name for recipe in loaded}) < len(loaded):
        raise RunError("two recipes of a study have the same name: change `name` in one of the files")
    pack = open_data(data)
    chosen = _find_split(pack, split, folds, loaded)
    result = open_study(
        study_folder(name or "-".join([*(recipe.name for recipe in loaded), chosen.name]), out),
        kind="folds and seeds",
        pack=pack,
        recipes=loaded,
        seeds=seeds,
        fixed={},
        split=chosen,
    )
    specs = _list_run_specs(loaded, chosen, seeds)
    return run_all(
        result,
        pack,
        specs,
        write_tables,
        device=device,
        on_epoch=on_epoch,
        shard=shard,
        engine=engine,
        address=address,
    )


def _list_run_specs(recipes: Sequence[Recipe], split: Split, seeds: Sequence[int]) -> list[RunSpec]:
    """Return the runs of the study, seed by seed, so that early results cover every fold."""
    folds: Sequence[int | None] = range(split.n_folds) if split.n_folds else (None,)
    return [
        RunSpec(f"{recipe.name}{'' if fold is None else f'-f{fold}'}-s{seed}", recipe, split, fold, seed)
        for seed, recipe, fold in itertools.product(seeds, recipes, folds)
    ]


def _find_split(pack: Pack, name: str | None, folds: int | None, recipes: Sequence[Recipe]) -> Split:
    if folds is None:
        splits = [choose_split(pack, name, recipe) for recipe in recipes]
        if len({hash_split(split) for split in splits}) > 1:
            raise RunError(
                f"the recipes were published on different splits: make one study per recipe, {name}"
            )
        return splits[0]
    name = name or f"folds-{folds}"
    if name in list_splits(pack):
        split = find_split(pack, name)
        if split.n_folds != folds:
            raise RunError(
                f"split {name!r} has {split.n_folds} folds, expected {folds}: choose another split"
            )
        return split
    try:
        split = make_split(pack, protocol="folds", name=name, folds=folds)
    except OSError as error:
        raise RunError(f"split {name!r} cannot be kept in {pack.path.name}: {error.strerror}") from None
    return split
