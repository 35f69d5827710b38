"""Intervals over patients: against explicit loops, hand-worked limits, and a population with known truth."""

import json
import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from biopsy.core.errors import MetricError
from biopsy.core.files import plain
from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.calibration import clipped_logit
from biopsy.statistics.intervals import (
    IntervalMethod,
    describe_method,
    estimate_metric,
    estimate_metrics,
    estimate_patient_metrics,
    measure_groups,
    measure_size_trend,
    replicate,
)
from biopsy.statistics.metrics import METRICS, measure
from biopsy.statistics.resampling import InformativeGroups, Resampler, fewest_informative
from biopsy.statistics.weighted_counts import sort_scores
from refusals import refuses
from report_facts import estimate_patch_metrics
from simulated_cohorts import POPULATIONS, Population

# five patients, three patches each
TARGET = np.array([1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1])
PROB = np.array([0.9, 0.4, 0.6, 0.7, 0.8, 0.1, 0.3, 0.8, 0.2, 0.5, 0.9, 0.3, 0.4, 0.6, 0.7])
PATIENTS = np.repeat(["d", "a", "c", "e", "b"], 3)


def leave_one_out(score):
    return np.array([score(TARGET[PATIENTS != p], PROB[PATIENTS != p]) for p in "abcde"])


def student_on_logit(value, left_out, sizes):
    """Student's t with (sum n)² / sum n² - 1 degrees of freedom, n the patches that carry the metric."""
    n, sizes = len(left_out), np.asarray(sizes, float)
    error = np.sqrt((n - 1) / n * ((logit(left_out) - logit(left_out).mean()) ** 2).sum())
    half = stats.t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1) * error
    return expit(logit(value) - half), expit(logit(value) + half)


POSITIVES, NEGATIVES = (1, 2, 2, 2, 1), (2, 1, 1, 1, 2)  # of patients a to e


@pytest.mark.parametrize(
    ("name", "score", "sizes"),
    [
        ("auroc", sk.roc_auc_score, NEGATIVES),
        ("auprc", sk.average_precision_score, NEGATIVES),
        ("brier", sk.brier_score_loss, (3,) * 5),
        ("sensitivity", lambda t, p: sk.recall_score(t, p >= 0.5), POSITIVES),
        ("f1", lambda t, p: sk.f1_score(t, p >= 0.5), POSITIVES),
    ],
)
def test_jackknife_equals_leaving_patients_out_one_by_one(name, score, sizes):
    ours = estimate_patch_metrics(TARGET, PROB, PATIENTS, seed=0)[name]
    low, high = student_on_logit(score(TARGET, PROB), leave_one_out(score), sizes)
    assert (ours.value, ours.low, ours.high) == pytest.approx((score(TARGET, PROB), low, high), abs=1e-12)


def test_jackknife_by_hand():
    """Accuracy of five patients with 3, 2, 2, 2, 2 of 3 patches right: 11 of 15.

    Without the first 8 of 12 remain right, without any other 9 of 12; ln(2) and four times ln(3) on the logit
    scale, which spread by sqrt(4/5 * 4/5 * ln(1.5) ** 2) = .8 ln(1.5); t(4) is 2.776445.
    """
    target = np.ones(15, int)
    prob = np.array([1, 1, 1] + [1, 1, 0] * 4) * 0.8
    ours = estimate_patch_metrics(target, prob, np.repeat(np.arange(5), 3), seed=0)["accuracy"]
    half = 2.776445 * 0.8 * math.log(1.5)
    odds = 11 / 4
    assert ours.value == 11 / 15
    assert ours.low == pytest.approx(1 / (1 + math.exp(half) / odds), abs=1e-6)
    assert ours.high == pytest.approx(1 / (1 + math.exp(-half) / odds), abs=1e-6)


