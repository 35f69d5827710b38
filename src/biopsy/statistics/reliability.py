"""Reliability: observed frequency per bin of predicted probability, and the terms of the Brier score."""

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
        low: Lowest probability in it.
        high: Highest probability in it.
        n: Patches.
        n_groups: Patients (slides, patches) that have some in it.
        mean_prob: Mean predicted probability.
        observed: The share found positive, with an interval over groups.
    """

    low: float
    high: float
    n: int
    n_groups: int
    mean_prob: float
    observed: Interval


@dataclass(frozen=True)
class BrierParts:
    """The Brier score, taken apart over bins: ``reliability - resolution + uncertainty + within_bins``.

    Attributes:
        reliability: Mean squared gap of predicted and observed frequency; 0 is ideal.
        resolution: How far the bins' shares lie from the share in all; higher is better.
        uncertainty: Of the target itself: prevalence times one less it.
        within_bins: What is left because probabilities differ within a bin.
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
    """Return the reliability table: the bins of the calibration error, lowest first.

    The intervals hold the edges of the bins and leave out or draw anew whole groups.

    Args:
        target: 0 or 1 per patch, ``(n,)``.
        n_bins: Bins asked for; ties may leave fewer.
        **resampling: As of `Resampler`.

    Raises:
        MetricError: If a target is not 0 or 1, or a probability not in 0-1.
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
    return [
        ReliabilityBin(
            float(inside.min()),
            float(inside.max()),
            len(inside),
            interval_groups,
            float(inside.mean()),
            interval,
        )
        for k, interval in enumerate(observed)
        for inside, interval_groups in [(prob[bins == k], int(np.count_nonzero(n[:, k])))]
    ]


def decompose_brier(target: ArrayLike, prob: ArrayLike, *, n_bins: int = N_BINS) -> BrierParts:
    """Take the Brier score apart (Murphy 1973; the part within bins: Stephenson, Coelho and Jolliffe 2008).

    Args:
        target: 0 or 1 per patch, ``(n,)``.
        n_bins: Bins of equal mass, those of the calibration error.

    Raises:
        MetricError: If a target is not 0 or 1, or a probability not in 0-1.

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
