"""Metrics with confidence intervals over patients: pooled over patches, and as means over patients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from biopsy.core.text import count
from biopsy.statistics.metrics import METRICS, Metric, measure, registry
from biopsy.statistics.multiclass import ClassSample
from biopsy.statistics.resampling import (
    BOOTSTRAP_FROM,
    MIN_GROUPS,
    Floats,
    InformativeGroups,
    Interval,
    Resampler,
    Resampling,
    divide,
    group_codes,
    sum_groups,
)
from biopsy.statistics.weighted_counts import SortedScores, sort_scores

GroupedSample = SortedScores | ClassSample
"""Patches in groups that can be weighted."""


@dataclass(frozen=True)
class Replicates:
    """Metrics of a sample and of its resamples.

    Attributes:
        value: Each metric on the sample.
        replicates: Each metric on every replicate, shape ``(n_replicates,)``.
    """

    value: dict[str, float]
    replicates: dict[str, Floats]
    resampler: Resampler


def replicate(sample: GroupedSample, resampler: Resampler, names: Iterable[str] | None = None) -> Replicates:
    """Return metrics (all, or the given names) of a sample and of each resample of its groups."""
    names = list(measure(sample.count(), names))
    values, replicates = resampler.replicate(
        lambda weight: list(measure(sample.count(weight), names).values())
    )
    return Replicates(
        dict(zip(names, values.tolist(), strict=True)),
        dict(zip(names, replicates.T, strict=True)),
        resampler,
    )


def average(results: Sequence[Replicates]) -> Replicates:
    """Return the mean over seeds of metrics of the same groups, per replicate.

    A metric that is undefined in one of them is undefined in the mean.
    """
    return Replicates(
        {name: float(np.mean([result.value[name] for result in results])) for name in results[0].value},
        {name: np.mean([result.replicates[name] for result in results], axis=0) for name in results[0].value},
        results[0].resampler,
    )


@dataclass(frozen=True)
class PatientSummary(Interval):
    """A metric within patients: mean with interval, number of patients, median and worst patient."""

    n_defined: int = 0
    median: float | None = None
    worst: float | None = None


def estimate_metric(metric: Metric, sample: GroupedSample, result: Replicates) -> Interval:
    """Return a metric with its interval, or the reason why there is none."""
    value = result.value[metric.name]
    if metric.no_interval and not np.isnan(value):
        return Interval(value, reason=metric.no_interval)
    return result.resampler.interval(
        value,
        result.replicates[metric.name],
        sample.informative_groups(metric.needs),
        bounds=metric.bounds,
        share=metric.share,
        undefined=metric.why_undefined(sample.count()) if np.isnan(value) else None,
    )


def estimate_metrics(
    sample: GroupedSample, names: Iterable[str] | None = None, **resampling: Unpack[Resampling]
) -> dict[str, Interval]:
    """Return the metrics of a sample (all, or the given names) with intervals over its groups."""
    result = replicate(sample, Resampler(len(sample.groups), **resampling), names)
    metrics = registry(type(sample.count()))
    return {name: estimate_metric(metrics[name], sample, result) for name in result.value}


def estimate_one_vs_rest(
    sample: ClassSample, **resampling: Unpack[Resampling]
) -> dict[str, dict[str, Interval]]:
    """Return the binary metrics of each class against the rest, by class name."""
    classes = zip(sample.class_names, sample.one_vs_rest, strict=True)
    return {name: estimate_metrics(scores, **resampling) for name, scores in classes}


def measure_groups(
    target: ArrayLike, prob: ArrayLike, group_ids: ArrayLike, threshold: float = 0.5
) -> tuple[NDArray[np.object_], dict[str, Floats]]:
    """Return the metrics within each group, except those marked `Metric.pooled_only`.

    Returns:
        The group ids in sorted order, and per metric one value for each, NaN where undefined.
    """
    scores = sort_scores(target, prob, threshold, group_ids=group_ids)
    order = np.argsort(scores.group, kind="stable")
    cuts = np.flatnonzero(np.diff(scores.group[order])) + 1
    names = [metric.name for metric in METRICS.values() if not metric.pooled_only]
    rows = [
        measure(sort_scores(scores.y_true[members], scores.y_prob[members], threshold).count(), names)
        for members in np.split(order, cuts)
    ]
    return scores.groups, {name: np.array([row[name] for row in rows]) for name in names}


def estimate_patient_metrics(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    threshold: float = 0.5,
    *,
    unit: str = "patient",
) -> dict[str, PatientSummary]:
    """Return means over patients, with equal weights, of the metrics within each patient.

    Metrics marked `Metric.pooled_only` (calibration) are excluded, and patients in whom a metric is undefined
    are excluded from it. The interval is Student's t over patients, on the metric's unbounded scale.
    """
    _, table = measure_groups(target, prob, group_ids, threshold)
    return {name: summarise_groups(METRICS[name], values, 0.95, unit) for name, values in table.items()}


def summarise_groups(metric: Metric, values: Floats, level: float, unit: str) -> PatientSummary:
    """Return the summary of a metric over the groups in which it is defined."""
    defined = values[~np.isnan(values)]
    n = len(defined)
    if n == 0:
        return PatientSummary(float("nan"), reason=f"undefined in every {unit}")
    mean = float(defined.mean())
    if n < MIN_GROUPS:
        interval = Interval(mean, reason=f"defined in only {count(n, unit)}: an interval needs {MIN_GROUPS}")
    else:
        resampler = Resampler(n, unit=unit, level=level, bootstrap_from=None)
        without_one = (defined.sum() - defined) / (n - 1)
        interval = resampler.interval(
            mean, without_one, InformativeGroups(np.ones(n)), bounds=metric.bounds, share=metric.share
        )
    worst = float(defined[np.argmax(np.abs(defined - metric.ideal))])
    return PatientSummary(**vars(interval), n_defined=n, median=float(np.median(defined)), worst=worst)


@dataclass(frozen=True)
class SizeTrend:
    """Rank correlation of the groups' numbers of patches with their errors, and its one-sided p-value."""

    correlation: float
    p: float


