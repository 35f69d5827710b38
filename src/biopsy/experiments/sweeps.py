"""Sweeps: one recipe with combinations of settings from a grid or a search, the best chosen on validation.

Suggestions of Optuna's tree-structured Parzen estimator depend on the seed and on earlier trials, which are
kept in the study: an interrupted search continues with the same suggestions.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.core.errors import FileFormatError, MissingExtra, RecipeError, RunError
from biopsy.core.files import write_json
from biopsy.core.loaders import parse_toml
from biopsy.core.ray_engine import Engine, check_engine
from biopsy.core.seeds import derive
from biopsy.data.packs import Pack
from biopsy.evaluation.study_tables import SHOWN, describe_run, training_columns
from biopsy.experiments.run_specs import RunSpec, check_networks, open_study, run_all, study_folder
from biopsy.experiments.sweep_page import (
    CombinationSummary,
    SweepSummary,
    draw_search,
    draw_sweep,
    format_value,
)
from biopsy.recipes import Overrides, Recipe, load_recipe, setting_lines
from biopsy.training.metrics import Metrics, Spread
from biopsy.training.runs import EpochRecord, OnEpoch, Run
from biopsy.training.study import Study, StudyInfo
from biopsy.training.train import choose_split, open_data

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

N_DIGITS = 3  # significant digits of suggested floats
_RANGE = re.compile(r"(?P<low>[^\s,]+?)\.\.(?P<high>[^\s,]+)(?P<log>\s+log)?")

Values = Mapping[str, object]
Trial = tuple[Values, float | None]
"""Setting to value, and the score on validation (higher is better); None if training diverged."""


def read_space(search: Iterable[str]) -> "dict[str, BaseDistribution]":
    """Return the distribution of each setting from lines such as ``"train.lr=1e-4..1e-1 log"``.

    A range with integer ends is of integers; ``KEY=VALUE,VALUE`` is a choice among values.

    Raises:
        RecipeError: If a line is neither, a range is empty, or a setting is repeated.
        MissingExtra: If Optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise MissingExtra("search", "a search")
    from optuna.distributions import CategoricalDistribution

    space: dict[str, BaseDistribution] = {}
    for line in [search] if isinstance(search, str) else search:
        key, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not text:
            raise RecipeError(
                f"--search {line!r} has no range: write --search 'train.lr=1e-4..1e-1 log'", "value"
            )
        if key in space:
            raise RecipeError(f"--search has {key!r} twice", "conflict")
        if match := _RANGE.fullmatch(text):
            space[key] = _read_range(line, match)
        elif ".." in text or "," not in text:
            raise RecipeError(
                f"--search {line!r} is neither a range nor a choice: write 'train.lr=1e-4..1e-1 log' or "
                "'train.batch_size=32,64'",
                "value",
            )
        else:
            space[key] = CategoricalDistribution([_read_value(key, value) for value in text.split(",")])
    return space


def _read_range(line: str, match: re.Match[str]) -> "BaseDistribution":
    from optuna.distributions import FloatDistribution, IntDistribution

    ends, log = (match["low"], match["high"]), match["log"] is not None
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise RecipeError(f"--search {line!r}: the ends of a range are numbers", "value") from None
    if not low < high:
        raise RecipeError(
            f"--search {line!r}: the range is empty, its low end must be below its high end", "value"
        )
    if log and low <= 0:
        raise RecipeError(f"--search {line!r}: a range on a logarithmic scale begins above 0", "value")
    if all(re.fullmatch(r"[+-]?\d+", end) for end in ends):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _read_value(key: str, text: str) -> Any:
    """Return a value parsed as by ``--set``: TOML, else text."""
    try:
        return parse_toml(f"value = {text.strip()}", f"--search {key}")["value"]
    except FileFormatError:
        return text.strip()


def list_ends(space: "Mapping[str, BaseDistribution]") -> list[Values]:
    """Return combinations that cover the ends of every range and every choice."""
    values = [getattr(d, "choices", None) or (d.low, d.high) for d in space.values()]  # type: ignore[attr-defined]
    n = max(map(len, values))
    return [
        {key: options[min(i, len(options) - 1)] for key, options in zip(space, values, strict=True)}
        for i in range(n)
    ]


def suggest(space: "Mapping[str, BaseDistribution]", trials: Sequence[Trial], *, seed: int) -> Values:
    """Return the settings of the next trial.

    Args:
        space: From `read_space`.
        trials: Earlier trials, in order.
        seed: Random seed; the suggestion is deterministic given seed, space and trials.
    """
    import optuna

    sampler = optuna.samplers.TPESampler(seed=derive(seed, "search", len(trials)) % 2**32)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        state = optuna.trial.TrialState
        for values, score in trials:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(values),
                    distributions=dict(space),
                    value=score,
                    state=state.FAIL if score is None else state.COMPLETE,
                )
            )
        suggested = study.ask(dict(space)).params
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {key: _round(suggested[key], space[key]) for key in space}


