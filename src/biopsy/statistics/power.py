"""Sample size: the number of patients needed to detect a difference, from the variance between patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from scipy import stats

from biopsy.core.errors import MetricError
from biopsy.core.text import count, plural
from biopsy.statistics.intervals import GroupedSample
from biopsy.statistics.metrics import find_metric
from biopsy.statistics.resampling import MIN_GROUPS, Floats, Resampler, check_level, fewest_informative

CORRELATIONS = (0.0, 0.5, 0.8)
MAX_PATIENTS = 1_000_000


@dataclass(frozen=True)
class SampleSize:
    """Number of patients needed for a comparison.

    Attributes:
        sd: Standard deviation of the patients' influences on the difference.
        n_patients: Smallest number with the required power.
        low: At the lower 95 % confidence limit of ``sd``.
        high: At its upper limit.
        power: Power with ``n_patients``.
    """

    sd: float
    n_patients: int
    low: int
    high: int
    power: float


@dataclass(frozen=True)
class Influences:
    """Influence of each group on a metric.

    Attributes:
        values: One per group, in the order of sorted ids, ``(n_groups,)``.
        effective: Effective number of informative groups.
    """

    values: Floats
    effective: float


def influence_groups(samples: Sequence[GroupedSample], name: str, *, unit: str = "patient") -> Influences:
    """Return the influence of each group on a metric: jackknife pseudo-values minus their mean.

    Their standard deviation divided by the square root of their number is the jackknife standard error (Efron
    and Tibshirani 1993, sec. 11.5).

    Args:
        samples: One per seed, of the same patches; the metric is the mean over them.
    """
    metric, n_groups = find_metric(name, type(samples[0].count())), len(samples[0].groups)
    for sample in samples:
        if np.isnan(metric.compute(sample.count())):
            raise MetricError(f"{name} is undefined: {metric.why_undefined(sample.count())}", "undefined")
    informative = fewest_informative([sample.informative_groups(metric.needs) for sample in samples])
    if informative.n < MIN_GROUPS:
        raise MetricError(
            f"only {count(informative.n, unit)} with {informative.description}: a plan needs the variance "
            f"between at least {MIN_GROUPS}",
            "undefined",
        )
    resampler = Resampler(n_groups, unit=unit, bootstrap_from=None)
    _, without = resampler.replicate(
        lambda weight: float(np.mean([metric.compute(sample.count(weight)) for sample in samples]))
    )
    if np.isnan(without).any():
        raise MetricError(
            f"{name} is undefined when {plural(unit)} are left out: no plan can be made", "undefined"
        )
    return Influences((n_groups - 1) * (without.mean() - without[:, 0]), informative.effective)


def plan_patients(
    sd: float,
    n_groups: int,
    *,
    difference: float,
    effective: float | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> SampleSize:
    """Return the number of patients with which a paired comparison detects a difference with a given power.

    A difference is detected if Student's t interval excludes 0. The power is that of the noncentral t
    distribution with noncentrality ``difference / sd * sqrt(n)`` (Cohen 1988, sec. 2.5) and
    ``n * effective / n_groups - 1`` degrees of freedom.

    Args:
        sd: Standard deviation of the patients' influences.
        n_groups: Number of patients from which it was estimated.
        difference: Difference to be detected, in units of the metric.
        effective: Effective number of informative patients (default: all). It determines the confidence
            limits of ``sd``: ``(effective - 1) sd² / sigma²`` has a chi-square distribution.

    Example:
        >>> plan_patients(0.1, 20, difference=0.05).n_patients
        34
    """
    check_level(level)
    if not (np.isfinite(difference) and difference > 0):
        raise MetricError(f"difference is {difference!r}: give one above 0, such as 0.03", "value")
    if not level > 1 - power > 0:
        raise MetricError(
            f"power is {power!r}: it must be between {1 - level:.2g} and 1, such as 0.8", "value"
        )
    if not sd > 1e-12:
        raise MetricError(
            "the metric does not vary between patients: its variance allows no plan", "undefined"
        )
    effective = n_groups if effective is None else effective
    share, freedom = effective / n_groups, effective - 1
    if not freedom >= 1:
        raise MetricError(
            f"the effective number of informative patients is {effective:.1f} of {n_groups}: a plan needs at "
            "least 2",
            "undefined",
        )
    spread = [sd * np.sqrt(freedom / stats.chi2.ppf(tail, freedom)) for tail in (0.975, 0.025)]
    n, low, high = (_fewest(difference / sd_bound, power, level, share) for sd_bound in (sd, *spread))
    return SampleSize(sd, n, low, high, comparison_power(difference / sd, n, level, share=share))


def comparison_power(effect: float, n_patients: int, level: float = 0.95, *, share: float = 1.0) -> float:
    """Return the power for an effect in standard deviations between patients.

    Args:
        share: Effective number of informative patients divided by ``n_patients``.
    """
    freedom = n_patients * share - 1
    cut = float(stats.t.ppf((1 + level) / 2, freedom))
    away = effect * np.sqrt(n_patients)
    return float(stats.nct.sf(cut, freedom, away) + stats.nct.cdf(-cut, freedom, away))


def _fewest(effect: float, power: float, level: float, share: float) -> int:
    """Return the smallest number of patients by bisection, at least as many as an interval needs."""
    high = ceil(MIN_GROUPS / share)
    low = high - 1
    while high < MAX_PATIENTS and comparison_power(effect, high, level, share=share) < power:
        low, high = high, high * 2
    if high >= MAX_PATIENTS:
        raise MetricError(
            f"more than {MAX_PATIENTS:,} patients would be needed: the difference is too small for this "
            "variance",
            "value",
        )
    while high - low > 1:
        middle = (low + high) // 2
        enough = comparison_power(effect, middle, level, share=share) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high
