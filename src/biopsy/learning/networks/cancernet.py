"""CancerNet (PyImageSearch 2019, revised 2020): separable convolutions and one wide dense layer."""

from collections import OrderedDict

from torch import Tensor, nn

from biopsy.errors import RecipeError
from biopsy.learning.networks.layers import (
    KERAS_EPS,
    KERAS_MOMENTUM,
    BatchNorm1d,
    BatchNorm2d,
    Dropout,
    FlattenChannelsLast,
    SeparableConv2d,
)
from biopsy.learning.networks.registry import register_network

# per stage: channels of each of its convolutions
STAGES = ((32,), (64, 64), (128, 128, 128))


class CancerNet(nn.Module):
    """Three stages of separable convolution, ReLU and batch normalisation, then dense 256 and the classes."""

    def __init__(
        self,
        n_classes: int,
        width: int,
        height: int,
        channels: int,
        stage_dropout: float,
        dense_dropout: float,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, stage_channels in enumerate(STAGES, start=1):
            for block, out_channels in enumerate(stage_channels, start=1):
                layers[f"conv{stage}_{block}"] = SeparableConv2d(channels, out_channels)
                layers[f"relu{stage}_{block}"] = nn.ReLU(inplace=True)
                layers[f"norm{stage}_{block}"] = BatchNorm2d(
                    out_channels, eps=KERAS_EPS, momentum=KERAS_MOMENTUM
                )
                channels = out_channels
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            layers[f"drop{stage}"] = Dropout(stage_dropout)
            width, height = width // 2, height // 2
        layers["flatten"] = FlattenChannelsLast()
        layers["dense"] = nn.Linear(channels * width * height, 256)
        layers["relu"] = nn.ReLU(inplace=True)
        layers["norm"] = BatchNorm1d(256, eps=KERAS_EPS, momentum=KERAS_MOMENTUM)
        self.body = nn.Sequential(layers)
        self.drop = Dropout(dense_dropout)
        self.head = nn.Linear(256, n_classes)

    def features(self, patches: Tensor) -> Tensor:
        return self.body(patches)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.drop(self.features(patches)))


@register_network
def cancernet(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    channels: int = 3,
    stage_dropout: float = 0.25,
    dense_dropout: float = 0.5,
) -> CancerNet:
    """Build CancerNet for any input of 8 px or more a side, any depth and any number of classes."""
    width, height = (input_px, input_px) if isinstance(input_px, int) else input_px
    if min(width, height) < 8:
        raise RecipeError(f"cancernet halves its input three times: input_px={input_px!r} must be at least 8")
    return CancerNet(n_classes, width, height, channels, stage_dropout, dense_dropout)
