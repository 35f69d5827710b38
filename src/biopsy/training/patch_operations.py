"""Operations on a batch of patches, each patch with its own parameters: warp, flip, stain, blur, erasing.

Parameters are on the CPU and are sent to the device of the batch without synchronising.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from biopsy.slide_io.stain import STAINS


def affine_matrix(
    *,
    rotation_deg: Tensor,
    shift_x_px: Tensor,
    shift_y_px: Tensor,
    shear_deg: Tensor,
    zoom_x: Tensor,
    zoom_y: Tensor,
) -> Tensor:
    """Compose rotation, shift, shear and zoom in that order, as in Keras.

    All arguments are ``(B,)``. The matrix maps a pixel of the *result* to its position in the source, both
    ``(x, y)`` from the centre: a zoom below 1 magnifies.

    Returns:
        ``(B, 2, 3)``: the linear part and the shift in pixels.
    """
    angle, shear = torch.deg2rad(rotation_deg), torch.deg2rad(shear_deg)
    zeros, ones = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    shearing = _matrices(ones, -shear.sin(), zeros, shear.cos())
    zooming = _matrices(zoom_x, zeros, zeros, zoom_y)
    shift = rotation @ torch.stack([shift_x_px, shift_y_px], dim=1)[:, :, None]
    return torch.cat([rotation @ shearing @ zooming, shift], dim=2)


def warp(batch: Tensor, matrix: Tensor) -> Tensor:
    """Resample a batch by one matrix of :func:`affine_matrix` per patch: bilinear, with border padding."""
    height, width = batch.shape[2:]
    half = torch.tensor([width / 2, height / 2, 1.0], dtype=matrix.dtype)
    theta = matrix * half / half[:2, None]  # pixels from the centre -> grid_sample's -1 to 1
    theta = send(theta.to(batch.dtype), batch)
    grid = _make_grid(theta, height, width)
    return functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)


def _make_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Compute ``affine_grid`` (``align_corners=False``), which takes twice as long on a CPU."""

    def centres(n: int) -> Tensor:
        return torch.linspace(-1, 1, n, device=theta.device, dtype=theta.dtype) * (n - 1) / n

    to_x, to_y, shift = theta[:, :, :, None, None].unbind(2)
    return (to_x * centres(width) + to_y * centres(height)[:, None] + shift).permute(0, 2, 3, 1)


def move_pixels(batch: Tensor, move: Tensor) -> Tensor:
    """Flip and rotate each patch by multiples of 90 degrees.

    Args:
        batch: ``(B, C, H, W)``; square if a patch is rotated by 90 or 270 degrees.
        move: ``(B,)`` on the CPU, ``4 * rot90 + 2 * flip_horizontal + flip_vertical``.
    """
    n, channels, height, width = batch.shape
    first = torch.arange(n, device=batch.device)[:, None] * height * width
    sources = _list_sources(height, width, batch.device)[send(move, batch)] + first
    pixels = batch.permute(0, 2, 3, 1).reshape(n * height * width, channels)
    moved = pixels.index_select(0, sources.flatten())
    return moved.view(n, height, width, channels).permute(0, 3, 1, 2)


def change_stain(batch: Tensor, *, scale: Tensor, offset: Tensor) -> Tensor:
    """Scale and offset the amounts of haematoxylin and eosin, keeping the residual.

    Args:
        batch: ``(B, 3, H, W)`` RGB in 0-1.
        scale: ``(B, 2)``, factors of haematoxylin and eosin.
        offset: ``(B, 2)``, added to their amounts (see ``slide_io.stain.separate_stains``).
    """
    n = len(batch)
    stains = torch.from_numpy(STAINS)
    scales = torch.cat([scale.double(), torch.ones(n, 1, dtype=torch.float64)], dim=1)
    change = torch.linalg.inv(stains) @ torch.diag_embed(scales) @ stains
    add = (offset.double() @ stains[:2])[:, None]
    change, add = send(change.to(batch.dtype), batch), send(add.to(batch.dtype), batch)
    # 255 steps and one: the scale of separate_stains, on which black has a density too
    transmitted = (batch.permute(0, 2, 3, 1).reshape(n, -1, 3) * 255 + 1) / 256
    changed = torch.baddbmm(add, transmitted.log10_().neg_(), change).neg_()
    rgb = ((10**changed) * 256 - 1).div_(255).clamp_(0, 1)
    return rgb.view(n, *batch.shape[2:], 3).permute(0, 3, 1, 2)


def blur(batch: Tensor, sigma_px: Tensor) -> Tensor:
    """Blur each patch with a Gaussian; the weights of the pixels within the patch sum to 1.

    Args:
        batch: ``(B, C, H, W)``.
        sigma_px: Standard deviations ``(B,)`` in pixels; 0 leaves a patch as it is.
    """
    sigma_px = send(sigma_px, batch)
    down, across = (_gaussian_weights(length, sigma_px) for length in batch.shape[2:])
    blurred = torch.einsum("byi,bcij,bxj->bcyx", down, batch, across)
    return blurred.contiguous(memory_format=torch.channels_last)


def _gaussian_weights(length: int, sigma_px: Tensor) -> Tensor:
    """Return the weight of each pixel of a line for each other, ``(B, length, length)`` float32."""
    pixels = torch.arange(length, device=sigma_px.device)
    distance = pixels[:, None] - pixels
    precision = 0.5 / sigma_px.float().clamp(min=1e-3) ** 2
    return torch.softmax(-precision[:, None, None] * distance**2, dim=2)


def erase_squares(batch: Tensor, *, centre: Tensor, side: float) -> Tensor:
    """Set a square of each patch to zero; the part of a square beyond the border is ignored.

    Args:
        batch: ``(B, C, H, W)``.
        centre: Centre of the square ``(B, 2)``, down and across, as fractions of height and width.
        side: Side of the square, as a fraction of the patch's side.
    """
    inside = []
    for place, length in zip(centre.T, batch.shape[2:], strict=True):
        distance = (torch.arange(length) + 0.5) / length - place[:, None]
        inside.append(send(distance.abs() < side / 2, batch))
    return batch.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def send(draws: Tensor, batch: Tensor) -> Tensor:
    """Move values to the device of a batch without synchronising."""
    if batch.device.type == "cuda":
        return draws.pin_memory().to(batch.device, non_blocking=True)
    return draws.to(batch.device)


@lru_cache(maxsize=16)
def _list_sources(height: int, width: int, device: torch.device) -> Tensor:
    """Return, for each of the 16 moves, the source of every pixel: ``(16, H * W)``; 4 where not square."""
    grid = torch.arange(height * width).view(height, width)
    sources = []
    for turns in range(4 if height == width else 1):
        for flips in ([], [0], [1], [0, 1]):
            sources.append(torch.rot90(grid, turns).flip(flips).flatten())
    return torch.stack(sources).to(device)


@lru_cache(maxsize=1)
def move_matrices() -> Tensor:
    """Return `move_pixels`'s moves as matrices ``(16, 2, 2)`` about the centre, from result to source."""
    matrices = []
    for turns in range(4):
        angle = turns * math.pi / 2
        cos, sin = round(math.cos(angle)), round(math.sin(angle))
        turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        for across, down in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            matrices.append(turn @ torch.diag(torch.tensor([across, down], dtype=torch.float64)))
    return torch.stack(matrices)
