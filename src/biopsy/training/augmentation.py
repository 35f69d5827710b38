"""Random changes of training patches: a recipe's augmentation and stain transfer, and a transform of one's
own.

*Augmentation* changes a whole batch at once, each patch its own draw, on the device it lies on. Rotation,
shift, shear and zoom are composed as Keras's ``ImageDataGenerator`` composes them; flips and quarter turns
move pixels exactly; the stain jitter scales and offsets the amounts of haematoxylin and eosin. All draws
come from a CPU generator, so every device sees the same ones.

*Stain transfer* recolours patches with the stain of other patients, class by class. Where many patients
contribute patches of one class only, stain tells the label: a network learns that an unfamiliar stain is
the class of those patients, and on a new patient every probability is shifted. Stain transfer removes that
association. A patch of one class is given the colour statistics that patches of the same class have in
another patient, who is drawn among the patients with more than one class; afterwards the classes share one
set of stains. The statistics are the mean and standard deviation of optical density in each channel
(Reinhard et al. 2001 match them in another colour space and without regard to class).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from biopsy.core.errors import RecipeError
from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.recipes.schema import Augmentation
from biopsy.slide_io.stain import STAINS

logger = logging.getLogger(__name__)


def augment(
    settings: Augmentation,
    batch: Tensor,
    generator: Generator,
    *,
    n: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Augment every patch of a batch independently, within the ranges of a recipe.

    Args:
        batch: ``(B, 3, H, W)`` float RGB in 0-1, on any device.
        generator: A CPU generator; the same state gives the same batch.
        n: Patches that are drawn for, of which ``batch`` is a part; None for those of the batch.
        part: Which of them the batch is.

    Returns:
        A new batch, or the same one where nothing is to be done.
    """
    warped = bool(settings.rotation_deg or settings.zoom or settings.shift or settings.shear_deg)
    moved = settings.flip_horizontal or settings.flip_vertical or settings.rot90
    if settings.rot90 and batch.shape[2] != batch.shape[3]:
        raise RecipeError(f"rot90 needs square patches, these are {tuple(batch.shape[2:])}")
    n = len(batch) if n is None else n
    move = (_draw_moves(settings, n, generator) if moved else torch.zeros(n, dtype=torch.long))[part]
    if warped:
        matrix = _draw_matrix(settings, n, batch.shape[2:], generator)[part]
        matrix[:, :, :2] = matrix[:, :, :2] @ _move_matrices()[move]
        batch = warp(batch, matrix)
    elif moved:
        batch = move_pixels(batch, move)
    if settings.hed_jitter:
        spread = (torch.rand(2, n, 2, generator=generator)[:, part] * 2 - 1) * settings.hed_jitter
        batch = change_stain(batch, scale=1 + spread[0], offset=spread[1])
    return batch


def _draw_moves(settings: Augmentation, n: int, generator: Generator) -> Tensor:
    coins = torch.rand(3, n, generator=generator)
    across = (coins[0] < 0.5) & settings.flip_horizontal
    down = (coins[1] < 0.5) & settings.flip_vertical
    turns = (coins[2] * 4).long() * settings.rot90
    return turns * 4 + across * 2 + down