def test_metrics_without_bounds_are_evaluated_on_the_plain_scale_and_losses_on_the_logarithm():
    cohort = Population().draw(8, 40, seed=1)
    ours = estimate_patch_metrics(cohort.target, cohort.prob, cohort.patient_ids, seed=0)

    def slope(target, prob):
        fit = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
        return fit.fit(clipped_logit(prob)[:, None], target).coef_[0, 0]

    sizes = np.array([np.bincount(cohort.patient_ids, cohort.target == k) for k in (0, 1)])
    of_classes = (sizes.sum(axis=1) ** 2 / (sizes**2).sum(axis=1)).min() - 1
    kept = [cohort.patient_ids != p for p in range(8)]
    for name, score, there, back, freedom in (
        ("calibration_slope", slope, lambda x: x, lambda x: x, of_classes),
        ("nll", sk.log_loss, np.log, np.exp, 7),
    ):
        left_out = there(np.array([score(cohort.target[k], cohort.prob[k]) for k in kept]))
        half = stats.t.ppf(0.975, freedom) * np.sqrt(7 / 8 * ((left_out - left_out.mean()) ** 2).sum())
        centre = there(score(cohort.target, cohort.prob))
        assert (ours[name].low, ours[name].high) == pytest.approx(
            (back(centre - half), back(centre + half)), rel=1e-5
        )
    assert -1 < ours["mcc"].low < ours["mcc"].value < ours["mcc"].high < 1


def test_order_of_patches_and_names_of_patients_do_not_matter():
    order = np.random.default_rng(0).permutation(len(TARGET))
    plain = estimate_patch_metrics(TARGET, PROB, PATIENTS, seed=0)
    shuffled = estimate_patch_metrics(TARGET[order], PROB[order], PATIENTS[order], seed=0)
    for name in METRICS:
        numbers = [
            [math.nan if x is None else x for x in (i.value, i.low, i.high)]
            for i in (plain[name], shuffled[name])
        ]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-9, nan_ok=True)


@pytest.fixture(scope="module")
def many():
    return Population().draw(120, 15, seed=1)


def test_a_metric_that_lacks_no_patches_states_why_it_is_undefined():
    """Equal probabilities have no slope, though no positive or negative patches are missing."""
    ours = estimate_patch_metrics(TARGET, np.full(15, 0.3), PATIENTS)["calibration_slope"]
    assert np.isnan(ours.value) and METRICS["calibration_slope"].undefined in ours.reason


@pytest.mark.parametrize(("n_groups", "method"), [(99, "jackknife"), (100, "bootstrap")])
def test_a_hundred_patients_are_bootstrapped_and_described_so(n_groups, method):
    assert Resampler(n_groups).method == method
    assert describe_method(n_groups).method.startswith(method)


def test_bootstrap_same_seed_same_answer(many):
    arrays = many.target, many.prob, many.patient_ids
    first, again, other = (estimate_patch_metrics(*arrays, seed=s, draws=100) for s in (3, 3, 4))
    assert first == again
    assert first["auroc"] != other["auroc"]
    assert first["auroc"].value == other["auroc"].value


def test_bootstrap_draws_whole_patients(many):
    """Each replicate equals scikit-learn's on the patients' patches, repeated as often as they were drawn."""
    scores = sort_scores(many.target, many.prob, group_ids=many.patient_ids)
    result = replicate(scores, Resampler(120, seed=5, draws=4), ["auroc", "brier"])
    for i, weight in enumerate(Resampler(120, seed=5, draws=4).resample_weights()):
        assert weight.sum() == 120
        rows = np.concatenate(
            [np.flatnonzero(many.patient_ids == p) for p in np.repeat(range(120), weight.astype(int))]
        )
        assert result.replicates["auroc"][i] == pytest.approx(
            sk.roc_auc_score(many.target[rows], many.prob[rows]), abs=1e-12
        )
        assert result.replicates["brier"][i] == pytest.approx(
            sk.brier_score_loss(many.target[rows], many.prob[rows]), abs=1e-12
        )


def test_bootstrap_and_jackknife_agree_where_they_meet(many):
    """A mean of 120 patients: the bootstrap's interval lies within a tenth of Student's over patients."""
    ours = estimate_patch_metrics(many.target, many.prob, many.patient_ids, seed=0, draws=600)["brier"]
    per_patient = ((many.prob - many.target) ** 2).reshape(120, 15).mean(axis=1)
    half = stats.t.ppf(0.975, 119) * per_patient.std(ddof=1) / math.sqrt(120)
    assert (ours.high - ours.low) / 2 == pytest.approx(half, rel=0.1)


