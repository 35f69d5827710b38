"""Random changes of training patches: a recipe's augmentation, and a transform of one's own.

*Augmentation* changes a whole batch at once, each patch with its own random numbers, on its device. Rotation,
shift, shear and zoom are composed as Keras's ``ImageDataGenerator`` composes them; flips and quarter turns
move pixels exactly; the stain jitter scales and offsets the amounts of haematoxylin and eosin; RandAugment
and blur come last, and cutout when the batch is normalised. All draws come from a CPU generator, so every
device sees the same ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from biopsy.core.errors import RecipeError
from biopsy.recipes.schema import Augmentation
from biopsy.training.draws import Draws
from biopsy.training.patch_operations import (
    affine_matrix,
    blur,
    change_stain,
    erase_squares,
    move_matrices,
    move_pixels,
    warp,
)
from biopsy.training.rand_augment import rand_augment


def augment(settings: Augmentation, batch: Tensor, draws: Draws) -> Tensor:
    """Augment every patch of a batch independently, within the ranges of a recipe.

    Args:
        batch: ``(B, 3, H, W)`` float RGB in 0-1, on any device.
        draws: Random numbers of its patches.

    Returns:
        A new batch, or the same one where nothing is to be done.
    """
    warped = bool(settings.rotation_deg or settings.zoom or settings.shift or settings.shear_deg)
    moved = settings.flip_horizontal or settings.flip_vertical or settings.rot90
    if settings.rot90 and batch.shape[2] != batch.shape[3]:
        raise RecipeError(f"rot90 needs square patches, these are {tuple(batch.shape[2:])}", "data")
    move = _draw_moves(settings, draws) if moved else torch.zeros(len(batch), dtype=torch.long)
    if warped:
        matrix = _draw_matrix(settings, batch.shape[2:], draws)
        matrix[:, :, :2] = matrix[:, :, :2] @ move_matrices()[move]
        batch = warp(batch, matrix)
    elif moved:
        batch = move_pixels(batch, move)
    if settings.hed_jitter or settings.hed_offset:
        change = draws.uniform_sets(2, 2) * 2 - 1
        scale, offset = 1 + change[0] * settings.hed_jitter, change[1] * settings.hed_offset
        batch = change_stain(batch, scale=scale, offset=offset)
    if settings.rand_augment_n:
        batch = rand_augment(settings, batch, draws)
    if settings.blur_px:
        batch = blur(batch, draws.uniform() * settings.blur_px)
    return batch


def cut_out(settings: Augmentation, batch: Tensor, draws: Draws) -> Tensor:
    """Set a square of every patch to zero, around a random place in the patch (DeVries & Taylor 2017).

    Args:
        batch: ``(B, 3, H, W)``, normalised: zero is the mean colour.
        draws: Random numbers of its patches.
    """
    if not settings.cutout:
        return batch
    return erase_squares(batch, centre=draws.uniform(2), side=settings.cutout)


def _draw_moves(settings: Augmentation, draws: Draws) -> Tensor:
    coins = draws.uniform_sets(3)
    across = (coins[0] < 0.5) & settings.flip_horizontal
    down = (coins[1] < 0.5) & settings.flip_vertical
    turns = (coins[2] * 4).long() * settings.rot90
    return turns * 4 + across * 2 + down


def _draw_matrix(settings: Augmentation, shape: torch.Size, draws: Draws) -> Tensor:
    height, width = shape
    draw = draws.uniform_sets(6, dtype=torch.float64) * 2 - 1
    return affine_matrix(
        rotation_deg=draw[0] * settings.rotation_deg,
        shift_x_px=draw[1] * settings.shift * width,
        shift_y_px=draw[2] * settings.shift * height,
        shear_deg=draw[3] * settings.shear_deg,
        zoom_x=1 + draw[4] * settings.zoom,
        zoom_y=1 + draw[5] * settings.zoom,
    )


Transform = Callable[[Tensor], Tensor]
"""Takes a batch ``(B, 3, input_px, input_px)``, float32 RGB in 0-1; keeps shape and type."""


def apply_transform(transform: Transform, batch: Tensor, seed: int) -> Tensor:
    """Apply a transform to a batch, with PyTorch's random state set by a seed.

    A transform of torchvision.transforms.v2 draws once per call, so it is called for each patch; anything
    else takes the whole batch.

    Raises:
        RecipeError: If shape or type of the batch are changed.
    """
    with torch.random.fork_rng(devices=[batch.device] if batch.is_cuda else []):
        torch.manual_seed(seed)
        if not _is_v2(transform):
            return _require_same(transform(batch), batch)
        return torch.stack([_require_same(transform(patch), patch) for patch in batch])


def check_transform(transform: Transform, input_px: int) -> None:
    """Check a transform on a batch.

    Raises:
        RecipeError: If it changes shape or type of a batch.
    """
    apply_transform(transform, torch.full((2, 3, input_px, input_px), 0.5), seed=0)


def describe_transform(transform: Transform) -> str:
    """Return the description of a transform: its settings, or the name of the function."""
    if isinstance(transform, torch.nn.Module):
        return " ".join(repr(transform).split())
    return f"{transform.__module__}.{getattr(transform, '__qualname__', type(transform).__qualname__)}"


def _is_v2(transform: Transform) -> bool:
    from torchvision.transforms import v2

    return isinstance(transform, v2.Transform)


def _require_same(changed: object, before: Tensor) -> Tensor:
    if not isinstance(changed, Tensor):
        raise RecipeError(
            f"transform must return a tensor; it returned {type(changed).__name__}", "transform"
        )
    if changed.shape != before.shape or changed.dtype != before.dtype:
        raise RecipeError(
            f"transform must keep shape and type, {tuple(before.shape)} {before.dtype}; it returned "
            f"{tuple(changed.shape)} {changed.dtype}: set the size with preprocessing.input_px, and leave "
            "normalisation to the recipe",
            "transform",
        )
    return changed
