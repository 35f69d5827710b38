"""What is gained by giving no answer where a classifier is unsure, and at what price.

Two views of one thing. *Shares*: of all patches, how many are covered by their conformal set, get no answer,
are kept and wrong. *Risk against coverage* (Geifman and El-Yaniv 2017): the error among the kept where only
the surest share of patches is kept, for every share. Intervals are over patients, as everywhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import (
    BOOTSTRAP_FROM,
    DRAWS,
    FEWEST_GROUPS,
    Interval,
    Method,
    bound_interval,
    check_level,
    estimate_from,
    reweightings,
)

Floats = NDArray[np.float64]

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
MOST_BLOCKS = 1000  # of neighbouring confidences, taken together where intervals are worked out


@dataclass(frozen=True)
class RiskCoverage:
    """The error among the surest patches; arrays have one entry for each distinct confidence.

    Attributes:
        coverage: Share of patches kept, rising to 1.
        risk: Share of wrong ones among them.
        confidence: The least confidence among them.
    """

    coverage: Floats
    risk: Floats
    confidence: Floats

    @property
    def area(self) -> float:
        """The mean risk over all coverages (AURC, Geifman et al. 2019), smaller is better.

        Patches of one confidence stand in no order: their errors are spread evenly over them.
        """
        return area_under(
            np.diff(self.coverage, prepend=0.0), np.diff(self.coverage * self.risk, prepend=0.0)
        )


@dataclass(frozen=True)
class RiskEstimate:
    """Risk-coverage in numbers with intervals: the area, and the risk at stated coverages."""

    area: Interval
    at: dict[float, Interval]


def trace_risk(wrong: ArrayLike, confidence: ArrayLike) -> RiskCoverage:
    """Trace the error among the kept from the surest patches to all.

    Args:
        wrong: Which patches were called wrongly, shape ``(n_patches,)``.
        confidence: Of each call, any scale; the classifier's is the probability of the called class.

    Raises:
        MetricError: If there are no patches, or a confidence is no number.
    """
    wrong, confidence = _check(wrong, confidence)
    levels, level = np.unique(-confidence, return_inverse=True)
    mass, errors = np.bincount(level), np.bincount(level, wrong)
    kept = np.cumsum(mass)
    return RiskCoverage(kept / kept[-1], np.cumsum(errors) / kept, -levels)


def area_under(mass: Floats, errors: Floats) -> float:
    """Integrate errors / kept over the share kept, for blocks of patches from the surest on.

    Within a block the errors grow linearly from ``e`` to ``e + de`` while the kept grow from ``m`` to
    ``m + dm``: the integral of the quotient is ``de + (e - m de / dm) log((m + dm) / m)``.
    """
    filled = mass > 0
    mass, errors = mass[filled], errors[filled]
    kept, wrong = np.cumsum(mass), np.cumsum(errors)
    start, offset = kept - mass, (wrong - errors) - (kept - mass) * errors / mass
    growth = np.log(kept[1:] / start[1:])
    return float((errors.sum() + (offset[1:] * growth).sum()) / kept[-1])


def ideal_area(error: float) -> float:
    """Give the smallest area that an error rate allows: every wrong patch less sure than every right one.

    Source: Geifman et al. 2019, "Bias-reduced uncertainty estimation for deep neural classifiers".
    """
    return error + (1 - error) * float(np.log1p(-error)) if error < 1 else 1.0


def risk_at(mass: Floats, errors: Floats, coverages: Sequence[float]) -> Floats:
    """Give the error among the kept at stated shares of the mass, blocks in order of confidence."""
    kept, wrong = np.append(0.0, np.cumsum(mass)), np.append(0.0, np.cumsum(errors))
    wanted = np.asarray(coverages) * kept[-1]
    return np.interp(wanted, kept, wrong) / wanted


def estimate_risk(
    wrong: ArrayLike,
    confidence: ArrayLike,
    group_ids: ArrayLike,
    *,
    seed: int,
    coverages: Sequence[float] = COVERAGES,
    level: float = 0.95,
    draws: int = DRAWS,
    unit: str = "patient",
) -> RiskEstimate:
    """Give the area under risk against coverage, and the risk at stated coverages, with intervals.

    Args:
        wrong: Which patches were called wrongly.
        confidence: Of each call.
        group_ids: The patient of each patch.
        seed: For the bootstrap, used from 100 groups on.
        coverages: Shares of patches to keep, each in (0, 1].
        level: Nominal coverage of the intervals.
        draws: Bootstrap draws.
        unit: What a group is, for the reasons.

    Raises:
        MetricError: As `trace_risk`, and for a level or a coverage that is none.
    """
    check_level(level)
    if not all(0 < share <= 1 for share in coverages):
        raise MetricError(f"coverages are {tuple(coverages)}: shares of patches lie between 0 and 1")
    wrong, confidence = _check(wrong, confidence)
    order = np.argsort(-confidence, kind="stable")
    starts = np.flatnonzero(np.diff(confidence[order], prepend=np.inf))
    if len(starts) > MOST_BLOCKS:
        even = np.linspace(0, len(order), MOST_BLOCKS, endpoint=False)
        starts = np.unique(starts[np.searchsorted(starts, even, side="right") - 1])
    groups, group = np.unique(np.asarray(group_ids)[order], return_inverse=True)
    wrong = wrong[order]

    def measure(weight: Floats) -> Floats:
        each = weight[group]
        mass, errors = np.add.reduceat(each, starts), np.add.reduceat(each * wrong, starts)
        return np.append(area_under(mass, errors), risk_at(mass, errors, coverages))

    carriers = np.full(1 + len(coverages), len(groups))
    weights = reweightings(len(groups), seed=seed, draws=draws)
    intervals = _estimate(measure, carriers, len(groups), weights, level, unit)
    return RiskEstimate(intervals[0], dict(zip(coverages, intervals[1:], strict=True)))


def estimate_shares(
    parts: dict[str, ArrayLike],
    group_ids: ArrayLike,
    *,
    of: dict[str, ArrayLike] | None = None,
    equal_groups: bool,
    seed: int,
    level: float = 0.95,
    draws: int = DRAWS,
    unit: str = "patient",
) -> dict[str, Interval]:
    """Give shares of patches with intervals over groups.

    Args:
        parts: Name -> which patches count, bool ``(n_patches,)``.
        group_ids: The patient of each patch.
        of: Name -> out of which patches; all where not given.
        equal_groups: Every patient weighs the same (a conformal promise is about those), or every patch.
        seed: For the bootstrap, used from 100 groups on.
        level: Nominal coverage.
        draws: Bootstrap draws.
        unit: What a group is, for the reasons.
    """
    check_level(level)
    groups, group, size = np.unique(np.asarray(group_ids), return_inverse=True, return_counts=True)
    each = 1 / size[group] if equal_groups else np.ones(len(group))

    def total(chosen: ArrayLike) -> Floats:
        return np.bincount(group, each * np.asarray(chosen, np.float64), minlength=len(groups)).astype(float)

    out_of = {name: np.ones(len(group), bool) for name in parts} | {
        name: np.asarray(chosen, bool) for name, chosen in (of or {}).items()
    }
    below = np.stack([total(out_of[name]) for name in parts])
    above = np.stack([total(np.asarray(chosen, bool) & out_of[name]) for name, chosen in parts.items()])

    def measure(weight: Floats) -> Floats:
        kept = below @ weight
        return np.divide(above @ weight, kept, out=np.full(len(kept), np.nan), where=kept > 0)

    weights = reweightings(len(groups), seed=seed, draws=draws)
    intervals = _estimate(measure, (below > 0).sum(axis=1), len(groups), weights, level, unit)
    return dict(zip(parts, intervals, strict=True))


def _estimate(
    measure: Callable[[Floats], Floats],
    carriers: NDArray[np.int64],
    n_groups: int,
    weights: Iterable[Floats],
    level: float,
    unit: str,
) -> list[Interval]:
    """Give each share that ``measure`` finds on weighted groups, with the interval its replicates allow."""
    method: Method = "jackknife" if n_groups < BOOTSTRAP_FROM else "bootstrap"
    values = measure(np.ones(n_groups))
    replicates = np.array([measure(w) for w in weights if w.any()]).reshape(-1, len(values))
    intervals = []
    for value, n, column in zip(values.tolist(), carriers.tolist(), replicates.T, strict=True):
        if np.isnan(value):
            intervals.append(Interval(value, reason="undefined: no patches"))
        elif n >= FEWEST_GROUPS and value in (0.0, 1.0):
            intervals.append(bound_interval(value, n, level))
        else:
            has = (n, "patches" if n == n_groups else "such patches")
            intervals.append(
                estimate_from(value, column, method, has, bounds=(0.0, 1.0), level=level, unit=unit)
            )
    return intervals


def _check(wrong: ArrayLike, confidence: ArrayLike) -> tuple[Floats, Floats]:
    wrong, confidence = np.asarray(wrong, np.float64), np.asarray(confidence, np.float64)
    if not len(wrong) or wrong.shape != confidence.shape:
        raise MetricError(f"{len(wrong)} calls with {len(confidence)} confidences: one each is needed")
    if not np.isfinite(confidence).all():
        raise MetricError(f"{int((~np.isfinite(confidence)).sum())} confidences are not finite")
    return wrong, confidence
