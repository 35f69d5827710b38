"""Calibrators: they equal scikit-learn's, keep their laws, and say why where nothing can be fitted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit, softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from biopsy.core.errors import MetricError
from biopsy.statistics.calibrators import (
    METHODS,
    PRIOR_CORRECTED,
    PRIOR_OF_TRAINING,
    PRIOR_UNCHANGED,
    Isotonic,
    Scaling,
    calibrator_from_dict,
    fit_calibrator,
    mean_nll,
)
from refusals import refuses

FITTED = ("temperature", "platt", "intercept", "isotonic")


def draw(n=400, *, slope=0.5, shift=0.8, seed=0):
    """Draw scores whose calibrated logit is ``slope * logit + shift``."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, n)
    target = (rng.random(n) < expit(slope * logits + shift)).astype(int)
    return np.stack([0.4 * logits, 1.4 * logits], axis=1), target


def apply(calibrator, scores):
    return softmax(calibrator.scale(scores), axis=1)


def test_platt_is_a_logistic_regression_without_penalty():
    scores, target = draw()
    logits = scores[:, [1]] - scores[:, [0]]
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits, target)
    ours = fit_calibrator(scores, target, "platt")
    assert (ours.slope, *ours.intercepts) == pytest.approx(
        (theirs.coef_[0, 0], 0, theirs.intercept_[0]), abs=1e-6
    )
    np.testing.assert_allclose(apply(ours, scores), theirs.predict_proba(logits), atol=1e-7)


def test_temperature_is_a_logistic_regression_without_intercept():
    scores, target = draw()
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(
        scores[:, [1]] - scores[:, [0]], target
    )
    ours = fit_calibrator(scores, target, "temperature")
    assert ours.slope == pytest.approx(theirs.coef_[0, 0], abs=1e-6) and ours.intercepts == ()


def test_isotonic_is_scikit_learns_within_the_same_bounds():
    scores, target = draw(300)
    prob = softmax(scores, axis=1)[:, 1]
    least, most = min(prob.min(), 1 / ((target == 0).sum() + 2)), max(prob.max(), 1 - 1 / (target.sum() + 2))
    theirs = IsotonicRegression(y_min=least, y_max=most, out_of_bounds="clip").fit(prob, target)
    ours = fit_calibrator(scores, target, "isotonic")
    new = np.stack([np.zeros(200), np.linspace(-15, 15, 200)], axis=1)
    for asked in (scores, new):
        expected = theirs.predict(softmax(asked, axis=1)[:, 1])
        np.testing.assert_allclose(apply(ours, asked)[:, 1], expected, atol=1e-7)  # float32 knots


def test_a_temperature_worked_by_hand():
    fitted = fit_calibrator([[0, 4], [0, 4], [0, 4], [4, 0]], [1, 0, 1, 0], "temperature")
    assert fitted.slope == pytest.approx(np.log(3) / 4)  # three of four are right: odds 3 at logit 4


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_a_temperature_follows_the_scale_of_scores(scale):
    scores, target = draw()
    fitted = fit_calibrator(scores * scale, target, "temperature")
    assert fitted.method == "temperature"
    wanted = fit_calibrator(scores, target, "temperature").slope
    assert fitted.slope * scale == pytest.approx(wanted, rel=1e-6)


def test_temperature_serves_any_number_of_classes():
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 2, (3000, 4))
    target = np.array([rng.choice(4, p=row) for row in softmax(0.4 * scores, axis=1)])
    assert fit_calibrator(scores, target, "temperature").slope == pytest.approx(0.4, abs=0.05)


