"""Recolouring of training patches by colour statistics of training patients.

*Stain transfer* recolours patches with the stain of other patients, class by class. Where many patients
contribute patches of one class only, stain tells the label: a network learns that an unfamiliar stain is
the class of those patients, and on a new patient every probability is shifted. Stain transfer removes that
association. A patch of one class is given the colour statistics that patches of the same class have in
another patient, who is drawn among the patients with more than one class; afterwards the classes share one
set of stains. The statistics are the mean and standard deviation of optical density in each channel
(Reinhard et al. 2001 match them in another colour space and without regard to class).

*RandStainNA* (Shen et al. 2022) recolours a patch to the mean and standard deviation of L*, a* and b* of a
virtual template: each of the six numbers is drawn from the normal distribution fitted to it over training
patches, without regard to class.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.recipes.preprocessing import to_unit
from biopsy.training.colour_spaces import lab_to_rgb, rgb_to_lab
from biopsy.training.draws import Draws
from biopsy.training.patch_operations import send

logger = logging.getLogger(__name__)

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
        draws: Draws,
    ) -> Tensor:
        """Recolour each patch with the given probability.

        Args:
            batch: ``(B, 3, H, W)`` RGB in 0-1, on any device.
            rows: Rows of the pack, ``(B,)``.
            target: Class of each patch, ``(B,)`` on the CPU.
            draws: Random numbers of the patches.
        """
        group = torch.from_numpy(self.group[rows])
        draw, chosen = draws.uniform_sets(2)
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
        scale, shift = (send(values.to(batch.dtype), batch)[:, :, None, None] for values in (scale, shift))
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


TEMPLATE_PATCHES = 4096  # measured in all
LOWEST_LAB_SD = 1.0  # below, a channel is stretched as if it had this


@dataclass(frozen=True)
class RandStainNA:
    """Distribution of the colour statistics of patches, from which templates are drawn.

    Attributes:
        centre: Means over patches of the mean and of the standard deviation of L*, a* and b*, ``(2, 3)``.
        spread: Standard deviations over patches, ``(2, 3)``.
        probability: Probability that a patch is recoloured.
    """

    centre: Tensor
    spread: Tensor
    probability: float

    def apply(self, batch: Tensor, draws: Draws) -> Tensor:
        """Recolour each patch with the given probability, by a template of its own.

        Args:
            batch: ``(B, 3, H, W)`` RGB in 0-1, on any device.
            draws: Random numbers of the patches.
        """
        chosen = draws.uniform() < self.probability
        draw = draws.normal_sets(2, 3)[:, chosen]
        if not chosen.any():
            return batch
        mean, sd = send(self.centre[:, None] + self.spread[:, None] * draw, batch)[..., None, None]
        rows = send(torch.nonzero(chosen).ravel(), batch)
        lab = rgb_to_lab(batch.index_select(0, rows))
        own_sd, own_mean = torch.std_mean(lab, (2, 3), correction=0, keepdim=True)
        matched = (lab - own_mean) * (sd.clamp(min=0) / own_sd.clamp(min=LOWEST_LAB_SD)) + mean
        return batch.index_copy(0, rows, lab_to_rgb(matched))


def fit_rand_stain_na(pack: Pack, rows: np.ndarray, probability: float, seed: int) -> RandStainNA | None:
    """Measure the colour statistics of training patches, of each patient equally many.

    Args:
        pack, probability, seed: As of `fit_stain_transfer`.

    Returns:
        None if the probability is 0.
    """
    if not probability:
        return None
    groups, group = np.unique(pack.group_ids[rows], return_inverse=True)
    rng = make_rng(seed, "rand-stain-na")
    chosen = rng.permutation(len(groups))[:TEMPLATE_PATCHES]
    n_each = min(-(-TEMPLATE_PATCHES // len(chosen)), np.bincount(group).max())
    measured = [np.resize(rng.permutation(rows[group == index]), n_each) for index in chosen]
    statistics = torch.stack([_measure_lab(pack.pixels(row)) for row in np.concatenate(measured)])
    return RandStainNA(statistics.mean(0), statistics.std(0, correction=0), probability)


def _measure_lab(pixels: np.ndarray) -> Tensor:
    """Return mean and standard deviation of L*, a* and b* of a patch, ``(2, 3)``."""
    lab = rgb_to_lab(to_unit(pixels.copy()[None]))[0]
    sd, mean = torch.std_mean(lab, (1, 2), correction=0)
    return torch.stack([mean, sd])