def test_two_models_over_the_same_patients_share_their_reweightings(many):
    ids = many.patient_ids
    first, second = (
        replicate(sort_scores(many.target, prob, group_ids=ids), Resampler(120, draws=50), ["brier"])
        for prob in (many.prob, many.prob**1.1)
    )
    paired = np.std(first.replicates["brier"] - second.replicates["brier"])
    assert paired < 0.2 * np.std(first.replicates["brier"])


def test_fewer_than_five_patients_have_no_interval():
    keep = np.isin(PATIENTS, ["a", "b", "c", "d"])
    ours = estimate_patch_metrics(TARGET[keep], PROB[keep], PATIENTS[keep], seed=0, unit="slide")
    for name, interval in ours.items():
        assert interval.low is interval.high is None, name
    assert ours["accuracy"].reason == "only 4 slides with patches: an interval needs 5"
    assert describe_method(4, seed=0).method == "none"


def test_patients_who_do_not_carry_a_metric_do_not_count_for_it():
    """Ten patients, four with positive patches: sensitivity has no interval, specificity has."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(10), 20)
    target = ((patients < 4) & (rng.random(200) < 0.5)).astype(int)
    prob = expit(rng.normal(target * 2 - 1))
    ours = estimate_patch_metrics(target, prob, patients, seed=0)
    assert ours["sensitivity"].reason == "only 4 patients with positive patches: an interval needs 5"
    assert ours["auroc"].reason == ours["sensitivity"].reason
    assert 0 < ours["specificity"].low < ours["specificity"].high < 1


def test_one_patient_with_nearly_all_patches_allows_no_interval():
    """Six patients, one with 300 of 325 patches: worth 1.2 patients of equal size."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(6), [300, 5, 5, 5, 5, 5])
    target = rng.integers(0, 2, len(patients))
    ours = estimate_patch_metrics(target, expit(rng.normal(target * 2 - 1)), patients, seed=0)
    assert ours["brier"].low is ours["brier"].high is None and "number of 1.2" in ours["brier"].reason


def test_too_few_patients_with_one_class_outweigh_unequal_ones_with_the_other():
    """Four patients with as many positives each, eight with very unequal negatives: four are too few."""
    positives = InformativeGroups(np.array([5.0] * 4 + [0] * 4), "positive patches")
    negatives = InformativeGroups(np.array([100.0, 20, 1, 1, 1, 1, 1, 1]), "negative patches")
    assert negatives.effective < positives.effective == positives.n == 4
    assert fewest_informative([negatives, positives]) is positives


def test_the_calibration_error_has_no_interval_and_is_not_measured_within_patients():
    """None covered in simulation: benchmarks/results/interval-coverage.csv."""
    cohort = Population().draw(12, 60, seed=0)
    ours = estimate_patch_metrics(cohort.target, cohort.prob, cohort.patient_ids, seed=0)["ece"]
    assert ours.value > 0 and ours.low is ours.high is None and ours.reason
    within = estimate_patient_metrics(cohort.target, cohort.prob, cohort.patient_ids)
    assert METRICS.keys() - within.keys() == {"ece", "calibration_slope", "calibration_intercept"}


def test_a_metric_that_needs_one_patient_has_no_interval():
    """Without patient 0 one cut separates the classes: no slope, so no interval; AUROC keeps its own."""
    patients = np.repeat(np.arange(6), 4)
    target = np.tile([0, 0, 1, 1], 6)
    prob = np.tile([0.1, 0.3, 0.6, 0.8], 6)
    prob[:4] = [0.2, 0.7, 0.4, 0.9]
    ours = estimate_patch_metrics(target, prob, patients, seed=0)
    assert math.isfinite(ours["calibration_slope"].value)
    assert ours["calibration_slope"].reason == "undefined when patients are left out: no interval"
    assert ours["auroc"].low < ours["auroc"].value < ours["auroc"].high < 1  # one replicate is exactly 1


def test_a_share_at_its_bound_gets_the_exact_limit_over_patients():
    """No patch of 12 patients is wrong: Clopper-Pearson for 12 of 12 trials, from scipy."""
    target, prob = np.tile([0, 1], 12), np.tile([0.2, 0.9], 12)
    ours = estimate_patch_metrics(target, prob, np.repeat(np.arange(12), 2), seed=0)
    exact = stats.binomtest(12, 12).proportion_ci(0.95, method="exact")
    for name in ("sensitivity", "specificity", "ppv", "npv", "accuracy"):
        assert (ours[name].low, ours[name].high) == pytest.approx((exact.low, exact.high))
    assert ours["auroc"].value == 1 and ours["auroc"].low is None and ours["auroc"].high is None
    assert "does not vary" in ours["auroc"].reason
    never = estimate_patch_metrics(target, prob / 2, np.repeat(np.arange(12), 2), seed=0)["sensitivity"]
    assert (never.low, never.high) == pytest.approx((0, 1 - exact.low))


