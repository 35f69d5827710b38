"""Runs of benchmarks: their options, and training once, resumed where it was interrupted."""

import argparse
from pathlib import Path

import biopsy
from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.recipes import Recipe, load_recipe
from biopsy.training.runs import Run


def make_parser(description: str, recipe: str, out: str) -> argparse.ArgumentParser:
    """Return a parser of the options that the training benchmarks share.

    Args:
        description: First line of the script's docstring.
        recipe: Default recipe.
        out: Default folder of the runs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", help="name of the rows (default: that of the recipe)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line; changed settings need a name for their rows."""
    arguments = parser.parse_args()
    if arguments.set and not arguments.name:
        parser.error("--set needs --name: rows of changed settings must not replace those of the recipe")
    return arguments


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
