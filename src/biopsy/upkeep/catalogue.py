"""What is shipped: data sets it can read or fetch, networks it can build, recipes it can train."""

from collections.abc import Callable
from typing import Literal

from biopsy.errors import BiopsyError, suggest

Kind = Literal["datasets", "models", "recipes"]
Row = dict[str, object]


def list_(kind: Kind) -> list[Row]:
    """List what is shipped, one row each, from the registers themselves.

    Args:
        kind: ``"datasets"``, ``"models"`` or ``"recipes"``.

    Returns:
        For data sets counts, resolution, licence and citation; for models parameters (with two classes and
        48-px input) and licence; for recipes the published and the corrected numbers and the cost. The rows
        of a kind have the same keys.

    Raises:
        BiopsyError: If there is no such kind.

    Example:
        >>> [row["name"] for row in list_("recipes")][:2]
        ['cancernet-2019', 'cancernet-2020']
    """
    if kind not in _LISTS:
        raise BiopsyError(f"there is no list of {kind!r}: {suggest(str(kind), _LISTS)}")
    return _LISTS[kind]()


def _list_datasets() -> list[Row]:
    from biopsy.data.datasets import LAYOUTS
    from biopsy.data.downloads import SOURCES

    return [
        {
            "name": layout.name,
            "title": layout.title,
            "counts": layout.expected,
            "mpp": layout.mpp,
            "fetch": layout.name in SOURCES,
            "licence": layout.licence,
            "citation": layout.citation,
        }
        for layout in LAYOUTS.values()
    ]


def _list_models() -> list[Row]:
    from biopsy.learning.networks import build_network, count_parameters, list_networks, network_parameters

    rows: list[Row] = []
    for name in list_networks():
        network = build_network(name, n_classes=2, input_px=48)
        total, trainable = count_parameters(network)
        settings = ", ".join(f"{key}={value}" for key, value in network_parameters(name).items())
        rows.append(
            {
                "name": name,
                "parameters": total,
                "trainable": trainable,
                "settings": settings,
                "weights": "random",
                "licence": "Apache-2.0",
            }
        )
    return rows


def _list_recipes() -> list[Row]:
    from biopsy.learning.recipes import list_recipes, load_recipe

    rows: list[Row] = []
    for name in list_recipes():
        recipe = load_recipe(name)
        rows.append(
            {
                "name": name,
                "title": recipe.title,
                "source": f"{recipe.origin.authors}, {recipe.origin.year}",
                "model": recipe.model.name,
                "published": recipe.origin.claim,
                "corrected": recipe.origin.corrected,
                "cost": recipe.origin.cost,
            }
        )
    return rows


_LISTS: dict[str, Callable[[], list[Row]]] = {
    "datasets": _list_datasets,
    "models": _list_models,
    "recipes": _list_recipes,
}