def test_platt_of_more_classes_is_a_multinomial_regression_with_one_slope():
    rng = np.random.default_rng(1)
    scores, intercepts = rng.normal(0, 2, (6000, 3)), np.array([0, 1, -0.5])
    target = np.array([rng.choice(3, p=row) for row in softmax(0.4 * scores + intercepts, axis=1)])
    for scale in (1, 1e-5):
        fitted = fit_calibrator(scores * scale, target, "platt")
        assert fitted.method == "platt" and fitted.slope * scale == pytest.approx(0.4, abs=0.03)
        assert fitted.intercepts == pytest.approx(intercepts, abs=0.1)
        prob = apply(fitted, scores * scale)
        np.testing.assert_allclose(prob.mean(axis=0), np.bincount(target) / 6000, atol=1e-7)
        margin = prob - np.eye(3)[target]  # both derivatives of the likelihood are zero
        assert (margin * scores).sum() / 6000 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_an_intercept_makes_the_mean_right_and_keeps_the_order(n_classes):
    rng = np.random.default_rng(2)
    scores, target = rng.normal(0, 3, (500, n_classes)), rng.integers(0, n_classes, 500)
    fitted = fit_calibrator(scores, target, "intercept")
    assert (fitted.method, fitted.slope, fitted.reason) == ("intercept", 1, None)
    np.testing.assert_allclose(apply(fitted, scores).mean(axis=0), np.bincount(target) / 500, atol=1e-7)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("spread", [1e-7, 1e-4, 1e3])
def test_scores_of_any_spread_are_calibrated_alike(method, spread):
    scores, target = draw()
    centred = scores - scores.mean(axis=0)
    wanted = fit_calibrator(centred, target, method)
    found = fit_calibrator(centred * spread + [0, 1], target, method)
    if method == "platt":
        assert found.method == "platt"
        np.testing.assert_allclose(apply(found, centred * spread + [0, 1]), apply(wanted, centred), atol=1e-6)
    assert np.isfinite(found.scale(centred * spread)).all()


@pytest.mark.parametrize("n_groups", [1, 4])
def test_below_five_patients_an_intercept_stands_alone(n_groups):
    scores, target = draw()
    fitted = fit_calibrator(scores, target, n_groups=n_groups)
    assert fitted.method == "intercept" and fitted.reason
    assert fitted.intercepts == fit_calibrator(scores, target, "intercept").intercepts
    assert fit_calibrator(scores, target, n_groups=5).method == "platt"
    assert fit_calibrator(scores * 1e-4, target, n_groups=n_groups).method == "platt"  # no slope of 1 there
    assert fit_calibrator(scores, target, "temperature", n_groups=n_groups).method == "temperature"


@pytest.mark.parametrize("positive_index", [0, 1])
@pytest.mark.parametrize("method", FITTED)
def test_another_prevalence_multiplies_the_odds(method, positive_index):
    scores, target = draw()
    fitted, there = (
        fit_calibrator(scores, target, method, positive_index=positive_index, prevalence=prevalence)
        for prevalence in (0.0, 0.1)
    )
    share = (target == positive_index).mean()
    ratio = (0.1 / 0.9) / (share / (1 - share))
    before, after = (apply(one, scores)[:, positive_index] for one in (fitted, there))
    np.testing.assert_allclose(after / (1 - after), ratio * before / (1 - before), rtol=1e-9)
    np.testing.assert_array_equal(apply(calibrator_from_dict(there.to_dict()), scores), apply(there, scores))
    same = fit_calibrator(scores, target, method, positive_index=positive_index, prevalence=share)
    np.testing.assert_allclose(apply(same, scores), apply(fitted, scores), rtol=1e-12)


@pytest.mark.parametrize("method", ["platt", "intercept", "isotonic"])
def test_another_prevalence_calibrates_patches_drawn_at_it(method):
    scores, target = draw(40_000, slope=1.0)
    rng = np.random.default_rng(1)
    positive, negative = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
    rows = np.concatenate([rng.choice(positive, 2_000), rng.choice(negative, 18_000)])
    there = apply(fit_calibrator(scores, target, method, prevalence=0.1), scores[rows])[:, 1]
    wanted = LogisticRegression(C=np.inf).fit(scores[rows, 1:] - scores[rows, :1], target[rows])
    theirs = wanted.predict_proba(scores[rows, 1:] - scores[rows, :1])[:, 1]
    assert there.mean() == pytest.approx(0.1, abs=0.004)
    assert np.abs(there - theirs).mean() < 0.006
    unadjusted = apply(fit_calibrator(scores, target, method), scores[rows])[:, 1]
    assert unadjusted.mean() > 0.15


