"""A network."""

import torch
from torch import nn

from biopsy.models.networks import register_network


class Mean(nn.Module):
    def __init__(self, n_classes: int, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, n_classes)

    def features(self, patches: torch.Tensor) -> torch.Tensor:
        return self.body(patches)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(patches))


@register_network
def example_mean(*, n_classes: int, input_px: int, channels: int = 4) -> nn.Module:
    return Mean(n_classes, channels)
