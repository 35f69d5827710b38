"""Random changes of a whole batch at once, each patch its own draw, on the device it lies on.

Rotation, shift, shear and zoom are composed as Keras's ``ImageDataGenerator`` composes them; flips and
quarter turns move pixels exactly; the stain jitter scales and offsets the amounts of haematoxylin and eosin.
All draws come from a CPU generator, so every device sees the same ones.
"""

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.nn import functional

from biopsy.core.errors import RecipeError
from biopsy.recipes.schema import Augmentation
from biopsy.slide_io.stain import STAINS


def augment(settings: Augmentation, batch: Tensor, generator: Generator) -> Tensor:
    """Change every patch of a batch by its own draw from the ranges of a recipe.

    Args:
        settings: Of the recipe; its stain transfer is another module's.
        batch: ``(B, 3, H, W)`` float RGB in 0-1, on any device.
        generator: A CPU generator; the same state gives the same batch.

    Returns:
        A new batch, or the same one where nothing is to be done.
    """
    warped = bool(settings.rotation_deg or settings.zoom or settings.shift or settings.shear_deg)
    moved = settings.flip_horizontal or settings.flip_vertical or settings.rot90
    if settings.rot90 and batch.shape[2] != batch.shape[3]:
        raise RecipeError(f"rot90 needs square patches, these are {tuple(batch.shape[2:])}")
    n = len(batch)
    move = _draw_moves(settings, n, generator) if moved else torch.zeros(n, dtype=torch.long)
    if warped:
        matrix = _draw_matrix(settings, batch, generator)
        matrix[:, :, :2] = matrix[:, :, :2] @ _move_matrices()[move]
        batch = warp(batch, matrix)
    elif moved:
        batch = move_pixels(batch, move)
    if settings.hed_jitter:
        spread = (torch.rand(2, n, 2, generator=generator) * 2 - 1) * settings.hed_jitter
        batch = change_stain(batch, scale=1 + spread[0], offset=spread[1])
    return batch


def _draw_moves(settings: Augmentation, n: int, generator: Generator) -> Tensor:
    coins = torch.rand(3, n, generator=generator)
    across = (coins[0] < 0.5) & settings.flip_horizontal
    down = (coins[1] < 0.5) & settings.flip_vertical
    turns = (coins[2] * 4).long() * settings.rot90
    return turns * 4 + across * 2 + down


def _draw_matrix(settings: Augmentation, batch: Tensor, generator: Generator) -> Tensor:
    n, _, height, width = batch.shape
    draw = torch.rand(6, n, generator=generator, dtype=torch.float64) * 2 - 1
    return affine_matrix(
        rotation_deg=draw[0] * settings.rotation_deg,
        shift_x_px=draw[1] * settings.shift * width,
        shift_y_px=draw[2] * settings.shift * height,
        shear_deg=draw[3] * settings.shear_deg,
        zoom_x=1 + draw[4] * settings.zoom,
        zoom_y=1 + draw[5] * settings.zoom,
    )


def affine_matrix(
    *,
    rotation_deg: Tensor,
    shift_x_px: Tensor,
    shift_y_px: Tensor,
    shear_deg: Tensor,
    zoom_x: Tensor,
    zoom_y: Tensor,
) -> Tensor:
    """Compose rotation, shift, shear and zoom in that order, as Keras does.

    All arguments are ``(B,)``. The matrix leads from a pixel of the *result* to the place in the source that
    it shows, both counted from the centre, x before y: a zoom below 1 magnifies.

    Returns:
        ``(B, 2, 3)``: the linear part and the shift in pixels.
    """
    angle, shear = torch.deg2rad(rotation_deg), torch.deg2rad(shear_deg)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    shearing = _matrices(one, -shear.sin(), zero, shear.cos())
    zooming = _matrices(zoom_x, zero, zero, zoom_y)
    shift = rotation @ torch.stack([shift_x_px, shift_y_px], dim=1)[:, :, None]
    return torch.cat([rotation @ shearing @ zooming, shift], dim=2)


def warp(batch: Tensor, matrix: Tensor) -> Tensor:
    """Resample a batch by one matrix of :func:`affine_matrix` per patch: bilinear, borders continued."""
    height, width = batch.shape[2:]
    half = torch.tensor([width / 2, height / 2, 1.0], dtype=matrix.dtype)
    theta = matrix * half / half[:2, None]  # pixels from the centre -> grid_sample's -1 to 1
    theta = _send(theta.to(batch.dtype), batch)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)


def move_pixels(batch: Tensor, move: Tensor) -> Tensor:
    """Flip and turn each patch without touching a value.

    Args:
        batch: ``(B, C, H, W)``; square where a quarter turn is asked for.
        move: ``(B,)`` on the CPU, ``4 * rot90 + 2 * flip_horizontal + flip_vertical``.
    """
    n, channels, height, width = batch.shape
    places = _move_places(height, width)[move] + torch.arange(n)[:, None] * height * width
    pixels = batch.permute(0, 2, 3, 1).reshape(n * height * width, channels)
    moved = pixels.index_select(0, _send(places.flatten(), batch))
    return moved.view(n, height, width, channels).permute(0, 3, 1, 2)


def change_stain(batch: Tensor, *, scale: Tensor, offset: Tensor) -> Tensor:
    """Scale and offset the amounts of haematoxylin and eosin, leaving what is neither.

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
    change, add = _send(change.to(batch.dtype), batch), _send(add.to(batch.dtype), batch)
    # 255 steps and one: the scale of separate_stains, on which black has a density too
    transmitted = (batch.permute(0, 2, 3, 1).reshape(n, -1, 3) * 255 + 1) / 256
    changed = torch.baddbmm(add, transmitted.log10_().neg_(), change).neg_()
    rgb = ((10**changed) * 256 - 1).div_(255).clamp_(0, 1)
    return rgb.view(n, *batch.shape[2:], 3).permute(0, 3, 1, 2)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _send(draws: Tensor, batch: Tensor) -> Tensor:
    """Move draws to the batch's device without waiting for it."""
    if batch.device.type == "cuda":
        return draws.pin_memory().to(batch.device, non_blocking=True)
    return draws.to(batch.device)


@lru_cache(maxsize=16)
def _move_places(height: int, width: int) -> Tensor:
    """Give, for each of the 16 moves, the source of every pixel: ``(16, H * W)``; 4 where not square."""
    grid = torch.arange(height * width).view(height, width)
    places = []
    for turns in range(4 if height == width else 1):
        for flips in ([], [0], [1], [0, 1]):
            places.append(torch.rot90(grid, turns).flip(flips).flatten())
    return torch.stack(places)


@lru_cache(maxsize=1)
def _move_matrices() -> Tensor:
    """Return the same 16 moves as matrices ``(16, 2, 2)`` about the centre, from result to source."""
    matrices = []
    for turns in range(4):
        angle = turns * math.pi / 2
        cos, sin = round(math.cos(angle)), round(math.sin(angle))
        turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        for across, down in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            matrices.append(turn @ torch.diag(torch.tensor([across, down], dtype=torch.float64)))
    return torch.stack(matrices)
