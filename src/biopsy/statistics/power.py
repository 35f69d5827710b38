"""How many patients it takes to see a difference, from how much patients differ in those at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from scipy import stats

from biopsy.core.errors import MetricError, suggest
from biopsy.core.text import count
from biopsy.statistics.intervals import GroupedSample
from biopsy.statistics.metrics import registry
from biopsy.statistics.resampling import FEWEST_GROUPS, Floats, Resampler, check_level, fewest_informative

CORRELATIONS = (0.0, 0.5, 0.8)
MOST_PATIENTS = 1_000_000


@dataclass(frozen=True)
class Need:
    """How many patients a comparison needs.

    Attributes:
        sd: Standard deviation of the patients' influences on the difference.
        n_patients: The fewest that reach the power.
        low: The same, were the spread as small as the patients at hand allow (95 %).
        high: The same, were it as large.
        power: Reached at ``n_patients``.
    """

    sd: float
    n_patients: int
    low: int
    high: int
    power: float


@dataclass(frozen=True)
class Influences:
    """How much each group moves a metric.

    Attributes:
        values: One per group, in the order of sorted ids, ``(n_groups,)``.
        effective: How many groups of equal size those that carry the metric are worth.
    """

    values: Floats
    effective: float


def influence_groups(samples: Sequence[GroupedSample], name: str, *, unit: str = "patient") -> Influences:
    """Return how much each group moves a metric: the jackknife's pseudo-values less their mean.

    Their standard deviation over the square root of their number is the jackknife's standard error (Efron and
    Tibshirani 1993, sec. 11.5).

    Args:
        samples: One a seed, of the same patches; the metric is their mean.
        name: Of the metric.
        unit: What a group is, for the reasons.

    Raises:
        MetricError: If the metric does not exist, is undefined, or fewer than five groups carry it.
    """
    metrics = registry(type(samples[0].count()))
    if name not in metrics:
        raise MetricError(f"metric {name!r} does not exist: {suggest(name, metrics)}")
    metric, n_groups = metrics[name], len(samples[0].groups)
    for sample in samples:
        if np.isnan(metric.compute(sample.count())):
            raise MetricError(f"{name} is undefined: {metric.why_undefined(sample.count())}")
    informative = fewest_informative([sample.informative_groups(metric.needs) for sample in samples])
    if informative.n < FEWEST_GROUPS:
        raise MetricError(
            f"only {count(informative.n, unit)} with {informative.description}: a plan needs the variance "
            f"between at least {FEWEST_GROUPS}"
        )
    resampler = Resampler(n_groups, unit=unit, bootstrap_from=None)
    _, without = resampler.replicate(
        lambda weight: float(np.mean([metric.compute(sample.count(weight)) for sample in samples]))
    )
    if np.isnan(without).any():
        raise MetricError(f"{name} is undefined when {unit}s are left out: no plan can be made")
    return Influences((n_groups - 1) * (without.mean() - without[:, 0]), informative.effective)


def plan_patients(
    sd: float,
    n_groups: int,
    *,
    difference: float,
    effective: float | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> Need:
    """Return the fewest patients whose paired comparison detects a difference with the stated power.

    A comparison detects it when Student's t interval excludes 0; the power is the noncentral t's share beyond
    its quantile, with ``difference / sd * sqrt(n)`` as noncentrality (Cohen 1988, sec. 2.5). Of ``n``
    patients as large a share carries the metric as of those at hand: the degrees of freedom are
    ``n * effective / n_groups - 1``.

    Args:
        sd: Standard deviation of the patients' influences.
        n_groups: Patients it was estimated from.
        difference: To be detected, in units of the metric.
        effective: How many patients of equal size those that carry the metric are worth; all by default. It
            says how uncertain ``sd`` is: ``(effective - 1) sd² / sigma²`` is taken as chi-square.
        power: Probability of detecting the difference.

    Raises:
        MetricError: If difference, power, level or variance allow no plan.

    Example:
        >>> plan_patients(0.1, 20, difference=0.05).n_patients
        34
    """
    check_level(level)
    if not (np.isfinite(difference) and difference > 0):
        raise MetricError(f"difference is {difference!r}: give one above 0, such as 0.03")
    if not level > 1 - power > 0:
        raise MetricError(f"power is {power!r}: it lies between {1 - level:.2g} and 1, such as 0.8")
    if not sd > 1e-12:
        raise MetricError("the metric does not vary between patients: its variance allows no plan")
    effective = n_groups if effective is None else effective
    share, freedom = effective / n_groups, effective - 1
    if not freedom >= 1:
        raise MetricError(
            f"the {n_groups} patients are worth {effective:.1f} of equal size that carry the metric: a plan "
            "needs at least 2"
        )
    spread = [sd * np.sqrt(freedom / stats.chi2.ppf(tail, freedom)) for tail in (0.975, 0.025)]
    n, low, high = (_fewest(difference / sd_bound, power, level, share) for sd_bound in (sd, *spread))
    return Need(sd, n, low, high, reach_power(difference / sd, n, level, share=share))


def reach_power(effect: float, n_patients: int, level: float = 0.95, *, share: float = 1.0) -> float:
    """Return the power for an effect in standard deviations between patients, a share of whom carry it."""
    freedom = n_patients * share - 1
    cut = float(stats.t.ppf((1 + level) / 2, freedom))
    away = effect * np.sqrt(n_patients)
    return float(stats.nct.sf(cut, freedom, away) + stats.nct.cdf(-cut, freedom, away))


def _fewest(effect: float, power: float, level: float, share: float) -> int:
    """Bisect for the fewest patients, never fewer than an interval needs."""
    high = ceil(FEWEST_GROUPS / share)
    low = high - 1
    while high < MOST_PATIENTS and reach_power(effect, high, level, share=share) < power:
        low, high = high, high * 2
    if high >= MOST_PATIENTS:
        raise MetricError(
            f"more than {MOST_PATIENTS:,} patients would be needed: the difference is too small for this "
            "variance"
        )
    while high - low > 1:
        middle = (low + high) // 2
        enough = reach_power(effect, middle, level, share=share) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high
