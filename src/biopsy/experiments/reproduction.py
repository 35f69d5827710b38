"""Reproductions of published recipes: as published, split by patient, and the effect of leakage."""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import RecipeError, RunError
from biopsy.core.files import plain
from biopsy.core.ray_engine import Engine, check_engine
from biopsy.core.results import Table
from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.evaluation.evaluate import evaluate
from biopsy.experiments.leakage import (
    Comparison,
    Condition,
    choose_apart,
    choose_leaking,
    compare_splits,
    count_subset,
    list_leaks,
    why_no_leak,
)
from biopsy.experiments.reproduction_page import draw_reproduction, table_of_lengths, table_of_papers
from biopsy.experiments.reproduction_summary import ReproductionSummary, write_tables
from biopsy.experiments.run_specs import RunSpec, check_networks, open_study, run_all, study_folder
from biopsy.models.weights import make_network
from biopsy.recipes import Overrides, Recipe, list_recipes, load_recipe, setting_lines
from biopsy.training.fit import optimiser_of
from biopsy.training.runs import OnEpoch
from biopsy.training.study import Paper, Plan, Study
from biopsy.training.train import open_data, train

PROBE_STEPS = 10  # updates in each of the two timed epochs; the first is warm-up
VALIDATION_SHARE = 0.25  # maximum share of the time of a run for validation
MARGIN = 0.9  # share of the budget that is planned
NEVER_STOP = "train.early_stopping_patience=0"  # equal numbers of updates in both conditions


@dataclass(frozen=True)
class Speed:
    """Measured cost of a recipe in seconds.

    Attributes:
        update_s: Time of an optimiser update.
        patch_s: Time per patch in validation or test.
        fixed_s: Other time of a run: building, predictions, baseline, intervals, files.
    """

    update_s: float
    patch_s: float
    fixed_s: float

    def cost(self, length: "Length", n_val: float, n_test: float) -> float:
        """Return the duration of a run in seconds."""
        n_predicted = length.epochs * n_val + n_test
        return self.fixed_s + self.patch_s * n_predicted + self.update_s * length.updates


