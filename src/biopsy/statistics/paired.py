"""Paired differences between classifiers on the same patches, with intervals over patients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import GroupedSample, Replicates, average, replicate
from biopsy.statistics.metrics import Metric, registry
from biopsy.statistics.resampling import Floats, Interval, Resampler, Resampling, fewest_informative
from biopsy.statistics.weighted_counts import sort_scores

SAME = "the two do not differ, whichever group is left out"


@dataclass(frozen=True)
class Sample:
    """Metrics of one classifier, or of the seeds of one recipe, on every resample.

    Attributes:
        samples: One per seed, of the same patches and groups.
        by_seed: Each metric of each seed, ``(n_seeds,)``.
        result: The mean over seeds of their metrics, on the sample and on each of its reweightings.
    """

    samples: Sequence[GroupedSample]
    by_seed: dict[str, Floats]
    result: Replicates

    def seed_variance(self, name: str) -> float:
        """Return the variance of a metric's mean over seeds due to training seeds."""
        values = self.by_seed[name]
        return float(np.var(values, ddof=1)) / len(values)


@dataclass(frozen=True)
class Difference:
    """A metric of the first minus that of the second.

    Attributes:
        interval: Over patients and, where both have several seeds, over seeds: of recipes, then. With one
            seed for either it is that of two trained networks.
        p: Two-sided, of Student's t for the same standard error and degrees of freedom. 1 where the two are
            the same, None where there is no interval.
        over_patients: The interval over patients alone.
    """

    interval: Interval
    p: float | None
    over_patients: Interval


def sample_seeds(
    samples: Sequence[GroupedSample], resampler: Resampler, *, names: Iterable[str] | None = None
) -> Sample:
    """Return the metrics of one classifier, or the mean over its seeds, on every resample of the groups.

    Args:
        samples: One per seed, of the same ``group_ids``.
        resampler: The same for all that are compared.
    """
    names = None if names is None else list(names)
    results = [replicate(sample, resampler, names) for sample in samples]
    by_seed = {name: np.array([result.value[name] for result in results]) for name in results[0].value}
    return Sample(samples, by_seed, average(results))


def subtract(first: Sample, second: Sample) -> dict[str, Difference]:
    """Return each metric of the first minus that of the second.

    Both are measured on every reweighting of the patients and the differences' spread is taken, so what makes
    a patient hard for both cancels. The interval is on the plain scale: a difference has no bounds to keep
    away from unless the two are as far apart as can be. With several seeds on both sides the variances of the
    seeds' means are added to that over patients, with Satterthwaite's degrees of freedom; seeds of two
    recipes are taken as independent, also where their numbers are the same.

    Raises:
        MetricError: If the two are not of the same groups.
    """
    resampler = first.result.resampler
    if not np.array_equal(first.samples[0].groups, second.samples[0].groups):
        raise MetricError(
            f"the two samples are not of the same {resampler.unit}s: compare predictions of the same patches"
        )
    metrics = registry(type(first.samples[0].count()))
    return {name: _subtract_metric(metrics[name], first, second) for name in first.result.value}


def _subtract_metric(metric: Metric, first: Sample, second: Sample) -> Difference:
    name, resampler = metric.name, first.result.resampler
    samples = (*first.samples, *second.samples)
    value = first.result.value[name] - second.result.value[name]
    replicates = first.result.replicates[name] - second.result.replicates[name]
    if value == 0 and not np.any(replicates):
        zero = Interval(0.0, reason=SAME)
        return Difference(zero, 1.0, zero)
    if metric.no_interval and not np.isnan(value):
        none = Interval(value, reason=metric.no_interval)
        return Difference(none, None, none)
    why = None
    if np.isnan(value):
        counts = (sample.count() for sample in samples)
        why = next(metric.why_undefined(count) for count in counts if np.isnan(metric.compute(count)))
    informative = fewest_informative([sample.informative_groups(metric.needs) for sample in samples])
    over_patients = resampler.interval(value, replicates, informative, undefined=why)
    if over_patients.low is None:
        return Difference(over_patients, None, over_patients)
    variances = [(resampler.standard_error(replicates[~np.isnan(replicates)]) ** 2, informative.freedom)]
    if min(len(first.samples), len(second.samples)) > 1:
        variances += [(sample.seed_variance(name), len(sample.samples) - 1) for sample in (first, second)]
    error, freedom = satterthwaite(variances)
    half = float(stats.t.ppf((1 + resampler.level) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Difference(Interval(value, value - half, value + half), p, over_patients)


def satterthwaite(variances: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the standard error and degrees of freedom of a sum of independent estimates.

    Source: Satterthwaite 1946, "An approximate distribution of estimates of variance components".

    Args:
        variances: Variance and degrees of freedom of each.

    Example:
        >>> satterthwaite([(4.0, 10.0), (0.0, 2.0)])
        (2.0, 10.0)
    """
    total = sum(variance for variance, _ in variances)
    return float(np.sqrt(total)), total**2 / sum(variance**2 / freedom for variance, freedom in variances)


def estimate_differences(
    target: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    group_ids: ArrayLike,
    *,
    names: Iterable[str] | None = None,
    thresholds: Sequence[float] = (0.5, 0.5),
    **resampling: Unpack[Resampling],
) -> dict[str, Interval]:
    """Return each metric of the first minus that of the second, as `subtract`.

    Args:
        target: 0 or 1 per patch, shape ``(n_patches,)``.
        first: Probability of the positive class per patch, by the one.
        second: The same, by the other.
        group_ids: The patient (slide, or patch where no ids exist) of each patch.
        thresholds: At which the first and the second call a patch positive.
        **resampling: As of `Resampler`.

    Raises:
        MetricError: For values that allow no metric, patches without a group, or a level outside 0-1.
    """
    ours, theirs = (
        sort_scores(target, prob, at, group_ids=group_ids)
        for prob, at in zip((first, second), thresholds, strict=True)
    )
    resampler = Resampler(len(ours.groups), **resampling)
    names = None if names is None else list(names)
    differences = subtract(*(sample_seeds([scores], resampler, names=names) for scores in (ours, theirs)))
    return {name: difference.interval for name, difference in differences.items()}


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values of several comparisons adjusted for the family-wise error rate.

    Holm (1979), A simple sequentially rejective multiple test procedure: the smallest of ``m`` is multiplied
    by ``m``, the next by ``m - 1``, and so on, kept monotonic. None is not counted as a comparison.

    Example:
        >>> adjust_holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    ordered = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank_of_p, (p, index) in enumerate(ordered):
        least = max(least, min(1.0, p * (len(ordered) - rank_of_p)))
        adjusted[index] = least
    return adjusted
