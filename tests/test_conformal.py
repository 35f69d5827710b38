"""Conformal sets: hand-worked quantiles, the plain version against other packages, the guarantee
simulated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.core.errors import MetricError
from biopsy.statistics.abstention import (
    abstain,
    fit_conformal,
    groups_needed,
    hierarchical_quantile,
    predict_sets,
    score_targets,
    split_conformal,
)
from refusals import refuses
from simulated_cohorts import Population, UnevenPatients


def both(prob):
    return np.stack([1 - np.asarray(prob), prob], axis=1)


# Three patients of 1, 2 and 5 patches: of K + 1 = 4 units of mass, a patch has 1, 1/2 or 1/5. By score:
#   score   .05  .10  .15  .20  .30  .40  .60  .90
#   patient  c    b    c    c    a    c    b    c
#   mass    .2   .5   .2   .2   1    .2   .5   .2
#   so far  .2   .7   .9  1.1  2.1  2.3  2.8  3.0
SCORES = [0.30, 0.10, 0.60, 0.05, 0.15, 0.20, 0.40, 0.90]
PATIENTS = ["a", "b", "b", "c", "c", "c", "c", "c"]


@pytest.mark.parametrize(
    ("alpha", "quantile"),
    [
        (0.25, 0.90),  # level .75 of 4 is 3.0, reached with the last patch
        (0.26, 0.90),
        (0.30, 0.60),  # level .70 of 4 is 2.8
        (0.45, 0.40),  # 2.2
        (0.50, 0.30),  # 2.0
        (0.75, 0.20),  # 1.0
        (0.95, 0.05),  # .2
        (0.24, np.inf),  # 3.04 of 3.0: the rest stands at infinity
    ],
)
def test_hand_worked_quantile(alpha, quantile):
    assert hierarchical_quantile(SCORES, PATIENTS, alpha) == quantile


def test_patients_needed():
    known = {0.5: 1, 1 / 3: 2, 0.2: 4, 0.1: 9, 0.07: 14, 0.05: 19, 0.01: 99, 0.001: 999}
    assert {alpha: groups_needed(alpha) for alpha in known} == known
    for alpha, needed in known.items():
        if needed > 1:
            scores = np.linspace(0, 1, needed)
            assert hierarchical_quantile(scores, np.arange(needed), alpha) == 1
            assert hierarchical_quantile(scores[1:], np.arange(needed - 1), alpha) == np.inf


def test_too_few_patients_are_refused_in_words():
    prob, target = np.random.default_rng(0).random(400), np.tile([0, 1], 200)
    for guarantee in ("class-conditional", "marginal"):
        fit = fit_conformal(both(prob), target, np.repeat(np.arange(8), 50), 0.1, guarantee=guarantee)
        assert fit["quantiles"] is None and fit["n_patients"] == 8 and fit["n_patches"] == 400
        assert fit["reason"] == ("an error rate of 0.1 needs at least 9 calibration patients; there are 8")
    fit = fit_conformal(both(prob), target, np.zeros(400), 0.05, unit="slide")
    assert fit["reason"].endswith("at least 19 calibration slides; there is 1")
    assert split_conformal(both(prob), target, 0.1)["quantiles"] is not None


def test_each_class_needs_patients_who_have_it():
    prob, patients = np.random.default_rng(0).random(400), np.repeat(np.arange(20), 20)
    target = (patients < 5).astype(int)
    fit = fit_conformal(both(prob), target, patients, 0.1, class_names=["not IDC", "IDC"])
    assert fit["quantiles"] is None and fit["n_patients"] == 20
    assert fit["reason"].endswith("at least 9 calibration patients with patches of IDC; there are 5")
    assert fit_conformal(both(prob), target, patients, 0.1, guarantee="marginal")["quantiles"] is not None
    reason = fit_conformal(both(prob), np.zeros(400, int), patients, 0.1)["reason"]
    assert reason.endswith("at least 9 calibration patients with patches of class 1; there are 0")


def draw_scores(seed, n_patients=12):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_patients), rng.integers(1, 30, n_patients))
    return np.round(rng.random(len(groups)), 2), groups


@given(st.integers(0, 99), st.sampled_from([0.1, 0.15, 0.3, 0.5]))
def test_a_quantile_is_the_least_score_that_carries_enough(seed, alpha):
    scores, groups = draw_scores(seed)
    size = np.bincount(groups)
    quantile = hierarchical_quantile(scores, groups, alpha)
    enough = (1 - alpha) * 13 - 1e-9
    assert (scores <= quantile) @ (1 / size[groups]) >= enough > (scores < quantile) @ (1 / size[groups])


@given(st.integers(0, 99))
def test_names_order_and_repeats_of_patches_do_not_matter(seed):
    scores, groups = draw_scores(seed)
    rng = np.random.default_rng(seed)
    quantile = hierarchical_quantile(scores, groups, 0.2)
    order = rng.permutation(len(scores))
    assert hierarchical_quantile(scores[order], 100 - groups[order], 0.2) == quantile
    again = np.append(np.arange(len(scores)), np.flatnonzero(groups == 3))  # one patient seen twice over
    assert hierarchical_quantile(scores[again], groups[again], 0.2) == quantile


@given(st.integers(0, 99), st.sampled_from([0.05, 0.1, 0.2]))
def test_with_a_patch_a_patient_it_is_plain_split_conformal(seed, alpha):
    scores = np.random.default_rng(seed).random(20 + seed)
    rank = int(np.ceil((len(scores) + 1) * (1 - alpha) - 1e-9))
    expected = np.sort(scores)[rank - 1] if rank <= len(scores) else np.inf
    assert hierarchical_quantile(scores, np.arange(len(scores)), alpha) == expected
    prob = 1 - scores
    plain = split_conformal(both(prob), np.ones(len(scores), int), alpha, guarantee="marginal")
    assert plain["unit"] == "patch" and plain["n_patients"] == len(scores)
    assert plain["quantiles"] == [pytest.approx(expected)] * 2 if plain["quantiles"] else rank > len(scores)


def test_the_calibration_patients_themselves_are_covered():
    scores, groups = draw_scores(4)
    quantile = hierarchical_quantile(scores, groups, 0.2)
    each = [np.mean(scores[groups == k] <= quantile) for k in range(12)]
    assert np.mean(each) >= 0.8 * 13 / 12  # K of K + 1 units carry the whole guarantee


def test_sets_of_three_classes():
    probs = np.array([[0.8, 0.15, 0.05], [0.45, 0.45, 0.10], [0.34, 0.33, 0.33]])
    assert predict_sets(probs, 0.3).tolist() == [[True, False, False], [False] * 3, [False] * 3]
    sets = predict_sets(probs, 0.6)
    assert sets.tolist() == [[True, False, False], [True, True, False], [False] * 3]
    assert predict_sets(probs, 0.92).all(axis=1).tolist() == [False, True, True]
    assert abstain(sets, [0, 0, 0]).tolist() == [False, True, True]
    assert abstain(sets, [1, 0, 0]).tolist() == [True, True, True]  # the set speaks against the call


def test_a_quantile_for_each_class_is_that_of_its_patches():
    rng = np.random.default_rng(8)
    probs, target, groups = rng.dirichlet([1, 1, 1], 600), rng.integers(0, 3, 600), rng.integers(0, 20, 600)
    fit = fit_conformal(probs, target, groups, 0.2)
    alone = [
        fit_conformal(probs[target == k], target[target == k], groups[target == k], 0.2, guarantee="marginal")
        for k in range(3)
    ]
    assert fit["quantiles"] == [one["quantiles"][k] for k, one in enumerate(alone)]
    assert len(set(fit["quantiles"])) == 3
    assert (predict_sets(probs, fit["quantiles"])[:, 1] == (1 - probs[:, 1] <= fit["quantiles"][1])).all()
    together = fit_conformal(probs, target, groups, 0.2, guarantee="marginal")
    assert set(together["quantiles"]) == {hierarchical_quantile(score_targets(probs, target), groups, 0.2)}


def test_kept_and_wrong_never_outnumber_the_uncovered():
    rng = np.random.default_rng(3)
    prob, target = rng.random(2000), rng.integers(0, 2, 2000)
    for quantile in (0.2, 0.5, 0.7, 0.95):
        for threshold in (0.2, 0.5, 0.8):
            sets, pred = predict_sets(both(prob), quantile), (prob >= threshold).astype(int)
            kept_wrong = ~abstain(sets, pred) & (pred != target)
            assert not (kept_wrong & sets[np.arange(2000), target]).any()


def test_the_class_that_is_positive_does_not_matter():
    rng = np.random.default_rng(5)
    prob, target, groups = rng.random(300), rng.integers(0, 2, 300), np.repeat(np.arange(20), 15)
    one = fit_conformal(both(prob), target, groups, 0.1)
    other = fit_conformal(both(prob)[:, ::-1], 1 - target, groups, 0.1)
    assert one["quantiles"] == other["quantiles"][::-1]


@pytest.mark.parametrize(
    ("guarantee", "shift"), [("marginal", 0.0), ("class-conditional", 0.0), ("class-conditional", 1.5)]
)
def test_a_calibrator_changes_no_set_of_two_classes(guarantee, shift):
    cohort = UnevenPatients(patient_sd=1).draw(30, 20, seed=1)
    new = UnevenPatients(patient_sd=1).draw(10, 20, seed=2)

    def cooled(prob, temperature):
        logit = np.log(prob / (1 - prob)) / temperature + shift * (temperature - 1)
        return both(1 / (1 + np.exp(-logit)))

    sets = []
    for temperature in (0.5, 1.0, 3.0):
        known = cooled(cohort.prob, temperature)
        fit = fit_conformal(known, cohort.target, cohort.patient_ids, 0.1, guarantee=guarantee)
        sets.append(predict_sets(cooled(new.prob, temperature), fit["quantiles"]))
    assert (sets[0] == sets[1]).all() and (sets[1] == sets[2]).all()


@pytest.mark.parametrize(
    ("probs", "target", "alpha", "reason"),
    [
        (both([0.5, np.nan]), [0, 1], 0.1, "prob"),
        (both([0.5, 1.5]), [0, 1], 0.1, "prob"),
        (both([0.5, 0.6]), [0, 2], 0.1, "target"),
        (both([0.5, 0.6]), [0], 0.1, "shape"),
        (both([0.5, 0.6]), [0, 1], 0, "value"),
        (both([0.5, 0.6]), [0, 1], 1.0, "value"),
    ],
)
def test_what_allows_no_sets_is_refused(probs, target, alpha, reason):
    with refuses(MetricError, reason=reason):
        fit_conformal(probs, target, np.arange(len(target)), alpha)


def test_a_quantile_needs_patches():
    with refuses(MetricError, "0 scores", "0 patches"):
        hierarchical_quantile([], [], 0.1)


def test_probabilities_of_zero_and_one_and_constant_ones():
    target = np.tile([0, 1], 20)
    sure = fit_conformal(both(target.astype(float)), target, np.repeat(np.arange(10), 4), 0.1)
    assert sure["quantiles"] == [0, 0] and predict_sets(both([0.0, 0.4, 1.0]), 0.0).sum(axis=1).tolist() == [
        1,
        0,
        1,
    ]
    constant = fit_conformal(both(np.full(40, 0.5)), target, np.repeat(np.arange(10), 4), 0.1)
    assert constant["quantiles"] == [0.5, 0.5] and predict_sets(both([0.5]), 0.5).all()


def test_uneven_patients_are_as_they_say():
    population = UnevenPatients(patient_sd=0.8, size_sd=0.8, size_with_margin=0.5)
    cohort = population.draw(8000, 30, seed=0)
    size = np.bincount(cohort.patient_ids)
    scores = score_targets(both(cohort.prob), cohort.target)
    for quantile in (0.3, 0.7):
        found = np.average(scores <= quantile, weights=1 / size[cohort.patient_ids])
        assert found == pytest.approx(population.coverage(quantile), abs=0.01)
    assert size.mean() == pytest.approx(30, rel=0.05)
    assert population.coverage(1.0) == population.coverage(np.inf) == 1
    mean_score = np.bincount(cohort.patient_ids, scores) / size
    assert np.corrcoef(mean_score, np.log(size))[0, 1] < -0.3
    assert population.draw(5, 30, seed=1).prob.tolist() == population.draw(5, 30, seed=1).prob.tolist()


def simulate(population, n_patients, alpha, repeats):
    """Mean coverage of new patients, and its standard error: patients as the unit, and patches."""
    found = np.empty((repeats, 2))
    for k in range(repeats):
        cohort = population.draw(n_patients, 40, seed=k)
        scores = score_targets(both(cohort.prob), cohort.target)
        units = (cohort.patient_ids, np.arange(len(scores)))
        found[k] = [population.coverage(hierarchical_quantile(scores, unit, alpha)) for unit in units]
    return found.mean(axis=0), found.std(axis=0) / np.sqrt(repeats)


def test_each_class_has_its_guarantee_where_one_for_all_fails_the_rarer():
    """Positives are 30 % of patches and score lower; .90 is promised, 40 patients calibrate, 30 times."""
    population, held = Population(auroc=0.83), {"marginal": [], "class-conditional": []}
    new = population.draw(1500, 20, seed=10**6)
    of_positives = new.target == 1
    for seed in range(30):
        cohort = population.draw(40, 40, seed=seed)
        for guarantee, coverages in held.items():
            fit = fit_conformal(
                both(cohort.prob), cohort.target, cohort.patient_ids, 0.1, guarantee=guarantee
            )
            coverages.append(predict_sets(both(new.prob), fit["quantiles"])[of_positives, 1].mean())
    assert np.mean(held["marginal"]) < 0.8
    assert 0.9 < np.mean(held["class-conditional"]) < 0.9 + 2 / 41


UNEVEN = UnevenPatients(size_sd=0.8, size_with_margin=0.5)


def test_patients_keep_the_guarantee_where_patches_break_it():
    (patients, patches), (_, error) = simulate(UNEVEN, 20, 0.1, repeats=150)
    assert 0.9 < patients < 0.9 + 2 / 21
    assert patches + 4 * error < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("population", [UnevenPatients(), UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("n_patients", "alpha"), [(10, 0.1), (20, 0.1), (50, 0.1), (20, 0.05), (50, 0.05)])
def test_the_guarantee_at_all_sizes(population, n_patients, alpha):
    (patients, patches), error = simulate(population, n_patients, alpha, repeats=3000)
    assert 1 - alpha - 2 * error[0] <= patients <= 1 - alpha + 2 / (n_patients + 1) + 2 * error[0]
    assert patches + 2 * error[1] < 1 - alpha


@pytest.mark.peer
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_plain_sets_are_those_of_mapie_and_crepes(alpha, n_classes):
    from crepes import ConformalClassifier
    from crepes.extras import hinge
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose probabilities are its input."""

        def fit(self, x, y):
            self.classes_ = np.arange(n_classes)
            self.is_fitted_ = True
            return self

        def predict_proba(self, x):
            return np.asarray(x)

        def predict(self, x):
            return self.predict_proba(x).argmax(axis=1)

    rng = np.random.default_rng(n_classes)
    probs, new = rng.dirichlet(np.full(n_classes, 0.6), size=(2, 503))
    target = np.array([rng.choice(n_classes, p=p) for p in probs])
    ours = predict_sets(new, split_conformal(probs, target, alpha, guarantee="marginal")["quantiles"])

    mapie = SplitConformalClassifier(
        Given().fit(probs, target), confidence_level=1 - alpha, conformity_score="lac", prefit=True
    )
    _, theirs = mapie.conformalize(probs, target).predict_set(new)
    assert (theirs[:, :, 0] == ours).all()

    crepes = ConformalClassifier().fit(hinge(probs, np.arange(n_classes), target))
    theirs = crepes.predict_set(hinge(new), confidence=1 - alpha, smoothing=False)
    assert (theirs.astype(bool) == ours).all()

    each = predict_sets(new, split_conformal(probs, target, alpha)["quantiles"])
    crepes = ConformalClassifier().fit(hinge(probs, np.arange(n_classes), target), bins=target)
    for k in range(n_classes):  # Mondrian: the class that is asked about is the bin
        theirs = crepes.predict_set(hinge(new), np.full(len(new), k), confidence=1 - alpha, smoothing=False)
        assert (theirs[:, k].astype(bool) == each[:, k]).all()
