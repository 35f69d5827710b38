"""Confidence intervals with the patient as the unit, for any statistic.

A statistic is a function of one weight per group. Below 100 groups, each is left out once (jackknife); from
100 on, groups are drawn with replacement (bootstrap). The replicates give a standard error on an unbounded
scale, and the interval is Student's t with ``(sum n)² / sum n² - 1`` degrees of freedom (the effective number
of groups minus 1) for groups with ``n`` patches on which the statistic depends.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Required, Unpack

import numpy as np
import pandas as pd
import scipy
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypedDict

from biopsy.core.errors import MetricError
from biopsy.core.loaders import FloatOrNan
from biopsy.core.seeds import make_rng
from biopsy.core.text import count, plural

Floats = NDArray[np.float64]
Method = Literal["jackknife", "bootstrap"]
Bounds = tuple[float, float]
Statistic = Callable[[Floats], ArrayLike]
"""Maps one weight per group, ``(n_groups,)``, to ``k`` values, ``(k,)``."""

BOOTSTRAP_FROM = 100  # groups; with fewer, the bootstrap is inaccurate: docs/concepts/intervals.md
DRAWS = 2000
MIN_GROUPS = 5
MIN_EFFECTIVE_GROUPS = 2.0  # groups of equal size; t with less than one degree of freedom spans everything
MAX_UNDEFINED = 0.05  # share of bootstrap draws that may miss, say, the few patients with positive patches
SHARE: Bounds = (0.0, 1.0)
UNBOUNDED: Bounds = (-np.inf, np.inf)


class Resampling(TypedDict, total=False):
    """Options of intervals over groups: keyword arguments of `Resampler`."""

    seed: Required[int]
    unit: str
    level: float
    draws: int


@dataclass(frozen=True)
class Interval:
    """A value (NaN if undefined) with its confidence interval, or the reason why there is none."""

    value: FloatOrNan
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def compare(self, neutral: float) -> str:
        """Return whether the interval lies above or below a value.

        Returns:
            ``higher``, ``lower``, ``not different`` (the interval contains the value), or ``inconclusive``
            without an interval.
        """
        if self.low is None or self.high is None:
            return "inconclusive"
        if self.low > neutral:
            return "higher"
        return "lower" if self.high < neutral else "not different"


@dataclass(frozen=True)
class InformativeGroups:
    """The groups that determine an interval: those with patches on which the statistic depends.

    Attributes:
        n_patches: Such patches in each group, ``(n_groups,)``.
        description: What the patches are, for reasons.
    """

    n_patches: Floats
    description: str = "patches"

    @property
    def n(self) -> int:
        """Number of groups with such patches."""
        return int(np.count_nonzero(self.n_patches))

    @property
    def effective(self) -> float:
        """Effective number of groups, ``(sum n)² / sum n²`` (Kish 1965); `n` if all are of equal size."""
        squares = float((self.n_patches**2).sum())
        return float(self.n_patches.sum()) ** 2 / squares if squares > 0 else 0.0

    @property
    def freedom(self) -> float:
        """Degrees of freedom of Student's t."""
        return self.effective - 1


def fewest_informative(candidates: Sequence[InformativeGroups]) -> InformativeGroups:
    """Return the first candidate too small for an interval, else that with fewest degrees of freedom."""
    return min(
        candidates,
        key=lambda groups: (groups.n, 0.0) if groups.n < MIN_GROUPS else (MIN_GROUPS, groups.effective),
    )


