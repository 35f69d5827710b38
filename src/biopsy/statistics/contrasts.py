"""A measured value in two sets of patches, and one quantity as a share of another, over patients.

Every comparison is a number on the sample as it is and on each of its `replicates.reweightings`: patients are
left out or drawn anew, never patches. The interval follows from their spread as for any metric.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import (
    BOOTSTRAP_FROM,
    DRAWS,
    Interval,
    Method,
    PatientSummary,
    estimate_from,
    replicate,
    reweightings,
    summarise_groups,
)
from biopsy.statistics.metrics import METRICS, UNBOUNDED, measure
from biopsy.statistics.weighted_counts import Floats, rank

AUROC = METRICS["auroc"]


@dataclass(frozen=True)
class Contrast:
    """How a measured value differs between chosen patches and the others.

    Attributes:
        n_chosen: How many are chosen.
        n_others: How many are not.
        mean_chosen: Mean of the value over the chosen; NaN without any.
        mean_others: Mean over the others.
        difference_sd: Mean of the chosen less mean of the others, in standard deviations within the two.
        auroc: Chance that a chosen patch has a higher value than one of the others; .5 is no difference.
        within: The same within each patient that has both kinds, summarised; None where the unit is the
            patch.
        by_group: One row a patient: ``n_chosen``, ``n_others``, ``auroc`` (NaN without both kinds); its index
            holds the ids. Empty where the unit is the patch.
    """

    n_chosen: int
    n_others: int
    mean_chosen: float
    mean_others: float
    difference_sd: Interval
    auroc: Interval
    within: PatientSummary | None
    by_group: pd.DataFrame


def contrast_groups(
    values: ArrayLike,
    chosen: ArrayLike,
    group_ids: ArrayLike,
    *,
    seed: int,
    unit: str = "patient",
    names: tuple[str, str] = ("chosen", "other"),
    level: float = 0.95,
    draws: int = DRAWS,
) -> Contrast:
    """Compare a value between chosen patches and the others.

    Args:
        values: What was measured, shape ``(n,)``.
        chosen: True for the patches of interest.
        group_ids: The patient (slide, patch) of each.
        seed: For the bootstrap, used from 100 groups on.
        unit: What a group is.
        names: What the chosen and the others are called in reasons, such as ``("missed", "found")``.
        level: Nominal coverage.
        draws: Bootstrap draws.

    Raises:
        MetricError: If the lengths differ or a value is not finite.
    """
    values, chosen = np.asarray(values, float), np.asarray(chosen, bool)
    group_ids = np.asarray(group_ids, dtype=object)
    if not values.shape == chosen.shape == group_ids.shape or not np.isfinite(values).all():
        raise MetricError(f"values {values.shape}, not all finite, or not one each of {chosen.shape} patches")
    if not 0 < chosen.sum() < len(chosen):
        return _nothing_to_compare(values, chosen, names)
    ranked = rank(chosen.astype(int), rankdata(values) / (len(values) + 1), group_ids=group_ids)
    codes, n_groups = pd.factorize(group_ids, sort=True)[0], len(ranked.groups)
    sums = _sums(values - values.mean(), chosen, codes, n_groups)
    counts = np.array([np.count_nonzero(sums[:, column]) for column in (0, 3)])
    rarer = int(counts.argmin())
    carriers = (int(counts[rarer]), f"{names[rarer]} patches")
    result = replicate(ranked, seed=seed, draws=draws, names=["auroc"])
    each = pd.DataFrame(
        {
            "n_chosen": sums[:, 0].astype(int),
            "n_others": sums[:, 3].astype(int),
            "auroc": [_auroc(values[codes == code], chosen[codes == code]) for code in range(n_groups)],
        }
        if unit != "patch"
        else {},
        index=ranked.groups if unit != "patch" else None,
    )
    return Contrast(
        int(chosen.sum()),
        int((~chosen).sum()),
        float(values[chosen].mean()),
        float(values[~chosen].mean()),
        _estimate(
            lambda weight: _difference_sd(weight @ sums),
            n_groups,
            carriers,
            UNBOUNDED,
            seed,
            unit,
            level,
            draws,
        ),
        _interval(
            result.value["auroc"],
            result.replicates["auroc"],
            result.method,
            carriers,
            AUROC.bounds,
            unit,
            level,
        ),
        summarise_groups(AUROC, each["auroc"].to_numpy(float), level, unit) if unit != "patch" else None,
        each,
    )


def estimate_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    group_ids: ArrayLike,
    *,
    seed: int,
    unit: str = "patient",
    level: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """Give the sum of one quantity over patches divided by the sum of another, neither below 0."""
    codes, groups = pd.factorize(np.asarray(group_ids, dtype=object), sort=True)
    sums = np.stack(
        [np.bincount(codes, np.asarray(part, float), len(groups)) for part in (numerator, denominator)]
    )

    def ratio(weight: Floats) -> float:
        above, below = sums @ weight
        return float(above / below) if below > 0 else float("nan")

    carriers = (int(np.count_nonzero(sums[1])), "patches")
    return _estimate(ratio, len(groups), carriers, (0.0, np.inf), seed, unit, level, draws)


def _estimate(
    statistic: Callable[[Floats], float],
    n_groups: int,
    carriers: tuple[int, str],
    bounds: tuple[float, float],
    seed: int,
    unit: str,
    level: float,
    draws: int,
) -> Interval:
    """Give a statistic of weights, one a group, with its interval."""
    replicates = np.array([statistic(weight) for weight in reweightings(n_groups, seed=seed, draws=draws)])
    method: Method = "jackknife" if n_groups < BOOTSTRAP_FROM else "bootstrap"
    return _interval(statistic(np.ones(n_groups)), replicates, method, carriers, bounds, unit, level)


def _interval(
    value: float,
    replicates: Floats,
    method: Method,
    carriers: tuple[int, str],
    bounds: tuple[float, float],
    unit: str,
    level: float,
) -> Interval:
    if np.isnan(value):
        return Interval(value, reason=f"undefined: no spread, or no {carriers[1]}")
    return estimate_from(value, replicates, method, carriers, bounds=bounds, level=level, unit=unit)


def _sums(values: Floats, chosen: NDArray[np.bool_], codes: NDArray[np.intp], n_groups: int) -> Floats:
    """Count, sum and sum of squares of the chosen, then of the others, for each group: ``(n_groups, 6)``."""
    columns = [
        np.bincount(codes[kind], values[kind] ** power, n_groups)
        for kind in (chosen, ~chosen)
        for power in range(3)
    ]
    return np.stack(columns, axis=1)


def _difference_sd(sums: Floats) -> float:
    n_chosen, chosen, chosen_2, n_others, others, others_2 = sums
    if not n_chosen or not n_others:
        return float("nan")
    variance = (chosen_2 - chosen**2 / n_chosen + others_2 - others**2 / n_others) / (n_chosen + n_others)
    return (
        float((chosen / n_chosen - others / n_others) / np.sqrt(variance))
        if variance > 1e-18
        else float("nan")
    )


def _auroc(values: Floats, chosen: NDArray[np.bool_]) -> float:
    return measure(rank(chosen.astype(int), rankdata(values) / (len(values) + 1)).tally(), ["auroc"])["auroc"]


def _nothing_to_compare(values: Floats, chosen: NDArray[np.bool_], names: tuple[str, str]) -> Contrast:
    missing = names[0] if not chosen.any() else names[1]
    nothing = Interval(float("nan"), reason=f"undefined: no {missing} patches")
    mean_chosen, mean_others = (
        float(values[kind].mean()) if kind.any() else float("nan") for kind in (chosen, ~chosen)
    )
    n = int(chosen.sum())
    return Contrast(n, len(chosen) - n, mean_chosen, mean_others, nothing, nothing, None, pd.DataFrame())
