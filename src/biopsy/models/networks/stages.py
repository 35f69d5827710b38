"""Stages: a network as a row of named parts, of which the first ones can be frozen.

A network that can be trained in part is a :class:`StagedNetwork`. Frozen stages keep their weights and stay
in evaluation mode, so that their normalisations and dropouts do in training what they do in prediction;
:func:`split_frozen` gives them as a module of its own, whose outputs may be computed once and used again.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Self

from torch import Tensor, nn

from biopsy.core.errors import RecipeError


class StagedNetwork(nn.Module):
    """A network that says which stages it consists of.

    Attributes:
        n_frozen: How many stages, counted from the input, are not trained.
    """

    n_frozen: int = 0

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Return name and module of every stage from input to output; the last is called ``head``."""
        raise NotImplementedError

    def cut(self, place: int) -> tuple[nn.Module, nn.Module] | None:
        """Return what lies before a stage and what begins with it; None where the network is no mere row."""
        modules = [module for _, module in self.stages()]
        return nn.Sequential(*modules[:place]), nn.Sequential(*modules[place:])

    def freeze_front(self, n_frozen: int) -> None:
        """Freeze the first stages and train all others."""
        trained = {id(weight) for _, stage in self.stages()[n_frozen:] for weight in stage.parameters()}
        for weight in self.parameters():  # one that belongs to no stage, a class token say, comes first
            weight.requires_grad_(n_frozen == 0 or id(weight) in trained)
        self.n_frozen = n_frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all stages that are trained; frozen ones stay in evaluation mode."""
        super().train(mode)
        for _, stage in self.stages()[: self.n_frozen]:
            stage.eval()
        return self


class SequentialNetwork(StagedNetwork):
    """Layers in one row: a body whose output is the features, perhaps a dropout, and the head.

    Args:
        layers: The body's layers by name.
        stages: Name of each stage -> name of its first layer; one called ``head`` is joined to the head.
        head: Features to logits.
        drop: Between the two, where the network has it.
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
        """Return name and module of every stage; the modules share their layers with the network."""
        parts = {name: [*self.body[start:end]] for name, (start, end) in self._slices.items()}
        last = [self.head] if self.drop is None else [self.drop, self.head]
        parts["head"] = parts.get("head", []) + last
        return [(name, nn.Sequential(*layers)) for name, layers in parts.items()]


def list_stages(network: nn.Module) -> list[str]:
    """Return the names of a network's stages from input to output; none where it is not staged."""
    return [name for name, _ in network.stages()] if isinstance(network, StagedNetwork) else []


def freeze(network: nn.Module, trainable: str) -> None:
    """Freeze what lies before a stage.

    Args:
        network: Changed in place.
        trainable: ``all``, or the first stage that is trained: it and those after it; ``head`` is the last.
            ``layer4`` is the first of ``layer4.0`` and ``layer4.1``.

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
    places = [place for place, name in enumerate(names) if f"{name}.".startswith(f"{trainable}.")]
    if trainable != "all" and not places:
        near = [f"did you mean {name!r}?" for name in get_close_matches(trainable, ["all", *names], n=1)]
        known = f"its stages are {', '.join(names)}" if names else "it has no stages, only 'all' is possible"
        raise RecipeError(
            f"the network has no stage {trainable!r} to train from; {'; '.join([*near, known])}"
        )
    if isinstance(network, StagedNetwork):
        network.freeze_front(0 if trainable == "all" else places[0])


def split_frozen(network: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the frozen front of a network and the trained rest, one behind the other.

    Both share their layers with the network. The front's outputs depend on nothing random.

    Returns:
        None where nothing is frozen, or where the network is not a row of its stages.
    """
    if not isinstance(network, StagedNetwork) or not network.n_frozen:
        return None
    return network.cut(network.n_frozen)
