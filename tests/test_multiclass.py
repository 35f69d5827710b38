"""Metrics of more than two classes against scikit-learn, their intervals, and what allows none."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn import metrics as sk

from biopsy.core.errors import MetricError
from biopsy.statistics.intervals import estimate_metrics, estimate_one_vs_rest, replicate
from biopsy.statistics.metrics import METRICS, measure, metric
from biopsy.statistics.multiclass import (
    MULTICLASS_METRICS,
    ClassCounts,
    ClassReport,
    class_sample,
    classification_report,
)
from biopsy.statistics.resampling import Resampler
from biopsy.statistics.weighted_counts import WeightedCounts, sort_scores
from report_facts import reliability_bins

NAMES = ["a", "b", "c", "d"]


def draw(n=240, n_groups=12, n_classes=4, seed=0, signal=1.5):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, n_classes, n)
    scores = rng.normal(size=(n, n_classes)) + signal * np.eye(n_classes)[target]
    probs = np.exp(scores)
    return target, probs / probs.sum(axis=1, keepdims=True), np.repeat(np.arange(n_groups), n // n_groups)


def top_label_ece(target, probs, bins=15):
    right, confidence = target == probs.argmax(axis=1), probs.max(axis=1)
    table = reliability_bins(right, confidence, n_bins=bins)
    return float((table.n * abs(table.mean_prob - table.observed)).sum() / len(target))


def of_sklearn(target, probs, weight=None):
    pred, w, labels = probs.argmax(axis=1), {"sample_weight": weight}, range(probs.shape[1])
    wanted = np.eye(probs.shape[1])[target]
    return {
        "accuracy": sk.accuracy_score(target, pred, **w),
        "balanced_accuracy": sk.balanced_accuracy_score(target, pred, **w),
        "f1_macro": sk.f1_score(target, pred, average="macro", **w),
        "f1_weighted": sk.f1_score(target, pred, average="weighted", **w),
        "kappa": sk.cohen_kappa_score(target, pred, **w),
        "kappa_quadratic": sk.cohen_kappa_score(target, pred, weights="quadratic", **w),
        "mcc": sk.matthews_corrcoef(target, pred, **w),
        "auroc": sk.roc_auc_score(target, probs, multi_class="ovr", **w),
        "auroc_micro": sk.roc_auc_score(wanted, probs, average="micro", **w),
        "nll": sk.log_loss(target, probs, labels=labels, **w),
        "brier": np.average(((probs - wanted) ** 2).sum(axis=1), weights=weight),
    }


@pytest.mark.parametrize(("n_classes", "signal"), [(3, 1.5), (4, 0.2), (8, 3.0)])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_equal_to_scikit_learn(n_classes, signal, weighted):
    target, probs, groups = draw(n_classes=n_classes, signal=signal)
    sample = class_sample(target, probs, "abcdefgh"[:n_classes], group_ids=groups)
    weight = np.random.default_rng(1).integers(0, 4, 12).astype(float) if weighted else None
    ours = measure(sample.count(weight))
    theirs = of_sklearn(target, probs, None if weight is None else weight[groups])
    assert set(ours) - set(theirs) == {"ece"}
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=0, abs=1e-12), name


def test_accuracy_is_the_share_that_is_right():
    """Eight classes, 14 of 45 right: one-against-rest accuracies would average to more than .8."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 8, 45)
    pred = np.where(np.arange(45) < 14, target, (target + 1) % 8)
    sample = class_sample(target, np.eye(8)[pred], list("abcdefgh"), group_ids=np.arange(45) // 5)
    assert measure(sample.count(), ["accuracy"])["accuracy"] == 14 / 45
    each = [measure(one.count(), ["accuracy"])["accuracy"] for one in sample.one_vs_rest]
    assert np.mean(each) > 0.8


def test_top_label_calibration_error_is_the_mean_gap_of_its_reliability_bins():
    target, probs, groups = draw()
    sample = class_sample(target, probs, NAMES, group_ids=groups)
    assert measure(sample.count(), ["ece"])["ece"] == pytest.approx(top_label_ece(target, probs), abs=1e-15)


def test_two_classes_agree_with_the_metrics_of_two():
    target, probs, groups = draw(n_classes=2)
    ours = measure(class_sample(target, probs, ["x", "y"], group_ids=groups).count())
    binary = measure(sort_scores(target, probs[:, 1]).count())
    same = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "mcc": "mcc", "nll": "nll"}
    same |= {"auroc": "auroc"}
    for name, other in same.items():
        assert ours[name] == pytest.approx(binary[other], abs=1e-12), name
    assert ours["brier"] == pytest.approx(2 * binary["brier"], abs=1e-12)


