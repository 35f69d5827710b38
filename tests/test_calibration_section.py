"""Chapters and figures on calibration and decisions: they say what the numbers say, and no more."""

from dataclasses import replace

import numpy as np
import pytest

from biopsy.core.errors import MetricError
from biopsy.evaluation.calibration.measure import MEASURED
from biopsy.evaluation.calibration.section import (
    describe_calibration,
    describe_calibrator,
    describe_slope,
    draw_calibration,
)
from biopsy.evaluation.figures import draw_decision_curve
from biopsy.evaluation.measure import measure_decisions
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.sections import describe_benefit, describe_decisions, describe_rule, table_of_points
from biopsy.reporting.document import Picture, Pictures, Table, Text
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.calibrators import PRIOR_CORRECTED, PRIOR_UNCHANGED
from biopsy.statistics.reliability import decompose_brier, estimate_reliability
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import DecisionCurve, NetBenefit, Reliability
from refusals import refuses
from report_facts import NAMES, estimate_patch_metrics
from report_facts import make_small_facts as run_facts

FITTED = {
    "method": "temperature",
    "slope": 0.5,
    "intercepts": [],
    "prior": "as trained",
    "asked": "temperature",
    "fitted_on": "validation",
    "n_patches": 712,
    "n_patients": 1,
    "unit": "patient",
    "warning": "calibrated on 1 patient only: what fits there may not fit the next",
}


def side(target, prob, groups):
    metrics = estimate_patch_metrics(target, prob, groups, seed=0)
    return Reliability(
        **{name: metrics[name] for name in MEASURED},
        ece_floor=ece_floor(prob, seed=0),
        brier_parts=decompose_brier(target, prob),
        bins=estimate_reliability(target, prob, groups, seed=0),
    )


@pytest.fixture(scope="module")
def facts():
    bare = run_facts()
    table = bare.predictions
    target, prob, groups = bare.is_positive, table["prob"].to_numpy(), table["patient_id"].to_numpy(str)
    thresholds = [
        {"value": 0.43, "rule": "youden", "chosen_on": "validation", "sensitivity": 0.9, "specificity": 0.8},
        {"value": 0.2, "rule": "sensitivity=0.95", "chosen_on": "validation"},
    ]
    extreme = prob**3 / (prob**3 + (1 - prob) ** 3)
    found = {**FITTED, "before": side(target, extreme, groups), "after": side(target, prob, groups)}
    scored = ScoredPatches.of_predictions(
        table.assign(**{"prob_not IDC": 1 - prob, "prob_IDC": prob}), NAMES, "IDC", "patient"
    )
    decisions = measure_decisions(scored, thresholds, prevalence=0.02)
    return replace(bare, metrics=replace(bare.metrics, calibration=found, **vars(decisions)))


def texts(section):
    return " ".join(block.text for block in section.blocks if isinstance(block, Text))


def test_the_calibration_section(facts):
    section = describe_calibration(facts)
    assert section.id == "calibration" and FITTED["warning"].capitalize() in texts(section)
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert table.columns == ["measure", "before calibration", "after calibration"]
    ece = facts.metrics.calibration["after"].ece.value
    assert table.rows[0][2].startswith(f"{ece:.3f} (a)") and len(table.rows) == 9
    pictures = [one for block in section.blocks if isinstance(block, Pictures) for one in block.items]
    assert [one.caption.split(":")[0] for one in pictures] == ["Before calibration", "After calibration"]
    assert all(isinstance(one, Picture) and "Predicted probability of IDC" in one.svg for one in pictures)


def test_without_calibration_there_is_one_column(facts):
    found = facts.metrics.calibration
    plain = {"method": "none", "reason": "not calibrated: all 9 patches are of class 0"}
    plain |= {"before": found["after"], "after": found["after"]}
    section = describe_calibration(replace(facts, metrics=replace(facts.metrics, calibration=plain)))
    assert texts(section).startswith("Not calibrated: all 9 patches are of class 0.")
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert table.columns == ["measure", "not calibrated"]


def test_the_decision_section(facts):
    section = describe_decisions(facts)
    points, prevalence = (block for block in section.blocks if isinstance(block, Table))
    reached = facts.metrics.operating_points[0].achieved["sensitivity"].value
    assert points.rows[0][:3] == ["highest sensitivity + specificity", "0.430", "0.900"]
    assert points.rows[0][4] == f"{reached - 0.9:+.3f}" and points.rows[1][4] == "-"
    assert prevalence.caption == "Predictive values at a prevalence of 2 %" and len(prevalence.rows) == 2
    assert "at threshold probabilities of" in texts(section)


