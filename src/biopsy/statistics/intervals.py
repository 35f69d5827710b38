"""Confidence intervals with the patient as the unit: jackknife, bootstrap, clustered means."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit, logit

from biopsy.core.errors import MetricError
from biopsy.core.seeds import make_rng
from biopsy.statistics.metrics import METRICS, UNBOUNDED, Counts, Metric, measure, registry
from biopsy.statistics.multiclass import ClassSample
from biopsy.statistics.weighted_counts import Floats, rank

Method = Literal["jackknife", "bootstrap"]
BOOTSTRAP_FROM = 100  # below it the bootstrap's own error shows: docs/concepts/intervals.md
DRAWS = 2000


class GroupedSample(Protocol):
    """Patches in groups that can be weighted anew: `tallies.Ranked` or `multiclass.ClassSample`."""

    @property
    def groups(self) -> Any:
        """Ids in sorted order, ``(n_groups,)``."""

    @property
    def needs(self) -> Mapping[str, str]:
        """What a metric may need, in words."""

    def tally(self, weight: Floats | None = None) -> Counts:
        """Count the sample with one weight per group."""

    def carriers(self) -> dict[str, int]:
        """Count the groups that hold each of `needs`."""


@dataclass(frozen=True)
class Replicates:
    """Metrics of a sample, and of the same sample with its groups weighted anew.

    Attributes:
        value: Each metric on the sample as it is.
        replicates: Each metric on every reweighting, shape ``(n_replicates,)``; for the jackknife, entry
            ``i`` leaves out group ``i`` in the order of sorted ids.
        method: How the groups were reweighted.
        n_groups: Groups in the sample.
    """

    value: dict[str, float]
    replicates: dict[str, Floats]
    method: Method
    n_groups: int


def standard_error(replicates: Floats, method: Method) -> float:
    """Give the standard error that replicates imply (Efron and Tibshirani 1993, eq. 6.6 and 11.5)."""
    n = len(replicates)
    sum_of_squares = float(((replicates - replicates.mean()) ** 2).sum())
    return float(np.sqrt(sum_of_squares * (n - 1) / n if method == "jackknife" else sum_of_squares / (n - 1)))


def reweightings(n_groups: int, *, seed: int, draws: int) -> Iterator[Floats]:
    """Yield weights per group: each group left out once, or from 100 groups whole groups drawn anew."""
    if n_groups < BOOTSTRAP_FROM:
        for left_out in range(n_groups):
            weight = np.ones(n_groups)
            weight[left_out] = 0
            yield weight
    else:
        rng = make_rng(seed, "bootstrap")
        for _ in range(draws):
            yield np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)


def reweigh(sums: Floats, *, seed: int, draws: int = DRAWS) -> tuple[Floats, Method]:
    """Add up what each group has, ``(n_groups, k)``, on every reweighting: ``(n_replicates, k)``, and how."""
    if len(sums) < BOOTSTRAP_FROM:
        return sums.sum(axis=0) - sums, "jackknife"
    weights = reweightings(len(sums), seed=seed, draws=draws)
    return np.stack([weight @ sums for weight in weights]), "bootstrap"


def replicate(
    sample: GroupedSample, *, seed: int, draws: int = DRAWS, names: Iterable[str] | None = None
) -> Replicates:
    """Compute metrics on a sample and on each reweighting of its groups.

    Args:
        sample: From `tallies.rank` or `multiclass.class_sample`, with ``group_ids``.
        seed: For the bootstrap; the same seed and the same groups give the same reweightings.
        draws: Bootstrap draws.
        names: Metrics wanted; all if not given.
    """
    n_groups, value = len(sample.groups), measure(sample.tally(), names)
    defined = [name for name in value if not np.isnan(value[name])]
    weights = reweightings(n_groups, seed=seed, draws=draws)
    rows = [
        list(measure(sample.tally(w), defined).values()) if w.any() else [np.nan] * len(defined)
        for w in weights
    ]
    table = np.array(rows).reshape(len(rows), len(defined))
    replicates = {name: table[:, column] for column, name in enumerate(defined)}
    return Replicates(value, replicates, "jackknife" if n_groups < BOOTSTRAP_FROM else "bootstrap", n_groups)


def average(results: Sequence[Replicates]) -> Replicates:
    """Give the mean over seeds (or classes) of metrics of the same groups, reweighting by reweighting.

    A metric that is undefined in one of them is undefined in the mean.
    """
    names = list(results[0].value)
    everywhere = [name for name in names if all(name in result.replicates for result in results)]
    return Replicates(
        {name: float(np.mean([result.value[name] for result in results])) for name in names},
        {name: np.mean([result.replicates[name] for result in results], axis=0) for name in everywhere},
        results[0].method,
        results[0].n_groups,
    )


FEWEST_GROUPS = 5
MOST_UNDEFINED = 0.05  # share of bootstrap draws that may miss, say, the few patients with positive patches


@dataclass(frozen=True)
class Interval:
    """A number and the range it may stand for; NaN or None with the reason where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, float | str | None]:
        """Give what `metrics.json` holds: an undefined value becomes null."""
        value = None if np.isnan(self.value) else self.value
        return {"value": value, "low": self.low, "high": self.high, "reason": self.reason}


