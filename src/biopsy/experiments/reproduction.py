"""Reproductions: published recipes as they were published, with patients apart, and the leak between."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import RecipeError, RunError
from biopsy.data.packs import Pack
from biopsy.experiments.budget import (
    Length,
    Need,
    describe_plan,
    full_length,
    measure_speed,
    share_out,
    with_length,
)
from biopsy.experiments.figures import draw_reproduction
from biopsy.experiments.leakage import (
    Arm,
    Comparison,
    choose_apart,
    choose_leaking,
    compare_splits,
    count_side,
    list_leaks,
    why_no_leak,
)
from biopsy.experiments.reproduction_summary import write_tables
from biopsy.experiments.run_specs import RunSpec, check_networks, open_study, place_study, run_all
from biopsy.recipes import Overrides, Recipe, list_recipes, load_recipe, setting_lines
from biopsy.training.fit import OnEpoch
from biopsy.training.study import Study
from biopsy.training.train import open_data

logger = logging.getLogger(__name__)

KIND = "reproduction"
UNKNOWN = "folders"  # class folders may hold any data set: whoever names the paper says it is this one
SAME_PATCHES = ({"hcd", "pcam"},)  # data sets of which one was made of the other


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
    on_epoch: OnEpoch | None = None,
) -> Study:
    """Run published recipes as published and with patients apart, and measure the leak slide by slide.

    All runs of a recipe make the same number of updates; both models of a comparison train on the same number
    of patches. The same command continues an interrupted study; recipes and seeds may be added, and a recipe
    keeps its first planned length.

    Args:
        data: Pack, or an archive to prepare.
        papers: Recipes with published results (default: all published on the pack's data set).
        budget: Time limit of all runs in minutes (default: full length).
        seeds: Training seeds of both models of a comparison.
        split: Split that keeps patients apart (default: the data set's own, else ``test_patients`` left
            out in turn, else by patient).
        test_patients: Ids of patients or slides whose leak is measured (default: the three with most
            patches of their rarer class).
        leak_seeds: Seeds of the leak's pairs of runs; an empty value leaves it out.
        overrides: Changes of recipe settings, ``KEY=VALUE`` such as ``train.epochs=2``; may be repeated
            (in Python: a list or a mapping).
        name: Name of the study in ``studies/``; the same name continues it.
        out: Output folder of the study (default: ``studies/NAME``).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        on_epoch: Called with each epoch's record, which also names ``run``, ``recipe``, ``seed``, ``arm``
            and the tested patient.

    Raises:
        RecipeError: If a recipe claims nothing, or was published on other data.
        RunError: If nothing can be compared, or the folder holds a study that asked something else.
    """
    changed = setting_lines(overrides)
    if not seeds:
        raise RunError("a reproduction needs at least one seed")
    if budget is not None and not budget > 0:
        raise RunError(f"a budget of {budget} is no number of minutes above 0")
    pack = open_data(data)
    if pack.positive_index is None:
        raise RunError(f"{pack.path.name} has {len(pack.class_names)} classes: a reproduction compares two")
    shipped = choose_papers(papers, pack)
    recipes = {recipe.name: load_recipe(recipe, changed) for recipe in shipped}
    check_networks(recipes.values(), pack)
    test_ids = list(test_patients) or choose_leaking(pack)
    apart = choose_apart(pack, split, test_patients)
    compared = {name: compare_splits(pack, recipe, apart) for name, recipe in recipes.items()}
    no_leak = why_no_leak(pack, test_ids) if leak_seeds else "not asked for"
    leaks = {} if no_leak else {seed: list_leaks(pack, test_ids, seed) for seed in leak_seeds}
    study = open_study(
        place_study(name or f"reproduction-{pack.path.stem}", out),
        kind=KIND,
        pack=pack,
        recipes=list(recipes.values()),
        seeds=seeds,
        same={"test_patients": test_ids},
        split=apart,
    )
    plans = _plan(study, recipes, pack, compared, (len(seeds), leaks), budget, device)
    noted = {
        recipe.name: {
            **_describe_paper(recipe, recipes[recipe.name]),
            "missing": compared[recipe.name].missing | ({"leak": no_leak} if no_leak else {}),
            "plan": plans[recipe.name],
        }
        for recipe in shipped
    }
    study.update(
        papers={**study.info.get("papers", {}), **noted},
        leak_seeds=sorted({*study.info.get("leak_seeds", []), *leaks}),
    )
    planned = [with_length(recipe, _read_length(plans[name])) for name, recipe in recipes.items()]
    specs = _list_run_specs(planned, compared, seeds, leaks)
    return run_all(study, pack, specs, write_tables, draw=_draw, device=device, on_epoch=on_epoch)


def _draw(study: Study) -> Figure:
    return draw_reproduction(study.summary()["papers"])


def choose_papers(papers: Sequence[str | Path | Recipe], pack: Pack) -> list[Recipe]:
    """Return the recipes of some papers, or of all that were published on the pack's data set.

    Raises:
        RecipeError: If a recipe claims nothing or was published on other data, or there is none.
    """
    dataset = pack.info.dataset
    requested = [papers] if isinstance(papers, str | Path | Recipe) else list(papers)
    known = [recipe for recipe in map(load_recipe, list_recipes()) if recipe.origin.claim]
    if not requested:
        result = [recipe for recipe in known if _is_of(recipe, dataset)]
        if not result:
            raise RecipeError(
                f"no recipe was published on {dataset!r}, the data set of {pack.path.name}; published ones: "
                + ", ".join(f"{recipe.name} ({recipe.origin.dataset})" for recipe in known)
            )
        return result
    result = [load_recipe(paper) for paper in requested]
    for recipe in result:
        if not recipe.origin.claim:
            raise RecipeError(
                f"{recipe.name} claims nothing (its origin.claim is empty), so there is nothing to "
                f"reproduce; recipes with a claim: {', '.join(recipe.name for recipe in known)}"
            )
        if recipe.origin.dataset and dataset != UNKNOWN and not _is_of(recipe, dataset):
            raise RecipeError(
                f"{recipe.name} was published on {recipe.origin.dataset!r}, {pack.path.name} holds "
                f"{dataset!r}: give a pack of that data set, or `biopsy train` the recipe on this one"
            )
    if len({recipe.name for recipe in result}) < len(result):
        raise RecipeError("two of the papers have the same name: change `name` in one of the files")
    return result


def _is_of(recipe: Recipe, dataset: str) -> bool:
    ours = recipe.origin.dataset
    return ours == dataset or any({ours, dataset} <= same for same in SAME_PATCHES)


def _describe_paper(shipped: Recipe, recipe: Recipe) -> dict[str, Any]:
    return {
        "title": shipped.title,
        "claim": shipped.origin.claim,
        "corrected": shipped.origin.corrected,
        "published_updates": shipped.origin.updates,
        "method_only": shipped.model.pretrained and not recipe.model.pretrained,
    }


def _plan(
    study: Study,
    recipes: Mapping[str, Recipe],
    pack: Pack,
    compared: Mapping[str, Comparison],
    asked: tuple[int, Mapping[int, Sequence[Arm]]],
    budget: float | None,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Decide how long the runs of each recipe are; what was decided before stays.

    Args:
        study: Holds the plans of an earlier command.
        recipes: By name.
        pack: The patches.
        compared: Recipe to its arms.
        asked: How many seeds, and the arms of the leak by seed.
        budget: Minutes for all runs; None for full length.
        device: Where they are trained.
    """
    plans = {name: entry["plan"] for name, entry in study.info.get("papers", {}).items()}
    new = {name: recipe for name, recipe in recipes.items() if name not in plans}
    full = {name: _full_length(recipe, pack, compared[name]) for name, recipe in new.items()}
    if budget is None:
        return plans | {name: describe_plan(length, length, None, None) for name, length in full.items()}
    if len(new) < len(recipes):
        logger.info("planned before and kept: %s", ", ".join(sorted(recipes.keys() - new.keys())))
    started, needs = time.perf_counter(), {}
    for name, recipe in new.items():
        n_seeds, leaks = asked
        arms = [*compared[name].arms * n_seeds, *(arm for result in leaks.values() for arm in result)]
        speed = measure_speed(recipe, pack, compared[name].arms[-1].split, device=device)
        n_val, n_test = (
            float(np.mean([count_side(pack, arm.split, side) for arm in arms])) for side in ("val", "test")
        )
        needs[name] = Need(len(arms), full[name], speed, n_val, n_test)
    left = 60 * budget - (time.perf_counter() - started)
    lengths = share_out(left, needs)
    expected = sum(needs[name].total(length) for name, length in lengths.items())
    if expected > left:
        text = "the budget of %g minutes is too short: runs as short as can be take about %.0f"
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
    sides = comparison.arms[0].split.sides(pack)
    return full_length(recipe, pack.target[sides == "train"])


def _read_length(plan: Mapping[str, Any]) -> Length:
    return Length(plan["epochs"], plan["steps_per_epoch"])


def _list_run_specs(
    recipes: Sequence[Recipe],
    compared: Mapping[str, Comparison],
    seeds: Sequence[int],
    leaks: Mapping[int, Sequence[Arm]],
) -> list[RunSpec]:
    """Return every run, seed by seed, so that an early look sees every recipe and arm."""
    return [
        _run_papers(recipe, arm, seed)
        for seed in sorted({*seeds, *leaks})
        for recipe in recipes
        for arm in (*(compared[recipe.name].arms if seed in seeds else ()), *leaks.get(seed, ()))
    ]


def _run_papers(recipe: Recipe, arm: Arm, seed: int) -> RunSpec:
    place = "" if arm.place is None else str(arm.place)
    return RunSpec(
        name=f"{recipe.name}-{arm.kind}{place}-s{seed}",
        recipe=recipe,
        split=arm.split,
        fold=None,
        seed=seed,
        about={"arm": arm.kind, "tested": arm.tested, "place": arm.place},
    )
