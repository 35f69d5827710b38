"""Conversion of Keras models to classifiers, layer by layer."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from biopsy.core.errors import FileFormatError, RecipeError, RunError, suggest
from biopsy.core.files import sha256_file
from biopsy.core.text import count
from biopsy.data.datasets import hcd, idc
from biopsy.models.classifier import Classifier, ClassifierInfo, default_thresholds
from biopsy.models.engine import outputs_of
from biopsy.models.importers.keras_files import KerasFile, Layer, list_steps, name_normalisation, read_keras
from biopsy.models.networks import build_network
from biopsy.models.networks.layers import FlattenChannelsLast, OneLogit, SeparableConv2d
from biopsy.recipes import Recipe, list_recipes, load_recipe

logger = logging.getLogger(__name__)

_STEPS: dict[type[nn.Module], str] = {
    SeparableConv2d: "separable convolution",
    nn.Conv2d: "convolution",
    nn.Linear: "dense layer",
    nn.MaxPool2d: "max-pooling",
    nn.ReLU: "relu",
}
_WITHOUT_EFFECT = (nn.Dropout, nn.Identity, FlattenChannelsLast)


def load_keras_into(path: Path | str, module: nn.Module) -> None:
    """Load the weights of a Keras file into a module with the same layers.

    Layers of each kind (convolution, separable convolution, normalisation, dense) are matched in order.
    Kernels are transposed; a dense layer after flattening needs Keras's order
    (``layers.FlattenChannelsLast``).

    Args:
        path: ``.h5`` (Keras 2 or 3, model or weights only), ``.weights.h5`` or ``.keras``.
        module: A network or a part of one; unchanged if an error is raised.
    """
    copy_weights(read_keras(path), module, "the network")


def copy_weights(file: KerasFile, module: nn.Module, name: str) -> None:
    """Copy the weights of a Keras file into a module; ``name`` is its name in errors."""
    places = list_places(module)
    layers, difference = file.layers, _find_difference(file.layers, places)
    if difference and not file.order_is_certain and not _find_difference(file.by_name(), places):
        layers, difference = file.by_name(), ""
    if difference:
        message = f"does not fit {name}: {difference}; {_guess(file.layers)}"
        raise FileFormatError(file.path, "architecture", message)
    with torch.no_grad():
        for kind in {place.kind for place in places}:
            for place, layer in zip(_of_kind(places, kind), _of_kind(layers, kind), strict=True):
                for weight, array in zip(place.weights, layer.weights, strict=True):
                    weight.copy_(torch.from_numpy(array))
    logger.info("%s: weights of %d layers were loaded", file.path, len(places))


def compare_steps(file: KerasFile, network: nn.Module, name: str) -> str:
    """Compare the operations in the configuration of a file with those of a network.

    Weights alone do not determine activations or the order of operations.

    Args:
        file: Not compared if it has no configuration.

    Returns:
        The output activation in the file, ``softmax`` or ``sigmoid``; "" if unknown.
    """
    if file.config is None:
        return ""
    file_steps, outputs = list_steps(file.config)
    network_steps = [step for step, _, _ in _walk(network)]
    pairs = zip_longest(network_steps, file_steps, fillvalue="nothing more")
    for number, (expected, actual) in enumerate(pairs, start=1):
        if expected != actual:
            difference = f"its step {number} is {actual}, expected {expected}"
            message = f"does not fit {name}: {difference}; {_guess(file.layers)}"
            raise FileFormatError(file.path, "architecture", message)
    return outputs


def list_places(module: nn.Module) -> list[Layer]:
    """Return the layers of a module with weights, as views."""
    places = []
    for _, name, layer in _walk(module):
        weights: list[Tensor | None]
        if isinstance(layer, SeparableConv2d):
            kind, last = "separable convolution", layer.pointwise
            weights = [layer.depthwise.weight.permute(2, 3, 0, 1), last.weight.permute(2, 3, 1, 0), last.bias]
        elif isinstance(layer, nn.Conv2d):
            kind, weights = "convolution", [layer.weight.permute(2, 3, 1, 0), layer.bias]
        elif isinstance(layer, nn.Linear):
            kind, weights = "dense layer", [layer.weight.t(), layer.bias]
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            kind = "normalisation"
            weights = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
        else:
            continue
        places.append(Layer(name, kind, [weight.detach() for weight in weights if weight is not None]))
    return places


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Yield operation, name and module of every layer in order; a separable convolution is one layer."""
    children = list(module.named_children())
    step = next((step for kind, step in _STEPS.items() if isinstance(module, kind)), None)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        yield name_normalisation(module.eps), name, module
    elif step is not None:
        yield step, name, module
    elif children:
        for child_name, child in children:
            yield from _walk(child, f"{name}.{child_name}".strip("."))
    elif not isinstance(module, _WITHOUT_EFFECT):
        yield type(module).__name__, name, module


def _of_kind(items: Sequence[Layer], kind: str) -> list[Layer]:
    return [item for item in items if item.kind == kind]


def _find_difference(layers: list[Layer], places: list[Layer]) -> str:
    """Return the first difference between the layers of a file and a module, "" if there is none."""
    unsupported = [layer for layer in layers if layer.kind == ""]
    if unsupported:
        return f"its layer {unsupported[0].name!r} with weights {_shapes(unsupported[0])} is not supported"
    if Counter(layer.kind for layer in layers) != Counter(place.kind for place in places):
        return f"it has {_count(layers)}, expected {_count(places)}"
    for kind in dict.fromkeys(place.kind for place in places):
        pairs = zip(_of_kind(places, kind), _of_kind(layers, kind), strict=True)
        for number, (place, layer) in enumerate(pairs, start=1):
            if _shapes(layer) != _shapes(place):
                return (
                    f"its {kind} {number}, {layer.name!r}, has weights {_shapes(layer)}, "
                    f"expected {_shapes(place)} for {place.name!r}"
                )
    return ""


