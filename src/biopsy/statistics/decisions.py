"""Decision thresholds, and error rates, predictive values and net benefit of decisions.

A patch is predicted positive if ``prob >= threshold``. Thresholds are midway between neighbouring
probabilities, so that rounding does not change a prediction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike

from biopsy.core.errors import MetricError, suggest
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
from biopsy.statistics.weighted_counts import NEEDS, check_binary, sort_scores

Rule = Callable[[Floats, Floats, Floats, Floats], Floats]
"""Function of the numbers of positive and negative patches, and of true and false positives."""


@dataclass(frozen=True)
class DecisionCounts:
    """Decisions at several thresholds, counted by group and on each resample of the groups.

    Attributes:
        thresholds: ``(k,)``.
        by_group: ``(n_groups, 2 + 2 k)``: numbers of positive and negative patches, then true positives at
            each threshold, then false positives.
        replicates: Their sums on each resample, ``(n_replicates, 2 + 2 k)``.
    """

    thresholds: Floats
    by_group: Floats
    replicates: Floats
    resampler: Resampler

    def counts(self, sums: Floats, at: int) -> tuple[Floats, Floats, Floats, Floats]:
        """Return positive, negative, true positive and false positive patches at one threshold."""
        k = len(self.thresholds)
        return sums[..., 0], sums[..., 1], sums[..., 2 + at], sums[..., 2 + k + at]


def count_decisions(
    target: ArrayLike,
    prob: ArrayLike,
    group_ids: ArrayLike,
    thresholds: Sequence[float] | Floats,
    **resampling: Unpack[Resampling],
) -> DecisionCounts:
    """Count decisions at thresholds; a patch is predicted positive if ``prob >= threshold``."""
    truth, prob = check_binary(target, prob)
    codes, groups = group_codes(group_ids)
    pred = [prob >= threshold for threshold in thresholds]
    columns = [truth, 1 - truth, *(truth * y for y in pred), *((1 - truth) * y for y in pred)]
    by_group = sum_groups(codes, len(groups), *columns)
    resampler = Resampler(len(groups), **resampling)
    _, replicates = resampler.replicate(lambda weight: weight @ by_group)
    return DecisionCounts(np.asarray(thresholds, np.float64), by_group, replicates, resampler)


def estimate_rates(decisions: DecisionCounts, at: int) -> dict[str, Interval]:
    """Return sensitivity, specificity, ppv and npv at the threshold number ``at``."""
    pos, neg, tp, fp = decisions.counts(decisions.by_group, at)
    rules: dict[str, tuple[Rule, Floats]] = {
        "sensitivity": (lambda p, n, t, f: divide(t, p), pos),
        "specificity": (lambda p, n, t, f: divide(n - f, n), neg),
        "ppv": (lambda p, n, t, f: divide(t, t + f), tp + fp),
        "npv": (lambda p, n, t, f: divide(n - f, n - f + p - t), pos + neg - tp - fp),
    }
    return {
        name: _estimate(decisions, at, rule, InformativeGroups(patches, description), share=True)
        for (name, (rule, patches)), description in zip(rules.items(), NEEDS.values(), strict=True)
    }


def estimate_predictive_values(decisions: DecisionCounts, at: int, prevalence: float) -> dict[str, Interval]:
    """Return ppv and npv at another prevalence by Bayes' rule."""
    check_prevalence(prevalence)

    def ppv(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        right, wrong = divide(tp, pos) * prevalence, divide(fp, neg) * (1 - prevalence)
        return divide(right, right + wrong)

    def npv(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        right, wrong = divide(neg - fp, neg) * (1 - prevalence), divide(pos - tp, pos) * prevalence
        return divide(right, right + wrong)

    pos, neg, _, _ = decisions.counts(decisions.by_group, at)
    informative = fewest_informative(
        [InformativeGroups(pos, "positive patches"), InformativeGroups(neg, "negative patches")]
    )
    return {
        "ppv": _estimate(decisions, at, ppv, informative),
        "npv": _estimate(decisions, at, npv, informative),
    }


def estimate_net_benefit(decisions: DecisionCounts, at: int) -> Interval:
    """Return the net benefit at the threshold number ``at``: ``tp / n - fp / n * t / (1 - t)``.

    Source: Vickers and Elkin 2006.
    """
    odds = decisions.thresholds[at] / (1 - decisions.thresholds[at])
    pos, neg, _, _ = decisions.counts(decisions.by_group, at)
    return _estimate(
        decisions,
        at,
        lambda p, n, t, f: divide(t - odds * f, p + n),
        InformativeGroups(pos + neg),
        bounds=UNBOUNDED,
    )


def estimate_benefit_gain(decisions: DecisionCounts, at: int) -> Interval:
    """Return the net benefit at the threshold number ``at`` minus that of the better reference strategy.

    The strategies are treating all patches and none; the better one on the sample is the reference on every
    resample, so that the difference is paired.
    """
    odds = decisions.thresholds[at] / (1 - decisions.thresholds[at])
    pos, neg, _, _ = decisions.counts(decisions.by_group, at)
    treat_all = pos.sum() > odds * neg.sum()

    def gain(pos: Floats, neg: Floats, tp: Floats, fp: Floats) -> Floats:
        reference = pos - odds * neg if treat_all else 0.0
        return divide(tp - odds * fp - reference, pos + neg)

    return _estimate(decisions, at, gain, InformativeGroups(pos + neg), bounds=UNBOUNDED)


def net_benefit(target: ArrayLike, prob: ArrayLike, thresholds: ArrayLike) -> Floats:
    """Return the net benefit at each threshold probability, ``(k,)``; see `estimate_net_benefit`.

    With probabilities of 1 for all patches it is that of treating all; that of treating none is 0.

    Example:
        >>> net_benefit([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], [0.5])
        array([0.])
    """
    truth, prob = check_binary(target, prob)
    at = np.asarray(thresholds, np.float64)
    if not ((at > 0) & (at < 1)).all():
        raise MetricError("threshold probabilities of a decision curve must be above 0 and below 1", "value")
    tp, fp = (
        len(chosen) - np.searchsorted(chosen, at, side="left")
        for chosen in (np.sort(prob[truth == 1]), np.sort(prob[truth == 0]))
    )
    return (tp - fp * at / (1 - at)) / len(truth)


def check_prevalence(prevalence: float) -> None:
    """Check that a prevalence is between 0 and 1."""
    if not 0 < prevalence < 1:
        raise MetricError(
            f"prevalence is {prevalence!r}: it must be above 0 and below 1, such as 0.02", "value"
        )


def _estimate(
    decisions: DecisionCounts,
    at: int,
    rule: Rule,
    informative: InformativeGroups,
    *,
    bounds: Bounds = SHARE,
    share: bool = False,
) -> Interval:
    return decisions.resampler.interval(
        float(rule(*decisions.counts(decisions.by_group.sum(axis=0), at))),
        rule(*decisions.counts(decisions.replicates, at)),
        informative,
        bounds=bounds,
        share=share,
    )


RULES = ("youden", "sensitivity=0.95", "specificity=0.90", "cost=5", "argmax")


@dataclass(frozen=True)
class Threshold:
    """A threshold and its rule.

    Attributes:
        value: A patch is predicted positive if ``prob >= value``.
        rule: The rule; if it was not applicable, the rule used instead and the reason.
        sensitivity: On the patches on which it was chosen; None without positive patches.
        specificity: On these patches; None without negative patches.
    """

    value: float
    rule: str
    sensitivity: float | None
    specificity: float | None


def parse_rule(rule: str) -> tuple[str, float]:
    """Split a rule into its name and its number (NaN for a rule without one)."""
    name, _, text = rule.partition("=")
    if name in ("youden", "argmax") and not text and "=" not in rule:
        return name, float("nan")
    if name not in ("sensitivity", "specificity", "cost"):
        raise MetricError(f"threshold rule {rule!r} does not exist: {suggest(rule, RULES)}", "name")
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if name == "cost" and not 0 < number < np.inf:
        raise MetricError(
            f"threshold rule {rule!r}: cost= takes the cost of a false negative, such as cost=5", "value"
        )
    if name != "cost" and not 0 < number <= 1:
        raise MetricError(
            f"threshold rule {rule!r}: {name}= takes a share above 0 and at most 1, such as 0.95", "value"
        )
    return name, number


def place_cuts(prob: Floats) -> Floats:
    """Return thresholds above all distinct descending probabilities, between neighbours, and below all.

    The outermost are midway to 1 and 0. Between neighbours without a number in between it is the upper one.
    """
    above = np.concatenate([[1.0 if prob[0] < 1 else np.nextafter(1.0, 2.0)], prob])
    below = np.append(prob, 0.0)
    middle = (above + below) / 2
    return np.where(middle > below, middle, above)


def choose_threshold(
    target: ArrayLike, prob: ArrayLike, rule: str = "youden", *, prevalence: float = 0.0
) -> Threshold:
    """Choose a threshold on validation patches.

    Args:
        rule: ``"youden"`` (highest sensitivity + specificity), ``"sensitivity=0.95"`` (reach it, then the
            highest specificity), ``"specificity=0.90"`` (reach it, then the highest sensitivity),
            ``"cost=5"`` (minimum cost if a false negative costs as much as 5 false positives) or
            ``"argmax"`` (0.5). Ties are resolved by higher sensitivity.
        prevalence: Share of positive patches at which costs are minimised; 0: that of these patches.

    Returns:
        The threshold; 0.5, stated in ``rule``, if the patches are of one class only.

    Example:
        >>> choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]).value
        0.4
    """
    name, number = parse_rule(rule)
    counts = sort_scores(target, prob).count()
    n_pos, n_neg = counts.n_pos, counts.n_neg
    tp, fp = np.concatenate([[0.0], counts.pos_above]), np.concatenate([[0.0], counts.neg_above])
    if not (n_pos and n_neg):
        missing = "negative" if n_pos else "positive"
        if name != "argmax":
            rule = f"argmax, because {rule} needs both classes and validation has no {missing} patch"
        sensitivity = counts.tp / n_pos if n_pos else None
        specificity = counts.tn / n_neg if n_neg else None
        return Threshold(0.5, rule, sensitivity, specificity)
    if name == "argmax":
        return Threshold(0.5, rule, counts.tp / n_pos, counts.tn / n_neg)
    tn = n_neg - fp
    if name == "youden":
        gain = tp * n_neg + tn * n_pos  # integers, so that ties are exact
    elif name == "cost":
        if prevalence:
            number *= prevalence / (1 - prevalence) * n_neg / n_pos
        gain = -number * (n_pos - tp) - fp
    elif name == "sensitivity":
        gain = np.where(tp >= number * n_pos * (1 - 1e-12), tn, -np.inf)
    else:
        gain = np.where(tn >= number * n_neg * (1 - 1e-12), tp, -np.inf)
    best = len(gain) - 1 - int(np.argmax(gain[::-1]))  # descending: the last is the most sensitive
    value = float(place_cuts(counts.scores.prob)[best])
    return Threshold(value, rule, float(tp[best] / n_pos), float(tn[best] / n_neg))