@pytest.mark.parametrize(("method", "n_classes"), [("none", 2), ("platt", 3)])
def test_a_prevalence_is_for_calibrated_probabilities_of_two_classes(method, n_classes):
    scores = np.random.default_rng(0).normal(size=(30, n_classes))
    with refuses(MetricError, "0.1", str(n_classes), method, reason="value"):
        fit_calibrator(scores, np.arange(30) % n_classes, method, prevalence=0.1)


@pytest.mark.parametrize("positive_index", [0, 1])
@pytest.mark.parametrize("method", FITTED)
def test_which_column_is_positive_does_not_matter(method, positive_index):
    scores, target = draw()
    wanted = apply(fit_calibrator(scores, target, method), scores)
    order = [0, 1] if positive_index else [1, 0]
    found = fit_calibrator(
        scores[:, order], target if positive_index else 1 - target, method, positive_index=positive_index
    )
    np.testing.assert_allclose(apply(found, scores[:, order])[:, order], wanted, atol=1e-9)


samples = st.integers(0, 10_000), st.floats(0.1, 3), st.floats(-2, 2), st.integers(20, 200)


@settings(max_examples=25, deadline=None)
@given(*samples)
def test_the_laws(seed, slope, shift, n):
    scores, target = draw(n, slope=slope, shift=shift, seed=seed)
    before = softmax(scores, axis=1)
    for method in FITTED:
        fitted = fit_calibrator(scores, target, method)
        after = apply(fitted, scores)
        np.testing.assert_allclose(after.sum(axis=1), 1, rtol=1e-12)
        assert mean_nll(fitted.scale(scores), target) <= mean_nll(scores, target) + 1e-9
        order = np.argsort(before[:, 1], kind="stable")
        assert (np.diff(after[order, 1]) >= -1e-12).all()
        if method != "isotonic" and len(set(target)) == 2 and 0 < target.sum() < n:
            assert roc_auc_score(target, after[:, 1]) == roc_auc_score(target, before[:, 1])


def test_calibrated_probabilities_are_right_on_average_with_an_intercept():
    scores, target = draw()
    for method in ("platt", "intercept", "isotonic"):
        prob = apply(fit_calibrator(scores, target, method), scores)[:, 1]
        assert prob.mean() == pytest.approx(target.mean(), abs=5e-3)


def test_a_calibrator_fits_where_it_was_not_fitted():
    scores, target = draw(4000, seed=3)
    new, truth = draw(4000, seed=4)
    best = log_loss(truth, expit(0.5 * (new[:, 1] - new[:, 0]) + 0.8))
    for method in ("platt", "isotonic"):
        found = log_loss(truth, apply(fit_calibrator(scores, target, method), new)[:, 1])
        assert found == pytest.approx(best, abs=0.01)


# Training that bent the prevalence.


def favoured(weight, n=20_000, seed=0):
    """Draw scores of a network that learned with the positive class weighted, and what is true."""
    rng = np.random.default_rng(seed)
    true_logit = rng.normal(-1.5, 1.5, n)
    target = (rng.random(n) < expit(true_logit)).astype(int)
    share = target.mean()
    seen = np.array([1 - share, weight * share])
    return np.stack([np.zeros(n), true_logit + np.log(weight)], axis=1), target, expit(true_logit), seen


