"""What is gained by giving no answer where a classifier is unsure, and at what price.

Two views of one thing. *Shares*: of all patches, how many are covered by their conformal set, get no answer,
are kept and wrong. *Risk against coverage* (Geifman and El-Yaniv 2017): the error among the kept where only
the surest share of patches is kept, for every share. Intervals are over patients, as everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike

from biopsy.core.errors import MetricError
from biopsy.statistics.resampling import (
    SHARE,
    Floats,
    InformativeGroups,
    Interval,
    Resampler,
    Resampling,
    divide,
    sum_groups,
)

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


def risk_coverage_curve(wrong: ArrayLike, confidence: ArrayLike) -> RiskCoverage:
    """Return the error among the kept patches from the most confident ones to all.

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


def optimal_aurc(error: float) -> float:
    """Return the smallest area at an error rate: all errors have lower confidence than correct patches.

    Source: Geifman et al. 2019, "Bias-reduced uncertainty estimation for deep neural classifiers".
    """
    return error + (1 - error) * float(np.log1p(-error)) if error < 1 else 1.0


def risk_at(mass: Floats, errors: Floats, coverages: Sequence[float]) -> Floats:
    """Return the selective risk at given coverages, for blocks in order of confidence."""
    kept, wrong = np.append(0.0, np.cumsum(mass)), np.append(0.0, np.cumsum(errors))
    target = np.asarray(coverages) * kept[-1]
    return np.interp(target, kept, wrong) / target


def estimate_risk(
    wrong: ArrayLike,
    confidence: ArrayLike,
    group_ids: ArrayLike,
    *,
    coverages: Sequence[float] = COVERAGES,
    **resampling: Unpack[Resampling],
) -> RiskEstimate:
    """Return the area under risk against coverage, and the risk at stated coverages, with intervals.

    Args:
        coverages: Shares of patches to keep, each in (0, 1].
        **resampling: As of `Resampler`.

    Raises:
        MetricError: As `risk_coverage_curve`, and for a level or a coverage that is none.
    """
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
        item = weight[group]
        mass, errors = np.add.reduceat(item, starts), np.add.reduceat(item * wrong, starts)
        return np.append(area_under(mass, errors), risk_at(mass, errors, coverages))

    informative = InformativeGroups(np.bincount(group).astype(np.float64))
    intervals = Resampler(len(groups), **resampling).estimate(
        measure, [informative] * (1 + len(coverages)), bounds=SHARE, share=True
    )
    return RiskEstimate(intervals[0], dict(zip(coverages, intervals[1:], strict=True)))


def estimate_shares(
    parts: dict[str, ArrayLike],
    group_ids: ArrayLike,
    *,
    among: dict[str, ArrayLike] | None = None,
    equal_groups: bool,
    **resampling: Unpack[Resampling],
) -> dict[str, Interval]:
    """Return shares of patches with intervals over groups.

    Args:
        parts: Name to the counted patches, bool ``(n_patches,)``.
        group_ids: Group id per patch.
        among: Name to the patches of the denominator, bool ``(n_patches,)`` (default: all).
        equal_groups: Equal weights of patients (as for conformal guarantees) instead of patches.
        **resampling: As of `Resampler`.
    """
    groups, group, size = np.unique(np.asarray(group_ids), return_inverse=True, return_counts=True)
    weight_of_patch = 1 / size[group] if equal_groups else np.ones(len(group))
    chosen = {name: np.asarray(part, bool) for name, part in parts.items()}
    within = {name: np.asarray((among or {}).get(name, np.ones(len(group))), bool) for name in parts}
    below = sum_groups(group, len(groups), *(weight_of_patch * within[name] for name in parts))
    above = sum_groups(
        group, len(groups), *(weight_of_patch * (chosen[name] & within[name]) for name in parts)
    )
    intervals = Resampler(len(groups), **resampling).estimate(
        lambda weight: divide(weight @ above, weight @ below),
        [InformativeGroups(column, "patches" if column.all() else "such patches") for column in below.T],
        bounds=SHARE,
        share=True,
        undefined="no patches",
    )
    return dict(zip(parts, intervals, strict=True))


def _check(wrong: ArrayLike, confidence: ArrayLike) -> tuple[Floats, Floats]:
    wrong, confidence = np.asarray(wrong, np.float64), np.asarray(confidence, np.float64)
    if not len(wrong) or wrong.shape != confidence.shape:
        raise MetricError(f"{len(wrong)} calls with {len(confidence)} confidences: one each is needed")
    if not np.isfinite(confidence).all():
        raise MetricError(f"{int((~np.isfinite(confidence)).sum())} confidences are not finite")
    return wrong, confidence
