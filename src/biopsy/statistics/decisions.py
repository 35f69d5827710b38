"""What a decision at a threshold is worth: error shares, predictive values at a prevalence, net benefit.

Patches are counted by patient once; every number here is a function of four counts, so that patients can be
left out or drawn anew without looking at patches again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import (
    DRAWS,
    FEWEST_GROUPS,
    Interval,
    Method,
    bound_interval,
    estimate_from,
    reweigh,
)
from biopsy.statistics.metrics import UNBOUNDED
from biopsy.statistics.weighted_counts import Floats, check_binary

Rule = Callable[[Floats, Floats, Floats, Floats], Floats]
"""Positive and negative patches, true and false positives in; one number out."""

SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Calls:
    """Calls at several thresholds, counted for each group and on each reweighting of the groups.

    Attributes:
        thresholds: ``(k,)``.
        by_group: ``(n_groups, 2 + 2 k)``: positive and negative patches, then true positives at each
            threshold, then false positives.
        replicates: The same sums on each reweighting, ``(n_replicates, 2 + 2 k)``.
        method: How the groups were reweighted.
        unit: What a group is.
        level: Nominal coverage of the intervals.
    """

    thresholds: Floats
    by_group: Floats
    replicates: Floats
    method: Method
    unit: str
    level: float

    def counts(self, sums: Floats, at: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Give positive, negative, true positive and false positive patches at one threshold."""
        k = len(self.thresholds)
        return sums[..., 0], sums[..., 1], sums[..., 2 + at], sums[..., 2 + k + at]


def count_calls(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    thresholds: Sequence[float] | Floats,
    *,
    seed: int,
    unit: str = "patient",
    level: float = 0.95,
    draws: int = DRAWS,
) -> Calls:
    """Count calls at thresholds; a patch is called positive where ``prob >= threshold``.

    Args:
        target: 0 or 1 per patch, ``(n,)``.
        prob: Probability of the positive class.
        group_ids: The patient (slide, patch) of each.
        thresholds: Any number of them, in any order.
        seed: Of the bootstrap, used from 100 groups on.
        unit: What a group is.
        level: Nominal coverage.
        draws: Bootstrap draws.

    Raises:
        MetricError: If a target is not 0 or 1, or a probability not in 0-1.
    """
    truth, prob = check_binary(target, prob)
    codes, groups = pd.factorize(np.asarray(group_ids, dtype=object), sort=True)
    n_groups = len(groups)

    def count(chosen: Floats) -> Floats:
        return np.asarray(np.bincount(codes, chosen, n_groups), np.float64)

    called = [prob >= threshold for threshold in thresholds]
    columns = [count(truth), count(1 - truth)]
    columns += [count(truth * call) for call in called] + [count((1 - truth) * call) for call in called]
    by_group = np.stack(columns, axis=1)
    replicates, method = reweigh(by_group, seed=seed, draws=draws)
    return Calls(np.asarray(thresholds, np.float64), by_group, replicates, method, unit, level)


def estimate_rates(calls: Calls, at: int) -> dict[str, Interval]:
    """Give sensitivity, specificity, ppv and npv at the threshold number ``at``."""
    pos, neg, tp, fp = calls.counts(calls.by_group, at)
    return {
        "sensitivity": _estimate(calls, at, lambda p, n, t, f: _divide(t, p), pos, "positive patches"),
        "specificity": _estimate(calls, at, lambda p, n, t, f: _divide(n - f, n), neg, "negative patches"),
        "ppv": _estimate(calls, at, lambda p, n, t, f: _divide(t, t + f), tp + fp, "patches called positive"),
        "npv": _estimate(
            calls,
            at,
            lambda p, n, t, f: _divide(n - f, n - f + p - t),
            pos + neg - tp - fp,
            "patches called negative",
        ),
    }


def estimate_predictive_values(calls: Calls, at: int, prevalence: float) -> dict[str, Interval]:
    """Give ppv and npv where a stated share of patches is positive, by Bayes' rule.

    Sensitivity and specificity are taken from the sample and held to be the same there.

    Raises:
        MetricError: If the prevalence is not between 0 and 1.
    """
    check_prevalence(prevalence)

    def ppv(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        right, wrong = _divide(tp, pos) * prevalence, _divide(fp, neg) * (1 - prevalence)
        return _divide(right, right + wrong)

    def npv(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        right, wrong = _divide(neg - fp, neg) * (1 - prevalence), _divide(pos - tp, pos) * prevalence
        return _divide(right, right + wrong)

    pos, neg, _, _ = calls.counts(calls.by_group, at)
    rarer, has = min((pos, "positive patches"), (neg, "negative patches"), key=lambda one: (one[0] > 0).sum())
    return {
        "ppv": _estimate(calls, at, ppv, rarer, has, share=False),
        "npv": _estimate(calls, at, npv, rarer, has, share=False),
    }


def estimate_net_benefit(calls: Calls, at: int) -> Interval:
    """Give the net benefit of acting on what is called positive at the threshold number ``at``.

    ``tp / n - fp / n * t / (1 - t)``: true positives less false ones, weighed by the odds of the threshold
    probability, per patch (Vickers and Elkin 2006).
    """
    odds = calls.thresholds[at] / (1 - calls.thresholds[at])
    pos, neg, _, _ = calls.counts(calls.by_group, at)
    return _estimate(
        calls, at, lambda p, n, t, f: _divide(t - odds * f, p + n), pos + neg, "patches", bounds=UNBOUNDED
    )


def net_benefit(target: ArrayLike, prob: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Give the net benefit at each threshold probability, ``(k,)``; see `estimate_net_benefit`.

    Probabilities of 1 for all patches give that of treating all; of treating none it is 0.

    Raises:
        MetricError: If a threshold is not above 0 and below 1, or values allow no count.

    Example:
        >>> net_benefit([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], [0.5])
        array([0.])
    """
    truth, prob = check_binary(target, prob)
    at = np.asarray(thresholds, np.float64)
    if not ((at > 0) & (at < 1)).all():
        raise MetricError("threshold probabilities of a decision curve lie above 0 and below 1")
    tp, fp = (
        len(chosen) - np.searchsorted(chosen, at, side="left")
        for chosen in (np.sort(prob[truth == 1]), np.sort(prob[truth == 0]))
    )
    return (tp - fp * at / (1 - at)) / len(truth)


def check_prevalence(prevalence: float) -> None:
    """Refuse a prevalence that is none."""
    if not 0 < prevalence < 1:
        raise MetricError(
            f"prevalence is {prevalence!r}: the share of positive patches, above 0 and below 1, such as 0.02"
        )


def _divide(above: Floats, below: Floats) -> Floats:
    """Divide, NaN where there is nothing to divide by."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _estimate(
    calls: Calls,
    at: int,
    rule: Rule,
    carried: Floats,
    has: str,
    *,
    bounds: tuple[float, float] = SHARE,
    share: bool = True,
) -> Interval:
    value = float(rule(*calls.counts(calls.by_group.sum(axis=0), at)))
    n = int(np.count_nonzero(carried))
    if np.isnan(value):
        return Interval(value, reason=f"undefined: no {has}")
    if share and bounds == SHARE and value in SHARE and n >= FEWEST_GROUPS:
        return bound_interval(value, n, calls.level)
    return estimate_from(
        value,
        rule(*calls.counts(calls.replicates, at)),
        calls.method,
        (n, has),
        bounds=bounds,
        level=calls.level,
        unit=calls.unit,
    )
