"""Shared layers, and initial weights as in Keras."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from biopsy.core.errors import RecipeError
from biopsy.core.seeds import derive

# Keras's BatchNormalization(epsilon=1e-3, momentum=.99); PyTorch's momentum is 1 minus Keras's
KERAS_EPS, KERAS_MOMENTUM = 1e-3, 0.01


def size_of(input_px: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``(width, height)`` of an input, given as a size or the side of a square."""
    width, height = (input_px, input_px) if isinstance(input_px, int) else input_px
    return width, height


def require_size(network: str, input_px: int | tuple[int, int], least_px: int) -> tuple[int, int]:
    """Return ``(width, height)`` of an input that is large enough for the pooling layers."""
    if min(size_of(input_px)) < least_px:
        raise RecipeError(
            f"{network} downsamples its input: input_px={input_px!r} must be at least {least_px}", "value"
        )
    return size_of(input_px)


class SeparableConv2d(nn.Module):
    """Depthwise separable 3x3 convolution with "same" padding, as Keras's ``SeparableConv2D``.

    Only the pointwise convolution has a bias.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class FlattenChannelsLast(nn.Module):
    """Flatten ``(B, C, H, W)`` in the order height, width, channel.

    This is Keras's order, so that weights of dense layers only need transposing; a batch in
    ``channels_last`` memory is not copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class OneLogit(nn.Linear):
    """A single logit ``z`` of class 1, returned as two logits ``(-z / 2, z / 2)``.

    Their softmax is the sigmoid of ``z``, their cross-entropy its binary cross-entropy.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = super().forward(x) / 2
        return torch.cat([-half, half], dim=1)


class Dropout(nn.Dropout):
    """Dropout with a fast random generator on the CPU (PyTorch's takes a sixth of a training step).

    The generator is seeded from PyTorch's random state. The dropped fraction is ``p`` within 1 / 65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or self.p == 0:
            return super().forward(x)
        draws = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())).random_raw(
            -(-x.numel() // 4)
        )
        keep = torch.from_numpy(draws.view(np.uint16)[: x.numel()] >= round(self.p * 65536))
        mask = torch.empty_like(x).copy_(keep.view(x.permute(0, *range(2, x.dim()), 1).shape).movedim(-1, 1))
        return x * mask.mul_(1 / (1 - self.p))


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation of images, numerically exact in float32 on the CPU.

    PyTorch sums a channels-last batch sequentially, with errors of 1e-4 in the first layer's outputs and 2 %
    in the gradient for CancerNet; ``Tensor.sum`` uses pairwise summation.
    """

    initial_weight: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        exact = self.training and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if not exact or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        out, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
        n = x.numel() // x.shape[1]
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        return out


class _Normalise(torch.autograd.Function):
    """Normalise ``(B, C, H, W)`` in channels-last memory by mean and variance of the batch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _as_rows(x)
        mean = rows.sum(0) / len(rows)
        var = ((rows * rows).sum(0) / len(rows) - mean.square()).clamp_(min=0)
        inverse = (var + eps).rsqrt()
        scale = weight * inverse
        out = torch.addcmul(bias - mean * scale, rows, scale)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, var)
        return _as_images(out, x), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        rows, grad_rows = _as_rows(x), _as_rows(grad)
        grad_bias = grad_rows.sum(0)
        grad_weight = ((grad_rows * rows).sum(0) - mean * grad_bias) * inverse
        scale = weight * inverse
        slope = -scale * inverse * grad_weight / len(rows)
        grad_x = torch.addcmul(-scale * grad_bias / len(rows) - slope * mean, rows, slope)
        return _as_images(grad_x.addcmul_(grad_rows, scale), x), grad_weight, grad_bias, None


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation of features with the biased running variance, as in Keras.

    PyTorch uses the unbiased variance, 3 % larger for a batch of 32. (For images, TensorFlow does too.)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        var, mean = torch.var_mean(x.detach().to(self.running_var.dtype), dim=0, correction=0)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        return functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def _as_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    n, channels, height, width = like.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


def initialise(network: nn.Module, seed: int) -> None:
    """Initialise weights as in Keras: Glorot-uniform kernels, zero biases, unit scale in normalisations.

    An attribute ``initial_weight`` of a normalisation overrides its scale. Each layer has its own random
    generator, derived from its name, so that adding a layer does not change the others.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            generator = torch.Generator().manual_seed(derive(seed, "initial weights", name))
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.constant_(module.weight, getattr(module, "initial_weight", 1.0))
            nn.init.zeros_(module.bias)
