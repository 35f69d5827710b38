"""Where to draw the line: a threshold chosen on validation, then frozen.

A patch is called positive where ``prob >= threshold``. Thresholds lie midway between neighbouring
probabilities, so that rounding a probability does not turn a call.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from biopsy.core.errors import MetricError, suggest
from biopsy.statistics.resampling import Floats
from biopsy.statistics.weighted_counts import sort_scores

RULES = ("youden", "sensitivity=0.95", "specificity=0.90", "cost=5", "argmax")


@dataclass(frozen=True)
class Threshold:
    """A threshold, how it was chosen, and what it achieved where it was chosen.

    Attributes:
        value: A patch is called positive where ``prob >= value``.
        rule: The rule in words; says so where the rule asked for could not be followed.
        sensitivity: Achieved on the patches it was chosen on; None without positive patches.
        specificity: The same; None without negative patches.
    """

    value: float
    rule: str
    sensitivity: float | None
    specificity: float | None


def parse_rule(rule: str) -> tuple[str, float]:
    """Split a rule into its name and its number (NaN for a rule without one).

    Raises:
        MetricError: For a rule that does not exist, or a number that it cannot have.
    """
    name, _, text = rule.partition("=")
    if name in ("youden", "argmax") and not text and "=" not in rule:
        return name, float("nan")
    if name not in ("sensitivity", "specificity", "cost"):
        raise MetricError(f"threshold rule {rule!r} does not exist: {suggest(rule, RULES)}")
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if name == "cost" and not 0 < number < np.inf:
        raise MetricError(
            f"threshold rule {rule!r}: cost= takes what one missed positive costs, such as cost=5"
        )
    if name != "cost" and not 0 < number <= 1:
        raise MetricError(
            f"threshold rule {rule!r}: {name}= takes a share above 0 and at most 1, such as 0.95"
        )
    return name, number


def place_cuts(prob: Floats) -> Floats:
    """Return one threshold above all distinct falling probabilities, between neighbours, and below all.

    The outermost lie midway to 1 and 0. Two neighbours with no number between them are cut at the upper one.
    """
    above = np.concatenate([[1.0 if prob[0] < 1 else np.nextafter(1.0, 2.0)], prob])
    below = np.append(prob, 0.0)
    middle = (above + below) / 2
    return np.where(middle > below, middle, above)


def choose_threshold(target: ArrayLike, prob: ArrayLike, rule: str = "youden") -> Threshold:
    """Choose a threshold on validation patches.

    Args:
        target: 0 or 1 per patch, shape ``(n_patches,)``.
        prob: Probability of the positive class per patch.
        rule: ``"youden"`` (highest sensitivity + specificity), ``"sensitivity=0.95"`` (reach it, then the
            highest specificity), ``"specificity=0.90"`` (reach it, then the highest sensitivity),
            ``"cost=5"`` (least cost where a missed positive costs 5 false alarms) or ``"argmax"`` (0.5).
            Ties go to the higher sensitivity.

    Returns:
        The threshold; 0.5 where the patches hold one class only, and ``rule`` then says so.

    Raises:
        MetricError: For a rule that does not exist, or values that allow no choice.

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
        gain = tp * n_neg + tn * n_pos  # in whole numbers, so that ties are ties
    elif name == "cost":
        gain = -number * (n_pos - tp) - fp
    elif name == "sensitivity":
        gain = np.where(tp >= number * n_pos * (1 - 1e-12), tn, -np.inf)
    else:
        gain = np.where(tn >= number * n_neg * (1 - 1e-12), tp, -np.inf)
    best = len(gain) - 1 - int(np.argmax(gain[::-1]))  # cuts fall: the last of the best is the most sensitive
    value = float(place_cuts(counts.scores.prob)[best])
    return Threshold(value, rule, float(tp[best] / n_pos), float(tn[best] / n_neg))
