"""Recipes: typed TOML files that define a training result.

Shipped recipes are in this folder. Their ``[sources]`` table has the source of each value: the publication, a
default of its library, or a choice of this package. To add one, write ``author2024.toml`` here.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from biopsy.core.errors import FileFormatError, RecipeError, suggest
from biopsy.core.loaders import load_toml, parse_toml
from biopsy.recipes.schema import DEFINING_TABLES, FORMAT, Recipe

__all__ = [
    "DEFINING_TABLES",
    "Overrides",
    "Recipe",
    "list_recipes",
    "load_recipe",
    "recipe_toml",
    "setting_lines",
]

Overrides = Mapping[str, object] | Iterable[str]
_SHIPPED = Path(__file__).parent


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def load_recipe(recipe: str | Path | Recipe, overrides: Overrides = ()) -> Recipe:
    """Load a recipe by name or from a TOML file, with overrides.

    Args:
        recipe: Name of a shipped recipe, path of a ``.toml`` file, or a recipe.
        overrides: ``{"table.key": value}``, or strings ``"table.key=value"`` with the value as TOML, else
            text. ``model.weights`` also sets ``model.pretrained``.

    Raises:
        RecipeError: If recipe, key or value are invalid; with the closest valid name.

    Example:
        >>> load_recipe("cancernet-2020", {"train.lr": 0.005}).train.lr
        0.005
    """
    document = recipe.model_dump() if isinstance(recipe, Recipe) else _read(recipe)
    lines = setting_lines(overrides)
    for line in lines:
        _override(document, line)
    changed = {line.partition("=")[0].strip() for line in lines}
    if "model.weights" in changed and "model.pretrained" not in changed:
        model = document["model"]
        assert isinstance(model, dict)
        if model["weights"]:
            model["pretrained"] = True
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        is_setting = error.errors()[0]["type"] in ("extra_forbidden", "missing")
        raise RecipeError(_describe_error(error, document), "setting" if is_setting else "value") from None


def setting_lines(overrides: Overrides) -> tuple[str, ...]:
    """Return overrides as arguments of ``--set``.

    Example:
        >>> setting_lines({"train.epochs": 2, "model.params.widths": [8, 16]})
        ('train.epochs=2', 'model.params.widths=[8, 16]')
    """
    if isinstance(overrides, Mapping):
        return tuple(f"{key}={_literal(value)}" for key, value in overrides.items())
    return tuple(overrides)


def _literal(value: object) -> str:
    """Return a value as TOML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, default=lambda number: number.item())  # numpy scalars


def recipe_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML with all defaults."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def _read(recipe: str | Path) -> dict[str, object]:
    path = Path(recipe)
    if path.suffix != ".toml":
        path = _SHIPPED / f"{recipe}.toml"
        if str(recipe) not in list_recipes():
            raise RecipeError(
                f"unknown recipe {str(recipe)!r}: {suggest(str(recipe), list_recipes())}", "name"
            )
    try:
        return load_toml(path)
    except FileFormatError as error:
        raise RecipeError(
            f"{error}: expected the name of a recipe or the path of a .toml file", error.reason
        ) from None


def _override(document: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise RecipeError(f"--set {override!r} has no '=': write --set train.lr=0.001", "value")
    settings = sorted(_list_settings(Recipe))
    free = key.startswith("model.params.")  # checked by the network
    if key not in settings and not free:
        raise RecipeError(f"a recipe has no setting {key!r}: {suggest(key, settings)}", "setting")
    try:
        value = parse_toml(f"value = {text.strip()}", f"--set {key}")["value"]
    except FileFormatError as error:
        if error.reason != "syntax":
            raise RecipeError(str(error), error.reason) from None
        value = text.strip()
    *tables, name = key.split(".")
    for table in tables:
        nested = document.setdefault(table, {})
        if not isinstance(nested, dict):
            raise RecipeError(
                f"{table!r} of the recipe is {nested!r}, no table with a setting {key!r}", "value"
            )
        document = nested
    document[name] = value


def _list_settings(model: type, prefix: str = "") -> Iterable[str]:
    """Yield the dotted names of all settings."""
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        if not prefix and name not in DEFINING_TABLES:
            continue
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            yield from _list_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _describe_error(error: ValidationError, document: Mapping[str, object]) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    name = document.get("name", "recipe")
    if first["type"] == "extra_forbidden":
        return f"{name}: a recipe has no setting {where!r}: {suggest(where, _list_settings(Recipe))}"
    if where == "format":
        return (
            f"{name}: has format {first['input']!r} where {FORMAT!r} was expected: update biopsy to read it"
        )
    return f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}, found {first['input']!r}"
