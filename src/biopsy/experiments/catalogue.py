"""Lists of supported data sets, networks, recipes, classifiers and encoders."""

from collections.abc import Callable
from typing import Literal

from biopsy.core.errors import BiopsyError, suggest

Kind = Literal["datasets", "models", "recipes", "classifiers", "encoders"]
Row = dict[str, object]
Rows = list[Row]  # before `list` is redefined below


def list(kind: Kind) -> Rows:
    """List supported data sets, models, recipes, classifiers or encoders.

    Args:
        kind: What to list.

    Returns:
        One row per item, all with the same keys. For data sets: how they are recognised and prepared, counts,
        pixel size, licence and citation; for models: parameters (with two classes and the input size of their
        recipe), stages and licence, then known pretrained weights with licence, preprocessing and whether
        their file is available; for recipes: published and corrected metrics and the cost; for classifiers:
        training data and input; for encoders: constructor, preprocessing, licence, access and whether the
        weights are available.

    Raises:
        BiopsyError: If the kind is unknown.

    Examples:
        >>> [row["name"] for row in list("recipes")][:3]
        ['baruah-2019', 'cancernet-2019', 'cancernet-2020']
    """
    if kind not in _LISTS:
        raise BiopsyError(f"unknown kind {kind!r}: {suggest(str(kind), _LISTS)}")
    return _LISTS[kind]()


def _list_datasets() -> Rows:
    from biopsy.data.datasets import Dataset, list_datasets

    def command(dataset: Dataset) -> str:
        source = "SLIDES" if dataset.cuts_slides else "SOURCE"
        options = " --mpp UM" * (dataset.mpp is None) + " --patch-px PIXELS" * dataset.cuts_slides
        return f"biopsy prepare {source} --out PACK{options}"

    return [
        {
            "name": dataset.name,
            "title": dataset.title,
            "looks_for": dataset.looks_for,
            "prepare": command(dataset),
            "counts": dataset.expected,
            "mpp": dataset.mpp,
            "fetch": dataset.is_downloadable,
            "licence": dataset.licence,
            "citation": dataset.citation,
        }
        for dataset in list_datasets()
    ]


def _list_models() -> Rows:
    from biopsy.models.networks import build_network, count_parameters, list_networks, network_parameters
    from biopsy.models.networks.stages import list_stages
    from biopsy.models.weights import list_weights, locate
    from biopsy.recipes import list_recipes, load_recipe

    recipes = [load_recipe(name) for name in list_recipes()]
    sides = {recipe.model.name: recipe.preprocessing.input_px for recipe in recipes}
    rows: Rows = []
    for name in list_networks():
        network = build_network(name, n_classes=2, input_px=sides.get(name, 48))
        total, trainable = count_parameters(network)
        row = {"name": name, "kind": "network", "input_px": sides.get(name, 48), "parameters": total}
        row |= {"trainable": trainable, "stages": ", ".join(list_stages(network))}
        row |= {"settings": ", ".join(f"{key}={value}" for key, value in network_parameters(name).items())}
        rows.append(row | {"licence": "Apache-2.0"})
    for name, licence in (("timm:NAME", "Apache-2.0"), ("torchvision:NAME", "BSD-3-Clause")):
        rows.append({"name": name, "kind": "any network of the library", "licence": licence})
    for weights in list_weights():
        path = locate(weights)
        row = {"name": weights.tag, "kind": f"weights of {' and '.join(weights.networks)}"}
        row |= {"licence": weights.licence, "preprocessing": weights.feed, "file": weights.file}
        row |= {"page": weights.page, "at_hand": "no" if path is None else str(path)}
        rows.append(row)
    name, kind = "timm:NAME.TAG, torchvision:NAME.TAG", "any weights of the libraries"
    rows.append({"name": name, "kind": kind, "licence": "differs, shown when they are loaded"})
    keys = dict.fromkeys(key for row in rows for key in row)
    return [dict.fromkeys(keys) | row for row in rows]


def _list_recipes() -> Rows:
    from biopsy.recipes import list_recipes, load_recipe

    rows: Rows = []
    for name in list_recipes():
        recipe = load_recipe(name)
        rows.append(
            {
                "name": name,
                "title": recipe.title,
                "source": ", ".join(
                    str(part) for part in (recipe.origin.authors, recipe.origin.year) if part
                ),
                "model": recipe.model.name,
                "published": recipe.origin.claim,
                "corrected": recipe.origin.corrected,
                "cost": recipe.origin.cost,
            }
        )
    return rows


def _list_classifiers() -> Rows:
    from biopsy.models.classifier import WEIGHTS, Classifier
    from biopsy.models.shipped import FOLDER, list_shipped

    rows: Rows = []
    for name in list_shipped():
        info, folder = Classifier.load(FOLDER / name).info, FOLDER / name
        row: Row = {"name": name, "description": info.description, "classes": ", ".join(info.class_names)}
        row |= {"patch": f"{info.patch_px} px at {info.mpp:g} um/px", "network": info.network}
        row |= {"recipe": info.recipe, "bytes": (folder / WEIGHTS).stat().st_size}
        rows.append(
            row | {"licence": info.licence, "citation": info.citation, "card": str(folder / "README.md")}
        )
    return rows


def _list_encoders() -> Rows:
    from biopsy.models.networks.encoders import list_encoders
    from biopsy.models.weights import find_weights, locate

    rows: Rows = []
    for encoder in list_encoders():
        path, (mean, std) = locate(find_weights(encoder.tag)), encoder.feed
        row: Row = {"name": encoder.name, "model.name": encoder.tag, "licence": encoder.licence}
        row |= {"gated": encoder.is_gated, "parameters": f"{encoder.millions:g} million"}
        row |= {"n_features": encoder.n_features, "pooling": encoder.pooling, "mpp": encoder.mpp}
        row |= {"input_px": encoder.input_px, "mean": mean, "std": std, "timm": encoder.architecture}
        row |= {"arguments": {key: str(value) for key, value in encoder.arguments.items()}}
        row |= {"file": f"{encoder.hub}: {encoder.file}", "not_checked": encoder.unchecked}
        rows.append(row | {"at_hand": "no" if path is None else str(path)})
    return rows


_LISTS: dict[str, Callable[[], Rows]] = {
    "datasets": _list_datasets,
    "models": _list_models,
    "recipes": _list_recipes,
    "classifiers": _list_classifiers,
    "encoders": _list_encoders,
}