def test_perfect_and_constant_predictors():
    target = np.tile([0, 1, 2], 8)
    perfect = measure(class_sample(target, np.eye(3)[target], NAMES[:3], group_ids=target).count())
    wanted = {m.name: m.ideal for m in MULTICLASS_METRICS.values()}
    assert perfect == pytest.approx(wanted, abs=1e-12)
    constant = np.tile([0.5, 0.3, 0.2], (24, 1))
    ours = measure(class_sample(target, constant, NAMES[:3], group_ids=target).count())
    assert ours["kappa"] == ours["kappa_quadratic"] == pytest.approx(0)
    assert ours["auroc"] == 0.5 and math.isnan(ours["mcc"])


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1_weighted", "auroc", "auroc_micro"])
def test_intervals_leave_out_whole_patients(name):
    target, probs, groups = draw(n_groups=10)
    ours = estimate_metrics(class_sample(target, probs, NAMES, group_ids=groups), seed=0, names=[name])[name]
    left_out = np.array([of_sklearn(target[groups != p], probs[groups != p])[name] for p in range(10)])
    error = np.sqrt(9 / 10 * ((logit(left_out) - logit(left_out).mean()) ** 2).sum())
    of_class = np.array([np.bincount(groups, target == k, 10) for k in range(len(NAMES))])
    sizes = of_class if name in ("balanced_accuracy", "auroc") else of_class.sum(axis=0, keepdims=True)
    freedom = (sizes.sum(axis=1) ** 2 / (sizes**2).sum(axis=1)).min() - 1
    half, value = stats.t.ppf(0.975, freedom) * error, of_sklearn(target, probs)[name]
    low, high = expit(logit(value) - half), expit(logit(value) + half)
    assert (ours.value, ours.low, ours.high) == pytest.approx((value, low, high), abs=1e-9)


def test_bootstrap_draws_whole_patients():
    target, probs, groups = draw(n=480, n_groups=120)
    names = ["kappa", "f1_macro", "auroc_micro"]
    resampler = Resampler(120, seed=5, draws=3)
    result = replicate(class_sample(target, probs, NAMES, group_ids=groups), resampler, names)
    for i, weight in enumerate(resampler.resample_weights()):
        rows = np.concatenate(
            [np.flatnonzero(groups == p) for p in np.repeat(range(120), weight.astype(int))]
        )
        theirs = of_sklearn(target[rows], probs[rows])
        for name in names:
            assert result.replicates[name][i] == pytest.approx(theirs[name], abs=1e-12)


def test_each_class_against_the_rest_is_shown_beside_the_pooled_numbers():
    target, probs, groups = draw()
    sample = class_sample(target, probs, NAMES, group_ids=groups)
    pooled, per_class = estimate_metrics(sample, seed=0), estimate_one_vs_rest(sample, seed=0)
    assert list(per_class) == NAMES and set(per_class["a"]) == set(METRICS)
    recalls = sk.recall_score(target, probs.argmax(axis=1), average=None)
    assert [per_class[name]["sensitivity"].value for name in NAMES] == pytest.approx(recalls.tolist())
    assert pooled["auroc"].value == pytest.approx(np.mean([per_class[n]["auroc"].value for n in NAMES]))


def test_a_mean_over_classes_is_undefined_where_a_class_has_no_patches():
    target, probs, groups = draw(n_classes=3)
    padded = np.hstack([probs, np.zeros((240, 1))])
    ours = estimate_metrics(class_sample(target, padded, NAMES, group_ids=groups), seed=0)
    for name in ("balanced_accuracy", "f1_macro", "auroc"):
        assert math.isnan(ours[name].value) and "no patches of class 'd'" in ours[name].reason
    assert ours["accuracy"].low < ours["accuracy"].value < ours["accuracy"].high


