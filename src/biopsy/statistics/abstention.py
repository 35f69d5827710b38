"""Abstention: conformal prediction sets, risk-coverage curves, and fractions of patches with intervals.

The selective risk is the error rate among the patches with the highest confidence, at every coverage (Geifman
and El-Yaniv 2017).

A conformal prediction set has the classes that cannot be excluded for a patch at a given error rate.

The score of a calibration patch is 1 minus the probability of its true class. The set of a new patch contains
every class whose score is at most a quantile of these scores.

Patches of one patient are correlated, so the patient is the exchangeable unit: hierarchical conformal
prediction (Lee, Barber and Willett 2023, "Distribution-free inference with hierarchical data",
arXiv:2306.06342, Theorem 1; ACM Journal of Data Science 2026). With ``K`` calibration patients of ``N_k``
patches it takes the quantile at ``1 - alpha`` of

    sum_k sum_i 1 / ((K + 1) N_k) at score s_ki  +  1 / (K + 1) at infinity

and guarantees that the set of a patch of a new patient contains its true class with probability at least
``1 - alpha`` (and, for scores without ties, at most ``1 - alpha + 2 / (K + 1)``). The guarantee is marginal
over calibration and new patients, not conditional on a patient. Dunn, Wasserman and Ramdas (JASA 2023,
118:2491, arXiv:1809.07441) posed the problem; their method is the same without the point at infinity, which
makes its guarantee asymptotic.

A marginal guarantee is also a mean over classes: coverage of a rarer or harder class can be lower.
Class-conditional sets (Mondrian: Vovk et al. 2005, ch. 4), with a quantile from the patches of each class,
have a guarantee for each class.

Split conformal prediction, valid only for independent patches, is the special case of one patch per patient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict, FiniteFloat
from typing_extensions import TypedDict

from biopsy.core.errors import MetricError
from biopsy.core.text import class_title, plural
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
MAX_BLOCKS = 1000  # of neighbouring confidences, combined for intervals


@dataclass(frozen=True)
class RiskCoverage:
    """A risk-coverage curve; arrays have one entry per distinct confidence.

    Attributes:
        coverage: Fraction of patches that are kept, ascending to 1.
        risk: Error rate among them.
        confidence: Lowest confidence among them.
    """

    coverage: Floats
    risk: Floats
    confidence: Floats

    @property
    def area(self) -> float:
        """Area under the curve (AURC, Geifman et al. 2019); errors are spread evenly over ties."""
        return area_under(
            np.diff(self.coverage, prepend=0.0), np.diff(self.coverage * self.risk, prepend=0.0)
        )


@dataclass(frozen=True)
class RiskEstimate:
    """Area under the risk-coverage curve, and risk at given coverages, with intervals."""

    area: Interval
    at: dict[float, Interval]


def risk_coverage_curve(wrong: ArrayLike, confidence: ArrayLike) -> RiskCoverage:
    """Return the risk-coverage curve.

    Args:
        wrong: Mask of misclassified patches, shape ``(n_patches,)``.
        confidence: Of each prediction, on any scale, such as the probability of the predicted class.
    """
    wrong, confidence = _check(wrong, confidence)
    levels, level = np.unique(-confidence, return_inverse=True)
    mass, errors = np.bincount(level), np.bincount(level, wrong)
    kept = np.cumsum(mass)
    return RiskCoverage(kept / kept[-1], np.cumsum(errors) / kept, -levels)


def area_under(mass: Floats, errors: Floats) -> float:
    """Integrate the risk over the coverage, for blocks of patches in descending order of confidence.

    Within a block, errors grow linearly from ``e`` to ``e + de`` and kept patches from ``m`` to ``m + dm``:
    the integral of the quotient is ``de + (e - m de / dm) log((m + dm) / m)``.
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
    """Return the area under the risk-coverage curve, and the risk at given coverages, with intervals.

    Args:
        coverages: Fractions of patches to keep, each in (0, 1].
    """
    if not all(0 < share <= 1 for share in coverages):
        raise MetricError(f"coverages are {tuple(coverages)}: they must be above 0 and at most 1", "value")
    wrong, confidence = _check(wrong, confidence)
    order = np.argsort(-confidence, kind="stable")
    starts = np.flatnonzero(np.diff(confidence[order], prepend=np.inf))
    if len(starts) > MAX_BLOCKS:
        even = np.linspace(0, len(order), MAX_BLOCKS, endpoint=False)
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
    """Return fractions of patches with intervals over groups.

    Args:
        parts: Name to the counted patches, bool ``(n_patches,)``.
        among: Name to the patches of the denominator, bool ``(n_patches,)`` (default: all).
        equal_groups: Equal weights of patients (as for conformal guarantees) instead of patches.
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
        raise MetricError(
            f"{len(wrong)} predictions with {len(confidence)} confidences: one each is needed", "shape"
        )
    if not np.isfinite(confidence).all():
        raise MetricError(f"{int((~np.isfinite(confidence)).sum())} confidences are not finite", "missing")
    return wrong, confidence


Flags = NDArray[np.bool_]
Guarantee = Literal["class-conditional", "marginal"]

METHOD = "hierarchical conformal (Lee, Barber and Willett 2023)"
ROUNDING = 1e-9  # tolerance of sums of 1 / ((K + 1) N_k)


class ConformalRecord(TypedDict, total=False):
    """Quantiles of conformal prediction sets, which decide abstention, or the reason for none.

    ``alpha`` is the share of a new patient's patches whose set may not contain the true class. A set holds
    the classes whose score is at most their quantile. ``unit`` (patient, slide or patch) is exchangeable.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    method: str
    alpha: float
    guarantee: str
    quantiles: list[FiniteFloat] | None
    n_patients: int
    n_patches: int
    unit: str
    reason: str | None
    chosen_on: str
    per_patch_quantiles: list[float] | None


