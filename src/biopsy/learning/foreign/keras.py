"""Carrying Keras's weights into a network of ours, layer by layer within each kind."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from biopsy.core.errors import DataError
from biopsy.learning.foreign.keras_config import list_steps, name_normalisation
from biopsy.learning.foreign.keras_files import KerasFile, Layer, read_keras
from biopsy.learning.networks import build_network
from biopsy.learning.networks.layers import FlattenChannelsLast, SeparableConv2d
from biopsy.learning.recipes import list_recipes, load_recipe

logger = logging.getLogger(__name__)

_STEPS: dict[type[nn.Module], str] = {
    SeparableConv2d: "separable convolution",
    nn.Conv2d: "convolution",
    nn.Linear: "dense layer",
    nn.MaxPool2d: "max-pooling",
    nn.ReLU: "relu",
}
_WITHOUT_EFFECT = (nn.Dropout, nn.Identity, FlattenChannelsLast)


class Place(NamedTuple):
    """A layer of ours: its name, its kind, and its weights seen in Keras's layout."""

    name: str
    kind: str
    weights: list[Tensor]


Item = TypeVar("Item", Place, Layer)


def load_keras_into(path: Path | str, module: nn.Module) -> None:
    """Fill a module with the weights of a Keras file, which must have the same layers.

    The n-th convolution of the file goes into the n-th of the module, and so with separable convolutions,
    normalisations and dense layers. Kernels are transposed; a dense layer behind a flattened image fits where
    the module flattens as Keras does (``layers.FlattenChannelsLast``).

    Args:
        path: ``.h5`` (Keras 2 or 3, whole model or weights alone), ``.weights.h5`` or ``.keras``.
        module: A network or a part of one; unchanged where an error is raised.

    Raises:
        DataError: If the file cannot be read, holds code, or is of another architecture; says at which layer,
            and of which shipped network the file may be.
    """
    carry(read_keras(path), module, "the network")


def carry(file: KerasFile, module: nn.Module, what: str) -> None:
    """Copy the weights of a file that was read; ``what`` names the module in errors."""
    places = list_places(module)
    layers, difference = file.layers, _find_difference(file.layers, places)
    if difference and not file.order_is_certain and not _find_difference(file.by_name(), places):
        layers, difference = file.by_name(), ""
    if difference:
        raise DataError(f"{file.path} does not fit {what}: {difference}; {_guess(file.layers)}")
    with torch.no_grad():
        for kind in {place.kind for place in places}:
            for place, layer in zip(_of_kind(places, kind), _of_kind(layers, kind), strict=True):
                for weight, array in zip(place.weights, layer.weights, strict=True):
                    weight.copy_(torch.from_numpy(array))
    logger.info("%s: %d layers carried over", file.path, len(places))


def compare_steps(file: KerasFile, network: nn.Module, what: str) -> str:
    """Compare what a file says happens to a patch with what a network of ours does.

    Weights do not tell an ELU from a ReLU, or a normalisation before it from one after it; the file's
    configuration does.

    Args:
        file: Not compared where it holds weights alone.
        network: A row of layers.
        what: Names the network in errors.

    Returns:
        What the file does to the last numbers, ``softmax`` or ``sigmoid``; empty where it does not say.

    Raises:
        DataError: Naming the first step that differs.
    """
    if file.config is None:
        return ""
    theirs, outputs = list_steps(file.config)
    ours = [step for step, _, _ in _walk(network)]
    pairs = zip_longest(ours, theirs, fillvalue="nothing more")
    for number, (wanted, found) in enumerate(pairs, start=1):
        if wanted != found:
            raise DataError(
                f"{file.path} does not fit {what}: its step {number} is {found} where {wanted} is expected; "
                f"{_guess(file.layers)}"
            )
    return outputs


def list_places(module: nn.Module) -> list[Place]:
    """List the layers of a module that have weights; filling what is listed fills the module."""
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
        places.append(Place(name, kind, [weight.detach() for weight in weights if weight is not None]))
    return places


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Yield step, name and module of every layer in order; a separable convolution is one."""
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


def _of_kind(items: Sequence[Item], kind: str) -> list[Item]:
    return [item for item in items if item.kind == kind]


def _find_difference(layers: list[Layer], places: list[Place]) -> str:
    """Say at which layer a file differs from what is expected; empty where it does not."""
    strange = [layer for layer in layers if layer.kind == ""]
    if strange:
        return (
            f"its layer {strange[0].name!r} with weights {_shapes(strange[0])} is of a kind that is not read"
        )
    if Counter(layer.kind for layer in layers) != Counter(place.kind for place in places):
        return f"it has {_count(layers)} where {_count(places)} are expected"
    for kind in dict.fromkeys(place.kind for place in places):
        pairs = zip(_of_kind(places, kind), _of_kind(layers, kind), strict=True)
        for number, (place, layer) in enumerate(pairs, start=1):
            if _shapes(layer) != _shapes(place):
                return (
                    f"its {kind} {number}, {layer.name!r}, has weights {_shapes(layer)} where "
                    f"{_shapes(place)} are expected for {place.name!r}"
                )
    return ""


def _shapes(item: Place | Layer) -> str:
    return " + ".join("x".join(map(str, weight.shape)) for weight in item.weights)


def _count(items: Sequence[Place | Layer]) -> str:
    counts = Counter(item.kind for item in items)
    return ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items()) or "no layer with weights"


def _guess(layers: list[Layer]) -> str:
    """Say which shipped recipes have a network with such layers."""
    found = []
    for name in list_recipes():
        recipe = load_recipe(name)
        if ":" in recipe.model.name:  # of another library
            continue
        with torch.device("meta"):
            network = build_network(
                recipe.model.name, n_classes=2, input_px=recipe.preprocessing.input_px, **recipe.model.params
            )
        if not _find_difference(layers, list_places(network)):
            found.append(name)
    return (
        f"its layers are those of {' or '.join(found)}" if found else "no shipped recipe has such a network"
    )