def test_the_prevalence_that_class_weights_made_is_taken_back():
    scores, target, truth, seen = favoured(weight=9)
    fitted = fit_calibrator(scores, target, "temperature", trained_prior=seen / seen.sum())
    assert fitted.prior == PRIOR_CORRECTED and fitted.slope == pytest.approx(1, abs=0.05)
    assert fitted.intercepts == pytest.approx((0, -np.log(9)), abs=0.1)
    np.testing.assert_allclose(apply(fitted, scores)[:, 1], truth, atol=0.02)
    steeper = fit_calibrator(scores * 2, target, "temperature", trained_prior=seen / seen.sum())
    assert steeper.intercepts[1] == pytest.approx(
        steeper.slope * (logit(target.mean()) - np.log(seen[1] / seen[0]))
    )
    alone = fit_calibrator(scores, target, "temperature")
    assert alone.prior == PRIOR_OF_TRAINING
    assert abs(apply(alone, scores)[:, 1].mean() - target.mean()) > 0.05  # temperature alone moves no prior


def test_class_weights_that_the_network_ignored_are_left():
    scores, target, _, seen = favoured(weight=1)
    fitted = fit_calibrator(
        scores, target, "temperature", trained_prior=seen * [1, 9] / (seen * [1, 9]).sum()
    )
    assert fitted.prior == PRIOR_UNCHANGED and fitted.intercepts == ()
    assert fitted.slope == pytest.approx(1, abs=0.05)


def test_a_class_that_validation_lacks_moves_nothing():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(0, 2, (200, 3)), rng.integers(0, 2, 200)
    fitted = fit_calibrator(
        scores + 2 * np.eye(3)[target], target, "temperature", trained_prior=[0.2, 0.3, 0.5]
    )
    assert fitted.method == "temperature" and fitted.prior == PRIOR_OF_TRAINING


def test_a_class_that_training_lacked_moves_nothing():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(0, 2, (200, 3)), rng.integers(0, 3, 200)
    fitted = fit_calibrator(
        scores + 2 * np.eye(3)[target], target, "temperature", trained_prior=[0.4, 0.6, 0]
    )
    assert fitted.method == "temperature" and fitted.prior == PRIOR_OF_TRAINING


def test_platt_intercept_and_isotonic_move_the_prior_themselves():
    scores, target, truth, seen = favoured(weight=9)
    for method in ("platt", "intercept", "isotonic"):
        fitted = fit_calibrator(scores, target, method, trained_prior=seen)
        assert fitted.prior.startswith("fitted")
        assert np.abs(apply(fitted, scores)[:, 1] - truth).mean() < 0.015


# What cannot be fitted, and what must not be.


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("n_groups", [1, 3, 20])
def test_one_class_moves_the_mean_as_if_one_more_patient_had_been_seen(method, n_groups):
    scores, _ = draw(20)
    fitted = fit_calibrator(scores, np.ones(20, int), method, n_groups=n_groups)
    assert fitted.method == "intercept" and (fitted.reason is None) == (method == "intercept")
    before = softmax(scores, axis=1)[:, 1].mean()
    wanted = (n_groups + before) / (n_groups + 1)
    assert apply(fitted, scores)[:, 1].mean() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("method", FITTED)
def test_constant_predictions_become_the_share(method):
    scores = np.tile([0.25, 0.75], (20, 1)) + np.arange(20)[:, None]  # the same probabilities in every row
    fitted = fit_calibrator(scores, (np.arange(20) % 4 == 0).astype(int), method)
    assert fitted.method == "intercept" and (fitted.reason is None) == (method == "intercept")
    np.testing.assert_allclose(apply(fitted, scores)[:, 1], 0.25, atol=1e-7)