def groups_needed(alpha: float) -> int:
    """Return the minimum number of calibration patients for an error rate: ``ceil(1 / alpha) - 1``.

    With fewer, more than ``alpha`` of the mass is at infinity and every set contains all classes.

    Raises:
        MetricError: If ``alpha`` is not between 0 and 1.

    Example:
        >>> groups_needed(0.10), groups_needed(0.05)
        (9, 19)
    """
    if not 0 < alpha < 1:
        raise MetricError(f"alpha is {alpha!r}: an error rate must be between 0 and 1, such as 0.1", "value")
    return ceil(1 / alpha - ROUNDING) - 1


def score_targets(probs: ArrayLike, target: ArrayLike) -> Floats:
    """Return 1 minus the probability of each patch's true class, shape ``(n_patches,)``."""
    probs, target = np.asarray(probs, np.float64), np.asarray(target)
    if probs.ndim != 2 or target.shape != probs.shape[:1]:
        raise MetricError(
            f"probs {probs.shape} and target {target.shape} do not fit: give one row of probs per target",
            "shape",
        )
    if not ((probs >= 0) & (probs <= 1)).all():
        raise MetricError("probabilities must be numbers in 0-1", "prob")
    if not np.isin(target, np.arange(probs.shape[1])).all():
        raise MetricError(f"targets are not all an index into {probs.shape[1]} classes", "target")
    return 1 - probs[np.arange(len(target)), target.astype(np.intp)]


