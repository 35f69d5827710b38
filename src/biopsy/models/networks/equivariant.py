"""A residual network equivariant to the symmetries of a square (Cohen and Welling 2016; Veeling et al. 2018).

Every filter is applied in its eight rotations and reflections (the group D4; with translations, p4m), so that
a layer has eight maps per channel. If the patch is turned, each map is turned and the eight exchange places;
their mean, and so the logits, stay the same. Maps are ordered by symmetry, then channel: map ``g * C + c``.

Layers with stride 2 are equivariant only if their windows lie symmetrically, so that the size of their
kernels depends on whether the side of their input is even or odd.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from biopsy.core.errors import RecipeError
from biopsy.models.networks.layers import BatchNorm2d, require_size
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.residual import STAGE_WIDTHS, ResidualBlock, ResidualNet

N_SYMMETRIES = 8


def transform(image: np.ndarray, symmetry: int) -> np.ndarray:
    """Return an image ``(H, W)`` after one of eight symmetries: reflected (from 4 on), then rotated."""
    return np.rot90(image if symmetry < 4 else image[:, ::-1], symmetry % 4)


def relative_symmetries() -> np.ndarray:
    """Return ``(8, 8)``: in row ``g`` and column ``h`` the symmetry that followed by ``g`` is ``h``."""
    corners = np.arange(4).reshape(2, 2)
    number = {transform(corners, symmetry).tobytes(): symmetry for symmetry in range(N_SYMMETRIES)}
    products = [
        [number[transform(transform(corners, first), then).tobytes()] for first in range(N_SYMMETRIES)]
        for then in range(N_SYMMETRIES)
    ]
    return np.argsort(products, axis=1)


class SymmetricConv2d(nn.Conv2d):
    """A convolution without bias by the eight rotations and reflections of each filter.

    It is the lifting convolution of an image, and the group convolution of the maps of another such layer,
    whose order also changes with the symmetry. Its weights are ``(out_channels, maps of the input, k, k)``.

    Args:
        in_channels: Channels of the input; it has eight maps for each, unless it is an image.
        out_channels: Channels of the output, each of eight maps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        from_image: bool = False,
    ) -> None:
        self.n_orders = 1 if from_image else N_SYMMETRIES
        super().__init__(self.n_orders * in_channels, out_channels, kernel_size, stride, padding, bias=False)
        places = np.arange(kernel_size**2).reshape(kernel_size, kernel_size)
        turned = np.stack([transform(places, symmetry).ravel() for symmetry in range(N_SYMMETRIES)])
        orders = np.zeros((N_SYMMETRIES, 1), np.int64) if from_image else relative_symmetries()
        index = (orders[:, :, None] * kernel_size**2 + turned[:, None]).reshape(N_SYMMETRIES, -1)
        shift = np.arange(N_SYMMETRIES)[:, None] * index.shape[1]
        self.index = nn.Buffer(torch.from_numpy(index.ravel()), persistent=False)
        self.inverse = nn.Buffer(
            torch.from_numpy((np.argsort(index, axis=1) + shift).ravel()), persistent=False
        )

    def filters(self) -> Tensor:
        """Return the weights of an ordinary convolution, ``(8 * out_channels, maps of the input, k, k)``."""
        k = self.kernel_size[0]
        rows = self.weight.view(self.out_channels, self.n_orders, -1, k * k).permute(1, 3, 0, 2).flatten(0, 1)
        if self.training:
            rows = _TakeRows.apply(rows, self.index, self.inverse)
        else:  # traced for export
            rows = rows.index_select(0, self.index)
        turned = rows.view(N_SYMMETRIES, self.n_orders, k * k, self.out_channels, -1).permute(0, 3, 1, 4, 2)
        return turned.reshape(N_SYMMETRIES * self.out_channels, self.in_channels, k, k)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.filters(), None, self.stride, self.padding)


class _TakeRows(torch.autograd.Function):
    """``rows[index]`` for an index of eight permutations of the rows.

    PyTorch's own gradient adds row by row, slowly, and on GPUs in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (N_SYMMETRIES, -1)).sum(0), None, None


class SymmetricBatchNorm2d(BatchNorm2d):
    """Batch normalisation with one mean, variance, weight and bias for the eight maps of a channel."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            assert self.running_mean is not None and self.running_var is not None
            parameters = (self.running_mean, self.running_var, self.weight, self.bias)
            mean, var, weight, bias = (values.repeat(N_SYMMETRIES) for values in parameters)
            return functional.batch_norm(x, mean, var, weight, bias, eps=self.eps)
        n, maps, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(n, height, -1, maps // N_SYMMETRIES)  # a view in channels_last
        out = super().forward(pixels.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1).reshape(n, height, width, maps).permute(0, 3, 1, 2)


class SymmetricPool(nn.Module):
    """Mean of each channel over pixels and symmetries: ``(B, 8 * C, H, W)`` to ``(B, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).unflatten(1, (N_SYMMETRIES, -1)).mean(dim=1)


def _halve(in_channels: int, out_channels: int, side: int, *, from_image: bool = False) -> SymmetricConv2d:
    """Return a convolution with stride 2 whose windows are symmetric on an input of that side."""
    return SymmetricConv2d(in_channels, out_channels, 4 - side % 2, 2, 1, from_image=from_image)


def _blocks(channels: list[int], side: int) -> Iterator[ResidualBlock]:
    for stage, (before, after) in enumerate(pairwise(channels)):
        conv, layers = SymmetricConv2d(before, after, 3, padding=1), []
        if stage:
            odd = side % 2
            conv = _halve(before, after, side)
            layers = [
                nn.AvgPool2d(2 + odd, 2, odd, count_include_pad=False),
                SymmetricConv2d(before, after, 1),
                SymmetricBatchNorm2d(after),
            ]
            side = -(-side // 2)
        yield ResidualBlock(
            conv,
            SymmetricBatchNorm2d(after),
            SymmetricConv2d(after, after, 3, padding=1),
            SymmetricBatchNorm2d(after),
            nn.Sequential(*layers) if layers else nn.Identity(),
        )


@register_network
def residual_p4m(
    *, n_classes: int, input_px: int | tuple[int, int], base_channels: int = 24, dropout: float = 0.0
) -> ResidualNet:
    """Build `residual` of equivariant layers: logits are the same in all symmetries of a patch.

    ``base_channels`` counts maps: at the same number there are about as many operations as in `residual`, and
    an eighth of the weights. 24 gives 52,000 parameters; 64 gives 371,000, nearly as many as `residual`,
    for about five times its time.
    """
    width, height = require_size("residual_p4m", input_px, 16)
    if width != height:
        raise RecipeError(f"residual_p4m needs a square input: found input_px={width}x{height}", "value")
    if base_channels < N_SYMMETRIES or base_channels % N_SYMMETRIES:
        raise RecipeError(
            f"residual_p4m has {N_SYMMETRIES} maps per channel: base_channels={base_channels} must be a "
            f"multiple of {N_SYMMETRIES}",
            "value",
        )
    base = base_channels // N_SYMMETRIES
    stem = nn.Sequential(_halve(3, base, width, from_image=True), SymmetricBatchNorm2d(base), nn.ReLU())
    channels = [base, *(base * factor for factor in STAGE_WIDTHS)]
    blocks = _blocks(channels, -(-width // 2))
    return ResidualNet(stem, blocks, SymmetricPool(), dropout, nn.Linear(channels[-1], n_classes))