def test_points_on_the_subset_that_chose_them_have_no_drift(facts):
    table = table_of_points(facts.metrics.operating_points, "validation")
    assert not any("drift" in column for column in table.columns) and len(table.rows) == 2
    assert table.columns != table_of_points(facts.metrics.operating_points, "test").columns


def test_without_operating_points_there_is_no_section():
    assert describe_decisions(run_facts()) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "Temperature scaling, fitted on 712 patches of 1 patient of the validation subset. Scores are "
             "multiplied by 0.500 (a temperature of 2.000)."),
        ({"unit": "patch"}, "fitted on 712 patches of the validation subset"),
        ({"n_patients": 9}, "of 9 patients of"),
        ({"intercepts": [0, 1.0]}, "and shifted."),
        ({"prior": PRIOR_CORRECTED}, "scores were corrected to the validation prevalence"),
        ({"prior": PRIOR_UNCHANGED}, "this was not corrected"),
        ({"method": "none"}, "The probabilities are those of the network."),
    ],
)  # fmt: skip
def test_what_is_reported_of_a_calibrator(change, text):
    assert text in describe_calibrator({**FITTED, **change})


def slope(value, low, high, intercept=(0, -1, 1)):
    other = dict.fromkeys(("ece", "brier", "nll"), Interval(0.1))
    intervals = {
        "calibration_slope": Interval(value, low, high, "a reason"),
        "calibration_intercept": Interval(*intercept),
    }
    return Reliability(**other, **intervals, ece_floor=0.1, bins=[])


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (slope(0.5, 0.3, 0.8), "The probabilities are overconfident (slope 0.500, 0.300 to 0.800)."),
        (slope(1.5, 1.3, 1.8), "The probabilities are underconfident"),
        (slope(1.1, 0.7, 1.5), "No over- or underconfidence was detected"),
        (slope(0.5, None, None), "has no interval: a reason"),
        (slope(np.nan, None, None), "slope is undefined: a reason"),
        (slope(1.0, 0.9, 1.1, (1, 0.5, 1.5)), "on average they underestimate the frequency of IDC"),
        (slope(1.0, 0.9, 1.1, (-1, -2, -0.5)), "overestimate the frequency of IDC"),
    ],
)
def test_what_is_reported_of_a_slope(after, text):
    assert text in describe_slope(after, "IDC")


@pytest.mark.parametrize(
    ("gains", "half", "text"),
    [
        ([0.0, 0.1, 0.0, 0.1], 0.05, "probabilities of 0.20, 0.40."),
        ([0.0, 0.1, 0.1, 0.1], 0.05, "probabilities of 0.20 to 0.40."),
        ([0.0, 0.1, 0.1, 0.1], 0.2, "at 0.20 to 0.40, but the 95 % intervals of the difference include 0."),
        ([0.0, 0.1, 0.1, 0.0], None, "at 0.20 to 0.30, but this has no interval: a reason."),
        ([0.0, 0.0, -0.1, 0.0], 0.05, "At no threshold probability"),
    ],
)
def test_where_acting_pays_as_far_as_intervals_allow(gains, half, text):
    ends = [(None, None) if half is None else (gain - half, gain + half) for gain in gains]
    marked = [
        NetBenefit(0.0, threshold=at, gain=Interval(gain, low, high, "a reason"))
        for at, gain, (low, high) in zip([0.1, 0.2, 0.3, 0.4], gains, ends, strict=True)
    ]
    assert text in describe_benefit(DecisionCurve([], [], [], marked))


def test_rules_in_words():
    assert describe_rule("sensitivity=0.95") == "sensitivity of 0.95"
    assert describe_rule("cost=5") == "minimum cost, a false negative costing 5 false positives"
    assert describe_rule("argmax, because youden needs both classes") == (
        "argmax, because youden needs both classes"
    )


def test_figures_hold_the_numbers_they_are_given(facts):
    found = facts.metrics.calibration
    line = draw_calibration(found["after"].bins).axes[0].lines[-1]
    np.testing.assert_allclose(line.get_xdata(), [one.mean_prob for one in found["after"].bins])
    curve = facts.metrics.decision_curve
    axes = draw_decision_curve(curve).axes[0]
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), curve.model)
    bare = replace(curve, marked=[replace(one, low=None, high=None) for one in curve.marked])
    assert len(draw_decision_curve(bare).axes[0].collections) == 0


def test_figures_refuse_nothing_to_draw():
    with refuses(MetricError, "bins"):
        draw_calibration([])
    with refuses(MetricError, "threshold"):
        draw_decision_curve(DecisionCurve([], [], [], []))
