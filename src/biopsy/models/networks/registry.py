"""Registry of networks by name, and their summary."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import Tensor, nn

from biopsy.core.errors import RecipeError, suggest
from biopsy.core.plugins import Registry
from biopsy.core.seeds import derive
from biopsy.models.networks import encoders, libraries
from biopsy.models.networks.layers import SeparableConv2d, initialise, size_of
from biopsy.models.networks.libraries import LibraryNetwork, walk


class Network(Protocol):
    """Interface of registered networks, besides ``nn.Module``."""

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits ``(B, n_classes)`` for patches ``(B, 3, H, W)``."""

    def features(self, patches: Tensor) -> Tensor:
        """Return the penultimate layer, ``(B, F)``."""


Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_BUILDERS: Registry[Callable[..., nn.Module]] = Registry("biopsy.networks", "biopsy.models.networks")
_FIXED = ("n_classes", "input_px")  # set by data and preprocessing, not by the recipe


def register_network(builder: Builder) -> Builder:
    """Register a function that builds a network under its name."""
    _BUILDERS.add(builder.__name__, builder, builder)
    return builder


def list_networks() -> list[str]:
    """Return the names of all networks, including plug-ins, without those of timm and torchvision."""
    return sorted(_BUILDERS)


def network_parameters(name: str) -> dict[str, object]:
    """Return the parameters of a network and their defaults (None: default of the library)."""
    if name.startswith(encoders.PREFIX):
        return {"drop_path_rate": None}
    if ":" in name:
        return dict.fromkeys(libraries.PARAMETERS[libraries.split_name(name)[0]])
    signature = inspect.signature(_find(name)).parameters.values()
    return {parameter.name: parameter.default for parameter in signature if parameter.name not in _FIXED}


def build_network(
    name: str,
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    seed: int | None = None,
    **parameters: object,
) -> nn.Module:
    """Build a network by name; PyTorch's global random state is preserved.

    Args:
        name: One of :func:`list_networks`, ``timm:NAME``, ``torchvision:NAME`` or ``hf-hub:ORG/NAME``.
        input_px: Side of the square input, or its ``(width, height)``.
        seed: Seed of the initial weights (as in Keras, see ``layers.initialise``; libraries use their own
            initialisation); None if weights are loaded afterwards.
        parameters: Parameters of the network, see :func:`network_parameters`.

    Raises:
        RecipeError: If the name or a parameter is unknown, a value is of another type, or the input is too
            small for the network.

    Example:
        >>> network = build_network("cancernet", n_classes=2, input_px=48, seed=0)
        >>> network(torch.zeros(4, 3, 48, 48)).shape
        torch.Size([4, 2])
    """
    defaults = network_parameters(name)
    for parameter in parameters:
        if parameter not in defaults:
            raise RecipeError(
                f"network {name!r} has no parameter {parameter!r}; {suggest(parameter, defaults)}", "setting"
            )
    with torch.random.fork_rng(devices=[]):
        if ":" in name:
            torch.manual_seed(derive(seed or 0, "initial weights", name))
            if name.startswith(encoders.PREFIX):
                return encoders.build_encoder(name, n_classes=n_classes, input_px=input_px, **parameters)
            return libraries.build_library_network(name, n_classes=n_classes, input_px=input_px, **parameters)
        build = validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))(_find(name))
        try:
            network = build(n_classes=n_classes, input_px=input_px, **parameters)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise RecipeError(
                f"network {name!r} takes no {where}={str(fault['input'])[:80]!r}: {fault['msg']}", "value"
            ) from None
    if seed is not None:
        initialise(network, seed)
    return cast(nn.Module, network)


def _find(name: str) -> Callable[..., nn.Module]:
    if name not in _BUILDERS:
        raise RecipeError(f"unknown network {name!r}; {suggest(name, _BUILDERS)}", "name")
    return _BUILDERS[name]


class LayerRow(NamedTuple):
    """One layer of a network."""

    name: str
    type: str
    output_shape: tuple[int, ...]  # (channels, height, width) or (features,)
    parameters: int


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters (including running statistics, as in Keras) and trainable ones.

    Example:
        >>> from biopsy.models.networks import build_network
        >>> count_parameters(build_network("cancernet", n_classes=2, input_px=48))
        (1235133, 1233533)
    """
    statistics = sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())
    total = sum(parameter.numel() for parameter in network.parameters()) + statistics
    return total, sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def describe(network: nn.Module, input_px: int | tuple[int, int]) -> list[LayerRow]:
    """Return the layers in order of execution, by a forward pass."""
    rows: list[LayerRow] = []

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, _: object, output: Tensor | Sequence[Any]) -> None:
            while not isinstance(output, Tensor):  # some blocks return several outputs
                output = output[0]
            rows.append(
                LayerRow(name, type(module).__name__, tuple(output.shape[1:]), count_parameters(module)[0])
            )

        return hook

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in _layers(network)]
    width, height = size_of(input_px)
    was_training = network.training
    weight = next(network.parameters())
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, first.in_channels, height, width, device=weight.device))
    finally:
        network.train(was_training)
        for handle in hooks:
            handle.remove()
    return rows


def _layers(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    if isinstance(module, LibraryNetwork):
        head = [*walk(module.head, "head.")] or [("head", module.head)]
        return [*walk(module.body, "body."), *head]
    result: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        is_leaf = isinstance(child, SeparableConv2d) or not any(child.children())
        result += [(prefix + name, child)] if is_leaf else _layers(child, f"{prefix}{name}.")
    return result
