"""Pseudo-slides: groups of patches alike in colour and texture, for packs without patients and slides.

Patches of one slide share stain and scanner, so clusters of appearance keep most neighbours together. They
are not slides: one slide may be in several clusters, and a cluster holds patches of several slides.
"""

import numpy as np

from biopsy.core.errors import SplitError
from biopsy.data.packs import Pack

N_PSEUDO_SLIDES = 24
MIN_CLASS_SHARE = 0.2  # of the even share 1 / n_classes; 10 % of a group's patches for two classes
N_STARTS = 4
# -log of the transmitted light, with white at 255 of 256 so that black stays finite.
OPTICAL_DENSITY = -np.log(np.arange(1, 257) / 256)


def describe_appearance(pack: Pack, rows: np.ndarray) -> np.ndarray:
    """Return statistics of colour and texture per patch, ``(len(rows), 11)``.

    These are, per channel of the optical density, its mean, standard deviation and 10th percentile, then the
    mean absolute difference between neighbouring pixels of its mean over channels, down and across.
    """
    features = np.empty((len(rows), 11))
    density_of = OPTICAL_DENSITY.astype(np.float32)
    for feature, row in zip(features, rows, strict=True):
        pixels = pack.pixels(int(row))
        n_pixels = pixels.shape[0] * pixels.shape[1]
        counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
        mean = counts @ OPTICAL_DENSITY / n_pixels
        square = counts @ OPTICAL_DENSITY**2 / n_pixels
        palest = np.cumsum(counts[:, ::-1], axis=1) > 0.1 * (n_pixels - 1)
        feature[0:3] = mean
        feature[3:6] = np.sqrt(np.maximum(square - mean**2, 0))
        feature[6:9] = OPTICAL_DENSITY[255 - palest.argmax(axis=1)]
        density = density_of[pixels].mean(axis=2)
        for axis in (0, 1):
            steps = np.abs(np.diff(density, axis=axis))
            feature[9 + axis] = steps.sum() / max(1, steps.size)
    return features


def cluster_appearance(features: np.ndarray, n_groups: int, *, seed: int) -> np.ndarray:
    """Return the group of each patch, numbered from the largest to the smallest, int64 ``(n_patches,)``.

    The groups are clusters of the standardised features by k-means, the best of 4 starts by k-means++ (Arthur
    & Vassilvitskii 2007).

    Raises:
        SplitError: If there are fewer distinct patches than groups.
    """
    from sklearn.cluster import KMeans  # slow import

    n_distinct = len(np.unique(features, axis=0))
    if not 2 <= n_groups <= n_distinct:
        raise SplitError(
            f"{n_distinct:,} distinct patches cannot form {n_groups} pseudo-slides; use --n-groups from 2 to "
            f"{n_distinct}",
            "too-few",
        )
    spread = features.std(axis=0)
    standardised = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    labels = KMeans(n_groups, n_init=N_STARTS, random_state=seed).fit_predict(standardised)
    sizes = np.bincount(labels, minlength=n_groups)
    rank = np.empty(n_groups, np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(n_groups)
    return rank[labels]


def have_all_classes(counts: np.ndarray) -> np.ndarray:
    """Return which groups hold at least `MIN_CLASS_SHARE` of an even share of each class.

    Args:
        counts: Patches ``(n_groups, n_classes)``, of the classes present in any group.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    enough: np.ndarray = shares.min(axis=1) >= MIN_CLASS_SHARE / counts.shape[1]
    return enough
