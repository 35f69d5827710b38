"""What a decision at a threshold is worth: error shares, predictive values at a prevalence, net benefit.

Patches are counted by patient once; every number here is a function of four counts, so that patients can be
left out or drawn anew without looking at patches again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike

from biopsy.core.errors import MetricError
from biopsy.statistics.resampling import (
    SHARE,
    UNBOUNDED,
    Bounds,
    Floats,
    InformativeGroups,
    Interval,
    Resampler,
    Resampling,
    divide,
    fewest_informative,
    group_codes,
    sum_groups,
)
from biopsy.statistics.weighted_counts import check_binary

Rule = Callable[[Floats, Floats, Floats, Floats], Floats]
"""Positive and negative patches, true and false positives in; one number out."""


@dataclass(frozen=True)
class Calls:
    """Calls at several thresholds, counted for each group and on each reweighting of the groups.

    Attributes:
        thresholds: ``(k,)``.
        by_group: ``(n_groups, 2 + 2 k)``: positive and negative patches, then true positives at each
            threshold, then false positives.
        replicates: The same sums on each reweighting, ``(n_replicates, 2 + 2 k)``.
        resampler: How the groups were reweighted.
    """

    thresholds: Floats
    by_group: Floats
    replicates: Floats
    resampler: Resampler

    def counts(self, sums: Floats, at: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Return positive, negative, true positive and false positive patches at one threshold."""
        k = len(self.thresholds)
        return sums[..., 0], sums[..., 1], sums[..., 2 + at], sums[..., 2 + k + at]


def count_calls(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    thresholds: Sequence[float] | Floats,
    **resampling: Unpack[Resampling],
) -> Calls:
    """Count calls at thresholds; a patch is called positive where ``prob >= threshold``.

    Args:
        target: 0 or 1 per patch, ``(n,)``.
        thresholds: Any number of them, in any order.
        **resampling: As of `Resampler`.

    Raises:
        MetricError: If a target is not 0 or 1, or a probability not in 0-1.
    """
    truth, prob = check_binary(target, prob)
    codes, groups = group_codes(group_ids)
    called = [prob >= threshold for threshold in thresholds]
    columns = [truth, 1 - truth, *(truth * call for call in called), *((1 - truth) * call for call in called)]
    by_group = sum_groups(codes, len(groups), *columns)
    resampler = Resampler(len(groups), **resampling)
    _, replicates = resampler.replicate(lambda weight: weight @ by_group)
    return Calls(np.asarray(thresholds, np.float64), by_group, replicates, resampler)


def estimate_rates(calls: Calls, at: int) -> dict[str, Interval]:
    """Return sensitivity, specificity, ppv and npv at the threshold number ``at``."""
    pos, neg, tp, fp = calls.counts(calls.by_group, at)
    rules: dict[str, tuple[Rule, Floats, str]] = {
        "sensitivity": (lambda p, n, t, f: divide(t, p), pos, "positive patches"),
        "specificity": (lambda p, n, t, f: divide(n - f, n), neg, "negative patches"),
        "ppv": (lambda p, n, t, f: divide(t, t + f), tp + fp, "patches called positive"),
        "npv": (
            lambda p, n, t, f: divide(n - f, n - f + p - t),
            pos + neg - tp - fp,
            "patches called negative",
        ),
    }
    return {
        name: _estimate(calls, at, rule, InformativeGroups(patches, description), share=True)
        for name, (rule, patches, description) in rules.items()
    }


def estimate_predictive_values(calls: Calls, at: int, prevalence: float) -> dict[str, Interval]:
    """Return ppv and npv where a stated share of patches is positive, by Bayes' rule.

    Sensitivity and specificity are taken from the sample and held to be the same there.

    Raises:
        MetricError: If the prevalence is not between 0 and 1.
    """
    check_prevalence(prevalence)

    def ppv(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        right, wrong = divide(tp, pos) * prevalence, divide(fp, neg) * (1 - prevalence)
        return divide(right, right + wrong)

    def npv(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        right, wrong = divide(neg - fp, neg) * (1 - prevalence), divide(pos - tp, pos) * prevalence
        return divide(right, right + wrong)

    pos, neg, _, _ = calls.counts(calls.by_group, at)
    informative = fewest_informative(
        [InformativeGroups(pos, "positive patches"), InformativeGroups(neg, "negative patches")]
    )
    return {
        "ppv": _estimate(calls, at, ppv, informative),
        "npv": _estimate(calls, at, npv, informative),
    }


def estimate_net_benefit(calls: Calls, at: int) -> Interval:
    """Return the net benefit of acting on what is called positive at the threshold number ``at``.

    ``tp / n - fp / n * t / (1 - t)``: true positives less false ones, weighed by the odds of the threshold
    probability, per patch (Vickers and Elkin 2006).
    """
    odds = calls.thresholds[at] / (1 - calls.thresholds[at])
    pos, neg, _, _ = calls.counts(calls.by_group, at)
    return _estimate(
        calls,
        at,
        lambda p, n, t, f: divide(t - odds * f, p + n),
        InformativeGroups(pos + neg),
        bounds=UNBOUNDED,
    )


def estimate_benefit_gain(calls: Calls, at: int) -> Interval:
    """Return the net benefit at the threshold number ``at`` minus that of the better reference strategy.

    The strategies are acting on all patches and on none; the better one on the sample is the reference on
    every reweighting, so the difference is paired.
    """
    odds = calls.thresholds[at] / (1 - calls.thresholds[at])
    pos, neg, _, _ = calls.counts(calls.by_group, at)
    act_on_all = pos.sum() > odds * neg.sum()

    def gain(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        reference = pos - odds * neg if act_on_all else 0.0
        return divide(tp - odds * fp - reference, pos + neg)

    return _estimate(calls, at, gain, InformativeGroups(pos + neg), bounds=UNBOUNDED)


def net_benefit(target: ArrayLike, prob: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Return the net benefit at each threshold probability, ``(k,)``; see `estimate_net_benefit`.

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


def _estimate(
    calls: Calls,
    at: int,
    rule: Rule,
    informative: InformativeGroups,
    *,
    bounds: Bounds = SHARE,
    share: bool = False,
) -> Interval:
    return calls.resampler.interval(
        float(rule(*calls.counts(calls.by_group.sum(axis=0), at))),
        rule(*calls.counts(calls.replicates, at)),
        informative,
        bounds=bounds,
        share=share,
    )
