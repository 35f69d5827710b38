"""Baruah's network (2019): four convolutions without padding, two dense layers.

Its post gives every class a sigmoid of its own; the logits are before it.
"""

from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.models.networks.layers import Dropout, FlattenChannelsLast, require_size
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.stages import SequentialNetwork

N_POOLED = 2  # a pooling follows each of the first two convolutions


@register_network
def baruah(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    filters: int = 32,
    n_convolutions: int = 4,
    dense: int = 128,
    n_dense: int = 2,
    dropout: float = 0.5,
    dropout_last: bool = False,
) -> SequentialNetwork:
    """Convolutions of ``filters``, twice as many with each, then dense layers of equal width.

    What the author left open are parameters: the number of filters and of layers. A dropout stands before
    each dense layer, as in the post's code.

    Args:
        n_classes: Number of logits.
        input_px: Side of the square input, or its ``(width, height)``; the post has 50.
        n_convolutions: Two or more.
        dense: Width of the dense layers.
        n_dense: One or more.
        dropout: Share dropped.
        dropout_last: Drop after the last dense layer too, so that a dropout follows each: as the post's
            text suggests and its code does not do.
    """
    if n_convolutions < N_POOLED or n_dense < 1:
        raise RecipeError(
            f"baruah with n_convolutions={n_convolutions!r} and n_dense={n_dense!r}: "
            f"it needs at least {N_POOLED} convolutions and 1 dense layer"
        )
    width, height = require_size("baruah", input_px, 10 + 8 * (n_convolutions - N_POOLED))
    layers: dict[str, nn.Module] = {}
    channels = 3
    for number in range(1, n_convolutions + 1):
        layers[f"conv{number}"] = nn.Conv2d(channels, filters * 2 ** (number - 1), 3)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        channels, width, height = filters * 2 ** (number - 1), width - 2, height - 2
        if number <= N_POOLED:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            width, height = width // 2, height // 2
    layers["flatten"] = FlattenChannelsLast()
    n_features = channels * width * height
    for number in range(1, n_dense + 1):
        layers[f"drop{number}"] = Dropout(dropout)
        layers[f"dense{number}"] = nn.Linear(n_features, dense)
        layers[f"dense{number}_relu"] = nn.ReLU(inplace=True)
        n_features = dense
    if dropout_last:
        layers[f"drop{n_dense + 1}"] = Dropout(dropout)
    stages = {f"stage{number}": f"conv{number}" for number in range(1, n_convolutions + 1)}
    return SequentialNetwork(layers, stages | {"dense": "flatten"}, nn.Linear(dense, n_classes))