@dataclass(frozen=True)
class Resampler:
    """Resampling of groups, and intervals from replicates.

    Attributes:
        n_groups: Number of groups (patients, slides or patches).
        seed: Seed of the bootstrap; the same seed and number of groups give the same weights.
        unit: Name of a group, for reasons.
        level: Nominal coverage.
        draws: Number of bootstrap draws.
        bootstrap_from: Number of groups from which the bootstrap is used; None: always the jackknife.
    """

    n_groups: int
    seed: int = 0
    unit: str = "patient"
    level: float = 0.95
    draws: int = DRAWS
    bootstrap_from: int | None = BOOTSTRAP_FROM

    def __post_init__(self) -> None:
        check_level(self.level)

    @property
    def method(self) -> Method:
        use_jackknife = self.bootstrap_from is None or self.n_groups < self.bootstrap_from
        return "jackknife" if use_jackknife else "bootstrap"

    def resample_weights(self) -> Iterator[Floats]:
        """Yield the weights of the groups, ``(n_groups,)``, of each replicate."""
        if self.method == "jackknife":
            for left_out in range(self.n_groups):
                weight = np.ones(self.n_groups)
                weight[left_out] = 0
                yield weight
        else:
            rng = make_rng(self.seed, "bootstrap")
            for _ in range(self.draws):
                drawn = rng.integers(self.n_groups, size=self.n_groups)
                yield np.bincount(drawn, minlength=self.n_groups).astype(np.float64)

    def replicate(self, statistic: Statistic) -> tuple[Floats, Floats]:
        """Return a statistic on the sample, ``(k,)``, and on each replicate, ``(n_replicates, k)``."""
        values = np.atleast_1d(np.asarray(statistic(np.ones(self.n_groups)), np.float64))
        rows = [
            np.atleast_1d(statistic(weight)) if weight.any() else np.full(values.shape, np.nan)
            for weight in self.resample_weights()
        ]
        return values, np.array(rows, np.float64).reshape(len(rows), *values.shape)

    def standard_error(self, replicates: Floats) -> float:
        """Return the standard error from replicates (Efron and Tibshirani 1993, eq. 6.6 and 11.5)."""
        n = len(replicates)
        sum_of_squares = float(((replicates - replicates.mean()) ** 2).sum())
        return float(
            np.sqrt(sum_of_squares * (n - 1) / n if self.method == "jackknife" else sum_of_squares / (n - 1))
        )

    def interval(
        self,
        value: float,
        replicates: Floats,
        informative: InformativeGroups,
        *,
        bounds: Bounds = UNBOUNDED,
        share: bool = False,
        undefined: str | None = None,
    ) -> Interval:
        """Return a value with its interval, or the reason why there is none.

        Args:
            value: On the sample; NaN if undefined.
            replicates: On each replicate, ``(n_replicates,)``, NaN if undefined.
            informative: Groups that determine the interval.
            bounds: Range of the statistic.
            share: Whether it is a proportion of patches that are each correct or not; values of 0 and 1 then
                have a `bound_interval`.
            undefined: Reason why the value may be NaN (default: that informative patches are missing).
        """
        if np.isnan(value):
            return Interval(value, reason=f"undefined: {undefined or 'no ' + informative.description}")
        if informative.n < MIN_GROUPS:
            return Interval(
                value,
                reason=f"only {count(informative.n, self.unit)} with {informative.description}: an interval "
                f"needs {MIN_GROUPS}",
            )
        if informative.effective < MIN_EFFECTIVE_GROUPS:
            return Interval(
                value,
                reason=f"one {self.unit} has most of the {informative.description}: an interval needs the "
                f"equivalent of {MIN_EFFECTIVE_GROUPS:g} {plural(self.unit)} of equal size, these have an "
                f"effective number of {informative.effective:.1f}",
            )
        if share and value in SHARE:
            return bound_interval(value, informative.effective, self.level)
        missing = np.isnan(replicates)
        if missing.mean() > (MAX_UNDEFINED if self.method == "bootstrap" else 0):
            return Interval(value, reason=f"undefined when {plural(self.unit)} are left out: no interval")
        replicates = replicates[~missing]
        if not np.ptp(replicates) > 1e-12:
            return Interval(value, reason=f"the estimate does not vary between {plural(self.unit)}")
        if value in bounds:
            return Interval(value, reason=f"the estimate is exactly {value:g}, its bound")
        return self._student_interval(value, replicates, bounds, informative.freedom)

    def _student_interval(self, value: float, replicates: Floats, bounds: Bounds, freedom: float) -> Interval:
        """Return the value plus and minus Student's t standard errors on the scale of `link`.

        If a replicate is exactly a bound, the standard error on the original scale is transformed by the
        delta method.
        """
        if np.isin(replicates, bounds).any():
            error = self.standard_error(replicates) * link_derivative(value, bounds)
        else:
            error = self.standard_error(link(replicates, bounds))
        half = float(scipy.special.stdtrit(freedom, (1 + self.level) / 2)) * error
        low, high = inverse_link(link(np.array(value), bounds) + np.array([-half, half]), bounds)
        return Interval(value, float(low), float(high))

    def estimate(
        self,
        statistic: Statistic,
        informative: Sequence[InformativeGroups],
        *,
        bounds: Bounds = UNBOUNDED,
        share: bool = False,
        undefined: str | None = None,
    ) -> list[Interval]:
        """Return each value of a statistic with its interval; arguments as in `interval`."""
        values, replicates = self.replicate(statistic)
        return [
            self.interval(value, column, groups, bounds=bounds, share=share, undefined=undefined)
            for value, column, groups in zip(values.tolist(), replicates.T, informative, strict=True)
        ]