def hierarchical_quantile(scores: ArrayLike, group_ids: ArrayLike, alpha: float) -> float:
    """Return the hierarchical quantile, infinite with fewer groups than `groups_needed`.

    Example:
        >>> hierarchical_quantile([0.1, 0.2, 0.6, 0.4], ["a", "a", "a", "b"], alpha=0.4)
        0.6
    """
    scores, groups = np.asarray(scores, np.float64), np.asarray(group_ids)
    if not len(scores) or scores.shape != groups.shape:
        raise MetricError(
            f"{len(scores)} scores of {len(groups)} patches: a quantile needs one each", "shape"
        )
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    if len(size) < groups_needed(alpha):
        return float("inf")
    order = np.argsort(scores, kind="stable")
    mass = np.cumsum(1 / size[group[order]])  # of K + 1 in all
    reached = np.searchsorted(mass, (1 - alpha) * (len(size) + 1) - ROUNDING * (len(size) + 1))
    return float(scores[order[min(int(reached), len(scores) - 1)]])


def fit_conformal(
    probs: ArrayLike,
    target: ArrayLike,
    group_ids: ArrayLike,
    alpha: float,
    *,
    guarantee: Guarantee = "class-conditional",
    unit: str = "patient",
    class_names: Sequence[str] = (),
) -> ConformalRecord:
    """Fit conformal sets on calibration patients.

    Args:
        probs: Calibrated probabilities, shape ``(n_patches, n_classes)``, of held-out patients.
        target: Index of the true class, shape ``(n_patches,)``.
        group_ids: The patient (slide, or patch without ids) of each patch.
        class_names: Names for the reason (default: class indices).

    Returns:
        The fit; with fewer patients than `groups_needed` (for ``"class-conditional"``: fewer with patches of
        a class), it has no quantiles and a reason.
    """
    scores, needed = score_targets(probs, target), groups_needed(alpha)
    target, groups, n_classes = np.asarray(target), np.asarray(group_ids), np.shape(probs)[1]
    n_patients, per_class = len(np.unique(groups)), guarantee == "class-conditional"
    quantiles: list[float] = []
    reason = None
    for k in range(n_classes if per_class else 1):
        members = target == k if per_class else np.ones(len(target), bool)
        n = len(np.unique(groups[members]))
        if n < needed:
            with_class = f" with patches of {class_title([*class_names, *map(str, range(n_classes))][k])}"
            reason = (
                f"an error rate of {alpha:g} needs at least {needed} calibration {plural(unit)}"
                f"{with_class if per_class and n < n_patients else ''}; there {'is' if n == 1 else 'are'} {n}"
            )
            break
        quantiles.append(hierarchical_quantile(scores[members], groups[members], alpha))
    return {
        "method": METHOD,
        "alpha": alpha,
        "guarantee": guarantee,
        "quantiles": None if reason else quantiles if per_class else quantiles * n_classes,
        "n_patients": n_patients,
        "n_patches": len(scores),
        "unit": unit,
        "reason": reason,
    }


def split_conformal(
    probs: ArrayLike, target: ArrayLike, alpha: float, *, guarantee: Guarantee = "class-conditional"
) -> ConformalRecord:
    """Fit split conformal sets, which treat patches as independent, for comparison.

    Source: Vovk et al. 2005; Lei et al. 2018, sec. 2.2: the ``ceil((n + 1)(1 - alpha))``-th smallest score.
    """
    return fit_conformal(
        probs, target, np.arange(len(np.asarray(probs))), alpha, guarantee=guarantee, unit="patch"
    )


def predict_sets(probs: ArrayLike, quantiles: ArrayLike) -> Flags:
    """Return, for each class, whether it is in the patch's set, shape ``(n_patches, n_classes)``."""
    return np.asarray(1 - np.asarray(probs, np.float64) <= np.asarray(quantiles))


def abstain(sets: Flags, pred: ArrayLike) -> Flags:
    """Return a mask of abstentions: patches whose set is not the predicted class alone.

    Such a set has several classes, none, or (with a threshold far from .5) only the class that is not
    predicted. A kept patch is misclassified only if its set lacks the true class, so that the error rate over
    all patches is at most ``alpha``.
    """
    pred = np.asarray(pred, np.intp)
    return (sets.sum(axis=1) != 1) | ~sets[np.arange(len(sets)), pred]
