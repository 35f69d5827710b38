"""Layers of a network in the order that a patch passes them, and methods that look at what one puts out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError
from biopsy.evaluation.explanation.methods import ExplanationRequest, register_method
from biopsy.models.networks.layers import SeparableConv2d

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish)
_PASSED_OVER = ("Norm", "Drop", "Identity")  # what may stand between a convolution and its rectifier
_INSTEAD = "integrated_gradients and occlusion look at the whole network, whatever it is made of"


class _Passage(NamedTuple):
    """A layer or a block of layers that a patch has passed: its name and what it put out."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    output: int  # which tensor it was, so that a block is known to give what its last layer gives


def find_layer(network: nn.Module, name: str) -> str:
    """Return the name of a layer back.

    Raises:
        RecipeError: If there is no module of that name, with the nearest one.
    """
    names = [known for known, _ in network.named_modules() if known]
    if name not in names:
        near = get_close_matches(name, names, n=5, cutoff=0.4) or names[:8]
        raise RecipeError(f"the network has no layer {name!r}; nearest: {', '.join(near)}")
    return name


def find_first_layer(network: nn.Module, input_px: int) -> str:
    """Return the first convolution, or the rectifier behind it, whose output is what the next layer sees.

    Raises:
        RecipeError: If the network has no convolution.
    """
    layers = list_layers(network, input_px)
    first = next((place for place, name in enumerate(layers) if "Conv" in _kind(network, name)), None)
    if first is None:
        raise RecipeError("the network has no convolution: name one of its layers, such as " + layers[0])
    for name in layers[first + 1 :]:
        if isinstance(network.get_submodule(name), _ACTIVATIONS):
            return name
        if not any(part in _kind(network, name) for part in _PASSED_OVER):
            break
    return layers[first]


def find_last_maps(network: nn.Module, input_px: int) -> str:
    """Return the layer or block whose maps are the last before the network pools or flattens them.

    It is what follows the last convolution at the same size: its rectifier, or the block that adds to it or
    joins it with others. Convolutions of the head, as SqueezeNet has one, already count classes.

    Raises:
        RecipeError: If there is none: no convolution, or a transformer, whose convolutions cut the patch into
            tokens before anything is looked at.
    """
    passed = [item for item in _follow(network, input_px) if item.name.split(".")[0] != "head"]
    convolutions = [
        place
        for place, item in enumerate(passed)
        if isinstance(item.module, nn.Conv2d | SeparableConv2d) and item.shape[-2:] > (1, 1)
    ]
    if not convolutions:
        raise RecipeError(f"grad_cam weighs the maps of a convolution and the network has none: {_INSTEAD}")
    last, tail = passed[convolutions[-1]], passed[convolutions[-1] + 1 :]
    kinds = [type(item.module).__name__ for item in tail]
    if any("Atten" in kind and "Pool" not in kind for kind in kinds) or any(len(e.shape) == 3 for e in tail):
        raise RecipeError(
            f"grad_cam needs maps, and behind its last convolution {last.name} the network works on tokens: "
            f"{_INSTEAD}"
        )
    same = [item for item in tail if len(item.shape) == 4 and item.shape[-2:] == last.shape[-2:]]
    ends = [e for e in same if isinstance(e.module, _ACTIVATIONS) or any(e.module.children())]
    return _innermost(passed, ends[-1] if ends else last).name


def list_layers(network: nn.Module, input_px: int) -> list[str]:
    """Name the layers that a patch passes, in order; a separable convolution counts as one."""
    inside = tuple(
        f"{name}." for name, module in network.named_modules() if isinstance(module, SeparableConv2d)
    )
    return [
        item.name
        for item in _follow(network, input_px)
        if (isinstance(item.module, SeparableConv2d) or not any(item.module.children()))
        and not item.name.startswith(inside)
    ]


def has_convolution(network: nn.Module) -> bool:
    """Return whether a network has a layer that sees the patch as a picture."""
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def layer_output(network: nn.Module, batch: Tensor, layer: str) -> Tensor:
    """Return what a layer puts out, ``(B, C, h, w)``.

    Raises:
        RecipeError: If that is no picture.
    """
    with torch.no_grad(), watch_layer(network, layer) as result:
        network(batch)
    return check_maps(result, layer)


@contextmanager
def watch_layer(network: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Keep what a layer puts out while the network is called; gradients begin there.

    What is kept is a copy: the next layer may write over the layer's own output.
    """
    result: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        result.append(output.detach().clone().requires_grad_(torch.is_grad_enabled()))
        return result[-1].clone()

    handle = network.get_submodule(layer).register_forward_hook(keep)
    try:
        yield result
    finally:
        handle.remove()


def check_maps(found: list[Tensor], layer: str) -> Tensor:
    """Return the last output that was kept.

    Raises:
        RecipeError: If that is no picture.
    """
    if not found or found[-1].dim() != 4:
        shape = tuple(found[-1].shape[1:]) if found else "nothing"
        raise RecipeError(
            f"layer {layer!r} gives {shape} for each patch, not maps of height and width: name a "
            "convolution, or what follows one"
        )
    return found[-1]


def _follow(network: nn.Module, input_px: int) -> list[_Passage]:
    """Send an empty patch through and list layers and blocks as they finish."""
    passed: list[_Passage] = []
    kept: list[Tensor] = []  # alive, or two outputs could share an address

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, output: object) -> None:
            if isinstance(output, Tensor):
                kept.append(output)
                passed.append(_Passage(name, module, tuple(output.shape), id(output)))

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
    return passed


def _innermost(passed: list[_Passage], block: _Passage) -> _Passage:
    """Go from a block to the layer inside it that gives the same output, if only that call of it does."""
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
    """Return the output of a layer, a map for each of its channels."""
    return layer_output(request.network, request.batch, str(request.layer))


@register_method(
    "Grad-CAM",
    shows="the channels of a late layer, weighted by the mean gradient of the class score and summed; "
    "negative values are set to 0 (Selvaraju et al. 2017)",
    caveat="Its resolution is that of the layer, which is coarse; it is enlarged to the size of the patch",
    find_layer=find_last_maps,
)
def grad_cam(request: ExplanationRequest) -> Tensor:
    """Return the layer's maps, weighted by the mean gradient of the class's score, added up and rectified."""
    layer = str(request.layer)
    with torch.enable_grad(), watch_layer(request.network, layer) as result:
        score = request.scores(request.batch).sum()
        maps = check_maps(result, layer)
        (gradient,) = torch.autograd.grad(score, maps)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * maps.detach()).sum(dim=1, keepdim=True).clamp(min=0)
