"""Weight randomisation: does a map change when what the network learned is taken out of it?

Adebayo et al. 2018 (Sanity checks for saliency maps), sec. 3.1, cascading: from the last layer to the first,
more and more weights are drawn anew, and each time the map is compared with that of the trained network. A
map that stays the same shows the picture, not the network.
"""

import copy
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from biopsy.core.seeds import derive

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
    """Give Spearman's correlation of each pair of maps ``(n, H, W)``; 0 where one of them is constant."""
    a, b = (rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0)


def structural_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Give the SSIM of each pair of maps ``(n, H, W)``, each divided by its own highest absolute value.

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
