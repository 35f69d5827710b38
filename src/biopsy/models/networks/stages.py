"""Networks with named stages, of which the first ones can be frozen.

Frozen stages of a :class:`StagedNetwork` keep their weights and stay in evaluation mode, including
normalisation and dropout; :func:`split_frozen` returns them as a module whose outputs can be cached.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Self

from torch import Tensor, nn

from biopsy.core.errors import RecipeError


class StagedNetwork(nn.Module):
    """A network with named stages.

    Attributes:
        n_frozen: Number of frozen stages from the input.
    """

    n_frozen: int = 0

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Return name and module of every stage from input to output; the last is called ``head``."""
        raise NotImplementedError

    def cut(self, index: int) -> tuple[nn.Module, nn.Module] | None:
        """Return the stages before an index and the others; None if the network is not sequential."""
        modules = [module for _, module in self.stages()]
        return nn.Sequential(*modules[:index]), nn.Sequential(*modules[index:])

    def freeze_front(self, n_frozen: int) -> None:
        """Freeze the first stages and train all others."""
        trained = {id(weight) for _, stage in self.stages()[n_frozen:] for weight in stage.parameters()}
        for weight in self.parameters():  # weights in no stage, such as a class token, come first
            weight.requires_grad_(n_frozen == 0 or id(weight) in trained)
        self.n_frozen = n_frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the stages; frozen ones stay in evaluation mode."""
        super().train(mode)
        for _, stage in self.stages()[: self.n_frozen]:
            stage.eval()
        return self


class SequentialNetwork(StagedNetwork):
    """A sequential body whose output is the features, an optional dropout, and the head.

    Args:
        layers: Layers of the body by name.
        stages: Name of the first layer by stage; a stage ``head`` is joined to the head.
        head: Module from features to logits.
        drop: Dropout before the head.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        stages: Mapping[str, str],
        head: nn.Module,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for name, layer in layers.items():
            self.body.add_module(name, layer)
        self.drop = drop
        self.head = head
        starts = [*(list(layers).index(first) for first in stages.values()), len(layers)]
        self._slices = dict(zip(stages, pairwise(starts), strict=True))

    def features(self, patches: Tensor) -> Tensor:
        """Return the penultimate layer, ``(B, F)``."""
        return self.body(patches)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits ``(B, n_classes)``."""
        features = self.body(patches)
        return self.head(features if self.drop is None else self.drop(features))

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Return name and module of every stage; layers are shared with the network."""
        parts = {name: [*self.body[start:end]] for name, (start, end) in self._slices.items()}
        last = [self.head] if self.drop is None else [self.drop, self.head]
        parts["head"] = parts.get("head", []) + last
        return [(name, nn.Sequential(*layers)) for name, layers in parts.items()]


def list_stages(network: nn.Module) -> list[str]:
    """Return the names of the stages from input to output; none if the network has no stages."""
    return [name for name, _ in network.stages()] if isinstance(network, StagedNetwork) else []


def freeze(network: nn.Module, trainable: str) -> None:
    """Freeze the stages before a given one.

    Args:
        trainable: ``all``, or the first trainable stage; ``head`` is the last. ``layer4`` is the first of
            ``layer4.0`` and ``layer4.1``.

    Raises:
        RecipeError: If the network has no stage of that name.

    Example:
        >>> from biopsy.models.networks import build_network, count_parameters
        >>> network = build_network("vgg16", n_classes=2, input_px=96)
        >>> freeze(network, "block5")
        >>> count_parameters(network)
        (15894849, 8259585)
    """
    names = list_stages(network)
    indices = [index for index, name in enumerate(names) if f"{name}.".startswith(f"{trainable}.")]
    if trainable != "all" and not indices:
        hint = [f"did you mean {name!r}?" for name in get_close_matches(trainable, ["all", *names], n=1)]
        stages = f"its stages are {', '.join(names)}" if names else "it has no stages, only 'all' is possible"
        raise RecipeError(
            f"the network has no stage {trainable!r} to train from; {'; '.join([*hint, stages])}", "name"
        )
    if isinstance(network, StagedNetwork):
        network.freeze_front(0 if trainable == "all" else indices[0])


def split_frozen(network: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the frozen and the trainable part of a network.

    Both share their layers with the network. The outputs of the frozen part are deterministic.

    Returns:
        None if nothing is frozen, or the network is not sequential.
    """
    if not isinstance(network, StagedNetwork) or not network.n_frozen:
        return None
    return network.cut(network.n_frozen)
