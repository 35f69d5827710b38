"""Layers shared by the networks, and the initial weights Keras would give them."""

import numpy as np
import torch
from torch import Tensor, nn

from biopsy.seeds import derive

# Keras: BatchNormalization(epsilon=1e-3, momentum=.99); PyTorch counts the momentum from the other end
BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01


class SeparableConv2d(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels; "same" padding.

    Keras's ``SeparableConv2D``: the first part has no bias, the second has one.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class FlattenChannelsLast(nn.Module):
    """Flatten ``(B, C, H, W)`` in the order height, width, channel.

    This is Keras's order, so a dense layer's weights carry over by transposing alone; for a batch in
    ``channels_last`` memory it copies nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class Dropout(nn.Dropout):
    """Dropout whose mask comes from a fast generator on the CPU, where PyTorch's takes a sixth of a step.

    The generator is seeded by one draw from PyTorch's own state, so a seed governs it as usual. The share
    dropped is ``p`` to within 1 / 65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or self.p == 0:
            return super().forward(x)
        draws = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())).random_raw(
            -(-x.numel() // 4)
        )
        kept = torch.from_numpy(draws.view(np.uint16)[: x.numel()] >= round(self.p * 65536))
        mask = torch.empty_like(x).copy_(kept.view(x.permute(0, *range(2, x.dim()), 1).shape).movedim(-1, 1))
        return x * mask.mul_(1 / (1 - self.p))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Give a batch normalisation of images as Keras has it."""
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)


def initialise(network: nn.Module, seed: int) -> None:
    """Set all weights as Keras starts them: Glorot-uniform kernels, zero biases, ones in normalisations.

    Each layer has its own generator, named after it: a layer added to a network moves no other's weights.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            generator = torch.Generator().manual_seed(derive(seed, "initial weights", name))
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
