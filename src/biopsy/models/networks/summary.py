"""Summary of a network: number of parameters and table of layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biopsy.models.networks.layers import SeparableConv2d, size_of
from biopsy.models.networks.libraries import LibraryNetwork, walk


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
    """Return the layers in order of execution, by a forward pass.

    Args:
        network: Any network; separable convolutions and blocks of libraries count as one layer.
        input_px: Side of the square input, or its ``(width, height)``.
    """
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
