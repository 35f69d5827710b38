"""Networks of other libraries by name: ``timm:resnet18``, ``torchvision:squeezenet1_1``.

Initial weights are those of the library; nothing is downloaded. A network has two parts, its body and the
last layer; stages are the children of the body by their names in the library.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError, first_line, suggest
from biopsy.models.networks.layers import size_of
from biopsy.models.networks.stages import StagedNetwork

PARAMETERS = {"timm": ("drop_rate", "drop_path_rate"), "torchvision": ("dropout", "head", "n_fire")}
"""Parameters that a recipe may set, if the network supports them. For SqueezeNet, ``head="linear"`` replaces
the convolutional head by global average pooling and a linear layer; ``n_fire`` also truncates it after that
number of fire modules."""
_EXPECTED = (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError)


class LibraryNetwork(StagedNetwork):
    """A network of a library, divided into body and head (the last layer).

    Args:
        body: Module from patches to features ``(B, F)`` or a map ``(B, F, height, width)``.
        head: Module from the output of the body to logits.
        size: ``(width, height)`` of the input.
        is_cut: Whether the network was truncated.
    """

    def __init__(
        self, body: nn.Module, head: nn.Module, size: tuple[int, int], *, is_cut: bool = False
    ) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.size = size
        self.is_cut = is_cut

    @property
    def trunk(self) -> nn.Module:
        """The module whose children are the stages before the head."""
        return self.body

    def features(self, patches: Tensor) -> Tensor:
        """Return the penultimate layer, ``(B, F)``; maps are averaged."""
        values = self.body(patches)
        return values.mean(dim=(2, 3)) if values.ndim == 4 else values

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits ``(B, n_classes)``."""
        return self.head(self.body(patches))

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Return the children of the trunk (without weights: joined to the previous one) and the head.

        A child called ``head`` is the stage ``before_head``.
        """
        groups: list[tuple[str, list[nn.Module]]] = []
        leading: list[nn.Module] = []
        for name, module in walk(self.trunk):
            if any(True for _ in module.parameters()):
                groups.append(("before_head" if name == "head" else name, [*leading, module]))
                leading = []
            else:
                (groups[-1][1] if groups else leading).append(module)
        return [*((name, nn.Sequential(*modules)) for name, modules in groups), ("head", self.head)]

    def cut(self, index: int) -> tuple[nn.Module, nn.Module] | None:
        """Return the stages before an index and the others, if the body is verified to be sequential."""
        stages = [module for _, module in self.stages()]
        if index == len(stages) - 1:
            return self.body, self.head
        weight = next(self.parameters())
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                width, height = self.size
                patch = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(weight)
                expected = self.body(patch)
                join = [nn.Flatten()] if expected.ndim == 2 else []  # torchvision flattens between the layers
                result = nn.Sequential(*stages[:-1], *join)(patch)
        except _EXPECTED:
            return None
        finally:
            self.train(training)
        if result.shape != expected.shape or not torch.allclose(result, expected, rtol=1e-4, atol=1e-5):
            return None
        return nn.Sequential(*stages[:index]), nn.Sequential(*stages[index:-1], *join, stages[-1])


def build_library_network(
    name: str, *, n_classes: int, input_px: int | tuple[int, int], **parameters: object
) -> LibraryNetwork:
    """Build a network of timm or torchvision, with random weights from PyTorch's global state.

    Args:
        name: ``timm:NAME``, where ``NAME`` may end in the tag of its weights, or ``torchvision:NAME``.
        parameters: Those of :data:`PARAMETERS`.

    Raises:
        RecipeError: If the name is unknown, or the network does not support input size or parameters.
    """
    library, model = split_name(name)
    size = size_of(input_px)
    build = _build_timm if library == "timm" else _build_torchvision
    try:
        body, head = build(model, n_classes, size, parameters)
        with torch.no_grad():
            head.eval()(body.eval()(torch.zeros(1, 3, size[1], size[0])))
    except RecipeError:
        raise
    except _EXPECTED as error:
        raise RecipeError(
            f"{name} cannot be built for input_px={input_px!r} with {parameters or 'no parameters'}: "
            f"{first_line(error)}",
            "value",
        ) from None
    return LibraryNetwork(body, head, size, is_cut=parameters.get("n_fire") is not None).train()


def split_name(name: str) -> tuple[str, str]:
    """Return library and network of ``timm:NAME`` or ``torchvision:NAME``.

    Raises:
        RecipeError: If the library has no such network; with the closest names.
    """
    library, _, model = name.partition(":")
    if library not in PARAMETERS:
        raise RecipeError(f"unknown library {library!r}; {suggest(library, PARAMETERS)}", "name")
    if library == "timm":
        import timm

        names = timm.list_models()
        architecture, _, tag = model.partition(".")
        if architecture in names and tag:
            names = timm.list_pretrained(f"{architecture}.*")
    else:
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
    if model not in names:
        nearest = get_close_matches(model, names, n=3, cutoff=0.5)
        hint = (
            f"the closest names are {', '.join(nearest)}" if nearest else f"{library} has {len(names)} others"
        )
        raise RecipeError(f"{library} has no network {model!r}; {hint}", "name")
    return library, model


def create_timm(model: str, size: tuple[int, int], **arguments: Any) -> nn.Module:
    """Return a network of timm; those with a fixed input size are built for ``size``, ``(width, height)``."""
    import timm

    settings = timm.models.get_pretrained_cfg(model)
    if settings is not None and settings.fixed_input_size:
        arguments["img_size"] = size[::-1]
    return timm.create_model(model, **arguments)


def _build_timm(
    model: str, n_classes: int, size: tuple[int, int], parameters: dict[str, object]
) -> tuple[nn.Module, nn.Module]:
    body = create_timm(model, size, num_classes=0, **parameters)
    with torch.no_grad():
        n_features = body.eval()(torch.zeros(1, 3, size[1], size[0])).shape[1]
    return body, nn.Linear(n_features, n_classes)


def _build_torchvision(
    model: str, n_classes: int, size: tuple[int, int], parameters: dict[str, object]
) -> tuple[nn.Module, nn.Module]:
    import torchvision

    settings: dict[str, Any] = {"weights": None, "num_classes": n_classes, **parameters}
    head_kind, n_fire = settings.pop("head", "own"), settings.pop("n_fire", None)
    if model.startswith("vit_"):
        settings["image_size"] = size[0]
    elif model.startswith("maxvit"):
        settings["input_size"] = size[::-1]
    elif model in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": True}
    network = torchvision.models.get_model(model, **settings)
    if model.startswith("squeezenet"):
        body = nn.Sequential()
        body.add_module(
            "features", network.features if n_fire is None else _keep_fire(network.features, n_fire)
        )
        if head_kind == "linear" or n_fire is not None:
            body.add_module("pool", nn.AdaptiveAvgPool2d(1))
            body.add_module("flatten", nn.Flatten())
            n_features = body.eval()(torch.zeros(1, 3, *size[::-1])).shape[1]
            return body, nn.Linear(n_features, n_classes)
        return body, nn.Sequential(*network.classifier, nn.Flatten())
    if n_fire is not None:
        raise RecipeError(f"n_fire counts the fire modules of SqueezeNet; {model} has none", "setting")
    name, head = [item for item in network.named_modules() if isinstance(item[1], nn.Linear)][-1]
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, head


def _keep_fire(features: nn.Sequential, n_fire: object) -> nn.Sequential:
    """Return the layers of SqueezeNet up to the n-th fire module."""
    positions = [index for index, layer in enumerate(features) if type(layer).__name__ == "Fire"]
    if not isinstance(n_fire, int) or not 1 <= n_fire <= len(positions):
        raise RecipeError(f"n_fire must be an integer from 1 to {len(positions)}, not {n_fire!r}", "value")
    return features[: positions[n_fire - 1] + 1]


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a network by name, those of sequential modules individually."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(child):
            yield from walk(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child