@dataclass(frozen=True)
class Length:
    """Length of a run: epochs, each followed by validation, and optimiser updates per epoch."""

    epochs: int
    steps_per_epoch: int

    @property
    def updates(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Need:
    """Time requirement of a recipe.

    Attributes:
        full: Full length of a run.
        n_val: Mean number of validation patches.
        n_test: Mean number of test patches.
    """

    n_runs: int
    full: Length
    speed: Speed
    n_val: float
    n_test: float

    def full_cost(self) -> float:
        """Return the duration of a run at full length in seconds."""
        return self.speed.cost(self.full, self.n_val, self.n_test)

    def total(self, length: Length) -> float:
        """Return the duration of all runs in seconds."""
        return self.n_runs * self.speed.cost(length, self.n_val, self.n_test)

    def fit(self, seconds: float) -> Length:
        """Return the maximum length of a run within a time limit, at least one update.

        The number of epochs is reduced so that validation takes at most a quarter of the time.
        """
        if seconds >= self.full_cost():
            return self.full
        free = seconds - self.speed.fixed_s - self.speed.patch_s * self.n_test
        look = self.speed.patch_s * self.n_val
        affordable = int(VALIDATION_SHARE * free / look) if look > 0 else self.full.epochs
        updates = int((free - look) / self.speed.update_s)
        epochs = max(1, min(self.full.epochs, affordable, updates))
        updates = int((free - epochs * look) / self.speed.update_s)
        return Length(epochs, max(1, min(updates // epochs, self.full.updates // epochs)))


def full_length(recipe: Recipe, target: np.ndarray) -> Length:
    """Return the full length of a recipe.

    Args:
        target: Classes of the training patches, ``(n,)``.
    """
    settings, per_class = recipe.train, np.bincount(target)
    per_class = per_class[per_class > 0]
    n_seen = {
        "none": per_class.sum(),
        "within-patient": per_class.sum(),
        "undersample": len(per_class) * per_class.min(),
        "oversample": len(per_class) * per_class.max(),
    }[settings.sampling]
    steps = n_seen / settings.batch_size
    n_steps = int(steps) if settings.drop_last else int(np.ceil(steps))
    return Length(settings.epochs, settings.steps_per_epoch or max(1, n_steps))


def with_length(recipe: Recipe, length: Length) -> Recipe:
    """Return a recipe with a fixed number of updates, without early stopping."""
    lines = [f"train.epochs={length.epochs}", f"train.steps_per_epoch={length.steps_per_epoch}", NEVER_STOP]
    return load_recipe(recipe, lines)


def measure_speed(recipe: Recipe, pack: Pack, split: Split, *, device: str) -> Speed:
    """Measure the cost of a recipe with two short epochs, evaluated on validation only."""
    optimiser_of(recipe, make_network(recipe, len(pack.class_names), seed=0)[0])  # warm-up: takes seconds
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        short = with_length(recipe, Length(2, PROBE_STEPS))
        run = train(short, pack, split=split, out=Path(folder) / "probe", device=device)
        if not split.test_is_validation:
            evaluate(run, subset="validation")
        last = run.log()[-1]
    elapsed = time.perf_counter() - started
    update_s = recipe.train.batch_size / last["images_per_s"]
    n_val = max(1, int((split.subsets(pack) == ("test" if split.test_is_validation else "validation")).sum()))
    patch_s = max(0.0, last["seconds"] - PROBE_STEPS * update_s) / n_val
    return Speed(update_s, patch_s, max(0.0, elapsed - 2 * last["seconds"]))


def share_out(seconds: float, needs: Mapping[str, Need]) -> dict[str, Length]:
    """Return the length of every recipe such that all runs fit into a time limit.

    Time is divided equally between runs; unused time of short recipes goes to the others.
    """
    lengths: dict[str, Length] = {}
    open_needs = dict(needs)
    left = MARGIN * seconds
    while open_needs:
        share = left / sum(need.n_runs for need in open_needs.values())
        content = {name: need for name, need in open_needs.items() if need.full_cost() <= share}
        if not content:
            return lengths | {name: need.fit(share) for name, need in open_needs.items()}
        for name, need in content.items():
            lengths[name] = need.full
            left -= need.n_runs * need.full_cost()
            del open_needs[name]
    return lengths


def describe_plan(length: Length, full: Length, speed: Speed | None, minutes: float | None) -> Plan:
    """Return the entry of a recipe's length in ``study.json``."""
    return {
        "epochs": length.epochs,
        "steps_per_epoch": length.steps_per_epoch,
        "updates": length.updates,
        "full_updates": full.updates,
        "budget_minutes": minutes,
        "measured": None if speed is None else asdict(speed),
    }


logger = logging.getLogger(__name__)

KIND = "reproduction"
UNKNOWN = "folders"  # class folders may contain any data set, so the requested paper is accepted
SAME_PATCHES = ({"hcd", "pcam"},)  # data sets with the same patches


class Reproduction(Study):
    """The study of a reproduction, which is printed as its table of metrics."""

    def blocks(self) -> list[str | Table]:
        papers = self.summary(ReproductionSummary).papers
        tables = table_of_papers(papers), table_of_lengths(papers, self.info["papers"])
        return [*tables, str(self.path)]

    def to_json(self) -> dict[str, object]:
        return {"path": self.path, **plain(self.summary(ReproductionSummary))}


def reproduce(
    data: Pack | Path | str,
    papers: Sequence[str | Path | Recipe] = (),
    *,
    budget: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    split: str | None = None,
    test_patients: Sequence[str] = (),
    leak_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    overrides: Overrides = (),
    name: str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    engine: Engine = "local",
    address: str | None = None,
    on_epoch: OnEpoch | None = None,
) -> Reproduction:
    """Run published recipes as published and split by patient, and measure the effect of leakage per slide.

    All runs of a recipe make the same number of updates; both models of a comparison train on the same number
    of patches. The same command continues an interrupted study; recipes and seeds may be added, and a recipe
    keeps its first planned length.

    Args:
        data: Pack, or an archive to prepare.
        papers: Recipes with published results (default: all published on the pack's data set).
        budget: Time limit of all runs in minutes (default: full length).
        seeds: Training seeds of both models of a comparison.
        split: Split without patient overlap (default: the data set's own, else leave-one-out of
            ``test_patients``, else by patient).
        test_patients: Ids of patients or slides whose leakage is measured (default: the three with most
            patches of their rarer class).
        leak_seeds: Seeds of the leakage experiment; an empty value leaves it out.
        overrides: Changes of recipe settings, ``KEY=VALUE`` such as ``train.epochs=2``; may be repeated
            (in Python: a list or a mapping).
        name: Name of the study in ``studies/``; the same name continues it.
        out: Output folder of the study (default: ``studies/NAME``).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        engine: ``ray`` trains the runs on a Ray cluster (extra ``ray``), one run per core or GPU; all nodes
            must see the pack and the study's folder under the same paths.
        address: Ray cluster, such as ``HOST:6379`` (default: ``RAY_ADDRESS``, else one that runs here, else
            one that is started for this command).
        on_epoch: Called with each epoch's record, which also names ``run``, ``recipe``, ``seed``,
            ``condition`` and the tested patient.

    Raises:
        RecipeError: If a recipe has no published results, or was published on other data.
        RunError: If nothing can be compared, or the folder contains a study with other settings.
    """
    check_engine(engine, address)
    changed = setting_lines(overrides)
    if not seeds:
        raise RunError("a reproduction needs at least one seed")
    if budget is not None and not budget > 0:
        raise RunError(f"budget={budget}: expected a number of minutes above 0")
    pack = open_data(data)
    if pack.positive_index is None:
        raise RunError(f"{pack.path.name} has {len(pack.class_names)} classes: a reproduction needs two")
    shipped = choose_papers(papers, pack)
    recipes = {recipe.name: load_recipe(recipe, changed) for recipe in shipped}
    check_networks(recipes.values(), pack)
    test_ids = list(test_patients) or choose_leaking(pack)
    apart = choose_apart(pack, split, test_patients)
    compared = {name: compare_splits(pack, recipe, apart) for name, recipe in recipes.items()}
    no_leak = why_no_leak(pack, test_ids) if leak_seeds else "not asked for"
    leaks = {} if no_leak else {seed: list_leaks(pack, test_ids, seed) for seed in leak_seeds}
    study = open_study(
        study_folder(name or f"reproduction-{pack.path.stem}", out),
        kind=KIND,
        pack=pack,
        recipes=list(recipes.values()),
        seeds=seeds,
        fixed={"test_patients": test_ids},
        split=apart,
    )
    plans = _plan(study, recipes, pack, compared, (len(seeds), leaks), budget, device)
    entries = {
        recipe.name: Paper(
            title=recipe.title,
            claim=recipe.origin.claim,
            corrected=recipe.origin.corrected,
            published_updates=recipe.origin.updates,
            method_only=recipe.model.pretrained and not recipes[recipe.name].model.pretrained,
            missing=compared[recipe.name].missing | ({"leak": no_leak} if no_leak else {}),
            plan=plans[recipe.name],
        )
        for recipe in shipped
    }
    study.update(
        papers={**study.info.get("papers", {}), **entries},
        leak_seeds=sorted({*study.info.get("leak_seeds", []), *leaks}),
    )
    planned = [
        with_length(recipe, Length(plans[name]["epochs"], plans[name]["steps_per_epoch"]))
        for name, recipe in recipes.items()
    ]
    specs = _list_run_specs(planned, compared, seeds, leaks)
    finished = run_all(
        study,
        pack,
        specs,
        write_tables,
        draw=_draw,
        device=device,
        on_epoch=on_epoch,
        engine=engine,
        address=address,
    )
    return Reproduction(finished.path, finished.info)


def _draw(study: Study) -> Figure:
    return draw_reproduction(study.summary(ReproductionSummary).papers)


def choose_papers(papers: Sequence[str | Path | Recipe], pack: Pack) -> list[Recipe]:
    """Return the recipes of the requested papers, or all that were published on the pack's data set.

    Raises:
        RecipeError: If a recipe has no published results or was published on other data, or there is none.
    """
    dataset = pack.info.dataset
    requested = [papers] if isinstance(papers, str | Path | Recipe) else list(papers)
    published = [recipe for recipe in map(load_recipe, list_recipes()) if recipe.origin.claim]
    if not requested:
        result = [recipe for recipe in published if _is_of(recipe, dataset)]
        if not result:
            raise RecipeError(
                f"no recipe was published on {dataset!r}, the data set of {pack.path.name}; published ones: "
                + ", ".join(f"{recipe.name} ({recipe.origin.dataset})" for recipe in published),
                "data",
            )
        return result
    result = [load_recipe(paper) for paper in requested]
    for recipe in result:
        if not recipe.origin.claim:
            raise RecipeError(
                f"{recipe.name} has no published results to reproduce (its origin.claim is empty); recipes "
                f"with published results: {', '.join(recipe.name for recipe in published)}",
                "data",
            )
        if recipe.origin.dataset and dataset != UNKNOWN and not _is_of(recipe, dataset):
            raise RecipeError(
                f"{recipe.name} was published on {recipe.origin.dataset!r}, {pack.path.name} contains "
                f"{dataset!r}: give a pack of that data set, or `biopsy train` the recipe on this one",
                "data",
            )
    if len({recipe.name for recipe in result}) < len(result):
        raise RecipeError("two of the papers have the same name: change `name` in one of the files", "name")
    return result


def _is_of(recipe: Recipe, dataset: str) -> bool:
    ours = recipe.origin.dataset
    return ours == dataset or any({ours, dataset} <= equal for equal in SAME_PATCHES)


def _plan(
    study: Study,
    recipes: Mapping[str, Recipe],
    pack: Pack,
    compared: Mapping[str, Comparison],
    requested: tuple[int, Mapping[int, Sequence[Condition]]],
    budget: float | None,
    device: str,
) -> dict[str, Plan]:
    """Return the length of the runs of each recipe; earlier plans are kept.

    Args:
        requested: Number of seeds, and the conditions of the leakage experiment by seed.
        budget: Minutes for all runs; None for full length.
    """
    plans = {name: entry["plan"] for name, entry in study.info.get("papers", {}).items()}
    new = {name: recipe for name, recipe in recipes.items() if name not in plans}
    full = {name: _full_length(recipe, pack, compared[name]) for name, recipe in new.items()}
    if budget is None:
        return plans | {name: describe_plan(length, length, None, None) for name, length in full.items()}
    if len(new) < len(recipes):
        logger.info("earlier plans kept: %s", ", ".join(sorted(recipes.keys() - new.keys())))
    started, needs = time.perf_counter(), {}
    for name, recipe in new.items():
        n_seeds, leaks = requested
        conditions = [
            *compared[name].conditions * n_seeds,
            *(condition for result in leaks.values() for condition in result),
        ]
        speed = measure_speed(recipe, pack, compared[name].conditions[-1].split, device=device)
        n_val, n_test = (
            float(np.mean([count_subset(pack, condition.split, subset) for condition in conditions]))
            for subset in ("validation", "test")
        )
        needs[name] = Need(len(conditions), full[name], speed, n_val, n_test)
    left = 60 * budget - (time.perf_counter() - started)
    lengths = share_out(left, needs)
    expected = sum(needs[name].total(length) for name, length in lengths.items())
    if expected > left:
        text = "the budget of %g minutes is too short: runs of minimum length take about %.0f"
        logger.warning(text, budget, expected / 60)
    for name, length in lengths.items():
        plans[name] = describe_plan(length, full[name], needs[name].speed, budget)
        logger.info(
            "%s: %d runs of %d epochs, %s updates each, of %s at full length",
            *(name, needs[name].n_runs, length.epochs),
            *(f"{length.updates:,}", f"{full[name].updates:,}"),
        )
    return plans


def _full_length(recipe: Recipe, pack: Pack, comparison: Comparison) -> Length:
    subsets = comparison.conditions[0].split.subsets(pack)
    return full_length(recipe, pack.target[subsets == "train"])


def _list_run_specs(
    recipes: Sequence[Recipe],
    compared: Mapping[str, Comparison],
    seeds: Sequence[int],
    leaks: Mapping[int, Sequence[Condition]],
) -> list[RunSpec]:
    """Return all runs, seed by seed, so that early results cover every recipe and condition."""
    return [
        _run_papers(recipe, condition, seed)
        for seed in sorted({*seeds, *leaks})
        for recipe in recipes
        for condition in (*(compared[recipe.name].conditions if seed in seeds else ()), *leaks.get(seed, ()))
    ]


def _run_papers(recipe: Recipe, condition: Condition, seed: int) -> RunSpec:
    suffix = "" if condition.place is None else str(condition.place)
    return RunSpec(
        name=f"{recipe.name}-{condition.kind}{suffix}-s{seed}",
        recipe=recipe,
        split=condition.split,
        fold=None,
        seed=seed,
        about={"condition": condition.kind, "tested": condition.tested, "place": condition.place},
    )