def test_a_class_of_few_patients_allows_no_interval_of_a_mean_over_classes():
    target, probs, groups = draw()
    target[(target == 3) & (groups >= 4)] = 0
    ours = estimate_metrics(class_sample(target, probs, NAMES, group_ids=groups), seed=0)
    assert ours["balanced_accuracy"].low is None
    assert "only 4 patients with patches of class 'd'" in ours["balanced_accuracy"].reason
    assert ours["accuracy"].low is not None


def test_classification_report_equals_scikit_learn():
    target, probs, _ = draw()
    pred = probs.argmax(axis=1)
    rows = classification_report(sk.confusion_matrix(target, pred), NAMES)
    theirs = sk.classification_report(target, pred, target_names=NAMES, output_dict=True)
    for row in rows[:4]:
        other = theirs[row.name]
        assert [row.precision, row.recall, row.f1, row.n] == pytest.approx(
            [other[k] for k in ("precision", "recall", "f1-score", "support")], abs=1e-12
        )
    for row, key in zip(rows[4:6], ("macro avg", "weighted avg"), strict=True):
        assert [row.precision, row.recall, row.f1, row.n] == pytest.approx(
            [theirs[key][k] for k in ("precision", "recall", "f1-score", "support")], abs=1e-12
        )
    assert rows[6] == ClassReport("micro average", *[rows[6].recall] * 3, 240)
    assert rows[6].recall == pytest.approx(theirs["accuracy"], abs=1e-12)


def test_a_class_never_called_has_no_precision():
    rows = classification_report([[5, 0, 0], [2, 3, 0], [1, 1, 0]], NAMES[:3])
    assert math.isnan(rows[2].precision) and (rows[2].recall, rows[2].f1, rows[2].n) == (0, 0, 2)
    assert math.isnan(rows[3].precision) and rows[3].recall == pytest.approx((1 + 0.6 + 0) / 3)


def test_one_registration_adds_a_metric_that_is_no_function_of_a_confusion_table(own_registrations):
    @metric("ranking", bounds=(0.0, 1.0))
    def hinge_free_gap(counts: WeightedCounts) -> float:
        mean = np.average(counts.y_prob, weights=counts.sample_weight * (counts.y_true == 1))
        return float(mean)

    @metric("ranking", of=ClassCounts, label="top-2 accuracy")
    def top_two(counts: ClassCounts) -> float:
        return sk.top_k_accuracy_score(counts.y_true, counts.y_prob, k=2, sample_weight=counts.sample_weight)

    target, probs, groups = draw()
    sample = class_sample(target, probs, NAMES, group_ids=groups)
    ours = estimate_metrics(sample, seed=0)["top_two"]
    assert ours.value == pytest.approx(sk.top_k_accuracy_score(target, probs, k=2))
    assert ours.low < ours.value < ours.high
    binary = estimate_metrics(sample.one_vs_rest[0], seed=0)["hinge_free_gap"]
    assert binary.value == pytest.approx(probs[target == 0, 0].mean())
    assert binary.low < binary.value < binary.high


REFUSED = [
    ({"probs": np.full((4, 2), 0.5)}, "probs has shape (4, 2) for 3 classes"),
    ({"target": [0, 1, 2]}, "one row per patch"),
    ({"target": [], "probs": np.empty((0, 3))}, "no patches"),
    ({"target": [0, 1, 2, 3]}, "not all an index into the 3 class names"),
    ({"probs": np.full((4, 3), np.nan)}, "4 rows have probabilities outside 0-1 or missing"),
    ({"probs": np.tile([2.0, -1.0, 0.0], (4, 1))}, "outside 0-1"),
    ({"probs": np.full((4, 3), 0.3)}, "do not sum to one; the first is row 0"),
    ({"group_ids": ["p", None, "q", "q"]}, "3 group ids for 4 patches"),
    ({"group_ids": ["p"]}, "1 group ids for 4 patches"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_labels_without_any_metric_are_refused(change, message):
    arguments = {"target": [0, 1, 2, 0], "probs": np.full((4, 3), 1 / 3), "group_ids": [1, 1, 2, 2]} | change
    group_ids = arguments.pop("group_ids")
    with pytest.raises(MetricError) as refused:
        class_sample(arguments["target"], arguments["probs"], NAMES[:3], group_ids=group_ids)
    assert message in str(refused.value)
