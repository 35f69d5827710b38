"""Grids: the settings a sweep tries, every value of one with every value of the others."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biopsy.core.errors import RecipeError
from biopsy.learning.recipes import Recipe, load_recipe

_OPENING, _CLOSING, _QUOTES = "[{(", ")}]", "\"'"


@dataclass(frozen=True)
class Combination:
    """One point of a grid.

    Attributes:
        values: Dotted setting to value, as the recipe holds it.
        recipe: With those values.
    """

    values: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Part of a folder's name: the values, and a few digits that tell like ones apart."""
        words = "-".join(f"{key.rpartition('.')[2]}-{spell(value)}" for key, value in self.values.items())
        words = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:60].strip("-.")
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()
        return f"{words}-{digest[:6]}"


def read_grid(grid: Iterable[str]) -> dict[str, list[str]]:
    """Read ``"train.lr=0.01,0.001"`` as a setting and the values it takes, as they were written.

    Commas within brackets and quotes belong to the value.

    Raises:
        RecipeError: If a line has no ``=`` or no value, or names a setting again.

    Example:
        >>> read_grid(["model.params.stage_widths=[32,64],[64,128]", "model.trainable=head,all"])
        {'model.params.stage_widths': ['[32,64]', '[64,128]'], 'model.trainable': ['head', 'all']}
    """
    found: dict[str, list[str]] = {}
    for line in [grid] if isinstance(grid, str) else grid:
        key, equals, text = line.partition("=")
        key, values = key.strip(), [value.strip() for value in _cut(text)]
        if not equals:
            raise RecipeError(f"--grid {line!r} has no '=': write --grid train.lr=0.01,0.001")
        if not all(values):
            raise RecipeError(f"--grid {line!r} lacks a value: write --grid train.lr=0.01,0.001")
        if key in found:
            raise RecipeError(f"--grid names {key!r} twice: give all its values in one")
        found[key] = values
    if not found:
        raise RecipeError("a sweep needs a grid of values: write --grid train.lr=0.01,0.001")
    return found


def combine(recipe: str | Path | Recipe, grid: Iterable[str], overrides: Sequence[str]) -> list[Combination]:
    """Give every combination of a grid's values, in order, each once.

    Args:
        recipe: A shipped name, a TOML file, or a recipe.
        grid: ``"table.key=value,value"`` each; values are read as those of ``--set``.
        overrides: ``"table.key=value"`` changes of every combination.

    Raises:
        RecipeError: If a recipe has no such setting or may not have such a value, or a setting is both in the
            grid and among the overrides.
    """
    asked = read_grid(grid)
    twice = sorted(asked.keys() & {override.partition("=")[0].strip() for override in overrides})
    if twice:
        raise RecipeError(f"{twice[0]} stands in --grid and in --set: leave it out of one")
    found: dict[str, Combination] = {}
    for values in itertools.product(*asked.values()):
        lines = [f"{key}={value}" for key, value in zip(asked, values, strict=True)]
        changed = load_recipe(recipe, [*overrides, *lines])
        document = changed.model_dump()
        combination = Combination({key: _find(document, key) for key in asked}, changed)
        found.setdefault(combination.name, combination)
    return list(found.values())


def spell(value: object) -> str:
    """Write a value of a setting for tables and figures: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> list[str]:
    """Cut at the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in _QUOTES:
            quote = sign
        else:
            depth += (sign in _OPENING) - (sign in _CLOSING)
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _find(document: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        document = document[name]
    return document
