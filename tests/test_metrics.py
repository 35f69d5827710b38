"""Metrics against scikit-learn, scipy and hand-worked tables, and the laws they keep."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from biopsy.core.errors import MetricError
from biopsy.statistics.calibration import (
    calibration_error,
    clipped_logit,
    ece_floor,
    fit_recalibration,
)
from biopsy.statistics.metrics import METRICS, measure
from biopsy.statistics.multiclass import MULTICLASS_METRICS
from biopsy.statistics.weighted_counts import sort_scores
from refusals import refuses
from report_facts import reliability_bins

NAMES_IN_METRICS_JSON = (
    "auroc auprc sensitivity specificity ppv npv balanced_accuracy f1 mcc accuracy brier nll ece "
    "calibration_slope calibration_intercept specificity_at_sensitivity_95 specificity_at_sensitivity_98"
).split()


def draw_case(n, seed, *, decimals=None, sharp=1.0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, n)
    target[:2] = 0, 1
    prob = special.expit(sharp * (rng.normal(size=n) + target - 0.5))
    return target, prob if decimals is None else prob.round(decimals)


CASES = {
    "continuous": draw_case(500, 0),
    "many ties": draw_case(500, 1, decimals=1),
    "zeros and ones": draw_case(400, 2, decimals=0, sharp=3),
    "confident": draw_case(300, 3, sharp=8),
    "float32": tuple(x.astype(t) for x, t in zip(draw_case(300, 4), (np.int64, np.float32), strict=True)),
    "six patches": draw_case(6, 5, decimals=2),
    "rare positives": (np.r_[np.ones(5, int), np.zeros(995, int)], draw_case(1000, 6)[1]),
}
THRESHOLD = 0.4


def of_sklearn(target, prob, weight):
    pred, prob = (prob.astype(float) >= THRESHOLD).astype(int), prob.astype(float)
    w = {"sample_weight": weight}
    fpr, tpr, _ = sk.roc_curve(target, prob, drop_intermediate=False, **w)
    return {
        "auroc": sk.roc_auc_score(target, prob, **w),
        "auprc": sk.average_precision_score(target, prob, **w),
        "sensitivity": sk.recall_score(target, pred, **w),
        "specificity": sk.recall_score(target, pred, pos_label=0, **w),
        "ppv": sk.precision_score(target, pred, **w),
        "npv": sk.precision_score(target, pred, pos_label=0, **w),
        "balanced_accuracy": sk.balanced_accuracy_score(target, pred, **w),
        "f1": sk.f1_score(target, pred, **w),
        "mcc": sk.matthews_corrcoef(target, pred, **w),
        "accuracy": sk.accuracy_score(target, pred, **w),
        "brier": sk.brier_score_loss(target, prob, **w),
        "nll": sk.log_loss(target, prob, **w),
        "specificity_at_sensitivity_95": 1 - fpr[tpr >= 0.95 - 1e-12].min(),
        "specificity_at_sensitivity_98": 1 - fpr[tpr >= 0.98 - 1e-12].min(),
    }


def test_the_list_is_that_of_metrics_json():
    assert sorted(METRICS) == sorted(NAMES_IN_METRICS_JSON)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_equal_to_scikit_learn(case, weighted):
    target, prob = CASES[case]
    lightest = 1 if case == "six patches" else 0
    weight = np.random.default_rng(9).integers(lightest, 4, len(target)).astype(float) if weighted else None
    ours = measure(sort_scores(target, prob, THRESHOLD).count(weight))
    for name, theirs in of_sklearn(target, prob, weight).items():
        assert ours[name] == pytest.approx(theirs, rel=0, abs=1e-12), name


@pytest.mark.parametrize("case", ["continuous", "many ties", "confident", "rare positives"])
def test_calibration_slope_and_intercept_equal_other_fits(case):
    target, prob = CASES[case]
    ours = measure(sort_scores(target, prob).count(), ["calibration_slope", "calibration_intercept"])
    x = clipped_logit(prob)
    fit = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    assert ours["calibration_slope"] == pytest.approx(fit.fit(x[:, None], target).coef_[0, 0], abs=1e-6)
    root = optimize.brentq(lambda a: (special.expit(a + x) - target).sum(), -20, 20, xtol=1e-13)
    assert ours["calibration_intercept"] == pytest.approx(root, abs=1e-9)


def test_calibration_recovers_a_known_distortion():
    rng = np.random.default_rng(0)
    true_logit = rng.normal(0, 1.5, 200_000)
    target = rng.random(len(true_logit)) < special.expit(true_logit)
    ours = measure(sort_scores(target, special.expit(2 * true_logit)).count(), ["calibration_slope"])
    assert ours["calibration_slope"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("start", [(0.0, 1.0), (30.0, -40.0), (-100.0, 5.0)])
def test_recalibration_converges_from_anywhere(start):
    logits, pos, neg = np.array([13.0, 2.0, -1.0, -13.0]), np.array([9.0, 3, 2, 1]), np.array([1.0, 2, 3, 9])
    assert fit_recalibration(logits, pos, neg, start=start) == pytest.approx(
        fit_recalibration(logits, pos, neg)
    )


@pytest.mark.parametrize("target", [[0, 0, 1, 0], [1, 1, 0, 1]])
def test_recalibration_with_one_patch_of_a_class_is_scikit_learns(target):
    logits, target = np.array([-2.0, -1.0, 0.5, 1.5]), np.array(target, float)
    fit = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    fit.fit(logits[:, None], target)
    ours = fit_recalibration(logits, target, 1 - target)
    assert ours == pytest.approx((fit.intercept_[0], fit.coef_[0, 0]), abs=1e-6)


def test_calibration_error_by_hand():
    """Six patches, three bins from the top: (.9 .8) (.6 .6) (.3 .1); positives 1 of 2, 2 of 2, 0 of 2.

    Gaps: |.85 - .5|, |.6 - 1|, |.2 - 0|, each weighing a third: (.35 + .4 + .2) / 3.
    """
    target, prob = [1, 0, 1, 1, 0, 0], [0.9, 0.8, 0.6, 0.6, 0.3, 0.1]
    bins = reliability_bins(target, prob, n_bins=3)
    assert bins.n.tolist() == [2, 2, 2]
    assert bins.mean_prob.tolist() == pytest.approx([0.2, 0.6, 0.85])
    assert bins.observed.tolist() == pytest.approx([0, 1, 0.5])
    assert bins.low.tolist() == [0.1, 0.6, 0.8]
    assert bins.high.tolist() == [0.3, 0.6, 0.9]
    levels, pos, neg = [0.9, 0.8, 0.6, 0.3, 0.1], [1.0, 0, 2, 0, 0], [0.0, 1, 0, 1, 1]
    assert calibration_error(*map(np.array, (levels, pos, neg)), 3) == pytest.approx(0.95 / 3)


def test_calibration_error_keeps_ties_together():
    """Ten patches at .2 (four positive) and five at .7 (all positive) fill two bins of the 15 asked for."""
    target, prob = [1] * 4 + [0] * 6 + [1] * 5, [0.2] * 10 + [0.7] * 5
    assert reliability_bins(target, prob).n.tolist() == [10, 5]
    by_hand = (10 * abs(0.2 - 0.4) + 5 * abs(0.7 - 1)) / 15
    assert measure(sort_scores(target, prob).count(), ["ece"])["ece"] == pytest.approx(by_hand, abs=1e-15)


def test_calibration_error_is_the_mean_gap_of_its_reliability_bins():
    target, prob = CASES["continuous"]
    bins = reliability_bins(target, prob)
    gaps = (bins.n * abs(bins.mean_prob - bins.observed)).sum() / len(prob)
    assert measure(sort_scores(target, prob).count(), ["ece"])["ece"] == pytest.approx(gaps, abs=1e-15)
    assert len(bins.n) == 15
    assert bins.n.max() - bins.n.min() <= 1


def test_floor_of_calibration_error():
    """One bin of n patches at p = .5: the mean of |Binomial(n, .5) / n - .5|, about sqrt(.5 / (pi n))."""
    prob = np.full(400, 0.5)
    floor = ece_floor(prob, seed=1, draws=4000)
    assert floor == pytest.approx(math.sqrt(0.5 / (math.pi * 400)), rel=0.05)
    assert floor == ece_floor(prob, seed=1, draws=4000) != ece_floor(prob, seed=2, draws=4000)
    assert ece_floor([0.0, 1.0, 1.0], seed=0) == 0
    assert ece_floor(CASES["continuous"][1], seed=0) > 5 * ece_floor(
        np.tile(CASES["continuous"][1], 100), seed=0
    )


def test_perfect_and_reversed_predictors():
    target = np.array([0, 0, 0, 1, 1])
    perfect = measure(sort_scores(target, target.astype(float)).count())
    higher = [n for n, m in METRICS.items() if m.better == "higher"]
    assert {n: perfect[n] for n in higher} == dict.fromkeys(higher, 1.0)
    assert perfect["brier"] == perfect["ece"] == 0
    assert perfect["nll"] == pytest.approx(0, abs=1e-15)
    assert math.isnan(perfect["calibration_slope"])
    reversed_ = measure(sort_scores(target, 1.0 - target).count())
    assert reversed_["auroc"] == reversed_["accuracy"] == reversed_["sensitivity"] == 0
    assert reversed_["mcc"] == -1
    assert reversed_["brier"] == 1


def test_a_constant_predictor_is_at_chance():
    target, prob = np.array([1, 0, 0, 0]), np.full(4, 0.25)
    ours = measure(sort_scores(target, prob).count())
    assert ours["auroc"] == 0.5
    assert ours["auprc"] == 0.25
    assert ours["ece"] == 0
    assert ours["balanced_accuracy"] == 0.5
    assert ours["brier"] == pytest.approx(0.25 * 0.75)
    assert ours["specificity_at_sensitivity_95"] == 0
    assert ours["calibration_intercept"] == pytest.approx(0, abs=1e-12)
    for name in ("ppv", "mcc", "calibration_slope"):
        assert math.isnan(ours[name])


samples = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 20), st.integers(0, 3)), min_size=2, max_size=40
).filter(lambda rows: {t for t, _, w in rows if w} == {0, 1})


@settings(deadline=None, max_examples=60)
@given(samples)
def test_flipping_classes(rows):
    target, twentieths, weight = np.array(rows).T
    weight = weight.astype(float)
    ours = measure(sort_scores(target, twentieths / 20, 0.49).count(weight))
    flipped = measure(sort_scores(1 - target, 1 - twentieths / 20, 0.51).count(weight))
    turned = measure(sort_scores(1 - target, twentieths / 20).count(weight), ["auroc"])
    assert turned["auroc"] == pytest.approx(1 - ours["auroc"], abs=1e-12)
    pairs = [("sensitivity", "specificity"), ("ppv", "npv")]
    pairs += [(n, n) for n in ("auroc", "balanced_accuracy", "mcc", "accuracy", "brier", "nll")]
    for name, other in pairs:
        assert flipped[name] == pytest.approx(ours[other], abs=1e-9, nan_ok=True), name
    assert flipped["calibration_slope"] == pytest.approx(ours["calibration_slope"], rel=1e-4, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(samples, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_weight_is_repetition(rows, random):
    target, twentieths, weight = np.array(rows).T
    weighted = measure(sort_scores(target, twentieths / 20).count(weight.astype(float)))
    repeated = [(t, p) for t, p, w in rows for _ in range(w)]
    random.shuffle(repeated)
    target, twentieths = np.array(repeated).T
    plain = measure(sort_scores(target, twentieths / 20).count())
    for name in METRICS:
        assert weighted[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-9, nan_ok=True), name


UNDEFINED = [
    ([0, 0], [0.1, 0.2], "auroc", "no positive patches"),
    ([1, 1], [0.1, 0.2], "auprc", "no negative patches"),
    ([0, 0], [0.1, 0.2], "sensitivity", "no positive patches"),
    ([1, 1], [0.1, 0.2], "specificity", "no negative patches"),
    ([1, 0], [0.1, 0.2], "ppv", "no patches predicted positive"),
    ([1, 0], [0.8, 0.9], "npv", "no patches predicted negative"),
    ([0, 0], [0.8, 0.9], "f1", "no positive patches"),
    ([0, 0], [0.1, 0.2], "mcc", "no positive patches and no patches predicted positive"),
    ([0, 1], [0.1, 0.2], "calibration_slope", "separates the classes"),
    ([0, 1, 0], [0.3, 0.3, 0.3], "calibration_slope", "all probabilities are equal"),
    ([0, 0], [0.1, 0.2], "calibration_intercept", "no positive patches"),
    ([0, 0], [0.1, 0.2], "specificity_at_sensitivity_95", "no positive patches"),
]


@pytest.mark.parametrize(("target", "prob", "name", "reason"), UNDEFINED)
def test_undefined_is_nan_with_a_reason(target, prob, name, reason):
    counts = sort_scores(target, prob).count()
    assert math.isnan(METRICS[name].compute(counts))
    assert reason in METRICS[name].why_undefined(counts)


def test_confusion_at_the_threshold_counts_equality_as_positive():
    counts = sort_scores([1, 1, 0, 0, 0], [0.5, 0.4, 0.5, 0.1, 0.2], 0.5).count()
    assert (counts.tp, counts.fp, counts.fn, counts.tn) == (1, 1, 1, 2)


REFUSED = [
    ([], [], "empty", []),
    ([0, 1], [0.5], "shape", ["(2,)", "(1,)"]),
    ([0, 2], [0.5, 0.5], "target", ["1 targets", "2", "row 1"]),
    ([0, np.nan], [0.5, 0.5], "target", ["nan", "row 1"]),
    ([0, 1], [np.nan, 0.5], "prob", ["1 probabilities", "nan", "row 0"]),
    ([0, 1], [0.5, 1.5], "prob", ["1.5", "row 1"]),
    ([[0, 1]], [[0.5, 0.5]], "shape", ["(1, 2)"]),
]


@pytest.mark.parametrize(("target", "prob", "reason", "facts"), REFUSED)
def test_values_that_allow_no_metric_are_refused(target, prob, reason, facts):
    with refuses(MetricError, *facts, reason=reason):
        sort_scores(target, prob)


def test_patches_without_a_patient_are_refused():
    with refuses(MetricError, "1 group", "2 patches"):
        sort_scores([0, 1], [0.2, 0.3], group_ids=["a", None])


def test_an_unknown_metric_names_the_nearest():
    with refuses(MetricError, "'auroc'"):
        measure(sort_scores([0, 1], [0.2, 0.3]).count(), ["auroc1"])


@pytest.mark.parametrize("metrics", [METRICS, MULTICLASS_METRICS], ids=["two classes", "more"])
def test_every_metric_has_a_description(metrics):
    for metric in metrics.values():
        assert 10 < len(metric.meaning) < 120
        assert "Return" not in metric.meaning and "\n" not in metric.meaning
        assert not metric.meaning.endswith(".")