def _shapes(item: Layer) -> str:
    return " + ".join("x".join(map(str, weight.shape)) for weight in item.weights)


def _count(items: Sequence[Layer]) -> str:
    counts = Counter(item.kind for item in items)
    return ", ".join(count(n, kind) for kind, n in counts.items()) or "no layer with weights"


def _guess(layers: list[Layer]) -> str:
    """Return a hint on shipped recipes whose network has these layers."""
    matching = []
    for name in list_recipes():
        recipe = load_recipe(name)
        if ":" in recipe.model.name:  # of another library
            continue
        with torch.device("meta"):
            network = build_network(
                recipe.model.name,
                n_classes=2,
                input_px=recipe.preprocessing.input_px,
                seed=None,
                **recipe.model.params,
            )
        if not _find_difference(layers, list_places(network)):
            matching.append(name)
    return (
        f"its layers are those of {' or '.join(matching)}"
        if matching
        else "no shipped recipe has such a network"
    )


# Class names, um/px and patch size by data set of a recipe
_DATASETS = {
    "idc": (idc.CLASS_NAMES, idc.MPP, 50),
    "hcd": (hcd.CLASS_NAMES, hcd.MPP, 96),
}


def import_keras(
    file: Path | str,
    *,
    model: str | Path,
    out: Path | str,
    class_names: Sequence[str] | None = None,
    positive: str | None = None,
    mpp: float | None = None,
    patch_px: int | None = None,
) -> Classifier:
    """Convert a model saved by Keras (.h5, .weights.h5, .keras) into a classifier.

    The probabilities are Keras's own (two sigmoids become ``p1 / (p0 + p1)``). Nothing is calibrated: the
    most probable class is predicted. The file has no statistics of the training patches, so
    out-of-distribution patches are not flagged.

    Args:
        file: ``.h5``, ``.weights.h5`` or ``.keras``; read as data, no code in it is executed.
        model: Recipe (name or TOML file) of the network, or a network of a shipped recipe; it defines the
            preprocessing.
        out: Output folder of the classifier; must not exist.
        class_names: Names of the outputs in their order (default: those of the recipe's data set).
        positive: Positive class of two (default: the second).
        mpp: Pixel size of the patches in µm (default: the data set's).
        patch_px: Side of the patches in pixels, as cut from the slide (default: the data set's).

    Raises:
        FileFormatError: If the file cannot be read, holds code, or is of another architecture.
        RecipeError: If the model is unknown, or ``class_names`` or ``patch_px`` is required.
        RunError: If ``out`` exists.
    """
    recipe = _find_recipe(model)
    names, default_mpp, default_px = _DATASETS.get(recipe.origin.dataset, ([], None, None))
    names = list(names if class_names is None else class_names)
    patch_px = default_px if patch_px is None else patch_px
    if len(names) < 2 or len(set(names)) < len(names) or patch_px is None or patch_px < 1:
        raise RecipeError(
            f"{recipe.name} with class_names={names} and patch_px={patch_px}: pass two or more distinct "
            "names in the order of the outputs, and the patch size in pixels",
            "value",
        )
    if positive is not None and (positive not in names or len(names) > 2):
        raise RecipeError(f"positive={positive!r} is not one of two classes: {', '.join(names)}", "name")
    if Path(out).exists():
        raise RunError(f"{out} exists: choose another folder")
    keras_file = read_keras(file)
    preprocessing = recipe.preprocessing.fixed(input_px=keras_file.input_px or recipe.preprocessing.input_px)
    network = build_network(
        recipe.model.name,
        n_classes=len(names),
        input_px=preprocessing.input_px,
        seed=None,
        **recipe.model.params,
    )
    activation = compare_steps(keras_file, network, recipe.model.name)
    copy_weights(keras_file, network, recipe.model.name)
    outputs = outputs_of(recipe.train.loss)
    if activation == "softmax" or any(isinstance(module, OneLogit) for module in network.modules()):
        outputs = "softmax"
    elif activation == "sigmoid":
        outputs = "sigmoid"
    info = ClassifierInfo(
        network=recipe.model.name,
        params=recipe.model.params,
        class_names=names,
        positive_class=(positive or names[1]) if len(names) == 2 else None,
        patch_px=patch_px,
        mpp=default_mpp if mpp is None else mpp,
        preprocessing=preprocessing,
        outputs=outputs,
        thresholds=default_thresholds(names),
        recipe=recipe.name,
    )
    origin = {
        "library": "keras",
        "format": keras_file.format,
        "file": keras_file.path.name,
        "sha256": sha256_file(file),
    }
    Classifier(info.model_copy(update={"imported": origin}), network).save(out)
    return Classifier.load(out)


def _find_recipe(model: str | Path) -> Recipe:
    """Return the recipe of a name, or the first shipped recipe with a network of that name."""
    recipes = list_recipes()
    if Path(model).suffix == ".toml" or str(model) in recipes:
        return load_recipe(model)
    shipped = [load_recipe(name) for name in recipes]
    networks = {recipe.model.name: recipe for recipe in reversed(shipped) if not recipe.model.params}
    if str(model) not in networks:
        names = [*recipes, *sorted(networks)]
        raise RecipeError(f"unknown recipe or network {str(model)!r}: {suggest(str(model), names)}", "name")
    return networks[str(model)]