@dataclass(frozen=True)
class PatientSummary:
    """A metric computed within each patient: the mean with its interval, the median, the worst patient."""

    mean: Interval
    n_defined: int
    median: float | None
    worst: float | None

    def to_dict(self) -> dict[str, float | int | str | None]:
        extra = {"n_defined": self.n_defined, "median": self.median, "worst": self.worst}
        return self.mean.to_dict() | extra


def carry(values: Floats, bounds: tuple[float, float]) -> Floats:
    """Carry a metric to a scale without bounds: logit between two, logarithm above one, plain without any."""
    low, high = bounds
    if np.isinf(low):
        return values
    return np.log(values - low) if np.isinf(high) else logit((values - low) / (high - low))


def carry_back(values: Floats, bounds: tuple[float, float]) -> Floats:
    """Undo `carry`."""
    low, high = bounds
    if np.isinf(low):
        return values
    return low + np.exp(values) if np.isinf(high) else low + (high - low) * expit(values)


def slope_of_carry(value: float, bounds: tuple[float, float]) -> float:
    """Give the derivative of `carry` at a value between the bounds."""
    low, high = bounds
    if np.isinf(low):
        return 1.0
    return 1 / (value - low) if np.isinf(high) else (high - low) / ((value - low) * (high - value))


def spread_interval(
    value: float,
    replicates: Floats,
    method: Method,
    *,
    bounds: tuple[float, float],
    n_groups: int,
    level: float,
) -> Interval:
    """Give ``value`` plus and minus Student's t standard errors, on a scale without the metric's bounds.

    Where leaving out one group lands exactly on a bound, which that scale does not have, the standard error
    of the plain scale is carried over by the slope at the value.
    """
    if not np.ptp(replicates) > 1e-12:
        return Interval(value, reason="leaving one out does not change it: no spread to learn from")
    if value in bounds:
        return Interval(value, reason=f"it is exactly {value:g}, its bound: no spread to learn from")
    if np.isin(replicates, bounds).any():
        error = standard_error(replicates, method) * slope_of_carry(value, bounds)
    else:
        error = standard_error(carry(replicates, bounds), method)
    half = float(stats.t.ppf((1 + level) / 2, n_groups - 1)) * error
    low, high = carry_back(carry(np.array(value), bounds) + np.array([-half, half]), bounds)
    return Interval(value, float(low), float(high))


def bound_interval(value: float, n_groups: int, level: float) -> Interval:
    """Give the interval of a share that is exactly 0 or 1, where replicates have no spread.

    Clopper and Pearson's limit with the patient as the trial: if in none of ``n`` patients a single patch is
    wrong, the share of patients with a wrong patch, and so (with patients of equal weight) the share of
    wrong patches, is at most ``1 - ((1 - level) / 2) ** (1 / n)``.
    """
    widest = 1 - ((1 - level) / 2) ** (1 / n_groups)
    return Interval(value, 1 - widest, 1.0) if value == 1 else Interval(value, 0.0, widest)


