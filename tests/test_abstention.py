"""Abstention: shares and risk against coverage, laws and hand-worked tables; the entry and the chapter."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from biopsy.core.errors import MetricError
from biopsy.evaluation.abstention.measure import (
    BEFORE,
    check_coverage,
    count_sets,
    measure_abstention,
)
from biopsy.evaluation.abstention.section import (
    MEASURES,
    describe_abstention,
    describe_verdict,
    draw_coverage,
    draw_risk_coverage,
)
from biopsy.evaluation.results import abstention_summary
from biopsy.evaluation.scored import ScoredPatches
from biopsy.reporting.document import ReportDocument, Summary
from biopsy.reporting.html import render_report
from biopsy.statistics.abstention import (
    COVERAGES,
    estimate_risk,
    estimate_shares,
    optimal_aurc,
    predict_sets,
    risk_at,
    risk_coverage_curve,
)
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import RiskAt, SetCounts
from biopsy.training.postprocessing import fit_abstention
from refusals import refuses
from report_facts import NAMES, THRESHOLD, Page, make_metrics, make_predictions, make_small_facts
from simulated_cohorts import UnevenPatients


def both(prob):
    return np.stack([1 - np.asarray(prob), prob], axis=1)


def draw_calls(seed=0, n=400, n_patients=20):
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.uniform(0.5, 1, n), 2)
    return rng.random(n) > confidence, confidence, rng.integers(0, n_patients, n)


def test_hand_worked_curve():
    # sorted: right .9, wrong .8, right .8, right .6
    curve = risk_coverage_curve([False, True, False, False], [0.6, 0.8, 0.9, 0.8])
    assert curve.confidence.tolist() == [0.9, 0.8, 0.6]
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.risk.tolist() == [0, pytest.approx(1 / 3), 0.25]
    # from 1 to 3 kept, (x - 1) / 2 of x are wrong; from 3 to 4 kept, 1 of x is
    by_hand = (1 - 0.5 * np.log(3)) / 4 + np.log(4 / 3) / 4
    assert curve.area == pytest.approx(by_hand)
    grid = np.linspace(1e-6, 1, 400_001)
    risk = np.where(grid < 0.25, 0, np.where(grid < 0.75, (grid * 4 - 1) / 2, 1) / (grid * 4))
    assert curve.area == pytest.approx(risk.mean(), abs=1e-5)


@given(st.integers(0, 99))
def test_area_lies_between_the_best_and_the_worst_order(seed):
    wrong, confidence, _ = draw_calls(seed)
    error = wrong.mean()
    best, worst = risk_coverage_curve(wrong, -1.0 * wrong).area, risk_coverage_curve(wrong, 1.0 * wrong).area
    assert best == pytest.approx(optimal_aurc(error))
    assert best <= risk_coverage_curve(wrong, confidence).area <= worst
    assert risk_coverage_curve(wrong, np.zeros(len(wrong))).area == pytest.approx(error)
    area = risk_coverage_curve(wrong, confidence).area
    assert risk_coverage_curve(wrong, np.log(confidence)).area == pytest.approx(area)
    doubled = risk_coverage_curve(np.repeat(wrong, 2), np.repeat(confidence, 2))
    assert doubled.area == pytest.approx(risk_coverage_curve(wrong, confidence).area)


def test_area_is_the_mean_risk_of_the_definition():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    wrong = rng.random(20_000) > confidence
    order = np.argsort(-confidence)
    mean = np.mean(np.cumsum(wrong[order]) / np.arange(1, 20_001))  # Geifman et al. 2019, eq. 1
    assert risk_coverage_curve(wrong, confidence).area == pytest.approx(mean, abs=2e-4)


def test_known_areas():
    assert optimal_aurc(0.0) == 0 and optimal_aurc(1.0) == 1
    assert risk_coverage_curve([True] * 3, [0.1, 0.2, 0.3]).area == pytest.approx(1)
    assert risk_coverage_curve([False] * 3, [0.1, 0.2, 0.3]).area == 0


def test_risk_between_distinct_confidences_spreads_their_errors():
    assert risk_at(np.array([2.0, 2.0]), np.array([0.0, 1.0]), [0.5, 0.75, 1.0]).tolist() == pytest.approx(
        [0, 0.5 / 3, 0.25]
    )


def test_estimates_agree_with_the_curve_and_hold_their_value():
    wrong, confidence, patients = draw_calls(3)
    found = estimate_risk(wrong, confidence, patients, seed=0)
    assert found.area.value == pytest.approx(risk_coverage_curve(wrong, confidence).area)
    assert found.at[1.0].value == pytest.approx(wrong.mean()) and tuple(found.at) == COVERAGES
    for interval in (found.area, *found.at.values()):
        assert interval.low < interval.value < interval.high
    many = estimate_risk(*draw_calls(4, n=6000), seed=0)  # neighbours are taken together
    assert many.area.value == pytest.approx(risk_coverage_curve(*draw_calls(4, n=6000)[:2]).area, abs=1e-4)


def test_intervals_are_the_jackknifes():
    wrong, confidence, patients = draw_calls(5)
    found = estimate_risk(wrong, confidence, patients, seed=0, coverages=[0.8])
    kept = [patients != k for k in np.unique(patients)]
    without = [risk_coverage_curve(wrong[k], confidence[k]).area for k in kept]
    logit = np.log(np.array(without) / (1 - np.array(without)))
    error = np.sqrt(19 / 20 * ((logit - logit.mean()) ** 2).sum())
    centre = np.log(found.area.value / (1 - found.area.value))
    sizes = np.unique(patients, return_counts=True)[1]
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    assert np.log(found.area.low / (1 - found.area.low)) == pytest.approx(
        centre - stats.t.ppf(0.975, effective - 1) * error
    )


def test_shares_weigh_patients_or_patches():
    patients = np.repeat(["a", "b", "c", "d", "e"], [1, 2, 3, 4, 10])
    chosen = np.array([1] + [1, 0] + [0, 0, 1] + [0] * 4 + [1] * 5 + [0] * 5, bool)
    by_patient = estimate_shares({"x": chosen}, patients, equal_groups=True, seed=0)["x"]
    by_patch = estimate_shares({"x": chosen}, patients, equal_groups=False, seed=0)["x"]
    assert by_patient.value == pytest.approx((1 + 1 / 2 + 1 / 3 + 0 + 1 / 2) / 5)
    assert by_patch.value == pytest.approx(8 / 20)
    assert by_patient.low < by_patient.value < by_patient.high
    same = np.repeat(["a", "b", "c", "d", "e"], 4)
    even = [estimate_shares({"x": chosen}, same, equal_groups=equal, seed=0)["x"] for equal in (True, False)]
    assert even[0].value == even[1].value and even[0].low == pytest.approx(even[1].low)


def test_a_share_out_of_none_and_of_few_patients():
    patients = np.repeat(np.arange(6), 5)
    wrong, kept = np.arange(30) % 2 == 0, patients < 3
    how = {"equal_groups": True, "seed": 0}
    of_few = estimate_shares({"x": wrong}, patients, among={"x": kept}, **how)["x"]
    assert of_few.value == pytest.approx(np.mean([3 / 5, 2 / 5, 3 / 5]))
    assert of_few.reason == "only 3 patients with such patches: an interval needs 5"
    none = estimate_shares({"x": wrong}, patients, among={"x": np.zeros(30)}, **how)["x"]
    assert np.isnan(none.value) and none.reason == "undefined: no patches"
    never = estimate_shares({"x": np.zeros(30)}, patients, **how)["x"]
    assert never.value == never.low == 0 and never.high == pytest.approx(1 - 0.025 ** (1 / 6))


def test_many_patients_are_drawn_with_the_seed():
    wrong, confidence, patients = draw_calls(6, n=1500, n_patients=120)
    one, again, other = (estimate_risk(wrong, confidence, patients, seed=s, draws=50).area for s in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("wrong", "confidence", "reason"),
    [([], [], "shape"), ([True], [0.5, 0.6], "shape"), ([True, False], [0.5, np.nan], "missing")],
)
def test_data_without_a_risk_coverage_curve_are_refused(wrong, confidence, reason):
    with refuses(MetricError, reason=reason):
        risk_coverage_curve(wrong, confidence)


def test_a_coverage_that_is_none_is_refused():
    with refuses(MetricError, "coverages", "0", "1"):
        estimate_risk([True, False], [0.1, 0.2], [1, 2], seed=0, coverages=[0.0])


# The entry of metrics.json


def fit(cohort, alpha=0.1, **changes):
    about = {
        "guarantee": "class-conditional",
        "class_names": ["a", "b"],
        "unit": "patient",
        "chosen_on": "validation",
        "patients_overlap": False,
        **changes,
    }
    return fit_abstention(both(cohort.prob), cohort.target, cohort.patient_ids.astype(str), alpha, **about)


def judge(conformal, cohort, threshold=0.5, unit="patient"):
    scored = ScoredPatches(
        target=cohort.target,
        probs=both(cohort.prob),
        pred=(cohort.prob >= threshold).astype(int),
        group_ids=cohort.patient_ids.astype(str),
        class_names=["a", "b"],
        positive_class="b",
        unit=unit,
    )
    return measure_abstention(conformal, scored)


POPULATION = UnevenPatients()
NEW = POPULATION.draw(30, 40, seed=10)


def test_a_guarantee_and_what_became_of_it():
    entry = judge(fit(POPULATION.draw(25, 40, seed=0), guarantee="marginal"), NEW)
    assert (entry.alpha, entry.target_coverage, entry.reason) == (0.1, 0.9, None)
    assert (entry.n_calibration_patients, entry.n_calibration_patches) == (25, 1000)
    for weight in ("patient", "patch"):
        shares = {name: share.value for name, share in vars(getattr(entry, weight)).items()}
        assert shares["coverage"] == pytest.approx(POPULATION.coverage(entry.quantiles[0]), abs=0.05)
        assert shares["error"] <= 1 - shares["coverage"] + 1e-12
        assert shares["error"] == pytest.approx(shares["error_among_kept"] * (1 - shares["abstained"]))
        assert getattr(entry.per_patch, weight).abstained.value < shares["abstained"]
    assert entry.coverage_by_group == sorted(entry.coverage_by_group) and len(entry.coverage_by_group) == 30
    assert np.mean(entry.coverage_by_group) == pytest.approx(entry.patient.coverage.value, abs=1e-12)
    assert sum(vars(entry.sets).values()) == len(NEW.prob)
    assert entry.sets.kept == round(len(NEW.prob) * (1 - entry.patch.abstained.value))
    assert entry.verdict == check_coverage(0.9, [entry.patient.coverage])
    assert entry.risk_coverage.at[0].risk.value == entry.risk_coverage.error


def test_a_guarantee_to_each_class_is_held_against_each():
    conformal = fit(POPULATION.draw(25, 40, seed=0))
    entry = judge(conformal, NEW)
    sets = predict_sets(both(NEW.prob), conformal["quantiles"])
    for k, name in enumerate("ab"):
        each = [sets[(NEW.target == k) & (NEW.patient_ids == p), k].mean() for p in range(30)]
        assert entry.by_class[name].coverage.value == pytest.approx(np.mean(each))
    coverages = [shares.coverage for shares in entry.by_class.values()]
    assert entry.verdict == check_coverage(0.9, coverages)


def test_the_sets_of_one_guarantee_lie_on_the_curve():
    conformal = fit(POPULATION.draw(25, 40, seed=0), guarantee="marginal")
    for threshold in (0.3, 0.5):
        entry = judge(conformal, NEW, threshold)
        pred = (NEW.prob >= threshold).astype(int)
        curve = risk_coverage_curve(pred != NEW.target, both(NEW.prob)[np.arange(len(pred)), pred])
        kept = 1 - entry.patch.abstained.value
        place = np.searchsorted(curve.coverage, kept - 1e-9)
        assert curve.coverage[place] == pytest.approx(kept)
        assert curve.risk[place] == pytest.approx(entry.patch.error_among_kept.value)


def test_too_few_patients_guarantee_nothing():
    conformal = fit(POPULATION.draw(1, 400, seed=0))
    assert conformal["quantiles"] is None and conformal["per_patch_quantiles"] is not None
    entry = judge(conformal, NEW)
    assert "needs at least 9 calibration patients; there is 1" in entry.reason
    assert entry.patient is None and entry.verdict is None
    assert entry.per_patch.patient.coverage.value > 0 and entry.risk_coverage.at


def test_patients_on_several_subsets_guarantee_nothing():
    conformal = fit(POPULATION.draw(25, 40, seed=0), patients_overlap=True)
    assert conformal["quantiles"] is None
    assert conformal["reason"] == (
        "patients are in several subsets of this split, so errors on validation give no guarantee "
        "for a new patient"
    )


def test_a_classifier_from_before_reports_it():
    entry = judge({}, NEW)
    assert entry.alpha is None and entry.reason == BEFORE
    assert entry.per_patch is None and entry.risk_coverage.area.value > 0


def test_with_the_patch_as_the_unit_both_are_one():
    conformal = fit(POPULATION.draw(200, 1, seed=1), unit="patch")
    assert conformal["quantiles"] == conformal["per_patch_quantiles"]
    entry = judge(conformal, POPULATION.draw(80, 1, seed=2), unit="patch")
    assert entry.patient == entry.patch == entry.per_patch.patch


def test_three_classes():
    rng = np.random.default_rng(0)
    probs, groups = rng.dirichlet([0.5, 0.5, 0.5], 900), np.repeat(np.arange(30), 30).astype(str)
    target, names, about = np.array([rng.choice(3, p=p) for p in probs]), ["a", "b", "c"], {"unit": "patient"}
    about |= {
        "guarantee": "class-conditional",
        "class_names": names,
        "chosen_on": "validation",
        "patients_overlap": False,
    }
    conformal = fit_abstention(probs[:600], target[:600], groups[:600], 0.1, **about)
    scored = ScoredPatches(
        target=target[600:],
        probs=probs[600:],
        pred=probs[600:].argmax(axis=1),
        group_ids=groups[600:],
        class_names=names,
        positive_class=None,
        unit="patient",
    )
    entry = measure_abstention(conformal, scored)
    assert list(entry.by_class) == names and len(entry.quantiles) == 3
    assert entry.patch.coverage.value > 0.85
    assert entry.risk_coverage.error == np.mean(scored.pred != scored.target)


def test_sets_are_counted_by_what_they_hold():
    sets = np.array([[True, False], [False, True], [True, True], [False, False], [True, False]])
    expected = SetCounts(kept=2, several=1, empty=1, against_threshold=1)
    assert count_sets(sets, np.array([0, 1, 1, 0, 1])) == expected


def test_a_verdict_needs_an_interval_to_be_against():
    kept, short = Interval(0.91, 0.88, 0.95), Interval(0.88, 0.84, 0.91)
    missed, bare = Interval(0.80, 0.76, 0.85), Interval(0.80)
    assert [check_coverage(0.9, [one]) for one in (kept, short, missed, bare)] == [
        "met",
        "inconclusive",
        "violated",
        "inconclusive",
    ]
    assert [check_coverage(0.9, [kept, other]) for other in (kept, short, missed)] == [
        "met",
        "inconclusive",
        "violated",
    ]


def test_the_summary_holds_share_target_and_verdict():
    few, enough = (fit(POPULATION.draw(n, 40, seed=0)) for n in (8, 25))
    refused = judge(few, NEW)
    assert refused.reason and refused.reason in abstention_summary(refused)
    entry = judge(enough, NEW)
    share = 100 * entry.patient.abstained.value
    for part in (f"{share:.1f} %", "0.9", "per class", entry.verdict):
        assert part in abstention_summary(entry)


# Figures and chapter


def test_figures_show_what_they_are_given():
    wrong, confidence, _ = draw_calls(1)
    bars = [RiskAt(0.8, 0.9, Interval(0.1, 0.05, 0.15)), RiskAt(0.9, 0.8, Interval(0.2))]
    figure = draw_risk_coverage(wrong, confidence, points=bars, kept=(0.7, 0.05))
    line = figure.axes[0].lines[0]
    assert line.get_xdata()[-1] == 100 and line.get_ydata()[-1] == pytest.approx(100 * wrong.mean())
    figure = draw_coverage([0.9, 0.7], [0.6, 0.8], 0.9)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [70, 90]
    with refuses(MetricError, "slide"):
        draw_coverage(None, [], 0.9, unit="slide")


def chapter(conformal, **changes):
    table = make_predictions(tuple("abcdefgh"), seed=1)
    prob = table["prob"].to_numpy()
    predictions = table.assign(**{f"prob_{NAMES[0]}": 1 - prob, f"prob_{NAMES[1]}": prob})
    scored = ScoredPatches.of_predictions(predictions, NAMES, NAMES[1], "patient")
    metrics = replace(make_metrics(table), abstention=measure_abstention(conformal, scored), **changes)
    return make_small_facts(tuple("abcdefgh"), predictions=predictions, metrics=metrics)


def words(facts):
    section = describe_abstention(facts)
    summary = Summary("Can it?", [], unit="patient")
    return Page(render_report(ReportDocument("Abstention", "", summary, [section]))).text


def test_the_section_states_whether_the_guarantee_is_met():
    facts = chapter(fit(POPULATION.draw(25, 40, seed=0)) | {"quantiles": [0.97, 0.97]})
    section = describe_abstention(facts)
    assert section.id == "abstention" and [block.kind for block in section.blocks][-1] == "pictures"
    text = words(facts)
    assert (
        "fitted on 1,000 patches of 25 patients (validation subset), with the patient as the exchangeable "
        "unit" in text
    )
    assert "of a new patient, at least 90 % have their true class in the set" in text
    assert "at most 10 % of each class are misclassified without abstention" in text
    assert "The coverage guarantee was met on these patients. Coverage: not IDC" in text
    assert "unit: patient unit: patch (naive)" in text
    one = chapter(fit(POPULATION.draw(25, 40, seed=0), guarantee="marginal") | {"quantiles": [0.97, 0.97]})
    said = describe_abstention(one).blocks
    assert "at most 10 % of patches are misclassified" in said[0].text and "Coverage: 1.000 (" in said[1].text
    columns = {(row[0], row[1]): row[2] for row in said[2].rows}
    assert columns["all", MEASURES["coverage"]] == "at least 0.900"
    assert columns["IDC", MEASURES["coverage"]] == "-"


def test_the_section_without_a_guarantee_states_its_reason():
    text = words(chapter(fit(POPULATION.draw(1, 400, seed=0))))
    assert "No coverage guarantee and no abstention: an error rate of 0.1 needs at least" in text
    assert "there is 1." in text and "its target and the coverage that it reached" in text
    assert "The coverage guarantee was" not in text and "Risk-coverage" in text


def test_a_guarantee_not_reached_is_violated_or_inconclusive():
    section = describe_abstention(chapter(fit(POPULATION.draw(25, 40, seed=0)) | {"quantiles": [0.2, 0.2]}))
    assert "The coverage guarantee was violated on these patients, by" in section.blocks[1].text
    assert section.blocks[1].tone == "warning"
    marginal = fit(POPULATION.draw(25, 40, seed=0), guarantee="marginal")
    found = chapter(marginal).metrics.abstention
    shares = replace(found.patient, coverage=Interval(0.88, 0.8, 0.91))
    found = replace(found, verdict="inconclusive", patient=shares)
    assert describe_verdict(found, "slide") == (
        "Inconclusive: coverage is 0.020 below target, within sampling error for so few slides. Coverage: "
        "0.880 (0.800 to 0.910); target 0.900."
    )


def test_a_report_on_the_calibration_subset_states_that_the_guarantee_is_not_tested():
    text = words(chapter(fit(POPULATION.draw(25, 40, seed=0)), subset="validation"))
    assert "The prediction sets were fitted on these patches" in text


def test_runs_of_older_versions_have_no_guarantee():
    assert describe_abstention(make_small_facts()) is None
    text = words(chapter({}))
    assert BEFORE in text
    assert THRESHOLD == 0.43
