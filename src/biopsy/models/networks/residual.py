"""A small residual network (after He et al. 2016).

The input may be any size from 16 px, because of global average pooling.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from biopsy.models.networks.layers import BatchNorm2d, Dropout, require_size
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.stages import StagedNetwork

Shortcut = Literal["strided", "pooled"]
STAGE_WIDTHS = (1, 2, 4, 5)
"""Channels of each stage, in multiples of ``base_channels``; weights are below 1 MB in half precision."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(
        self, conv1: nn.Module, norm1: nn.Module, conv2: nn.Module, norm2: BatchNorm2d, shortcut: nn.Module
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv1, norm1
        self.conv2, self.norm2 = conv2, norm2
        self.norm2.initial_weight = 0.0  # a block is initially its shortcut (Goyal et al. 2017)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResidualNet(StagedNetwork):
    """A stem with stride 2, stages of one block, pooling to features, dropout and head."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: Iterable[ResidualBlock],
        pool: nn.Module,
        dropout: float,
        head: nn.Linear,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.pool = pool
        self.drop = Dropout(dropout)
        self.head = head

    def features(self, patches: Tensor) -> Tensor:
        return torch.flatten(self.pool(self.blocks(self.stem(patches))), 1)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.drop(self.features(patches)))

    def stages(self) -> list[tuple[str, nn.Module]]:
        *first, last = self.blocks
        return [
            ("stem", self.stem),
            *((f"stage{number}", block) for number, block in enumerate(first, start=1)),
            (f"stage{len(self.blocks)}", nn.Sequential(last, self.pool, nn.Flatten())),
            ("head", nn.Sequential(self.drop, self.head)),
        ]


def _block(in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> ResidualBlock:
    """Return a block; ``stride=2`` halves the resolution."""
    layers: list[nn.Module] = []
    if in_channels != out_channels or stride != 1:
        pooled = shortcut == "pooled" and stride != 1
        layers = [
            *([nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)] if pooled else []),
            nn.Conv2d(in_channels, out_channels, 1, 1 if pooled else stride, bias=False),
            BatchNorm2d(out_channels),
        ]
    return ResidualBlock(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        BatchNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        BatchNorm2d(out_channels),
        nn.Sequential(*layers) if layers else nn.Identity(),
    )


@register_network
def residual(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    base_channels: int = 24,
    dropout: float = 0.0,
    shortcut: Shortcut = "pooled",
) -> ResidualNet:
    """Build the residual network; ``base_channels=24`` gives about 420,000 parameters.

    Downsampling shortcuts are ``"strided"`` or ``"pooled"`` (average pooling, He et al. 2019).
    """
    require_size("residual", input_px, 16)
    stem = nn.Sequential(
        nn.Conv2d(3, base_channels, 3, stride=2, padding=1, bias=False), BatchNorm2d(base_channels), nn.ReLU()
    )
    channels = [base_channels, *(base_channels * factor for factor in STAGE_WIDTHS)]
    blocks = (
        _block(before, after, 1 if stage == 0 else 2, shortcut)
        for stage, (before, after) in enumerate(pairwise(channels))
    )
    return ResidualNet(stem, blocks, nn.AdaptiveAvgPool2d(1), dropout, nn.Linear(channels[-1], n_classes))