def carried_by(metric: Metric, sample: GroupedSample) -> tuple[int, str]:
    """Count the groups that an interval of a metric can learn from, and say what they have."""
    carriers = sample.carriers()
    need = min(metric.needs, key=carriers.__getitem__, default=None)
    return (len(sample.groups), "patches") if need is None else (carriers[need], sample.needs[need])


def estimate_metric(
    metric: Metric, sample: GroupedSample, result: Replicates, *, level: float, unit: str
) -> Interval:
    """Give one metric with its interval, or with the reason why it has none."""
    value = result.value[metric.name]
    if np.isnan(value):
        return Interval(value, reason=f"undefined: {metric.why_undefined(sample.tally())}")
    n, has = carried_by(metric, sample)
    if n >= FEWEST_GROUPS and metric.share and value in (0.0, 1.0):
        return bound_interval(value, n, level)
    replicates = result.replicates[metric.name]
    return estimate_from(
        value, replicates, result.method, (n, has), bounds=metric.bounds, level=level, unit=unit
    )


def estimate_from(
    value: float,
    replicates: Floats,
    method: Method,
    carriers: tuple[int, str],
    *,
    bounds: tuple[float, float],
    level: float,
    unit: str,
) -> Interval:
    """Give a value with the interval its replicates allow, or with the reason why they allow none.

    Args:
        value: On the sample as it is.
        replicates: The same on every reweighting, NaN where undefined.
        method: How the groups were reweighted.
        carriers: How many groups an interval can learn from, and what they have.
        bounds: Between which values it lives.
        level: Nominal coverage.
        unit: What a group is, for the reasons.
    """
    n, has = carriers
    if n < FEWEST_GROUPS:
        return Interval(value, reason=f"only {n} {unit}(s) with {has}: an interval needs {FEWEST_GROUPS}")
    undefined = np.isnan(replicates)
    if undefined.mean() > (MOST_UNDEFINED if method == "bootstrap" else 0):
        return Interval(value, reason=f"undefined when {unit}s are left out: no interval")
    return spread_interval(value, replicates[~undefined], method, bounds=bounds, n_groups=n, level=level)


def estimate_patch_metrics(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    threshold: float = 0.5,
    *,
    seed: int,
    level: float = 0.95,
    draws: int = DRAWS,
    unit: str = "patient",
    called: ArrayLike | None = None,
) -> dict[str, Interval]:
    """Give every metric pooled over patches, with an interval over groups of patches.

    Args:
        target: 0 or 1 per patch, shape ``(n_patches,)``.
        prob: Probability of the positive class per patch.
        group_ids: The patient (slide, or patch where no ids exist) of each patch.
        threshold: A patch is called positive where ``prob >= threshold``.
        seed: For the bootstrap, used from 100 groups on.
        level: Nominal coverage.
        draws: Bootstrap draws.
        unit: What a group is, for the reasons.
        called: Which patches are called positive, where that is not a matter of one threshold.

    Raises:
        MetricError: For values that allow no metric, patches without a group, or a level outside 0-1.
    """
    ranked = rank(target, prob, threshold, group_ids=group_ids, called=called)
    return estimate_metrics(ranked, seed=seed, level=level, draws=draws, unit=unit)


def estimate_metrics(
    sample: GroupedSample,
    *,
    seed: int,
    names: Iterable[str] | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    unit: str = "patient",
) -> dict[str, Interval]:
    """Return every metric of a sample's kind (or those named), with an interval over its groups."""
    check_level(level)
    result, known = replicate(sample, seed=seed, draws=draws, names=names), registry(type(sample.tally()))
    return {
        name: estimate_metric(known[name], sample, result, level=level, unit=unit) for name in result.value
    }