def test_undefined_values_state_why_and_become_null():
    ours = estimate_patch_metrics(np.zeros(10, int), np.full(10, 0.2), np.arange(10), seed=0)
    assert plain(ours["auroc"]) == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "undefined: no positive patches",
    }
    json.dumps(plain(ours), allow_nan=False)


def test_mean_over_patients_by_hand():
    """Accuracies of six patients, .5 to 1, each of four patches; one patient has no positive patch."""
    right = [2, 3, 3, 4, 4, 2]
    prob = np.concatenate([[0.9] * k + [0.1] * (4 - k) for k in right])
    target, patients = np.ones(24, int), np.repeat(np.arange(6), 4)
    ours = estimate_patient_metrics(target, prob, patients)
    accuracy = ours["accuracy"]
    shares = np.array(right) / 4
    left_out = (shares.sum() - shares) / 5
    assert accuracy.value == pytest.approx(0.75)
    assert (accuracy.n_defined, accuracy.median, accuracy.worst) == (6, 0.75, 0.5)
    assert (accuracy.low, accuracy.high) == pytest.approx(student_on_logit(0.75, left_out, [1] * 6))
    assert ours["specificity"].reason == "undefined in every patient"
    target[:4] = 0
    again = estimate_patient_metrics(target, prob, patients)["sensitivity"]
    assert again.n_defined == 5
    assert again.value == pytest.approx(np.mean(shares[1:]))


def test_worst_patient_is_the_one_furthest_from_ideal():
    ours = estimate_patient_metrics(TARGET, PROB, PATIENTS)
    _, table = measure_groups(TARGET, PROB, PATIENTS)
    assert ours["brier"].worst == table["brier"].max()
    assert ours["accuracy"].worst == table["accuracy"].min()


def test_groups_are_measured_on_their_own():
    ids, table = measure_groups(TARGET, PROB, PATIENTS)
    assert ids.tolist() == list("abcde")
    for i, patient in enumerate(ids):
        mine = PATIENTS == patient
        alone = measure(sort_scores(TARGET[mine], PROB[mine]).count())
        assert {name: column[i] for name, column in table.items()} == pytest.approx(
            {name: alone[name] for name in table}, nan_ok=True
        )


def test_method_is_stated():
    assert describe_method(20, seed=7, unit="slide") == IntervalMethod("slide", 0.95, 20, "jackknife-t")
    assert describe_method(100, seed=7, draws=50) == IntervalMethod(
        "patient", 0.95, 100, "bootstrap-se", 50, 7
    )


