"""Ways to ask a network what it looks at: one function each, in one register, a file for each family."""

from biopsy.judging.methods import gradients, occlusion, through_layers
from biopsy.judging.methods.gradients import input_gradient
from biopsy.judging.methods.layers import find_first_layer, find_last_maps, find_layer, has_convolution
from biopsy.judging.methods.register import METHODS, Method, Question, find_method, register_method

__all__ = [
    "METHODS",
    "Method",
    "Question",
    "find_first_layer",
    "find_last_maps",
    "find_layer",
    "find_method",
    "gradients",
    "has_convolution",
    "input_gradient",
    "occlusion",
    "register_method",
    "through_layers",
]
