"""Two classifiers on the same patches: the difference of each metric, with an interval over patients."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from biopsy.statistics.intervals import Interval, carried_by, check_level, estimate_from
from biopsy.statistics.metrics import METRICS, UNBOUNDED
from biopsy.statistics.replicates import DRAWS, replicate
from biopsy.statistics.tallies import rank


def estimate_differences(
    target: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    group_ids: ArrayLike,
    *,
    names: Iterable[str] = tuple(METRICS),
    thresholds: Sequence[float] = (0.5, 0.5),
    seed: int,
    level: float = 0.95,
    draws: int = DRAWS,
    unit: str = "patient",
) -> dict[str, Interval]:
    """Give each metric of the first minus that of the second.

    Both are measured on every reweighting of the patients and the differences' spread is taken, so what makes
    a patient hard for both cancels. The interval is on the plain scale: a difference has no bounds to keep
    away from unless the two are as far apart as can be.

    Args:
        target: 0 or 1 per patch, shape ``(n_patches,)``.
        first: Probability of the positive class per patch, by the one.
        second: The same, by the other.
        group_ids: The patient (slide, or patch where no ids exist) of each patch.
        names: Which metrics.
        thresholds: At which the first and the second call a patch positive.
        seed: For the bootstrap, used from 100 groups on.
        level: Nominal coverage.
        draws: Bootstrap draws.
        unit: What a group is, for the reasons.

    Raises:
        MetricError: For values that allow no metric, patches without a group, or a level outside 0-1.
    """
    check_level(level)
    names = list(names)
    samples = [
        rank(target, prob, threshold, group_ids=group_ids)
        for prob, threshold in zip((first, second), thresholds, strict=True)
    ]
    results = [replicate(sample, seed=seed, draws=draws, names=names) for sample in samples]
    found = {}
    for name in names:
        metric = METRICS[name]
        value = results[0].value[name] - results[1].value[name]
        if np.isnan(value):
            undefined = samples[int(not np.isnan(results[0].value[name]))]
            found[name] = Interval(value, reason=f"undefined: {metric.why_undefined(undefined.tally())}")
            continue
        found[name] = estimate_from(
            value,
            results[0].replicates[name] - results[1].replicates[name],
            results[0].method,
            min(carried_by(metric, sample) for sample in samples),
            bounds=UNBOUNDED,
            level=level,
            unit=unit,
        )
    return found