def measure_size_trend(target: ArrayLike, error: ArrayLike, group_ids: ArrayLike) -> SizeTrend | None:
    """Test for informative cluster size: whether groups with more patches have larger errors.

    The error of a group is its mean within each class minus the mean over groups in that class, averaged over
    the classes of the group.

    Args:
        error: Error of each patch, ``(n,)``, such as 1 minus the probability of its class.

    Returns:
        Spearman's correlation; None with fewer than 5 groups, equal sizes or equal errors.
    """
    (codes, groups), (classes, target) = group_codes(group_ids), np.unique(target, return_inverse=True)
    sums = sum_groups(codes * len(classes) + target, len(groups) * len(classes), np.ones(len(codes)), error)
    n_patches, total = sums.T.reshape(2, len(groups), len(classes))
    within = divide(total, n_patches)
    size, mean_error = n_patches.sum(axis=1), np.nanmean(within - np.nanmean(within, axis=0), axis=1)
    if len(groups) < MIN_GROUPS or np.ptp(size) == 0 or np.ptp(mean_error) == 0:
        return None
    result = scipy.stats.spearmanr(size, mean_error, alternative="greater")
    return SizeTrend(float(result.statistic), float(result.pvalue))


@dataclass(frozen=True)
class IntervalMethod:
    """Method of the intervals over groups: the ``interval`` entry of `metrics.json`."""

    unit: str
    level: float
    n_groups: int
    method: str
    draws: int | None = None
    seed: int | None = None


def describe_method(n_groups: int, **resampling: Unpack[Resampling]) -> IntervalMethod:
    """Return the method of intervals over ``n_groups`` groups."""
    used = Resampler(n_groups, **resampling)
    if n_groups >= BOOTSTRAP_FROM:
        return IntervalMethod(used.unit, used.level, n_groups, "bootstrap-se", used.draws, used.seed)
    method = "none" if n_groups < MIN_GROUPS else "jackknife-t"
    return IntervalMethod(used.unit, used.level, n_groups, method)
