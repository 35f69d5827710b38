"""CancerNet (PyImageSearch 2019, revised 2020): separable convolutions and one wide dense layer."""

from torch import nn

from biopsy.models.networks.layers import (
    KERAS_EPS,
    KERAS_MOMENTUM,
    BatchNorm1d,
    BatchNorm2d,
    Dropout,
    FlattenChannelsLast,
    SeparableConv2d,
    require_size,
)
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.stages import SequentialNetwork

# per stage: channels of each of its convolutions
CHANNELS = ((32,), (64, 64), (128, 128, 128))


@register_network
def cancernet(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    channels: int = 3,
    stage_dropout: float = 0.25,
    dense_dropout: float = 0.5,
) -> SequentialNetwork:
    """Three stages of separable convolution, ReLU and batch normalisation, then dense 256 and the classes.

    Takes any input of 8 px or more a side, any depth and any number of classes.
    """
    width, height = require_size("cancernet", input_px, 8)
    layers: dict[str, nn.Module] = {}
    for stage, stage_channels in enumerate(CHANNELS, start=1):
        for block, out_channels in enumerate(stage_channels, start=1):
            layers[f"conv{stage}_{block}"] = SeparableConv2d(channels, out_channels)
            layers[f"relu{stage}_{block}"] = nn.ReLU(inplace=True)
            layers[f"norm{stage}_{block}"] = BatchNorm2d(out_channels, eps=KERAS_EPS, momentum=KERAS_MOMENTUM)
            channels = out_channels
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
        layers[f"drop{stage}"] = Dropout(stage_dropout)
        width, height = width // 2, height // 2
    layers["flatten"] = FlattenChannelsLast()
    layers["dense"] = nn.Linear(channels * width * height, 256)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["norm"] = BatchNorm1d(256, eps=KERAS_EPS, momentum=KERAS_MOMENTUM)
    stages = {"stage1": "conv1_1", "stage2": "conv2_1", "stage3": "conv3_1", "dense": "flatten"}
    return SequentialNetwork(layers, stages, nn.Linear(256, n_classes), Dropout(dense_dropout))
