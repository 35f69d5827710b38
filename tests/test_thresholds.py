"""Thresholds against a search by hand, ties, unreachable targets and one class only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from biopsy.core.errors import MetricError
from biopsy.statistics.decisions import choose_threshold
from refusals import refuses

# falling: .9 pos, .8 neg, .7 pos, .6 pos, .4 neg, .3 pos, .2 neg, .1 neg
TARGET = np.array([1, 0, 1, 1, 0, 1, 0, 0])
PROB = np.array([0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1])

BY_HAND = [
    (
        "youden",
        0.25,
        1.0,
        0.5,
    ),  # .5 gain at .5 (3 of 4, 3 of 4) and at .25 (4 of 4, 2 of 4): more sensitive wins
    ("sensitivity=0.75", 0.5, 0.75, 0.75),
    ("sensitivity=0.95", 0.25, 1.0, 0.5),
    ("sensitivity=1", 0.25, 1.0, 0.5),
    ("specificity=0.75", 0.5, 0.75, 0.75),
    ("specificity=0.90", 0.85, 0.25, 1.0),
    ("cost=5", 0.25, 1.0, 0.5),
    ("cost=0.5", 0.5, 0.75, 0.75),
    ("cost=0.1", 0.85, 0.25, 1.0),
    ("argmax", 0.5, 0.75, 0.75),
]


@pytest.mark.parametrize(("rule", "value", "sensitivity", "specificity"), BY_HAND)
def test_by_hand(rule, value, sensitivity, specificity):
    chosen = choose_threshold(TARGET, PROB, rule)
    assert chosen.value == pytest.approx(value)
    assert (chosen.sensitivity, chosen.specificity, chosen.rule) == (sensitivity, specificity, rule)


scores = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), min_size=2, max_size=60).filter(
    lambda rows: {t for t, _ in rows} == {0, 1}
)


@settings(deadline=None, max_examples=60)
@given(scores, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_rules_hold_on_their_own_patches_and_nothing_beats_them(rows, share):
    target, prob = np.array(rows).T
    prob = prob / 30
    fpr, tpr, _ = roc_curve(target, prob, drop_intermediate=False)
    by_rule = {
        "youden": lambda sens, spec: sens + spec,
        f"sensitivity={share}": lambda sens, spec: np.where(sens >= share - 1e-9, spec, -1),
        f"specificity={share}": lambda sens, spec: np.where(spec >= share - 1e-9, sens, -1),
        "cost=5": lambda sens, spec: -5 * (1 - sens) * sum(target) - (1 - spec) * sum(1 - target),
    }
    for rule, gain in by_rule.items():
        chosen = choose_threshold(target, prob, rule)
        called = prob >= chosen.value
        assert chosen.sensitivity == pytest.approx(called[target == 1].mean())
        assert chosen.specificity == pytest.approx(1 - called[target == 0].mean())
        achieved = gain(np.float64(chosen.sensitivity), np.float64(chosen.specificity))
        assert achieved == pytest.approx(np.max(gain(tpr, 1 - fpr)))
        assert not np.isin(chosen.value, prob[(prob > 0) & (prob < 1)])


@pytest.mark.parametrize("rule", ["youden", "sensitivity=0.8", "specificity=0.8", "cost=5", "argmax"])
def test_at_another_prevalence_costs_are_those_of_patches_drawn_at_it(rule):
    rng = np.random.default_rng(3)
    target = np.repeat([0, 1], 40)
    prob = np.clip(rng.normal(0.35 + 0.3 * target, 0.2), 0.01, 0.99)
    chosen = choose_threshold(target, prob, rule, prevalence=0.1)
    repeats = np.where(target == 1, 1, 9)  # one positive in ten
    wanted = choose_threshold(np.repeat(target, repeats), np.repeat(prob, repeats), rule)
    assert chosen == wanted
    assert (chosen.value == choose_threshold(target, prob, rule).value) == (rule != "cost=5")


def test_a_gap_is_cut_in_its_middle():
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]).value == pytest.approx(0.4)


def test_outermost_cuts_lie_midway_to_0_and_1():
    above = choose_threshold([1, 0], [0.4, 0.8], "specificity=0.9")
    assert above.value == pytest.approx(0.9) and (above.sensitivity, above.specificity) == (0, 1)
    below = choose_threshold([1, 0], [0.2, 0.8], "sensitivity=1")
    assert below.value == pytest.approx(0.1) and (below.sensitivity, below.specificity) == (1, 0)


def test_neighbouring_floats_are_still_distinguished():
    low = 0.3
    high = float(np.nextafter(low, 1))
    chosen = choose_threshold([0, 1], [low, high])
    assert low < chosen.value <= high
    assert (chosen.sensitivity, chosen.specificity) == (1, 1)


def test_a_specificity_that_ties_put_out_of_reach_calls_nothing_positive():
    chosen = choose_threshold([0, 1, 0, 1], [1.0, 1.0, 0.5, 0.5], "specificity=0.9")
    assert chosen.value > 1
    assert (chosen.sensitivity, chosen.specificity) == (0, 1)


@pytest.mark.parametrize(("target", "missing"), [([0, 0], "positive"), ([1, 1], "negative")])
def test_one_class_only_falls_back_to_a_half_and_reports_it(target, missing):
    chosen = choose_threshold(target, [0.2, 0.7], "youden")
    assert chosen.value == 0.5
    assert chosen.rule == f"argmax, because youden needs both classes and validation has no {missing} patch"
    assert (chosen.sensitivity, chosen.specificity) == ((0.5, None) if target[0] else (None, 0.5))
    assert choose_threshold(target, [0.2, 0.7], "argmax").rule == "argmax"


REFUSED = [
    ("yoden", "'youden'", "name"),
    ("youden=2", "'youden=2'", "name"),
    ("sensitivity", "0.95", "value"),
    ("sensitivity=95", "'sensitivity=95'", "value"),
    ("specificity=high", "'specificity=high'", "value"),
    ("cost=0", "'cost=0'", "value"),
    ("cost=inf", "cost=5", "value"),
]


@pytest.mark.parametrize(("rule", "fact", "reason"), REFUSED)
def test_rules_that_do_not_exist_are_refused(rule, fact, reason):
    with refuses(MetricError, fact, reason=reason):
        choose_threshold(TARGET, PROB, rule)


def test_missing_probabilities_are_refused():
    with refuses(MetricError, "not in 0-1"):
        choose_threshold([0, 1], [0.1, np.nan])
