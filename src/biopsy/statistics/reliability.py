"""Reliability table (observed frequency per bin of predicted probability), and terms of the Brier score."""

from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike

from biopsy.statistics.calibration import N_BINS, bin_patches
from biopsy.statistics.resampling import (
    SHARE,
    InformativeGroups,
    Interval,
    Resampler,
    Resampling,
    divide,
    group_codes,
)
from biopsy.statistics.weighted_counts import check_binary


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of predicted probability.

    Attributes:
        low: Lowest probability.
        high: Highest probability.
        n_groups: Number of patients (slides, patches) with patches in the bin.
        observed: Observed frequency of the positive class, with an interval over groups.
    """

    low: float
    high: float
    n: int
    n_groups: int
    mean_prob: float
    observed: Interval


@dataclass(frozen=True)
class BrierParts:
    """Decomposition of the Brier score: ``reliability - resolution + uncertainty + within_bins``.

    Attributes:
        reliability: Mean squared difference of predicted and observed frequency; 0 is ideal.
        resolution: Mean squared difference of observed frequency and prevalence; higher is better.
        uncertainty: Variance of the target, prevalence times (1 - prevalence).
        within_bins: Remainder, since probabilities differ within bins.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


def estimate_reliability(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    *,
    n_bins: int = N_BINS,
    **resampling: Unpack[Resampling],
) -> list[ReliabilityBin]:
    """Return the reliability table: the bins of the calibration error in ascending order.

    Groups are resampled with fixed edges of the bins.

    Args:
        n_bins: Number of bins; with ties there may be fewer.
    """
    truth, prob = check_binary(target, prob)
    bins = np.unique(bin_patches(prob, n_bins=n_bins), return_inverse=True)[1]
    codes, groups = group_codes(group_ids)
    shape, cell = (len(groups), bins.max() + 1), codes * (bins.max() + 1) + bins
    n, n_pos = (np.bincount(cell, weight, shape[0] * shape[1]).reshape(shape) for weight in (None, truth))
    observed = Resampler(len(groups), **resampling).estimate(
        lambda weight: divide(weight @ n_pos, weight @ n),
        [InformativeGroups(column) for column in n.T],
        bounds=SHARE,
        share=True,
    )
    table = []
    for k, interval in enumerate(observed):
        inside, n_groups = prob[bins == k], int(np.count_nonzero(n[:, k]))
        low, high, mean = float(inside.min()), float(inside.max()), float(inside.mean())
        table.append(ReliabilityBin(low, high, len(inside), n_groups, mean, interval))
    return table


def decompose_brier(target: ArrayLike, prob: ArrayLike, *, n_bins: int = N_BINS) -> BrierParts:
    """Decompose the Brier score (Murphy 1973; within bins: Stephenson, Coelho and Jolliffe 2008).

    Example:
        >>> decompose_brier([0, 1, 1, 1], [0.5, 0.5, 1.0, 1.0], n_bins=2)
        BrierParts(reliability=0.0, resolution=0.0625, uncertainty=0.1875, within_bins=0.0)
    """
    truth, prob = check_binary(target, prob)
    bins = np.unique(bin_patches(prob, n_bins=n_bins), return_inverse=True)[1]
    n = np.bincount(bins)
    predicted, observed, prevalence = np.bincount(bins, prob) / n, np.bincount(bins, truth) / n, truth.mean()
    share = n / len(truth)
    reliability = float(share @ (predicted - observed) ** 2)
    resolution = float(share @ (observed - prevalence) ** 2)
    uncertainty = float(prevalence * (1 - prevalence))
    brier = float(((prob - truth) ** 2).mean())
    return BrierParts(reliability, resolution, uncertainty, brier - (reliability - resolution + uncertainty))