def estimate_class_metrics(
    sample: ClassSample, *, seed: int, level: float = 0.95, draws: int = DRAWS, unit: str = "patient"
) -> tuple[dict[str, Interval], dict[str, dict[str, Interval]]]:
    """Return every metric of more than two classes, and those of each class against the rest.

    Args:
        sample: From `multiclass.class_sample`.
        seed, level, draws, unit: As in `estimate_patch_metrics`.

    Returns:
        Metric to interval; class name to metric of two classes to interval.
    """
    options: dict[str, Any] = {"seed": seed, "level": level, "draws": draws, "unit": unit}
    per_class = {
        name: estimate_metrics(one, **options)
        for name, one in zip(sample.class_names, sample.one_vs_rest, strict=True)
    }
    return estimate_metrics(sample, **options), per_class


def measure_groups(
    target: ArrayLike, prob: ArrayLike, group_ids: ArrayLike, threshold: float = 0.5
) -> tuple[NDArray[np.object_], dict[str, Floats]]:
    """Compute every metric within each group.

    Returns:
        The group ids in sorted order, and per metric one value for each, NaN where undefined.
    """
    ranked = rank(target, prob, threshold, group_ids=group_ids)
    order = np.argsort(ranked.group, kind="stable")
    cuts = np.flatnonzero(np.diff(ranked.group[order])) + 1
    rows = []
    for rows_of_group in np.split(order, cuts):
        rows.append(
            measure(rank(ranked.target[rows_of_group], ranked.y_prob[rows_of_group], threshold).tally())
        )
    return ranked.groups, {name: np.array([row[name] for row in rows]) for name in METRICS}


def estimate_patient_metrics(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    threshold: float = 0.5,
    *,
    level: float = 0.95,
    unit: str = "patient",
) -> dict[str, PatientSummary]:
    """Give every metric as a mean over patients, each computed within one patient and weighing the same.

    Patients in whom a metric is undefined (no positive patch, say) are left out of it and ``n_defined`` says
    how many remain. The interval is Student's t over those patients, on the metric's unbounded scale.
    """
    check_level(level)
    _, table = measure_groups(target, prob, group_ids, threshold)
    return {m.name: summarise_groups(m, table[m.name], level, unit) for m in METRICS.values()}


def summarise_groups(metric: Metric, values: Floats, level: float, unit: str) -> PatientSummary:
    """Summarise one metric over the groups in which it is defined."""
    defined = values[~np.isnan(values)]
    n = len(defined)
    if n == 0:
        return PatientSummary(Interval(float("nan"), reason=f"undefined in every {unit}"), 0, None, None)
    mean = float(defined.mean())
    if n < FEWEST_GROUPS:
        interval = Interval(mean, reason=f"defined in only {n} {unit}(s): an interval needs {FEWEST_GROUPS}")
    elif metric.share and mean in (0.0, 1.0):
        interval = bound_interval(mean, n, level)
    else:
        without_one = (defined.sum() - defined) / (n - 1)
        interval = spread_interval(
            mean, without_one, "jackknife", bounds=metric.bounds, n_groups=n, level=level
        )
    worst = float(defined[np.argmax(np.abs(defined - metric.ideal))])
    return PatientSummary(interval, n, float(np.median(defined)), worst)


def describe_method(
    n_groups: int, *, seed: int, level: float = 0.95, draws: int = DRAWS, unit: str = "patient"
) -> dict[str, float | int | str | None]:
    """Give the ``interval`` entry of `metrics.json`: how the intervals over ``n_groups`` were made."""
    entry: dict[str, float | int | str | None] = {"unit": unit, "level": level, "n_groups": n_groups}
    if n_groups < FEWEST_GROUPS:
        return entry | {"method": "none", "draws": None, "seed": None}
    if n_groups < BOOTSTRAP_FROM:
        return entry | {"method": "jackknife-t", "draws": None, "seed": None}
    return entry | {"method": "bootstrap-se", "draws": draws, "seed": seed}


def check_level(level: float) -> None:
    """Refuse a nominal coverage that is none."""
    if not 0 < level < 1:
        raise MetricError(f"level is {level!r}: the nominal coverage lies between 0 and 1, such as 0.95")


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
