"""The mean of a measured value, or of a paired difference, with an interval over patients."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import Interval, estimate_from
from biopsy.statistics.metrics import UNBOUNDED
from biopsy.statistics.replicates import BOOTSTRAP_FROM, DRAWS, reweightings


def estimate_mean(
    values: ArrayLike,
    group_ids: ArrayLike,
    *,
    seed: int,
    unit: str = "patient",
    bounds: tuple[float, float] = UNBOUNDED,
    level: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """Give the mean over patches, with an interval over patients.

    A comparison of two ways on the same patches is paired by giving the differences as values.

    Args:
        values: One a patch, finite, shape ``(n,)``.
        group_ids: The patient (slide, patch) of each.
        seed: For the bootstrap, used from 100 groups on.
        unit: What a group is, for the reasons.
        bounds: Between which values a mean lives.
        level: Nominal coverage.
        draws: Bootstrap draws.

    Raises:
        MetricError: If there is no value, one is not finite, or the lengths differ.
    """
    values, group_ids = np.asarray(values, float), np.asarray(group_ids, dtype=object)
    if not values.size or values.shape != group_ids.shape or not np.isfinite(values).all():
        raise MetricError(f"values {values.shape}, none or not all finite, of {len(group_ids)} patches")
    codes, groups = pd.factorize(group_ids, sort=True)
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    replicates = np.array(
        [
            weight @ sums / (weight @ counts) if weight @ counts else np.nan
            for weight in reweightings(len(groups), seed=seed, draws=draws)
        ]
    )
    return estimate_from(
        float(values.mean()),
        replicates,
        "jackknife" if len(groups) < BOOTSTRAP_FROM else "bootstrap",
        (len(groups), "patches"),
        bounds=bounds,
        level=level,
        unit=unit,
    )
