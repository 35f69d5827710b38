"""Layers of a network in forward order, and explanation methods that use the output of one layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError
from biopsy.evaluation.saliency.methods import ExplanationRequest, register_method
from biopsy.models.networks.layers import SeparableConv2d

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish)
_SKIPPED = ("Norm", "Drop", "Identity")  # layers allowed between a convolution and its activation
_ALTERNATIVES = "use integrated_gradients or occlusion, which work for any network"


class _LayerCall(NamedTuple):
    """A call of a layer or block in a forward pass: its name and output."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    output: int  # id of the tensor, to detect blocks that return the output of their last layer


def find_layer(network: nn.Module, name: str) -> str:
    """Return the name of a layer if it exists.

    Raises:
        RecipeError: If there is no module of that name, with the nearest ones.
    """
    names = [module_name for module_name, _ in network.named_modules() if module_name]
    if name not in names:
        near = get_close_matches(name, names, n=5, cutoff=0.4) or names[:8]
        raise RecipeError(f"the network has no layer {name!r}; nearest: {', '.join(near)}", "name")
    return name


def find_first_layer(network: nn.Module, input_px: int) -> str:
    """Return the first convolution, or the activation that follows it.

    Raises:
        RecipeError: If the network has no convolution.
    """
    layers = list_layers(network, input_px)
    first = next((index for index, name in enumerate(layers) if "Conv" in _kind(network, name)), None)
    if first is None:
        raise RecipeError(
            "the network has no convolution: choose one of its layers, such as " + layers[0], "network"
        )
    for name in layers[first + 1 :]:
        if isinstance(network.get_submodule(name), _ACTIVATIONS):
            return name
        if not any(part in _kind(network, name) for part in _SKIPPED):
            break
    return layers[first]


def find_last_maps(network: nn.Module, input_px: int) -> str:
    """Return the layer or block with the last feature maps before pooling or flattening.

    It follows the last convolution at the same size: its activation, or the residual or concatenating block
    that contains it. Convolutions of the head, as in SqueezeNet, are ignored.

    Raises:
        RecipeError: If there are no such maps: the network has no convolution, or is a transformer.
    """
    passed = [item for item in _trace_calls(network, input_px) if item.name.split(".")[0] != "head"]
    convolutions = [
        index
        for index, item in enumerate(passed)
        if isinstance(item.module, nn.Conv2d | SeparableConv2d) and item.shape[-2:] > (1, 1)
    ]
    if not convolutions:
        raise RecipeError(
            f"grad_cam needs feature maps of a convolution, the network has none: {_ALTERNATIVES}", "network"
        )
    last, tail = passed[convolutions[-1]], passed[convolutions[-1] + 1 :]
    kinds = [type(item.module).__name__ for item in tail]
    if any("Atten" in kind and "Pool" not in kind for kind in kinds) or any(len(e.shape) == 3 for e in tail):
        raise RecipeError(
            f"grad_cam needs feature maps, but after its last convolution {last.name} the network works on "
            f"tokens: {_ALTERNATIVES}",
            "network",
        )
    same_size = [item for item in tail if len(item.shape) == 4 and item.shape[-2:] == last.shape[-2:]]
    ends = [e for e in same_size if isinstance(e.module, _ACTIVATIONS) or any(e.module.children())]
    return _innermost(passed, ends[-1] if ends else last).name


def list_layers(network: nn.Module, input_px: int) -> list[str]:
    """Return the names of the layers in forward order; a separable convolution is one layer."""
    inside = tuple(
        f"{name}." for name, module in network.named_modules() if isinstance(module, SeparableConv2d)
    )
    return [
        item.name
        for item in _trace_calls(network, input_px)
        if (isinstance(item.module, SeparableConv2d) or not any(item.module.children()))
        and not item.name.startswith(inside)
    ]


def has_convolution(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def layer_output(network: nn.Module, batch: Tensor, layer: str) -> Tensor:
    """Return the output of a layer, ``(B, C, h, w)``.

    Raises:
        RecipeError: If the output has another shape.
    """
    with torch.no_grad(), watch_layer(network, layer) as result:
        network(batch)
    return check_maps(result, layer)


@contextmanager
def watch_layer(network: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Record the outputs of a layer while the network is called; gradients start there.

    Copies are recorded, because the next layer may work in place.
    """
    result: list[Tensor] = []

    def record(module: nn.Module, args: object, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        result.append(output.detach().clone().requires_grad_(torch.is_grad_enabled()))
        return result[-1].clone()

    handle = network.get_submodule(layer).register_forward_hook(record)
    try:
        yield result
    finally:
        handle.remove()


def check_maps(outputs: list[Tensor], layer: str) -> Tensor:
    """Return the last recorded output.

    Raises:
        RecipeError: If there is none, or it is not ``(B, C, h, w)``.
    """
    if not outputs or outputs[-1].dim() != 4:
        shape = tuple(outputs[-1].shape[1:]) if outputs else "nothing"
        raise RecipeError(
            f"layer {layer!r} returns {shape} per patch, not feature maps: choose a convolution or the layer "
            "after one",
            "network",
        )
    return outputs[-1]


def _trace_calls(network: nn.Module, input_px: int) -> list[_LayerCall]:
    """Return the calls of layers and blocks in a forward pass, in the order in which they finish."""
    calls: list[_LayerCall] = []
    outputs: list[Tensor] = []  # alive, or two outputs could share an address

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append(output)
                calls.append(_LayerCall(name, module, tuple(output.shape), id(output)))

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in network.named_modules() if name]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, input_px, input_px, device=next(network.parameters()).device))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls


def _innermost(passed: list[_LayerCall], block: _LayerCall) -> _LayerCall:
    """Return the innermost layer of a block with the same output, if that layer is called only once."""
    names = [item.name for item in passed]
    while True:
        before = [item for item in passed[: passed.index(block)] if item.name.startswith(f"{block.name}.")]
        if not before or before[-1].output != block.output or names.count(before[-1].name) > 1:
            return block
        block = before[-1]


def _kind(network: nn.Module, name: str) -> str:
    return type(network.get_submodule(name)).__name__


@register_method(
    "activations",
    shows="the output of single channels of one layer",
    caveat="It does not depend on a class, and an active channel need not influence the prediction",
    find_layer=find_first_layer,
    per_class=False,
)
def activations(request: ExplanationRequest) -> Tensor:
    """Return the output of a layer, one map per channel."""
    return layer_output(request.network, request.batch, str(request.layer))


@register_method(
    "Grad-CAM",
    shows="the channels of a late layer, weighted by the mean gradient of the class score and summed; "
    "negative values are set to 0 (Selvaraju et al. 2017)",
    caveat="Its resolution is that of the layer, which is coarse; it is enlarged to the size of the patch",
    find_layer=find_last_maps,
)
def grad_cam(request: ExplanationRequest) -> Tensor:
    """Return the rectified sum of the layer's maps, weighted by the mean gradient of the class score."""
    layer = str(request.layer)
    with torch.enable_grad(), watch_layer(request.network, layer) as result:
        score = request.scores(request.batch).sum()
        maps = check_maps(result, layer)
        (gradient,) = torch.autograd.grad(score, maps)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * maps.detach()).sum(dim=1, keepdim=True).clamp(min=0)
