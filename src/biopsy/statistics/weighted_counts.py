"""Samples of two classes, sorted once and counted with any weights of patients.

Metrics are functions of these counts, so that resampling patients (weight 0: left out; 2: drawn twice) does
not sort again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biopsy.core.errors import MetricError
from biopsy.statistics.calibration import IDENTITY, clipped_logit, fit_intercept, fit_recalibration
from biopsy.statistics.resampling import (
    Floats,
    InformativeGroups,
    fewest_informative,
    group_codes,
    sum_groups,
)

LOG_CLIP = float(np.finfo(np.float64).eps)  # as scikit-learn's log_loss
NEEDS = {
    "n_pos": "positive patches",
    "n_neg": "negative patches",
    "n_pred_pos": "patches predicted positive",
    "n_pred_neg": "patches predicted negative",
}


@dataclass(frozen=True)
class SortedScores:
    """Patches in descending order of probability.

    Attributes:
        y_true: 0.0 or 1.0 per patch, shape ``(n_patches,)``.
        y_pred: 1.0 if the patch is predicted positive.
        group: Index into ``groups``.
        groups: Patient ids in sorted order, shape ``(n_groups,)``.
        prob: The distinct probabilities, descending, shape ``(n_levels,)``.
        starts: Index of the first patch of each distinct probability.
    """

    y_true: Floats
    y_pred: Floats
    group: NDArray[np.intp]
    groups: NDArray[np.object_]
    prob: Floats
    starts: NDArray[np.intp]
    needs: ClassVar[Mapping[str, str]] = NEEDS

    def count(self, weight: Floats | None = None) -> "WeightedCounts":
        """Return the counts with one weight per *group* (default: 1)."""
        item = np.ones(len(self.y_true)) if weight is None else weight[self.group]
        each_pos = item * self.y_true
        pos = np.add.reduceat(each_pos, self.starts)
        neg = np.add.reduceat(item, self.starts) - pos
        tp = float(each_pos @ self.y_pred)
        return WeightedCounts(self, pos, neg, tp=tp, fp=float(item @ self.y_pred) - tp, sample_weight=item)

    def informative_groups(self, needs: Iterable[str] = ()) -> InformativeGroups:
        """Return the groups with patches of the scarcest of given `NEEDS`; all groups without needs."""
        needs = list(needs)
        if not needs:
            return InformativeGroups(np.bincount(self.group, minlength=len(self.groups)).astype(np.float64))
        return fewest_informative(
            [InformativeGroups(self._patches_by_need[need], self.needs[need]) for need in needs]
        )

    @cached_property
    def _patches_by_need(self) -> dict[str, Floats]:
        """Number of patches of each group for each of `NEEDS`, ``(n_groups,)``."""
        columns = self.y_true, 1 - self.y_true, self.y_pred, 1 - self.y_pred
        sums = sum_groups(self.group, len(self.groups), *columns)
        return dict(zip(NEEDS, sums.T, strict=True))

    @cached_property
    def y_prob(self) -> Floats:
        """The probability of every patch, ``(n_patches,)``."""
        return np.repeat(self.prob, np.diff(np.append(self.starts, len(self.y_true))))

    @cached_property
    def logits(self) -> Floats:
        return clipped_logit(self.prob)

    @cached_property
    def log_losses(self) -> tuple[Floats, Floats]:
        """Log loss of a positive and of a negative patch at each distinct probability."""
        clipped = np.clip(self.prob, LOG_CLIP, 1 - LOG_CLIP)
        return -np.log(clipped), -np.log(1 - clipped)

    @cached_property
    def squares(self) -> tuple[Floats, Floats]:
        """Squared error of a positive and of a negative patch at each distinct probability."""
        return (1 - self.prob) ** 2, self.prob**2

    @cached_property
    def recalibration(self) -> tuple[float, float]:
        """Intercept and slope on the sample, the initial values of fits on resamples."""
        counts = self.count()
        intercept, slope = fit_recalibration(self.logits, counts.pos, counts.neg)
        return (intercept, slope) if np.isfinite(slope) else IDENTITY

    @cached_property
    def shift(self) -> float:
        """Intercept at slope 1 on the sample, an initial value too."""
        counts = self.count()
        return fit_intercept(self.logits, counts.pos, counts.neg) if counts.n_pos and counts.n_neg else 0.0


@dataclass(frozen=True)
class WeightedCounts:
    """Weighted counts of a sample, input of metrics.

    Attributes:
        scores: The patches; ``scores.prob`` are the distinct probabilities.
        pos: Weight of positive patches at each distinct probability.
        neg: Weight of negative patches at each distinct probability.
        tp: Weight of true positives.
        fp: Weight of false positives.
        sample_weight: Weight of each patch of ``y_true``, ``y_pred`` and ``y_prob``, ``(n_patches,)``, as for
            metrics of scikit-learn.
    """

    scores: SortedScores
    pos: Floats
    neg: Floats
    tp: float
    fp: float
    sample_weight: Floats

    @property
    def needs(self) -> Mapping[str, str]:
        return self.scores.needs

    @property
    def y_true(self) -> Floats:
        return self.scores.y_true

    @property
    def y_pred(self) -> Floats:
        return self.scores.y_pred

    @property
    def y_prob(self) -> Floats:
        return self.scores.y_prob

    @cached_property
    def n_pos(self) -> float:
        return float(self.pos.sum())

    @cached_property
    def n_neg(self) -> float:
        return float(self.neg.sum())

    @cached_property
    def pos_above(self) -> Floats:
        """Positive weight at or above each distinct probability."""
        return np.cumsum(self.pos)

    @cached_property
    def neg_above(self) -> Floats:
        return np.cumsum(self.neg)

    @property
    def n(self) -> float:
        return self.n_pos + self.n_neg

    @property
    def fn(self) -> float:
        return self.n_pos - self.tp

    @property
    def tn(self) -> float:
        return self.n_neg - self.fp

    @property
    def n_pred_pos(self) -> float:
        return self.tp + self.fp

    @property
    def n_pred_neg(self) -> float:
        return self.fn + self.tn


def check_binary(target: ArrayLike, prob: ArrayLike) -> tuple[Floats, Floats]:
    """Return both as float64 arrays of one length."""
    target, prob = np.asarray(target), np.asarray(prob, dtype=np.float64)
    if target.shape != prob.shape or target.ndim != 1:
        raise MetricError(
            f"target has shape {target.shape} and prob {prob.shape}: give one of each per patch", "shape"
        )
    if not len(target):
        raise MetricError("there are no patches to measure: at least one is needed", "empty")
    wrong = ~np.isin(target, (0, 1))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise MetricError(
            f"{wrong.sum()} targets are not 0 or 1; the first is {target[at]!r} at row {at}", "target"
        )
    wrong = ~((prob >= 0) & (prob <= 1))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise MetricError(
            f"{wrong.sum()} probabilities are not in 0-1; the first is {prob[at]} at row {at}", "prob"
        )
    return target.astype(np.float64), prob


def sort_scores(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    threshold: float = 0.5,
    *,
    group_ids: ArrayLike | None = None,
    y_pred: ArrayLike | None = None,
) -> SortedScores:
    """Sort a sample of two classes.

    Args:
        y_true: 0 or 1 per patch, shape ``(n_patches,)``.
        y_prob: Probability of the positive class per patch.
        threshold: A patch is predicted positive if ``y_prob >= threshold``.
        group_ids: Patient (or slide) per patch (default: each patch is a group).
        y_pred: Predicted positive patches, instead of a threshold.

    Raises:
        MetricError: If values are invalid, or a patch has no group.
    """
    target, prob = check_binary(y_true, y_prob)
    if group_ids is None:
        codes, groups = np.arange(len(prob)), np.arange(len(prob)).astype(object)
    else:
        codes, groups = check_groups(group_ids, len(prob))
    pred = prob >= threshold if y_pred is None else np.asarray(y_pred, dtype=bool)
    order = np.argsort(-prob, kind="stable")
    falling = prob[order]
    starts = np.flatnonzero(np.concatenate([[True], falling[1:] != falling[:-1]]))
    return SortedScores(
        target[order], pred[order].astype(np.float64), codes[order], groups, falling[starts], starts
    )


def check_groups(group_ids: ArrayLike, n_patches: int) -> tuple[NDArray[np.intp], NDArray[np.object_]]:
    """Return the index of each patch's group, and the ids of the groups in sorted order."""
    codes, groups = group_codes(group_ids)
    if len(codes) != n_patches or (codes < 0).any():
        raise MetricError(
            f"{np.count_nonzero(codes >= 0)} group ids for {n_patches} patches: "
            "give the patient of each patch",
            "shape",
        )
    return codes, groups
