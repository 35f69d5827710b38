"""Ways to ask a network what it looks at: one function each, in one register, a file for each family."""

from biopsy.evaluation.explanation.methods.gradients import input_gradient
from biopsy.evaluation.explanation.methods.layers import (
    find_first_layer,
    find_last_maps,
    find_layer,
    has_convolution,
)
from biopsy.evaluation.explanation.methods.registry import (
    METHODS,
    ExplanationRequest,
    Method,
    find_method,
    register_method,
)

__all__ = [
    "METHODS",
    "ExplanationRequest",
    "Method",
    "find_first_layer",
    "find_last_maps",
    "find_layer",
    "find_method",
    "has_convolution",
    "input_gradient",
    "register_method",
]