def _draw_matrix(settings: Augmentation, n: int, shape: torch.Size, generator: Generator) -> Tensor:
    height, width = shape
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
    """Compose rotation, shift, shear and zoom in that order, as in Keras.

    All arguments are ``(B,)``. The matrix leads from a pixel of the *result* to the place in the source that
    it shows, both counted from the centre, x before y: a zoom below 1 magnifies.

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
    theta = _send(theta.to(batch.dtype), batch)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    return functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)


def move_pixels(batch: Tensor, move: Tensor) -> Tensor:
    """Flip and rotate each patch by multiples of 90 degrees.

    Args:
        batch: ``(B, C, H, W)``; square where a quarter turn is asked for.
        move: ``(B,)`` on the CPU, ``4 * rot90 + 2 * flip_horizontal + flip_vertical``.
    """
    n, channels, height, width = batch.shape
    sources = _list_sources(height, width)[move] + torch.arange(n)[:, None] * height * width
    pixels = batch.permute(0, 2, 3, 1).reshape(n * height * width, channels)
    moved = pixels.index_select(0, _send(sources.flatten(), batch))
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
    change, add = _send(change.to(batch.dtype), batch), _send(add.to(batch.dtype), batch)
    # 255 steps and one: the scale of separate_stains, on which black has a density too
    transmitted = (batch.permute(0, 2, 3, 1).reshape(n, -1, 3) * 255 + 1) / 256
    changed = torch.baddbmm(add, transmitted.log10_().neg_(), change).neg_()
    rgb = ((10**changed) * 256 - 1).div_(255).clamp_(0, 1)
    return rgb.view(n, *batch.shape[2:], 3).permute(0, 3, 1, 2)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _send(draws: Tensor, batch: Tensor) -> Tensor:
    """Move values to the device of a batch without synchronising."""
    if batch.device.type == "cuda":
        return draws.pin_memory().to(batch.device, non_blocking=True)
    return draws.to(batch.device)


@lru_cache(maxsize=16)
def _list_sources(height: int, width: int) -> Tensor:
    """Return, for each of the 16 moves, the source of every pixel: ``(16, H * W)``; 4 where not square."""
    grid = torch.arange(height * width).view(height, width)
    sources = []
    for turns in range(4 if height == width else 1):
        for flips in ([], [0], [1], [0, 1]):
            sources.append(torch.rot90(grid, turns).flip(flips).flatten())
    return torch.stack(sources)


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


FEWEST_PATCHES = 8  # of a class, for its statistics in a patient
MOST_PATCHES = 400  # measured of each class and patient
LOWEST_SD = 1e-3  # of optical density; below, a channel is constant


@dataclass(frozen=True)
class StainTransfer:
    """Colour statistics of each patient and class, and the patients that can be sources.

    Attributes:
        mean: Mean optical density, ``(n_groups, n_classes, 3)``; NaN where it is not known.
        sd: Standard deviation, of the same shape.
        lenders: For each class the groups that have it and another class, ``(n_lenders,)`` each.
        group: Group of each patch of the pack, ``(n_patches,)``.
        probability: Probability that a patch is recoloured.
    """

    mean: Tensor
    sd: Tensor
    lenders: list[Tensor]
    group: np.ndarray
    probability: float

    def apply(
        self,
        batch: Tensor,
        rows: np.ndarray,
        target: Tensor,
        generator: Generator,
        *,
        n: int | None = None,
        part: slice = slice(None),
    ) -> Tensor:
        """Recolour each patch with the given probability.

        Args:
            batch: ``(B, 3, H, W)`` RGB in 0-1, on any device.
            rows: Rows of the pack, ``(B,)``.
            target: Class of each patch, ``(B,)`` on the CPU.
            generator: A CPU generator; the same state gives the same batch.
            n, part: As of `augment`.
        """
        group = torch.from_numpy(self.group[rows])
        draw, chosen = torch.rand(2, len(rows) if n is None else n, generator=generator)[:, part]
        to = group.clone()
        for label, lenders in enumerate(self.lenders):
            if len(lenders):
                of_class = target == label
                to[of_class] = lenders[(draw[of_class].double() * len(lenders)).long()]
        scale = self.sd[to, target] / self.sd[group, target]
        shift = self.mean[to, target] - scale * self.mean[group, target]
        known = (chosen < self.probability) & torch.isfinite(scale + shift).all(1)
        scale = torch.where(known[:, None], scale, 1.0)
        shift = torch.where(known[:, None], shift, 0.0)
        scale, shift = (values.to(batch)[:, :, None, None] for values in (scale, shift))
        transmitted = torch.exp(-(density(batch) * scale + shift))
        return ((transmitted * 256 - 1) / 255).clamp_(0, 1)


def density(batch: Tensor) -> Tensor:
    """Return the optical density (natural logarithm) of RGB in 0-1, finite for black."""
    return -torch.log((batch * 255 + 1) / 256)


def fit_stain_transfer(pack: Pack, rows: np.ndarray, probability: float, seed: int) -> StainTransfer | None:
    """Measure the colour statistics of training patches by patient and class.

    Args:
        pack: Pack of the patches; its group ids are those of patients, or of slides where patients are
            unknown.
        probability: Probability that a patch is recoloured; 0 for none.
        seed: Seed of the draw of the patches that are measured.

    Returns:
        None if the probability is 0, or if fewer than two patients have patches of more than one class.
    """
    if not probability:
        return None
    groups, group = np.unique(pack.group_ids, return_inverse=True)
    n_classes = len(pack.class_names)
    mean = torch.full((len(groups), n_classes, 3), torch.nan)
    sd = mean.clone()
    rng = make_rng(seed, "stain-transfer")
    for index in np.unique(group[rows]):
        for label in range(n_classes):
            own = rows[(group[rows] == index) & (pack.target[rows] == label)]
            if len(own) >= FEWEST_PATCHES:
                measured = np.sort(rng.permutation(own)[:MOST_PATCHES])
                mean[index, label], sd[index, label] = _measure(pack, measured)
    measured_classes = torch.isfinite(mean).all(2)
    several = measured_classes.sum(1) >= 2
    lenders = [torch.nonzero(measured_classes[:, label] & several).ravel() for label in range(n_classes)]
    if pack.unit == "patch" or int(several.sum()) < 2:
        logger.warning(
            "no stain transfer: it needs two training patients with %d or more patches of two classes each, "
            "found %d",
            FEWEST_PATCHES,
            0 if pack.unit == "patch" else int(several.sum()),
        )
        return None
    return StainTransfer(mean, sd, lenders, group, probability)


def _measure(pack: Pack, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the optical density of patches, ``(3,)`` each."""
    pixels = [pack.pixels(row).reshape(-1, 3) for row in rows]
    values = density(torch.from_numpy(np.concatenate(pixels)).float() / 255)
    return values.mean(0), values.std(0).clamp(min=LOWEST_SD)


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
        raise RecipeError(f"transform must return a tensor; it returned {type(changed).__name__}")
    if changed.shape != before.shape or changed.dtype != before.dtype:
        raise RecipeError(
            f"transform must keep shape and type, {tuple(before.shape)} {before.dtype}; it returned "
            f"{tuple(changed.shape)} {changed.dtype}: set the size with preprocessing.input_px, and leave "
            "normalisation to the recipe"
        )
    return changed
