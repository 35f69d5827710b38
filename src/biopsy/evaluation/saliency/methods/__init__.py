"""Explanation methods: functions that return saliency maps, registered by name with a description.

A method takes a network in evaluation mode and a preprocessed batch, and returns a map for each patch. To add
one, write a function under ``@register_method`` in the file of its family, with a sentence on what its map
shows and one on its limits: it is then available to `explain_patches`, the command line, the report and the
faithfulness tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from biopsy.core.errors import RecipeError, suggest
from biopsy.core.plugins import Registry
from biopsy.core.text import capitalize


@dataclass(frozen=True)
class ExplanationRequest:
    """Input of an explanation method.

    Attributes:
        network: The network in evaluation mode.
        batch: Preprocessed patches, ``(B, 3, S, S)``.
        class_index: The explained class, whose score is taken before softmax or sigmoid, ``(B,)``.
        baseline: Preprocessed white (empty glass), ``(3, 1, 1)``.
        layer: Name of the layer; None for the whole network.
    """

    network: nn.Module
    batch: Tensor
    class_index: Tensor
    baseline: Tensor
    layer: str | None = None

    def scores(self, batch: Tensor) -> Tensor:
        """Return the score of the explained class for a batch of the same size, ``(B,)``."""
        return self.network(batch).gather(1, self.class_index[:, None])[:, 0]


Compute = Callable[[ExplanationRequest], Tensor]
FindLayer = Callable[[nn.Module, int], str]


@dataclass(frozen=True)
class Method:
    """An explanation method.

    Attributes:
        title: Name in reports.
        compute: Returns maps ``(B, n_maps, h, w)``, which cover the batch and may have another resolution.
        shows: What a map shows, in one sentence.
        caveat: Limits of the interpretation, in one sentence.
        find_layer: For methods of one layer: returns the default layer, from a network and its input size.
        per_class: Whether maps depend on the explained class.
        signed: Whether negative values oppose the class.
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
    def caption(self) -> str:
        """What a map shows and what it does not, for captions."""
        return f"{capitalize(self.title)}: {self.shows}. {self.caveat}."

    @property
    def takes_layer(self) -> bool:
        """Whether the method uses one layer, given by name."""
        return self.find_layer is not None


METHODS: Registry[Method] = Registry("biopsy.methods", "biopsy.evaluation.saliency.methods")


def register_method(
    title: str,
    *,
    shows: str,
    caveat: str,
    find_layer: FindLayer | None = None,
    per_class: bool = True,
    signed: bool = False,
) -> Callable[[Compute], Compute]:
    """Register a function as a method under its name; parameters as the attributes of `Method`."""

    def register(compute: Compute) -> Compute:
        name = compute.__name__
        method = Method(name, title, compute, shows, caveat, find_layer, per_class, signed)
        METHODS.add(name, method, compute)
        return compute

    return register


def find_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RecipeError: If it does not exist, with the nearest name.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown explanation method {name!r}; {suggest(name, METHODS)}", "name")
    return METHODS[name]