def link(values: Floats, bounds: Bounds) -> Floats:
    """Map a statistic to an unbounded scale: logit (two bounds), logarithm (lower bound) or identity."""
    low, high = bounds
    if np.isinf(low):
        return values
    return np.log(values - low) if np.isinf(high) else scipy.special.logit((values - low) / (high - low))


def inverse_link(values: Floats, bounds: Bounds) -> Floats:
    low, high = bounds
    if np.isinf(low):
        return values
    return low + np.exp(values) if np.isinf(high) else low + (high - low) * scipy.special.expit(values)


def link_derivative(value: float, bounds: Bounds) -> float:
    low, high = bounds
    if np.isinf(low):
        return 1.0
    return 1 / (value - low) if np.isinf(high) else (high - low) / ((value - low) * (high - value))


def bound_interval(value: float, n_groups: float, level: float) -> Interval:
    """Return the interval of a proportion of exactly 0 or 1, for which replicates do not vary.

    Clopper-Pearson limit with the patient as the trial: with no error in ``n`` patients (their effective
    number), the proportion of patients with an error, and so of errors, is at most
    ``1 - ((1 - level) / 2) ** (1 / n)``.
    """
    widest = 1 - ((1 - level) / 2) ** (1 / n_groups)
    return Interval(value, 1 - widest, 1.0) if value == 1 else Interval(value, 0.0, widest)


def check_level(level: float) -> None:
    """Check that a nominal coverage is between 0 and 1."""
    if not 0 < level < 1:
        raise MetricError(
            f"level is {level!r}: the nominal coverage must be between 0 and 1, such as 0.95", "value"
        )


def group_codes(group_ids: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.object_]]:
    """Return the index of each patch's group, and the ids of the groups in sorted order."""
    codes, groups = pd.factorize(np.asarray(group_ids, dtype=object), sort=True)
    return codes, np.asarray(groups, dtype=object)


def sum_groups(codes: NDArray[np.intp], n_groups: int, *columns: ArrayLike) -> Floats:
    """Return the sum of each column within each group, ``(n_groups, n_columns)``."""
    sums = [np.bincount(codes, np.asarray(column, np.float64), n_groups) for column in columns]
    return np.stack(sums, axis=1).astype(np.float64)


def divide(above: ArrayLike, below: ArrayLike) -> Floats:
    """Return a quotient, NaN if the denominator is not above 0."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def clustered_mean(
    values: ArrayLike,
    group_ids: ArrayLike,
    *,
    bounds: Bounds = UNBOUNDED,
    **resampling: Unpack[Resampling],
) -> Interval:
    """Return the mean over patches with an interval over groups; of paired differences as values, too.

    Args:
        values: One per patch, finite, shape ``(n,)``.
    """
    values, group_ids = np.asarray(values, float), np.asarray(group_ids, dtype=object)
    if not values.size or values.shape != group_ids.shape or not np.isfinite(values).all():
        raise MetricError(
            f"values of shape {values.shape} for {len(group_ids)} patches: give one finite value per patch",
            "shape",
        )
    return clustered_ratio(values, np.ones(len(values)), group_ids, bounds=bounds, **resampling)


def clustered_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    group_ids: ArrayLike,
    *,
    bounds: Bounds = (0.0, np.inf),
    **resampling: Unpack[Resampling],
) -> Interval:
    """Return the sum of one quantity over patches divided by the sum of another, with an interval."""
    codes, groups = group_codes(group_ids)
    sums = sum_groups(codes, len(groups), numerator, denominator)
    [interval] = Resampler(len(groups), **resampling).estimate(
        lambda weight: divide(*(weight @ sums)), [InformativeGroups(sums[:, 1])], bounds=bounds
    )
    return interval
