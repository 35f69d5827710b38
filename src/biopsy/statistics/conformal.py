"""Conformal prediction sets: the classes that cannot be excluded for a patch at a given error rate.

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
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biopsy.core.errors import MetricError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Guarantee = Literal["class-conditional", "marginal"]

METHOD = "hierarchical conformal (Lee, Barber and Willett 2023)"
ROUNDING = 1e-9  # tolerance of sums of 1 / ((K + 1) N_k)


@dataclass(frozen=True)
class Conformal:
    """A coverage guarantee and its quantiles, or the reason why there are none.

    Attributes:
        alpha: Error rate: the share of a new patient's patches whose set may not contain the true class.
        guarantee: Class-conditional or marginal.
        quantiles: Largest score of each class in a set.
        n_patients: Number of calibration patients (or other units).
        n_patches: Number of calibration patches.
        unit: Exchangeable unit: patient, slide or patch.
        reason: Why there are no quantiles.
    """

    alpha: float
    guarantee: Guarantee
    quantiles: tuple[float, ...] | None
    n_patients: int
    n_patches: int
    unit: str
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``classifier.json``."""
        quantiles = None if self.quantiles is None else list(self.quantiles)
        return {"method": METHOD, **asdict(self), "quantiles": quantiles}


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
        raise MetricError(f"alpha is {alpha!r}: an error rate lies between 0 and 1, such as 0.1")
    return ceil(1 / alpha - ROUNDING) - 1


def score_targets(probs: ArrayLike, target: ArrayLike) -> Floats:
    """Return 1 minus the probability of each patch's true class, shape ``(n_patches,)``.

    Raises:
        MetricError: If shapes differ, or a target or probability is invalid.
    """
    probs, target = np.asarray(probs, np.float64), np.asarray(target)
    if probs.ndim != 2 or target.shape != probs.shape[:1]:
        raise MetricError(
            f"probs {probs.shape} and target {target.shape} do not fit: one row of probs a target"
        )
    if not ((probs >= 0) & (probs <= 1)).all():
        raise MetricError("probabilities must lie in 0 to 1 and be numbers")
    if not np.isin(target, np.arange(probs.shape[1])).all():
        raise MetricError(f"targets are not all an index into {probs.shape[1]} classes")
    return 1 - probs[np.arange(len(target)), target.astype(np.intp)]


def hierarchical_quantile(scores: ArrayLike, group_ids: ArrayLike, alpha: float) -> float:
    """Return the hierarchical quantile, infinite with fewer groups than `groups_needed`.

    Args:
        scores: One score per patch, shape ``(n_patches,)``.
        group_ids: The patient of each patch; every group has equal mass.
        alpha: Error rate.

    Raises:
        MetricError: Without patches, or if ``alpha`` is not between 0 and 1.

    Example:
        >>> hierarchical_quantile([0.1, 0.2, 0.6, 0.4], ["a", "a", "a", "b"], alpha=0.4)
        0.6
    """
    scores, groups = np.asarray(scores, np.float64), np.asarray(group_ids)
    if not len(scores) or scores.shape != groups.shape:
        raise MetricError(f"{len(scores)} scores of {len(groups)} patches: a quantile needs one each")
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
) -> Conformal:
    """Fit conformal sets on calibration patients.

    Args:
        probs: Calibrated probabilities, shape ``(n_patches, n_classes)``, of held-out patients.
        target: Index of the true class, shape ``(n_patches,)``.
        group_ids: The patient (slide, or patch without ids) of each patch.
        alpha: Error rate.
        guarantee: Class-conditional or marginal.
        unit: Unit of the groups.
        class_names: Names for the reason (default: class indices).

    Returns:
        The fit; with fewer patients than `groups_needed` (for ``"class-conditional"``: fewer with patches of
        a class), it has no quantiles and a reason.

    Raises:
        MetricError: If probabilities, targets or the error rate are invalid.
    """
    scores, needed = score_targets(probs, target), groups_needed(alpha)
    target, groups, n_classes = np.asarray(target), np.asarray(group_ids), np.shape(probs)[1]
    n_patients, quantiles = len(np.unique(groups)), []
    for k in range(n_classes if guarantee == "class-conditional" else 1):
        members = target == k if guarantee == "class-conditional" else np.ones(len(target), bool)
        n = len(np.unique(groups[members]))
        if n < needed:
            suffix = (
                f" with {[*class_names, *map(str, range(n_classes))][k]}"
                if guarantee == "class-conditional"
                else ""
            )
            reason = (
                f"an error rate of {alpha:g} needs at least {needed} calibration "
                f"{unit}s{'' if n == n_patients else suffix}; there {'is' if n == 1 else 'are'} {n}"
            )
            return Conformal(alpha, guarantee, None, n_patients, len(scores), unit, reason)
        quantiles.append(hierarchical_quantile(scores[members], groups[members], alpha))
    per_class = tuple(quantiles) if guarantee == "class-conditional" else (quantiles[0],) * n_classes
    return Conformal(alpha, guarantee, per_class, n_patients, len(scores), unit)


def split_conformal(
    probs: ArrayLike, target: ArrayLike, alpha: float, *, guarantee: Guarantee = "class-conditional"
) -> Conformal:
    """Fit split conformal sets, which treat patches as independent, for comparison.

    Source: Vovk et al. 2005; Lei et al. 2018, sec. 2.2: the ``ceil((n + 1)(1 - alpha))``-th smallest score.
    """
    return fit_conformal(
        probs, target, np.arange(len(np.asarray(probs))), alpha, guarantee=guarantee, unit="patch"
    )


def predict_sets(probs: ArrayLike, quantiles: ArrayLike) -> Flags:
    """Return, for each class, whether it is in the patch's set, shape ``(n_patches, n_classes)``.

    Args:
        probs: Shape ``(n_patches, n_classes)``.
        quantiles: One a class, or one for all.
    """
    return np.asarray(1 - np.asarray(probs, np.float64) <= np.asarray(quantiles))


def abstain(sets: Flags, pred: ArrayLike) -> Flags:
    """Return which patches get no answer: those whose set is not the called class alone.

    That is a set of several classes, an empty one, or (two classes with a threshold far from one half) the
    one class that the threshold does not call. A kept patch is wrong only if its set misses the true class,
    so kept and wrong patches are at most the promised share of all.
    """
    pred = np.asarray(pred, np.intp)
    return (sets.sum(axis=1) != 1) | ~sets[np.arange(len(sets)), pred]
