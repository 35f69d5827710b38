"""A transform of one's own for training patches, beside the named augmentations of a recipe."""

from collections.abc import Callable

import torch
from torch import Tensor

from biopsy.core.errors import RecipeError

Transform = Callable[[Tensor], Tensor]
"""Takes a batch ``(B, 3, input_px, input_px)``, float32 RGB in 0-1; keeps shape and type."""


def apply_transform(transform: Transform, batch: Tensor, seed: int) -> Tensor:
    """Return a batch as a transform makes it, PyTorch's random numbers being those of a seed.

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
    """Try a transform out.

    Raises:
        RecipeError: If it changes shape or type of a batch.
    """
    apply_transform(transform, torch.full((2, 3, input_px, input_px), 0.5), seed=0)


def describe_transform(transform: Transform) -> str:
    """Return what a run records of a transform: its settings, or the name of the function."""
    if isinstance(transform, torch.nn.Module):
        return " ".join(repr(transform).split())
    return f"{transform.__module__}.{getattr(transform, '__qualname__', type(transform).__qualname__)}"


def _is_v2(transform: Transform) -> bool:
    from torchvision.transforms import v2

    return isinstance(transform, v2.Transform)


def _require_same(changed: object, before: Tensor) -> Tensor:
    if not isinstance(changed, Tensor):
        raise RecipeError(f"transform must return a tensor; it returned {type(changed).__name__}")
    if changed.shape != before.shape or changed.dtype != before.dtype:
        raise RecipeError(
            f"transform must keep shape and type, {tuple(before.shape)} {before.dtype}; it returned "
            f"{tuple(changed.shape)} {changed.dtype}: set the size with preprocessing.input_px, and leave "
            "normalisation to the recipe"
        )
    return changed
