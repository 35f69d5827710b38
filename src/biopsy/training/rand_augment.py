"""RandAugment for haematoxylin and eosin (Faryna, van der Laak & Litjens 2021, after Cubuk et al. 2020).

A patch is changed by a number of operations in turn, each drawn independently from `OPERATIONS`, with a level
between 0 and the magnitude. An operation of level 0 changes nothing, equalisation excepted. The operations
and their strengths are those of the authors' code, with these differences:

* Brightness, contrast, colour and sharpness are multiplied by 1 ± .09 level, where the authors have .1 + .18
  level: their level 5 is the identity, and 0 the strongest.
* Hue and saturation change by the level, theirs by the magnitude.
* Haematoxylin and eosin change as optical densities, and the residual stays.
* Translations are a share of the side, equal to theirs in patches of 128 px; shears are about the centre;
  what comes from outside repeats the border, where theirs is grey.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from biopsy.recipes.schema import Augmentation
from biopsy.training.colour_spaces import hsv_to_rgb, rgb_to_hsv
from biopsy.training.draws import Draws
from biopsy.training.patch_operations import change_stain, send, warp

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes patches ``(B, 3, H, W)``, on the CPU their levels ``(B,)`` and draws in -1 to 1 ``(B, 4)``."""


def rand_augment(settings: Augmentation, batch: Tensor, draws: Draws) -> Tensor:
    """Change every patch by operations of its own; arguments as of `augmentation.augment`."""
    batch = batch.clone(memory_format=torch.contiguous_format)  # rows are copied faster
    for _ in range(settings.rand_augment_n):
        operation = draws.integers(len(OPERATIONS))
        level = draws.uniform() * settings.rand_augment_magnitude
        details = draws.uniform(4) * 2 - 1
        for number, change in enumerate(OPERATIONS.values()):
            rows = torch.nonzero(operation == number).ravel()
            if len(rows):
                index = send(rows, batch)
                batch.index_copy_(0, index, change(batch.index_select(0, index), level[rows], details[rows]))
    return batch


def _keep(patches: Tensor, level: Tensor, draws: Tensor) -> Tensor:
    return patches


def _change_matrix(
    patches: Tensor, level: Tensor, draws: Tensor, *, row: int, column: int, strength: float
) -> Tensor:
    """Warp by a matrix that differs from the identity in one number, a shift in sides or a shear."""
    amount = _signed(level, draws) * strength
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(patches), 1, 1)
    matrix[:, row, column] = amount * (patches.shape[3 - row] if column == 2 else 1)
    return warp(patches, matrix)


def _rotate(patches: Tensor, level: Tensor, draws: Tensor) -> Tensor:
    angle = _signed(level, draws).double() * math.radians(3)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return warp(patches, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3))


def _enhance(patches: Tensor, level: Tensor, draws: Tensor, *, without: Callable[[Tensor], Tensor]) -> Tensor:
    """Move patches away from what they are ``without`` a property, or towards it, as Pillow does."""
    poor = without(patches)
    factor = send(1 + 0.09 * _signed(level, draws), patches)[:, None, None, None]
    return (poor + factor * (patches - poor)).clamp_(0, 1)


def _grey(patches: Tensor) -> Tensor:
    red, green, blue = patches.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601


def _smooth(patches: Tensor) -> Tensor:
    """Average over 3 x 3 pixels; the central one has five times the weight of the others."""
    height, width = patches.shape[2:]
    bordered = functional.pad(patches, (1, 1, 1, 1), mode="replicate")
    total = torch.zeros_like(patches)
    for down, across in product(range(3), repeat=2):
        total += bordered[:, :, down : down + height, across : across + width]
    return (9 * (total / 9) + 4 * patches) / 13


def _equalise(patches: Tensor, level: Tensor, draws: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize((patches * 255).round().byte()).to(patches) / 255


def _change_hsv(patches: Tensor, level: Tensor, draws: Tensor) -> Tensor:
    hue, saturation, value = rgb_to_hsv(patches).split(1, dim=1)
    shift, more = send(0.03 * level[:, None] * draws[:, :2], patches).T[:, :, None, None, None]
    saturation = saturation * (1 + more * torch.where(more > 0, 1 - saturation, 1.0))
    return hsv_to_rgb(torch.cat([(hue + shift) % 1, saturation, value], dim=1))


def _change_hed(patches: Tensor, level: Tensor, draws: Tensor) -> Tensor:
    amount = 0.03 * level[:, None] * draws
    return change_stain(patches, scale=1 + amount[:, :2], offset=amount[:, 2:])


def _signed(level: Tensor, draws: Tensor) -> Tensor:
    return level * draws[:, 0].sign()


OPERATIONS: dict[str, Operation] = {
    "identity": _keep,
    "translate_x": partial(_change_matrix, row=0, column=2, strength=1 / 128),
    "translate_y": partial(_change_matrix, row=1, column=2, strength=1 / 128),
    "shear_x": partial(_change_matrix, row=0, column=1, strength=0.03),
    "shear_y": partial(_change_matrix, row=1, column=0, strength=0.03),
    "rotate": _rotate,
    "brightness": partial(_enhance, without=torch.zeros_like),
    "contrast": partial(_enhance, without=lambda patches: _grey(patches).mean((2, 3), keepdim=True)),
    "colour": partial(_enhance, without=_grey),
    "sharpness": partial(_enhance, without=_smooth),
    "equalise": _equalise,
    "hsv": _change_hsv,
    "hed": _change_hed,
}
