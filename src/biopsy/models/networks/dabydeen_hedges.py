"""The network of Dabydeen and Hedges: stages of one convolution and a pooling, and a small dense layer."""

from collections.abc import Sequence

from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.models.networks.layers import Dropout, FlattenChannelsLast, require_size
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.stages import SequentialNetwork


@register_network
def dabydeen_hedges(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    widths: Sequence[int] = (64, 128, 128, 128, 128),
    dense: int = 64,
    dropout: float = 0.5,
) -> SequentialNetwork:
    """Stages of convolution ("same" padding), ReLU and max-pooling, then a dense layer with dropout.

    Args:
        n_classes: Number of logits.
        input_px: Side of the square input, or its ``(width, height)``.
        widths: Filters of each stage; the authors' first network had three stages.
        dense: Width of the dense layer.
        dropout: Share of it that is dropped; not stated in the post.
    """
    if not widths:
        raise RecipeError("dabydeen_hedges with widths=[] has no stage: give the filters of one or more")
    width, height = require_size("dabydeen_hedges", input_px, 2 ** len(widths))
    layers: dict[str, nn.Module] = {}
    channels = 3
    for number, out_channels in enumerate(widths, start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, out_channels, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels, width, height = out_channels, width // 2, height // 2
    layers["flatten"] = FlattenChannelsLast()
    layers["dense"] = nn.Linear(channels * width * height, dense)
    layers["dense_relu"] = nn.ReLU(inplace=True)
    stages = {f"stage{number}": f"conv{number}" for number in range(1, len(widths) + 1)}
    return SequentialNetwork(
        layers, stages | {"dense": "flatten"}, nn.Linear(dense, n_classes), Dropout(dropout)
    )
