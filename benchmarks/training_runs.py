"""Runs of benchmarks: trained once, and gone on with where they were interrupted."""

from pathlib import Path

import biopsy
from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.recipes import Recipe, load_recipe
from biopsy.training.runs import Run


def train_once(recipe: Recipe, pack: Pack, split: Split, seed: int, path: Path) -> Run:
    """Return the finished run in a folder; end if it is of other settings."""
    if not (path / "run.json").exists():
        return biopsy.train(recipe, pack, split=split, seed=seed, out=path)
    run = Run.open(path)
    if recipe.train.precision == "auto":  # a run keeps the precision that this came to
        recipe = load_recipe(recipe, {"train.precision": run.recipe.train.precision})
    if run.recipe != recipe:
        raise SystemExit(f"{path} holds a run of other settings: use another --name or --out")
    return run if run.info["status"] == "finished" else biopsy.train(resume=path)