REFUSED = [
    ({"level": 95}, "value"),
    ({"group_ids": PATIENTS[:3]}, "shape"),
    ({"prob": PROB + 1}, "prob"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_estimates_refuse(change, reason):
    arguments = {"target": TARGET, "prob": PROB, "group_ids": PATIENTS, "seed": 0} | change
    with refuses(MetricError, reason=reason):
        estimate_patch_metrics(**arguments)


def test_a_cohort_follows_its_population():
    population = Population(auroc=0.83)
    cohort = population.draw(4000, 40, seed=0)
    ours = measure(sort_scores(cohort.target, cohort.prob, 0.3).count())
    assert ours["auroc"] == pytest.approx(0.83, abs=0.006)
    assert ours["sensitivity"] == pytest.approx(population.sensitivity(0.3), abs=0.01)
    assert ours["specificity"] == pytest.approx(population.specificity(0.3), abs=0.01)
    again = population.draw(4000, 40, seed=0)
    assert (again.prob == cohort.prob).all()
    assert (population.draw(4000, 40, seed=1).prob != cohort.prob).any()


def test_intervals_of_few_unequal_patients_hold_the_truth():
    """200 cohorts of five patients, the larger ones harder: with n - 1 degrees of freedom .82 hold it."""
    population, held = POPULATIONS["Pareto, harder"], []
    large = population.draw(5000, 60, seed=1)
    truth = measure(sort_scores(large.target, large.prob).count(), ["auroc"])["auroc"]
    for seed in range(200):
        cohort = population.draw(5, 60, seed=seed)
        scores = sort_scores(cohort.target, cohort.prob, group_ids=cohort.patient_ids)
        ours = estimate_metrics(scores, seed=0, names=["auroc"])["auroc"]
        if ours.low is not None:
            held.append(ours.low < truth < ours.high)
    assert len(held) > 100 and np.mean(held) > 0.87


def test_intervals_have_their_nominal_coverage():
    """150 cohorts of 12 patients: 95 % nominal, .88 is 4 standard errors below."""
    population, names, held = Population(auroc=0.83), ["auroc", "sensitivity"], {"ours": [], "wilson": []}
    truth = {"auroc": 0.83, "sensitivity": population.sensitivity(0.3)}
    for seed in range(150):
        cohort = population.draw(12, 60, seed=seed)
        ranked = sort_scores(cohort.target, cohort.prob, 0.3, group_ids=cohort.patient_ids)
        result = replicate(ranked, Resampler(12), names)
        for name in names:
            ours = estimate_metric(METRICS[name], ranked, result)
            held["ours"].append(ours.low < truth[name] < ours.high)
        counts = ranked.count()
        wilson = stats.binomtest(int(counts.tp), int(counts.n_pos)).proportion_ci(0.95, method="wilson")
        held["wilson"].append(wilson.low < truth["sensitivity"] < wilson.high)
    assert np.mean(held["ours"]) > 0.88
    assert np.mean(held["wilson"]) < 0.75


def test_size_trend_is_the_rank_correlation_of_sizes_and_errors():
    """One class: no class means to take off, so scipy on the groups' means says the same."""
    sizes, rng = np.array([3, 9, 5, 20, 14, 7]), np.random.default_rng(0)
    ids, error = np.repeat(list("abcdef"), sizes), rng.random(sizes.sum())
    means = [error[ids == group].mean() for group in "abcdef"]
    found = stats.spearmanr(sizes, means, alternative="greater")
    trend = measure_size_trend(np.ones(len(ids)), error, ids)
    assert (trend.correlation, trend.p) == pytest.approx((found.statistic, found.pvalue))
    assert measure_size_trend(np.ones(30), np.arange(30), np.repeat(np.arange(6), 5)) is None  # equal sizes
    assert measure_size_trend(np.ones(58), np.ones(58), ids) is None  # equal errors
    assert measure_size_trend(np.ones(37), error[:37], ids[:37]) is None  # four groups


def test_size_trend_does_not_depend_on_the_classes_a_group_has():
    """Class 1 is hard in every group, and only the large groups have it."""
    sizes = np.arange(4, 16)
    ids = np.repeat(np.arange(12), sizes)
    target = np.repeat(np.arange(12) >= 6, sizes).astype(int)
    noise = np.tile([0.01, -0.01], 6)[ids]
    trend = measure_size_trend(target, 0.1 + 0.5 * target + noise, ids)
    assert abs(trend.correlation) < 0.5 and trend.p > 0.1


def warned(population, n_patients, cohorts=40):
    """The share of cohorts that are warned of."""
    found = []
    for seed in range(cohorts):
        cohort = population.draw(n_patients, 60, seed=seed)
        probs = np.stack([1 - cohort.prob, cohort.prob], axis=1)
        scored = ScoredPatches(
            target=cohort.target,
            probs=probs,
            pred=probs.argmax(1),
            group_ids=cohort.patient_ids,
            class_names=("normal", "tumour"),
            positive_class="tumour",
            unit="patient",
        )
        found.append(scored.warn_unequal_groups() is not None)
    return np.mean(found)


def test_cohorts_whose_larger_patients_are_harder_are_warned_of():
    assert warned(POPULATIONS["Pareto, harder"], 30) > 0.9
    assert warned(POPULATIONS["Pareto"], 30) < 0.3  # nominal .1: size says nothing there
    assert warned(POPULATIONS["Pareto"], 10) > 0.3  # ten patients cannot show it
    assert warned(POPULATIONS["mixed"], 10) == 0  # patients of equal size
