"""Measures of faithfulness: deletion and insertion curves, weight randomisation."""

import copy
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from biopsy.core.seeds import derive

CELLS = 12  # to a side: of an IDC patch of 200 um a cell is 17 um, about a nucleus with its surroundings
STEPS = 12  # points of a curve beside the untouched patch
BLUR = 1 / 10  # standard deviation as a share of the patch's side

Ask = Callable[[np.ndarray], np.ndarray]


def blur_patches(patches: np.ndarray) -> np.ndarray:
    """Blur patches, uint8 ``(n, H, W, 3)``, so far that only slow colour is left."""
    spread = BLUR * max(patches.shape[1:3])
    blurred = np.empty_like(patches)
    for patch, out in zip(patches, blurred, strict=True):
        cv2.GaussianBlur(patch, (0, 0), spread, dst=out, borderType=cv2.BORDER_REPLICATE)
    return blurred


def rank_cells(maps: np.ndarray) -> np.ndarray:
    """Return the rank of every pixel's cell, 0 for the cell that a map marks most.

    Args:
        maps: ``(n, H, W)``; a cell counts by its mean. Cells of equal value follow each other from the upper
            left to the lower right.

    Returns:
        int ``(n, H, W)``, from 0 to ``CELLS ** 2 - 1``.
    """
    cell = _cell_of_pixels(maps.shape[1:])
    sizes = np.bincount(cell.ravel(), minlength=CELLS**2)
    ranks = np.empty(maps.shape, int)
    for values, out in zip(maps, ranks, strict=True):
        mean = np.bincount(cell.ravel(), values.ravel(), CELLS**2) / np.maximum(sizes, 1)
        order = np.argsort(-mean, kind="stable")
        place = np.empty(CELLS**2, int)
        place[order] = np.arange(CELLS**2)
        out[...] = place[cell]
    return ranks


def deletion_insertion_curves(
    ask: Ask, patches: np.ndarray, blurred: np.ndarray, ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the class's probability as cells are deleted, and as they are inserted, in an order.

    Args:
        ask: Gives the probability of the class in question for patches ``(n * m, H, W, 3)``, of which the
            first ``m`` are versions of the first patch and so on.
        patches: uint8 ``(n, H, W, 3)``.
        blurred: What is left of them where everything is taken away.
        ranks: As `rank_cells` gives them.

    Returns:
        Two arrays ``(n, STEPS + 1)``: at share 0, 1 / STEPS, ... 1 of the cells deleted; and inserted.
    """
    bounds = np.arange(STEPS + 1) / STEPS * CELLS**2
    taken = ranks[:, None] < bounds[:, None, None]  # (n, STEPS + 1, H, W)
    whole, empty = patches[:, None], blurred[:, None]
    curves = []
    for first, then in ((whole, empty), (empty, whole)):
        versions = np.where(taken[..., None], then, first)
        curves.append(ask(versions.reshape(-1, *patches.shape[1:])).reshape(len(patches), -1))
    return curves[0], curves[1]


def area_under(curves: np.ndarray) -> np.ndarray:
    """Return the mean height of curves ``(n, STEPS + 1)`` by trapezia, ``(n,)``."""
    return (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2


def _cell_of_pixels(shape: tuple[int, ...]) -> np.ndarray:
    """Return the cell that each pixel belongs to, ``(H, W)``."""
    rows, columns = (np.arange(side) * CELLS // side for side in shape)
    return rows[:, None] * CELLS + columns


MOST_STEPS = 6
_WINDOW_PX, _SPREAD_PX = 11, 1.5  # Wang et al. 2004, sec. III.B
_K1, _K2 = 0.01, 0.03


def randomise_cascading(network: nn.Module, *, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a copy of a network with more and more of its weights drawn anew, from the last layer on.

    Weight matrices and kernels are drawn from a normal distribution of their own spread; offsets and factors
    are shuffled. Layers are taken together so that there are at most `MOST_STEPS` steps.

    Args:
        network: Not changed.
        seed: Of the new weights; each layer has its own stream.

    Yields:
        Name of the first layer that is random, and the network, the same object every time.
    """
    network = copy.deepcopy(network)
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ][::-1]
    for part in np.array_split(np.arange(len(layers)), min(MOST_STEPS, len(layers))):
        for place in part:
            name, module = layers[place]
            generator = torch.Generator().manual_seed(derive(seed, "random weights", name))
            for weight in module.parameters(recurse=False):
                _draw_anew(weight, generator)
        yield layers[part[-1]][0], network


def _draw_anew(weight: torch.Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        if weight.dim() > 1:
            drawn = torch.randn(weight.shape, generator=generator) * weight.square().mean().sqrt().cpu()
        else:
            drawn = weight.cpu()[torch.randperm(len(weight), generator=generator)]
        weight.copy_(drawn)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each pair of maps ``(n, H, W)``; 0 where one of them is constant."""
    a, b = (rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0)


def structural_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the SSIM of each pair of maps ``(n, H, W)``, each divided by its own highest absolute value.

    Wang et al. 2004, Image quality assessment, eq. 13, with Gaussian windows. 1 is the same map.
    """
    return np.array([_similarity(_scale(a), _scale(b)) for a, b in zip(first, second, strict=True)])


def _scale(values: np.ndarray) -> np.ndarray:
    highest = np.abs(values).max()
    return values.astype(np.float64) / (highest if highest > 0 else 1)


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(values, (_WINDOW_PX, _WINDOW_PX), _SPREAD_PX))

    mean_a, mean_b = mean(a), mean(b)
    spread_a, spread_b, common = (
        mean(a * a) - mean_a**2,
        mean(b * b) - mean_b**2,
        mean(a * b) - mean_a * mean_b,
    )
    c1, c2 = _K1**2, _K2**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * common + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2))).mean())