def _round(value: object, distribution: "BaseDistribution") -> object:
    from optuna.distributions import FloatDistribution

    if not isinstance(distribution, FloatDistribution):
        return value
    return min(max(float(f"{value:.{N_DIGITS}g}"), distribution.low), distribution.high)


_OPENING, _CLOSING, _QUOTES = "[{(", ")}]", "\"'"


@dataclass(frozen=True)
class Combination:
    """One combination of settings.

    Attributes:
        values: Dotted setting to value, as in the recipe.
    """

    values: dict[str, object]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Part of a folder name: the values, and a few digits of their hash."""
        words = "-".join(
            f"{key.rpartition('.')[2]}-{format_value(value)}" for key, value in self.values.items()
        )
        words = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:60].strip("-.")
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()
        return f"{words}-{digest[:6]}"


def read_grid(grid: Iterable[str]) -> dict[str, list[str]]:
    """Return the values of each setting, as text, from lines such as ``"train.lr=0.01,0.001"``.

    Commas within brackets and quotes belong to the value.

    Raises:
        RecipeError: If a line has no ``=`` or no value, or a setting is repeated.

    Example:
        >>> read_grid(["model.params.stage_widths=[32,64],[64,128]", "model.trainable=head,all"])
        {'model.params.stage_widths': ['[32,64]', '[64,128]'], 'model.trainable': ['head', 'all']}
    """
    result: dict[str, list[str]] = {}
    for line in [grid] if isinstance(grid, str) else grid:
        key, equals, text = line.partition("=")
        key, values = key.strip(), [value.strip() for value in _split_values(text)]
        if not equals:
            raise RecipeError(f"--grid {line!r} has no '=': write --grid train.lr=0.01,0.001", "value")
        if not all(values):
            raise RecipeError(f"--grid {line!r} lacks a value: write --grid train.lr=0.01,0.001", "value")
        if key in result:
            raise RecipeError(f"--grid has {key!r} twice: give all its values in one", "conflict")
        result[key] = values
    if not result:
        raise RecipeError(
            "a sweep needs a grid of values or a search: write --grid train.lr=0.01,0.001 or "
            "--search 'train.lr=1e-4..1e-1 log'",
            "setting",
        )
    return result


def combine(recipe: str | Path | Recipe, grid: Iterable[str], overrides: Sequence[str]) -> list[Combination]:
    """Return the distinct combinations of a grid, in order.

    Args:
        recipe: A shipped name, a TOML file, or a recipe.
        grid: Lines ``"table.key=value,value"``; values are parsed as those of ``--set``.
        overrides: Changes ``"table.key=value"`` of every combination.

    Raises:
        RecipeError: If a setting or value is invalid, or a setting is both in the grid and in the overrides.
    """
    requested = read_grid(grid)
    duplicated = sorted(requested.keys() & {override.partition("=")[0].strip() for override in overrides})
    if duplicated:
        raise RecipeError(f"{duplicated[0]} is in both --grid and --set: leave it out of one", "conflict")
    result: dict[str, Combination] = {}
    for values in itertools.product(*requested.values()):
        lines = [f"{key}={value}" for key, value in zip(requested, values, strict=True)]
        combination = _combination(recipe, list(requested), [*overrides, *lines])
        result.setdefault(combination.name, combination)
    return list(result.values())


def _combination(recipe: str | Path | Recipe, keys: Sequence[str], lines: Sequence[str]) -> Combination:
    changed = load_recipe(recipe, lines)
    return Combination({key: _find(changed.model_dump(), key) for key in keys}, changed)


def _split_values(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _find(document: object, key: str) -> object:
    for name in key.split("."):
        assert isinstance(document, dict)
        document = document[name]
    return document


KIND = "sweep"
CHOSEN_BY = ("val_auroc", "val_loss")
"""Criteria of the choice: AUROC, or the loss if validation does not have exactly two classes."""


def sweep(
    recipe: str | Path | Recipe,
    data: Pack | Path | str,
    *,
    grid: Iterable[str] = (),
    search: Iterable[str] = (),
    trials: int = 20,
    split: str | None = None,
    fold: int | None = None,
    seeds: Sequence[int] = (0,),
    overrides: Overrides = (),
    name: str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    shard: str | None = None,
    engine: Engine = "local",
    address: str | None = None,
    on_epoch: OnEpoch | None = None,
) -> Study:
    """Train every combination of some settings, or search ranges of them, and choose one on validation.

    The same command continues an interrupted sweep; seeds, and values of the same settings, may be added.
    Every combination of a grid is also evaluated on the test subset, which the ledger records; the choice
    depends on validation only. A search (Optuna's TPE, of the extra "search") does not evaluate the test
    subset.

    Args:
        recipe: Name of a recipe, or TOML file.
        data: Pack, or an archive to prepare.
        grid: Setting and its values, ``KEY=VALUE,VALUE``; may be repeated, for every combination. Commas
            in brackets and quotes belong to a value.
        search: Setting and its range, ``KEY=LOW..HIGH`` or ``"KEY=LOW..HIGH log"``, or a choice,
            ``KEY=VALUE,VALUE``, instead of a grid; may be repeated.
        trials: Combinations that a search tries.
        split: Split of the pack (default: the data set's own, else by patient).
        fold: Fold to test, of a split with folds.
        seeds: Training seeds of every combination.
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
            ``seed`` and the settings of the grid.

    Raises:
        RecipeError: If a combination is invalid; checked before training.
        RunError: If the folder contains a study with other settings.
        DataError: If ``shard`` is not ``I/N``.
    """
    check_engine(engine, address, shard)
    changed = setting_lines(overrides)
    ranges = [search] if isinstance(search, str) else list(search)
    space = read_space(ranges) if ranges else {}
    if space and grid:
        raise RecipeError("a sweep takes either --grid or --search", "conflict")
    if space and (shard is not None or engine != "local"):
        raise RecipeError(
            "a trial of a search depends on those before it: leave --shard and --engine out", "conflict"
        )
    if space and trials < 1:
        raise RecipeError(f"a search needs at least one trial, got --trials {trials}", "value")
    base = load_recipe(recipe, changed)
    if space:
        combinations = [_with_values(base, values, changed) for values in list_ends(space)]
    else:
        combinations = combine(recipe, grid, changed)
    if not seeds:
        raise RunError("a sweep needs at least one seed")
    pack = open_data(data)
    check_networks([combination.recipe for combination in combinations], pack)
    chosen = choose_split(pack, split, base)
    chosen.subsets(pack, fold)
    study = open_study(
        study_folder(name or f"{'search' if space else 'sweep'}-{base.name}-{chosen.name}", out),
        kind=KIND,
        pack=pack,
        recipes=[base],
        seeds=seeds,
        fixed={
            "grid": list(combinations[0].values),
            "fold": fold,
            "search": {"ranges": ranges, "seeds": list(seeds)} if space else None,
        },
        split=chosen,
    )

    def specify(combination: Combination, seed: int) -> RunSpec:
        return RunSpec(
            name=f"{combination.name}-s{seed}",
            recipe=combination.recipe,
            split=chosen,
            fold=fold,
            seed=seed,
            about=combination.values,
        )

    def search_specs() -> Iterator[RunSpec]:
        done: list[Trial] = []
        while len(done) < trials:
            values = suggest(space, done, seed=seeds[0])
            specs = [specify(_with_values(base, values, changed), seed) for seed in seeds]
            yield from specs
            done.append((values, _score([study.path / "runs" / spec.name for spec in specs])))

    specs = (
        search_specs()
        if space
        else [specify(combination, seed) for seed in seeds for combination in combinations]
    )
    return run_all(
        study,
        pack,
        specs,
        write_tables,
        draw=draw_study,
        test=not space,
        device=device,
        on_epoch=on_epoch,
        shard=shard,
        engine=engine,
        address=address,
    )


def _with_values(base: Recipe, values: Values, overrides: Sequence[str]) -> Combination:
    """Return the combination with the values of a search.

    Raises:
        RecipeError: If a setting or value is invalid, or a setting is also overridden.
    """
    for key in values.keys() & {line.partition("=")[0].strip() for line in overrides}:
        raise RecipeError(f"{key} is in both --search and --set: leave it out of one", "conflict")
    return _combination(base, list(values), setting_lines(values))


def _score(paths: Sequence[Path]) -> float | None:
    """Return the mean validation AUROC of a trial's runs, or minus the loss; None if one diverged."""
    runs = [Run.open(path) for path in paths]
    if any(run.info["status"] != "finished" for run in runs):
        return None
    records = [_chosen_record(run) for run in runs]
    scores = [
        -record["val_loss"] if record["val_auroc"] is None else record["val_auroc"] for record in records
    ]
    mean = float(np.mean(scores))
    return mean if math.isfinite(mean) else None


def shown_runs(study: Study) -> list[Run]:
    """Return the runs in the table of a sweep: evaluated runs, or finished runs of a search."""
    if study.info.get("search"):
        return [run for run in study.runs() if run.info["status"] == "finished"]
    return study.evaluated_runs()


def write_tables(study: Study) -> None:
    """Write ``table.csv`` and ``metrics.json`` from the runs so far."""
    runs = shown_runs(study)
    if not runs:
        return
    rows = [_describe(run, study.info) for run in runs]
    table = pd.DataFrame([{key: _cell(value) for key, value in row.items()} for row in rows])
    study.write_table(table)
    write_json(study.path / "metrics.json", summarise(rows, study.info["grid"], _metrics(study)))


def summarise(
    rows: Sequence[Mapping[str, object]], keys: Sequence[str], metrics: Sequence[Metrics]
) -> SweepSummary:
    """Return the results of every combination over seeds, and the best combination on validation.

    Args:
        rows: One row per run: the settings of the grid by name, ``seed``, ``val_auroc``, ``val_loss`` and the
            metrics of the test subset.
        keys: The settings of the grid.
        metrics: ``metrics.json`` of the runs; empty for a search.
    """
    groups: dict[str, list[Mapping[str, object]]] = {}
    for row in rows:
        groups.setdefault(repr([row[key] for key in keys]), []).append(row)
    combinations = [_summarise_combination(group, keys) for group in groups.values()]
    n_seeds = max(entry.n_seeds for entry in combinations)
    complete = [entry for entry in combinations if entry.n_seeds == n_seeds]
    means = {name: [getattr(entry, name).mean for entry in complete] for name in CHOSEN_BY}
    by = next((name for name, values in means.items() if None not in values), None)
    best = None
    if by is not None:
        best = complete[int(np.argmax(means[by]) if by == "val_auroc" else np.argmin(means[by]))]
    openings = [group.ledger for group in metrics if group.ledger]
    return SweepSummary(
        positive_class=metrics[0].positive_class if metrics else None,
        unit=metrics[0].unit if metrics else "",
        grid=list(keys),
        chosen_by=by,
        best=best,
        combinations=combinations,
        ledger=max(openings, key=lambda group: group["times"], default=None),
    )


def _summarise_combination(rows: Sequence[Mapping[str, object]], keys: Sequence[str]) -> CombinationSummary:
    names = [name for name in (*CHOSEN_BY, *SHOWN, "baseline_auroc") if name in rows[0]]
    spreads = {name: Spread.of(_number(row[name]) for row in rows) for name in names}
    return CombinationSummary(
        values={key: rows[0][key] for key in keys},
        n_seeds=len(rows),
        val_auroc=spreads["val_auroc"],
        val_loss=spreads["val_loss"],
        metrics={name: spread for name, spread in spreads.items() if name in SHOWN},
        baseline_auroc=spreads.get("baseline_auroc", Spread()).mean,
    )


def _metrics(study: Study) -> list[Metrics]:
    return [run.metrics() for run in study.evaluated_runs()] if not study.info.get("search") else []


def draw_study(study: Study) -> Figure:
    """Draw the metric of every run of a sweep against its settings."""
    rows = [_describe(run, study.info) for run in shown_runs(study)]
    summary = summarise(rows, study.info["grid"], _metrics(study))
    metric = summary.chosen_by or CHOSEN_BY[0]
    name, best = ("AUROC" if metric == "val_auroc" else "loss"), summary.best
    values = {key: [row[key] for row in rows] for key in study.info["grid"]}
    validation = np.array([_number(row[metric]) for row in rows])
    marked = None if best is None else best.values
    if study.info.get("search"):
        return draw_search(values, validation, metric=name, best=marked)
    test = np.array([_number(row["auroc"]) for row in rows]) if metric == "val_auroc" else None
    return draw_sweep(values, validation, test, metric=name, best=marked)


def _chosen_record(run: Run) -> EpochRecord:
    """Return the record of the selected epoch of a run."""
    return next(record for record in run.log() if record["epoch"] == run.info["chosen_epoch"])


def _describe(run: Run, info: StudyInfo) -> dict[str, object]:
    """Return the row of a run: settings, validation metrics of the selected epoch, and test metrics."""
    settings, chosen = info["runs"][run.path.name], _chosen_record(run)
    if info.get("search"):
        row = {"recipe": run.info["recipe"], "seed": run.info["seed"], **training_columns(run)}
    else:
        row = describe_run(run)
    return {
        **{key: settings[key] for key in info["grid"]},
        "seed": row.pop("seed"),
        "val_auroc": chosen["val_auroc"],
        "val_loss": chosen["val_loss"],
        **row,
    }


def _cell(value: object) -> object:
    return format_value(value) if isinstance(value, list | dict | bool) else value


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
