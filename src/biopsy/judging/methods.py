"""Ways to ask a network what it looks at: one function each, in one register.

A method takes a network in evaluation mode and a batch as the network is fed it, and gives a map for each
patch. To add one, write it here under ``@register_method`` with a sentence on what its map shows and one on
what it does not: `explain_patches`, the command line and the captions of the report then know it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from biopsy.errors import RecipeError, suggest
from biopsy.learning.networks.layers import SeparableConv2d

Compute = Callable[[nn.Module, Tensor, Tensor, str | None], Tensor]

# Smilkov et al. 2017, SmoothGrad, sec. 3.2: 10 to 20 % of the input's range; gains end at about 50 draws
NOISE, DRAWS, NOISE_SEED = 0.15, 25, 0

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish)
_PASSED_OVER = ("Norm", "Drop", "Identity")  # what may stand between a convolution and its rectifier


@dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
        name: By which it is asked for.
        compute: ``(network, batch (B, 3, S, S), class_index (B,), layer) -> (B, n_maps, h, w)``; maps may be
            of another size than the batch, and cover it.
        shows: What a map shows, in a sentence for a reader.
        shows_not: What it must not be taken for.
        takes_layer: Whether it looks at one layer, by name.
        per_class: Whether it depends on the class that is asked about.
    """

    name: str
    compute: Compute
    shows: str
    shows_not: str
    takes_layer: bool
    per_class: bool


METHODS: dict[str, Method] = {}


def register_method(
    *, shows: str, shows_not: str, takes_layer: bool = False, per_class: bool = True
) -> Callable[[Compute], Compute]:
    """Make a function known as a method under its own name; see `Method` for the rest."""

    def register(compute: Compute) -> Compute:
        name = compute.__name__
        METHODS[name] = Method(name, compute, shows, shows_not, takes_layer, per_class)
        return compute

    return register


def find_method(name: str) -> Method:
    """Give a method by name.

    Raises:
        RecipeError: If there is none, with the nearest name.
    """
    if name not in METHODS:
        raise RecipeError(f"no way to explain is called {name!r}; {suggest(name, METHODS)}")
    return METHODS[name]


def find_layer(network: nn.Module, input_px: int, name: str | None = None) -> str:
    """Give the name of a layer.

    Args:
        network: Any network.
        input_px: Side of the square that it is fed.
        name: A module of it. None takes the first convolution, and where a rectifier follows it directly (or
            after a normalisation) that rectifier, whose output is what the next layer sees.

    Raises:
        RecipeError: If there is no module of that name, with the nearest one; or no convolution.
    """
    if name is not None:
        names = [known for known, _ in network.named_modules() if known]
        if name not in names:
            near = get_close_matches(name, names, n=5, cutoff=0.4) or names[:8]
            raise RecipeError(f"the network has no layer {name!r}; nearest: {', '.join(near)}")
        return name
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


def list_layers(network: nn.Module, input_px: int) -> list[str]:
    """Name the layers that a patch passes, in order; a separable convolution counts as one."""
    passed: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: passed.append(name)

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in network.named_modules()
        if name and (isinstance(module, SeparableConv2d) or not any(module.children()))
    ]
    inside = {f"{name}." for name, module in network.named_modules() if isinstance(module, SeparableConv2d)}
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, input_px, input_px, device=next(network.parameters()).device))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return [name for name in passed if not name.startswith(tuple(inside))]


def _kind(network: nn.Module, name: str) -> str:
    return type(network.get_submodule(name)).__name__


def has_convolution(network: nn.Module) -> bool:
    """Say whether a network has a layer that sees the patch as a picture."""
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def input_gradient(network: nn.Module, batch: Tensor, class_index: Tensor) -> Tensor:
    """Give the gradient of each patch's class score, before softmax or sigmoid, ``(B, 3, S, S)``.

    It flows through weights that are frozen as well; no weight's own gradient is touched.
    """
    with torch.enable_grad():
        batch = batch.detach().requires_grad_(True)
        scores = network(batch).gather(1, class_index[:, None])
        (gradient,) = torch.autograd.grad(scores.sum(), batch)
    return gradient


@register_method(
    shows="how much the score of the class, before the softmax, would change if that pixel changed a little: "
    "the absolute input gradient, the largest of the three colours (Simonyan et al. 2014)",
    shows_not="what the network recognised there, nor whether the pixel speaks for the class or against it",
)
def saliency(network: nn.Module, batch: Tensor, class_index: Tensor, layer: str | None) -> Tensor:
    """Give the absolute input gradient, the largest over channels."""
    return input_gradient(network, batch, class_index).abs().amax(dim=1, keepdim=True)


@register_method(
    shows="the absolute value of the input gradient's mean over noisy copies of the patch (Smilkov et al. "
    "2017), so that what differs from copy to copy fades",
    shows_not="what the network recognised there; a smooth map is easier to look at, not truer",
)
def smoothgrad(network: nn.Module, batch: Tensor, class_index: Tensor, layer: str | None) -> Tensor:
    """Give the saliency of the gradient averaged over noisy copies; the noise is the same every time."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    spread = NOISE * (batch.amax(dim=(1, 2, 3), keepdim=True) - batch.amin(dim=(1, 2, 3), keepdim=True))
    total = torch.zeros_like(batch)
    for _ in range(DRAWS):
        noise = torch.randn(batch.shape[1:], generator=generator).to(batch.device)
        total += input_gradient(network, batch + spread * noise, class_index)
    return (total / DRAWS).abs().amax(dim=1, keepdim=True)


@register_method(
    shows="what channels of one layer gave out at each place",
    shows_not="class activation mapping: no class enters it, and a channel that lights up may count for "
    "nothing in the decision",
    takes_layer=True,
    per_class=False,
)
def activations(network: nn.Module, batch: Tensor, class_index: Tensor, layer: str | None) -> Tensor:
    """Give the output of a layer, a map for each of its channels."""
    return layer_output(network, batch, str(layer))


def layer_output(network: nn.Module, batch: Tensor, layer: str) -> Tensor:
    """Give what a layer puts out, ``(B, C, h, w)``.

    Raises:
        RecipeError: If that is no picture.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(output.detach().clone())  # the next layer may write over it

    handle = network.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.no_grad():
            network(batch)
    finally:
        handle.remove()
    if not found or found[0].dim() != 4:
        shape = tuple(found[0].shape[1:]) if found else "nothing"
        raise RecipeError(
            f"layer {layer!r} gives {shape} for each patch, not maps of height and width: "
            "name a convolution, or what follows one"
        )
    return found[0]
