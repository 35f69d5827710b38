"""Two classifiers on the same patches: the difference of each metric, with an interval over patients."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import (
    DRAWS,
    GroupedSample,
    Interval,
    Replicates,
    average,
    carried_by,
    check_level,
    estimate_from,
    replicate,
    standard_error,
)
from biopsy.statistics.metrics import UNBOUNDED, registry
from biopsy.statistics.weighted_counts import rank

SAME = "the two do not differ, whoever is left out"


@dataclass(frozen=True)
class Sample:
    """What one classifier says, ready to be compared: sorted, and measured on every reweighting.

    Attributes:
        samples: One a seed, of the same patches and groups.
        result: The mean of their metrics, on the sample and on each of its reweightings.
    """

    samples: Sequence[GroupedSample]
    result: Replicates


@dataclass(frozen=True)
class Difference:
    """A metric of the first less that of the second, and how easily chance alone gives as much.

    Attributes:
        interval: The difference with its interval.
        p: Of Student's t, two-sided: the difference over the standard error that its replicates imply, with
            one degree of freedom less than the groups that carry the metric. 1 where the two are the same,
            None where there is no interval.
    """

    interval: Interval
    p: float | None


def sample_seeds(
    samples: Sequence[GroupedSample], *, seed: int, names: Iterable[str] | None = None, draws: int = DRAWS
) -> Sample:
    """Measure one classifier, or the mean of its seeds, on every reweighting of the groups.

    Args:
        samples: One a seed, of the same ``group_ids``.
        seed: For the bootstrap, used from 100 groups on; the same for all that are compared.
        names: Which metrics; all if not given.
        draws: Bootstrap draws.
    """
    names = None if names is None else list(names)
    return Sample(samples, average([replicate(one, seed=seed, draws=draws, names=names) for one in samples]))


def subtract(
    first: Sample, second: Sample, *, level: float = 0.95, unit: str = "patient"
) -> dict[str, Difference]:
    """Give each metric of the first minus that of the second.

    Both are measured on every reweighting of the patients and the differences' spread is taken, so what makes
    a patient hard for both cancels. The interval is on the plain scale: a difference has no bounds to keep
    away from unless the two are as far apart as can be.

    Raises:
        MetricError: If the two are not of the same groups, or the level is outside 0-1.
    """
    check_level(level)
    if not np.array_equal(first.samples[0].groups, second.samples[0].groups):
        raise MetricError(f"the two are not of the same {unit}s: compare what both say of the same patches")
    found, known = {}, registry(type(first.samples[0].tally()))
    for name in first.result.value:
        metric = known[name]
        value = first.result.value[name] - second.result.value[name]
        if np.isnan(value):
            tallies = (one.tally() for sample in (first, second) for one in sample.samples)
            why = next(metric.why_undefined(tally) for tally in tallies if np.isnan(metric.compute(tally)))
            found[name] = Difference(Interval(value, reason=f"undefined: {why}"), None)
            continue
        replicates = first.result.replicates[name] - second.result.replicates[name]
        if value == 0 and not np.any(replicates):
            found[name] = Difference(Interval(0.0, reason=f"no spread to learn from: {SAME}"), 1.0)
            continue
        method = first.result.method
        n, has = min(carried_by(metric, one) for sample in (first, second) for one in sample.samples)
        interval = estimate_from(
            value, replicates, method, (n, has), bounds=UNBOUNDED, level=level, unit=unit
        )
        p = None
        if interval.low is not None:
            error = standard_error(replicates[~np.isnan(replicates)], method)
            p = float(2 * stats.t.sf(abs(value) / error, n - 1))
        found[name] = Difference(interval, p)
    return found


def estimate_differences(
    target: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    group_ids: ArrayLike,
    *,
    names: Iterable[str] | None = None,
    thresholds: Sequence[float] = (0.5, 0.5),
    seed: int,
    level: float = 0.95,
    draws: int = DRAWS,
    unit: str = "patient",
) -> dict[str, Interval]:
    """Give each metric of the first minus that of the second, as `subtract`.

    Args:
        target: 0 or 1 per patch, shape ``(n_patches,)``.
        first: Probability of the positive class per patch, by the one.
        second: The same, by the other.
        group_ids: The patient (slide, or patch where no ids exist) of each patch.
        names: Which metrics; all if not given.
        thresholds: At which the first and the second call a patch positive.
        seed: For the bootstrap, used from 100 groups on.
        level: Nominal coverage.
        draws: Bootstrap draws.
        unit: What a group is, for the reasons.

    Raises:
        MetricError: For values that allow no metric, patches without a group, or a level outside 0-1.
    """
    check_level(level)
    names = None if names is None else list(names)
    one, other = (
        sample_seeds([rank(target, prob, at, group_ids=group_ids)], seed=seed, names=names, draws=draws)
        for prob, at in zip((first, second), thresholds, strict=True)
    )
    found = subtract(one, other, level=level, unit=unit)
    return {name: difference.interval for name, difference in found.items()}


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct the p-values of several comparisons so that the chance of any false one stays at the level.

    Holm (1979), A simple sequentially rejective multiple test procedure: the smallest of ``m`` is multiplied
    by ``m``, the next by ``m - 1``, none below one before it. What has no p-value is no comparison.

    Example:
        >>> adjust_holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank_of_p, (p, place) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank_of_p)))
        adjusted[place] = least
    return adjusted
