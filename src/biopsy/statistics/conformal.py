"""Conformal sets: the classes that cannot be ruled out for a patch at a stated error rate.

Each calibration patch scores 1 minus the probability of its true class. A new patch's set holds every class
whose score is at most a quantile of those; the quantile is chosen so that the true class is left out of the
set no more often than promised.

Patches of one patient resemble each other, so the patient is what may be exchanged: hierarchical conformal
prediction (Lee, Barber and Willett 2023, "Distribution-free inference with hierarchical data",
arXiv:2306.06342, Theorem 1; ACM Journal of Data Science 2026). With ``K`` calibration patients of ``N_k``
patches it takes the quantile at ``1 - alpha`` of

    sum_k sum_i 1 / ((K + 1) N_k) at score s_ki  +  1 / (K + 1) at infinity

and promises: a patch drawn from a new patient has its class in its set with probability at least
``1 - alpha`` (and, scores without ties, at most ``1 - alpha + 2 / (K + 1)``). The guarantee is a mean over
calibration patients and new patients alike, not one for each patient. Dunn, Wasserman and Ramdas (JASA 2023,
118:2491, arXiv:1809.07441) posed the problem; their pooled distribution functions are the same without the
point at infinity, which makes their guarantee an asymptotic one.

Made for all classes together, the guarantee is a mean over classes too, and the rarer or harder class pays:
its patches are missed more often than promised. Made for each class by itself (Mondrian: Vovk et al. 2005,
ch. 4), with a quantile from the patches of that class, each class has its own guarantee.

The plain version, right only if patches were independent, is the same quantile with every patch a patient of
its own.
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
ROUNDING = 1e-9  # what sums of 1 / ((K + 1) N_k) may be off


@dataclass(frozen=True)
class Conformal:
    """A guarantee and what it rests on; without a quantile, the reason why there is none.

    Attributes:
        alpha: Error rate promised: the share of a new patient's patches whose set may miss the true class.
        guarantee: Whether that is promised of the patches of each class, or of all patches together.
        quantiles: Largest score that each class may have to be in a set.
        n_patients: Calibration patients, or groups of whatever ``unit`` says.
        n_patches: Their patches.
        unit: What counts as one independent observation: patient, slide or patch.
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
        """Return what ``classifier.json`` holds."""
        quantiles = None if self.quantiles is None else list(self.quantiles)
        return {"method": METHOD, **asdict(self), "quantiles": quantiles}


def groups_needed(alpha: float) -> int:
    """Return the fewest calibration patients that can guarantee an error rate: ``ceil(1 / alpha) - 1``.

    With fewer, more than ``alpha`` of the mass stands at infinity and every set is the set of all classes.

    Raises:
        MetricError: If ``alpha`` is no error rate.

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
        MetricError: If shapes do not agree, a target is no class, or a probability is none.
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
    """Return the quantile of the module's formula, infinite with fewer groups than `groups_needed`.

    Args:
        scores: One a patch, shape ``(n_patches,)``.
        group_ids: The patient of each patch; every group has the same mass, whatever its size.

    Raises:
        MetricError: Without patches, or if ``alpha`` is no error rate.

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
    """Fit the sets of an error rate on calibration patients.

    Args:
        probs: Calibrated probabilities, shape ``(n_patches, n_classes)``, of patients not learned from.
        target: Index of the true class.
        group_ids: The patient (slide, or patch where no ids exist) of each patch.
        guarantee: Of the patches of each class, or of all together.
        class_names: For the reason; their numbers where not given.

    Returns:
        The fit; with fewer patients than `groups_needed` (for ``"class-conditional"``: fewer with patches of
        some class) it has no quantiles and says why.

    Raises:
        MetricError: For probabilities, targets or an error rate that are none.
    """
    scores, needed = score_targets(probs, target), groups_needed(alpha)
    target, groups, n_classes = np.asarray(target), np.asarray(group_ids), np.shape(probs)[1]
    n_patients, quantiles = len(np.unique(groups)), []
    for k in range(n_classes if guarantee == "class-conditional" else 1):
        own = target == k if guarantee == "class-conditional" else np.ones(len(target), bool)
        n = len(np.unique(groups[own]))
        if n < needed:
            of = (
                f" with {[*class_names, *map(str, range(n_classes))][k]}"
                if guarantee == "class-conditional"
                else ""
            )
            reason = (
                f"an error rate of {alpha:g} needs at least {needed} calibration "
                f"{unit}s{'' if n == n_patients else of}; there {'is' if n == 1 else 'are'} {n}"
            )
            return Conformal(alpha, guarantee, None, n_patients, len(scores), unit, reason)
        quantiles.append(hierarchical_quantile(scores[own], groups[own], alpha))
    every = tuple(quantiles) if guarantee == "class-conditional" else (quantiles[0],) * n_classes
    return Conformal(alpha, guarantee, every, n_patients, len(scores), unit)


def split_conformal(
    probs: ArrayLike, target: ArrayLike, alpha: float, *, guarantee: Guarantee = "class-conditional"
) -> Conformal:
    """Fit plain split conformal sets, as if patches were independent: to be shown as what it is.

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
