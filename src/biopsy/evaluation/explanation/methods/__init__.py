"""Explanation methods: a name, the function that makes the maps, and what they show and do not show.

A method takes a network in evaluation mode and a batch as the network is fed it, and gives a map for each
patch. To add one, write a function under ``@register_method`` in the file of its family, with a sentence on
what its map shows and one on what it does not: `explain_patches`, the command line, the captions of the
report and the test of whether maps mean anything then know it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from biopsy.core.errors import RecipeError, suggest
from biopsy.core.plugins import Registry


@dataclass(frozen=True)
class ExplanationRequest:
    """What a method explains.

    Attributes:
        network: In evaluation mode.
        batch: Patches as the network is fed them, ``(B, 3, S, S)``.
        class_index: The class whose score, before softmax or sigmoid, is explained, ``(B,)``.
        blank: What the network is fed where a slide is empty, white glass, ``(3, 1, 1)``.
        layer: Name of the layer it looks at; None for the whole network.
    """

    network: nn.Module
    batch: Tensor
    class_index: Tensor
    blank: Tensor
    layer: str | None = None

    def scores(self, batch: Tensor) -> Tensor:
        """Return the score of the explained class for patches in the place of the batch, ``(B,)``."""
        return self.network(batch).gather(1, self.class_index[:, None])[:, 0]


Compute = Callable[[ExplanationRequest], Tensor]
FindLayer = Callable[[nn.Module, int], str]


@dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
        name: Name of the function.
        title: What a reader calls it.
        compute: Gives maps ``(B, n_maps, h, w)``; they may be of another size than the batch, and cover it.
        shows: What a map shows, in a sentence for a reader.
        caveat: What it must not be taken for.
        find_layer: For a method that looks at one layer: gives the one it takes by default, of a network and
            the side of its input.
        per_class: Whether it depends on the explained class.
        signed: Whether values below 0 speak against the class.
    """

    name: str
    title: str
    compute: Compute
    shows: str
    caveat: str
    find_layer: FindLayer | None
    per_class: bool
    signed: bool

    @property
    def takes_layer(self) -> bool:
        """Whether it looks at one layer, by name."""
        return self.find_layer is not None


METHODS: Registry[Method] = Registry("biopsy.methods", "biopsy.evaluation.explanation.methods")


def register_method(
    title: str,
    *,
    shows: str,
    caveat: str,
    find_layer: FindLayer | None = None,
    per_class: bool = True,
    signed: bool = False,
) -> Callable[[Compute], Compute]:
    """Make a function known as a method under its own name; see `Method` for the rest."""

    def register(compute: Compute) -> Compute:
        name = compute.__name__
        method = Method(name, title, compute, shows, caveat, find_layer, per_class, signed)
        METHODS.add(name, method, compute)
        return compute

    return register


def find_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RecipeError: If there is none, with the nearest name.
    """
    if name not in METHODS:
        raise RecipeError(f"no way to explain is called {name!r}; {suggest(name, METHODS)}")
    return METHODS[name]
