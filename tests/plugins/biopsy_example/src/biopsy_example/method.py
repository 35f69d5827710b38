"""An explanation method."""

from torch import Tensor

from biopsy.evaluation.saliency.methods import ExplanationRequest, register_method
from biopsy.evaluation.saliency.methods.gradients import input_gradient


@register_method(
    "gradient times input",
    shows="to first order, what each pixel adds to the score",
    caveat="what pixels do together",
    signed=True,
)
def example_gradient_times_input(asked: ExplanationRequest) -> Tensor:
    gradient = input_gradient(asked.network, asked.batch, asked.class_index)
    return (gradient * asked.batch).sum(dim=1, keepdim=True)