@pytest.mark.parametrize(("method", "sign"), [("temperature", 1), ("temperature", -1), ("platt", 1)])
def test_a_slope_that_does_not_exist_leaves_the_intercept(method, sign):
    x = np.concatenate([np.linspace(-5, -1, 10), np.linspace(1, 5, 10)])
    for target in ((x > 0).astype(int), (x > 0) * 2):
        scores = np.stack([0 * x, sign * x, sign * x - 8][: target.max() + 1], axis=1)
        fitted = fit_calibrator(scores, target, method)
        if target.max() == 1 or method == "platt":
            assert fitted.method == "intercept" and fitted.reason


def test_perfectly_separated_classes_have_no_slope():
    target = np.arange(30) % 3
    fitted = fit_calibrator(3 * np.eye(3)[target] + 0.01 * np.arange(30)[:, None] % 0.07, target)
    assert fitted.method == "intercept" and fitted.reason


def test_platt_does_not_turn_a_classifier_round():
    scores, target = draw()
    fitted = fit_calibrator(scores, 1 - target, "platt")
    assert fitted.method == "intercept" and fitted.reason
    assert apply(fitted, scores)[:, 1].mean() == pytest.approx((1 - target).mean(), abs=1e-6)


@pytest.mark.parametrize("method", FITTED)
def test_probabilities_of_exactly_0_and_1(method):
    scores, target = draw(100)
    scores[:10] = [[-1000.0, 1000.0]] * 5 + [[1000.0, -1000.0]] * 5
    target[:10] = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    prob = softmax(scores, axis=1)
    assert {0.0, 1.0} <= set(prob[:, 1])
    fitted = fit_calibrator(scores, target, method)
    assert fitted.method == method and np.isfinite(fitted.scale(scores)).all()
    assert mean_nll(fitted.scale(scores), target) < mean_nll(scores, target) or method == "intercept"


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("method", FITTED)
def test_values_that_are_not_finite_are_refused(method, wrong):
    scores, target = draw(20)
    scores[3, 1] = wrong
    with refuses(MetricError, "1", "finite", "row 3"):
        fit_calibrator(scores, target, method)


def test_isotonic_is_for_two_classes_only():
    with refuses(MetricError, "3", "'platt'"):
        fit_calibrator(np.zeros((4, 3)), [0, 1, 2, 0], "isotonic")


@pytest.mark.parametrize(
    ("scores", "target", "reason"),
    [
        (np.zeros((3, 2)), [0, 1], "shape"),
        (np.zeros((3, 1)), [0, 0, 0], "shape"),
        (np.zeros((0, 2)), [], "shape"),
        (np.zeros((2, 2)), [0, 2], "target"),
    ],
)
def test_shapes_and_targets_are_checked(scores, target, reason):
    with refuses(MetricError, reason=reason):
        fit_calibrator(scores, target)


def test_an_unknown_method_is_named():
    with refuses(MetricError, "'plat'", "'platt'"):
        fit_calibrator(np.zeros((2, 2)), [0, 1], "plat")


@pytest.mark.parametrize("method", METHODS)
def test_a_stored_calibrator_is_read_back_equal(method):
    scores, target = draw()
    fitted = fit_calibrator(scores, target, method, trained_prior=[0.4, 0.6])
    read = calibrator_from_dict({**fitted.to_dict(), "fitted_on": "validation"})
    assert read == fitted and isinstance(read, Isotonic if method == "isotonic" else Scaling)
    np.testing.assert_array_equal(read.scale(scores), fitted.scale(scores))


def test_nothing_is_exactly_nothing():
    scores, _ = draw(20)
    assert calibrator_from_dict({"method": "none"}).scale(scores) is scores


def test_isotonic_is_no_more_certain_than_its_data():
    x = np.linspace(-2, 2, 40)
    fitted = fit_calibrator(np.stack([0 * x, x], axis=1), (x > 0).astype(int), "isotonic")
    ends = (min(expit(-2), 1 / 22), max(expit(2), 21 / 22))
    assert (fitted.calibrated[0], fitted.calibrated[-1]) == pytest.approx(ends)
    assert logit(fitted.calibrated).max() < 4
