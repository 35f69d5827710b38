"""Paired differences between classifiers on the same patches, with intervals over patients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from biopsy.core.errors import MetricError
from biopsy.core.text import plural
from biopsy.statistics.intervals import GroupedSample, Replicates, average, replicate
from biopsy.statistics.metrics import Metric, registry
from biopsy.statistics.resampling import Floats, Interval, Resampler, Resampling, fewest_informative
from biopsy.statistics.weighted_counts import sort_scores

SAME = "the estimates are identical, also when any group is left out"


@dataclass(frozen=True)
class Sample:
    """Metrics of a classifier, or of several seeds of a recipe, on every resample.

    Attributes:
        samples: One per seed, of the same patches and groups.
        by_seed: Each metric of each seed, ``(n_seeds,)``.
        result: Mean over seeds of the metrics, on the sample and on each resample.
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
    """Difference of a metric, first minus second.

    Attributes:
        interval: Over patients, and over seeds if both have several (a comparison of recipes; otherwise of
            trained networks).
        p: Two-sided p-value of Student's t with the same standard error and degrees of freedom; 1 if the two
            are identical, None without an interval.
        over_patients: Interval over patients only.
    """

    interval: Interval
    p: float | None
    over_patients: Interval


def sample_seeds(
    samples: Sequence[GroupedSample], resampler: Resampler, *, names: Iterable[str] | None = None
) -> Sample:
    """Return the metrics of one classifier, or the mean over its seeds, on every resample of the groups."""
    names = None if names is None else list(names)
    results = [replicate(sample, resampler, names) for sample in samples]
    by_seed = {name: np.array([result.value[name] for result in results]) for name in results[0].value}
    return Sample(samples, by_seed, average(results))


def subtract(first: Sample, second: Sample) -> dict[str, Difference]:
    """Return the paired differences of metrics, first minus second.

    Both are computed on every resample of the patients, so that the difficulty of a patient cancels. The
    interval is on the original scale. If both have several seeds, the variances of the means over seeds are
    added to that over patients, with Satterthwaite's degrees of freedom; seeds of two recipes are treated as
    independent.
    """
    resampler = first.result.resampler
    if not np.array_equal(first.samples[0].groups, second.samples[0].groups):
        raise MetricError(
            f"the two samples are not of the same {plural(resampler.unit)}: compare predictions of the same "
            "patches",
            "order",
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
    reason = None
    if np.isnan(value):
        counts = (sample.count() for sample in samples)
        reason = next(metric.why_undefined(count) for count in counts if np.isnan(metric.compute(count)))
    informative = fewest_informative([sample.informative_groups(metric.needs) for sample in samples])
    over_patients = resampler.interval(value, replicates, informative, undefined=reason)
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
    """Return the paired differences of metrics of two arrays of probabilities, see `subtract`.

    Args:
        target: 0 or 1 per patch, shape ``(n_patches,)``.
        first: Positive probability of each patch by the first classifier.
        second: By the second classifier.
        thresholds: Decision thresholds of the first and second classifier.
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
    """Return p-values of several comparisons adjusted for the family-wise error rate (Holm 1979).

    The smallest of ``m`` is multiplied by ``m``, the next by ``m - 1``, and so on, kept monotonic. None is
    not counted as a comparison.

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
