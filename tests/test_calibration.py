"""Calibration as a stage: fitted on validation, kept in the classifier, applied everywhere, fitted again."""

import json
import tomllib

import numpy as np
import pandas as pd
import pytest
import tomli_w
from filelock import FileLock
from scipy.special import softmax

from biopsy.core.errors import MetricError, RunError
from biopsy.core.files import LOCK
from biopsy.data.predictions import write_predictions
from biopsy.data.splits import split
from biopsy.evaluation.calibration.recalibrate import calibrate
from biopsy.evaluation.calibration.section import describe_calibrator
from biopsy.evaluation.evaluate import evaluate
from biopsy.models.classifier import Classifier, score_classes
from biopsy.recipes import load_recipe
from biopsy.statistics.calibrators import fit_calibrator
from biopsy.statistics.decisions import choose_threshold
from biopsy.training.postprocessing import find_trained_prior, fit_postprocessing, warn_of_calibration
from biopsy.training.runs import Run
from refusals import refuses
from tiny_runs import LIVELY, assert_same_run, copy_run, train_tiny

RULES = ["youden", "sensitivity=0.95", "specificity=0.90", "cost=5"]


@pytest.fixture
def run(trained_run, tmp_path):
    return copy_run(trained_run, tmp_path)


def read(run, subset="validation"):
    """Return logits, target and the whole table of a run's predictions."""
    frame, _ = run.predictions(subset)
    return frame[["logit_non_idc", "logit_idc"]].to_numpy(), frame["target"].to_numpy(int), frame


def stub(class_names=("non_idc", "idc"), outputs="softmax"):
    """Return a classifier without a network, for what needs only its record."""
    from biopsy.models.classifier import ClassifierInfo
    from biopsy.recipes.preprocessing import Preprocessing

    positive = "idc" if len(class_names) == 2 else None
    info = ClassifierInfo(
        network="stub",
        class_names=list(class_names),
        positive_class=positive,
        patch_px=8,
        mpp=None,
        preprocessing=Preprocessing(input_px=8),
        outputs=outputs,
    )
    import torch

    return Classifier(info, torch.nn.Identity())


def calibrate_stub(logits, target, groups, method="temperature", **options):
    classifier = stub(**options)
    fit_postprocessing(
        classifier, logits, target, groups, method=method, rules=RULES, chosen_on="validation", unit="patient"
    )
    return classifier


def draw(n=60, n_groups=6, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 2, n)
    logits = np.stack([np.zeros(n), rng.normal(4 * target - 1, 4)], axis=1)
    return logits, target, rng.integers(n_groups, size=n).astype(str)


# What training leaves behind.


def test_training_calibrates_on_validation(trained_run):
    logits, target, frame = read(trained_run)
    record, classifier = trained_run.classifier.info.calibrator, trained_run.classifier
    assert record["method"] == "platt"
    assert record["slope"] == fit_calibrator(logits, target).slope
    assert (record["fitted_on"], record["n_patches"], record["n_patients"]) == ("validation", 40, 5)
    assert record["unit"] == "patient" and record["warning"] is None
    np.testing.assert_array_equal(frame["prob"], classifier.probs(logits)[:, 1])
    scores = record["slope"] * logits + record["intercepts"]
    np.testing.assert_allclose(frame["prob"], softmax(scores, axis=1)[:, 1], rtol=1e-12)
    assert classifier.calibrator.to_dict().items() <= record.items()


def test_thresholds_are_chosen_on_calibrated_probabilities(trained_run):
    _, target, frame = read(trained_run)
    frozen = trained_run.classifier.info.thresholds
    assert [one["rule"] for one in frozen] == RULES
    for one in frozen:
        wanted = choose_threshold(target, frame["prob"], one["rule"])
        assert one == {
            "value": wanted.value,
            "rule": wanted.rule,
            "chosen_on": "validation",
            "sensitivity": wanted.sensitivity,
            "specificity": wanted.specificity,
        }
    assert trained_run.info["threshold"].items() <= frozen[0].items()


def test_calibrated_scores_equal_those_of_an_export(trained_run):
    for method in ("temperature", "platt", "isotonic", "none"):
        logits, target, groups = draw(200)
        for outputs in ("softmax", "sigmoid"):
            classifier = calibrate_stub(logits, target, groups, method, outputs=outputs)
            scores = classifier.calibrated_scores(logits)
            np.testing.assert_allclose(softmax(scores, axis=1), classifier.probs(logits), atol=1e-14)
            record = classifier.info.calibrator
            if "slope" in record:  # all that another program needs
                known = record["slope"] * score_classes(logits, outputs) + (record["intercepts"] or 0)
                np.testing.assert_allclose(scores, known, atol=1e-12)


def test_the_operating_points_are_the_recipes(make_pack, tmp_path):
    pack = make_pack(n_patients=6, official_subsets=("train", "validation", "test"))
    more = 'decision.operating_points=["specificity=0.8"]'
    run = train_tiny(pack, tmp_path / "run", more, "decision.threshold=cost=2", "decision.calibration=platt")
    assert [one["rule"] for one in run.classifier.info.thresholds] == ["cost=2", "specificity=0.8"]
    assert run.classifier.info.calibrator["asked"] == "platt"


def test_as_published_is_not_calibrated():
    recipe = load_recipe("cancernet-2020")
    assert (recipe.decision.calibration, recipe.as_published.calibration) == ("platt", "none")


def test_the_prevalence_that_training_saw_follows_from_weights_and_sampling():
    counts = [300, 100]
    for changes, wanted in (
        (("train.class_weights=none",), None),
        (("train.class_weights=largest",), [0.5, 0.5]),
        (("train.class_weights=balanced",), [0.5, 0.5]),
        (("train.class_weights=none", "train.sampling=undersample"), [0.5, 0.5]),
        (("train.class_weights=largest", "train.sampling=oversample"), [0.25, 0.75]),
        (("train.class_weights=none", "train.sampling=within-patient"), None),  # where it changes no share
        (("train.class_weights=largest", "train.sampling=within-patient"), [0.5, 0.5]),
    ):
        found = find_trained_prior(load_recipe("cancernet-2020", changes), counts)
        assert found is None if wanted is None else found.tolist() == pytest.approx(wanted)
    for weights, wanted in (("none", [0.4, 0.6]), ("largest", [2 / 11, 9 / 11])):
        changes = ("train.sampling=within-patient", f"train.class_weights={weights}")
        found = find_trained_prior(load_recipe("cancernet-2020", changes), counts, [0.4, 0.6])
        assert found.tolist() == pytest.approx(wanted)


def test_more_than_two_classes_are_calibrated(make_pack, tmp_path):
    pack = make_pack(n_patients=6, n_classes=3, official_subsets=("train", "validation", "test"))
    with refuses(MetricError, "'isotonic'", "3", "'platt'"):
        train_tiny(pack, tmp_path / "refused", "decision.calibration=isotonic")
    run = train_tiny(pack, tmp_path / "run")
    record = run.classifier.info.calibrator
    assert record["asked"] == "platt" and len(record["intercepts"]) == 3
    found = evaluate(run)["calibration"]
    assert found["before"]["nll"]["value"] > 0 and found["after"]["brier"]["low"] is None
    with refuses(MetricError, "'isotonic'", "3", "'platt'"):
        calibrate(run, method="isotonic")


# What validation may lack.


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_one_class_in_validation_is_recorded_and_the_run_goes_on(method):
    logits, _, groups = draw()
    classifier = calibrate_stub(logits, np.zeros(60, int), groups, method)
    record = classifier.info.calibrator
    assert record["method"] == "intercept" and record["asked"] == method and record["reason"]
    before, after = softmax(logits, axis=1)[:, 1].mean(), classifier.probs(logits)[:, 1].mean()
    assert after == pytest.approx(before / 7, rel=1e-5)  # as if a seventh patient had been as predicted
    assert all("needs both classes" in one["rule"] for one in classifier.info.thresholds)


@pytest.mark.parametrize(("n_groups", "text"), [(1, "1 patient only"), (2, "2 patients only")])
def test_one_or_two_patients_calibrate_with_a_warning(n_groups, text):
    logits, target, groups = draw(n_groups=n_groups)
    classifier = calibrate_stub(logits, target, groups, "platt")
    record = classifier.info.calibrator
    assert record["method"] == "intercept" and record["n_patients"] == n_groups and record["reason"]
    assert text in record["warning"]
    assert [text in message for message in warn_of_calibration(classifier)] == [False, True]


def test_a_training_with_neighbours_warns_of_its_calibration_once(make_pack, tmp_path, caplog):
    pack = make_pack(n_patients=6, patches_per_patient=8)
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1", "model.context=0.5")
    expected = warn_of_calibration(run.classifier)
    logged = [record.getMessage() for record in caplog.records]
    assert expected and [message for message in logged if "calibrated" in message] == expected


def test_constant_and_nan_logits():
    logits, target, groups = draw()
    assert (
        "all predictions are equal"
        in calibrate_stub(0 * logits + 1, target, groups).info.calibrator["reason"]
    )
    logits[4, 0] = np.nan
    with refuses(MetricError, "finite", "row 4"):
        calibrate_stub(logits, target, groups)


def test_patches_without_patients_are_their_own_unit():
    logits, target, groups = draw(n_groups=3)
    classifier = stub()
    fit_postprocessing(
        classifier, logits, target, groups, method="platt", rules=RULES, chosen_on="validation", unit="patch"
    )
    assert classifier.info.calibrator["warning"] is None


# Evaluation.


def test_the_metrics_hold_values_before_and_after_calibration(run):
    metrics = evaluate(run, prevalence=0.02)
    found = metrics["calibration"]
    assert found["method"] == "platt" and found["n_patients"] == 5
    for name in ("ece", "brier", "nll", "calibration_slope", "calibration_intercept"):
        assert found["after"][name] == pytest.approx(metrics["patch"][name])
    assert found["after"]["ece_floor"] == metrics["ece_floor"]
    logits, target, _ = read(run, "test")
    raw = softmax(logits, axis=1)[:, 1]
    assert found["before"]["brier"]["value"] == pytest.approx(((raw - target) ** 2).mean())
    for subset in (found["before"], found["after"]):
        parts = subset["brier_parts"]
        total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within_bins"]
        assert total == pytest.approx(subset["brier"]["value"])
        assert sum(one["n"] for one in subset["bins"]) == 40
        gaps = [one["n"] * abs(one["mean_prob"] - one["observed"]["value"]) for one in subset["bins"]]
        assert sum(gaps) / 40 == pytest.approx(subset["ece"]["value"])


def test_operating_points_drift_from_validation_to_test(run):
    metrics = evaluate(run, prevalence=0.02)
    _, target, frame = read(run, "test")
    for one, frozen in zip(metrics["operating_points"], run.classifier.info.thresholds, strict=True):
        called = frame["prob"].to_numpy() >= frozen["value"]
        reached = called[target == 1].mean(), (~called)[target == 0].mean()
        names = ("sensitivity", "specificity")
        assert tuple(one["achieved"][name]["value"] for name in names) == pytest.approx(reached)
        assert one["where_chosen"] == {name: frozen[name] for name in names}
        drift = [value - frozen[name] for name, value in zip(names, reached, strict=True)]
        assert [one["drift"][name] for name in names] == pytest.approx(drift)
    targets = [one["target"] for one in metrics["operating_points"]]
    assert targets == [None, {"sensitivity": 0.95}, {"specificity": 0.9}, None]
    first, there = metrics["operating_points"][0], metrics["at_prevalence"]
    assert there["prevalence"] == 0.02 and len(there["points"]) == 4
    sensitivity, specificity = (first["achieved"][name]["value"] for name in ("sensitivity", "specificity"))
    right = 0.02 * sensitivity
    assert there["points"][0]["ppv"]["value"] == pytest.approx(right / (right + 0.98 * (1 - specificity)))
    curve = metrics["decision_curve"]
    assert len(curve["thresholds"]) == len(curve["model"]) == len(curve["treat_all"]) == 99
    assert curve["marked"][9]["value"] == pytest.approx(curve["model"][49])


def test_a_prevalence_that_is_none_is_refused_before_the_test_subset_is_opened(run):
    with refuses(MetricError, "0.02"):
        evaluate(run, prevalence=2.0)
    assert not (run.path / "predictions" / "test.parquet").exists()


# For another prevalence.


def test_a_run_is_calibrated_for_another_prevalence(run, tmp_path):
    before, threshold = run.classifier, run.info["threshold"]["value"]
    logits, target, _ = read(run)
    result = calibrate(run, prevalence=0.05)
    record = result["calibrator"]
    assert (record["prevalence"], record["fitted_prevalence"]) == (0.05, target.mean())
    redone = Run.open(run.path)
    odds = (0.05 / 0.95) / (target.mean() / (1 - target.mean()))
    old, new = (one.probs(logits)[:, 1] for one in (before, redone.classifier))
    np.testing.assert_allclose(new / (1 - new), odds * old / (1 - old), rtol=1e-9)
    np.testing.assert_array_equal(new >= redone.info["threshold"]["value"], old >= threshold)
    assert "5 %" in describe_calibrator(record) and "5 %" in str(result)
    again = train_tiny(
        run.open_pack(), tmp_path / "again", *LIVELY, "decision.prevalence=0.05", recipe="idc-small"
    )
    assert again.classifier.info.calibrator == redone.classifier.info.calibrator
    assert again.classifier.info.thresholds == redone.classifier.info.thresholds
    assert calibrate(redone)["calibrator"]["prevalence"] == 0.05  # the recipe keeps it
    assert calibrate(Run.open(run.path), method="none")["calibrator"] == {"method": "none"}
    restored = calibrate(Run.open(run.path), prevalence=0)["calibrator"]
    assert restored == before.info.calibrator


def test_single_patches_are_calibrated_again_too(make_pack, tmp_path):
    pack = make_pack(n_patients=8, patches_per_patient=8)
    patients = sorted(set(pack.table["patient_id"]))
    split(pack, protocol="patients", test_patients=patients[:1], val_patients=patients[1:6], name="many")
    settings = (*LIVELY, "model.context=4")
    run = train_tiny(pack, tmp_path / "run", *settings, recipe="idc-small", split="many")
    settings += ("decision.prevalence=0.1",)
    again = train_tiny(pack, tmp_path / "again", *settings, recipe="idc-small", split="many")
    before = run.classifier.info
    calibrate(run, prevalence=0.1)
    info = Run.open(run.path).classifier.info
    assert info.single_patch == again.classifier.info.single_patch != before.single_patch
    assert info.single_patch["calibrator"]["prevalence"] == info.calibrator["prevalence"] == 0.1
    assert info.single_patch["calibrator"]["slope"] != info.calibrator["slope"]
    assert_same_run(Run.open(run.path), again)

    frame, metadata = again.predictions("validation")
    columns = [name for name in frame if name.startswith("single_logit")]
    write_predictions(
        again.path / "predictions" / "validation.parquet", frame.drop(columns=columns), metadata
    )
    with refuses(RunError, *columns):
        calibrate(again)


@pytest.mark.parametrize(("method", "prevalence"), [("none", 0.1), ("platt", 1.0), ("platt", -0.1)])
def test_prevalences_that_do_not_apply_are_refused(run, method, prevalence):
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with refuses(MetricError, f"{prevalence:g}", reason="value"):
        calibrate(run, method=method, prevalence=prevalence)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_training_refuses_a_prevalence_without_calibration(make_pack, tmp_path):
    pack = make_pack(n_patients=6)
    with refuses(MetricError, "0.1", "'none'", reason="value"):
        train_tiny(pack, tmp_path / "run", "decision.calibration=none", "decision.prevalence=0.1")


# Doing it again.


def test_doing_it_again_is_as_if_it_had_been_so_from_the_start(run, tmp_path):
    for method in ("isotonic", "none"):
        again = train_tiny(
            run.open_pack(),
            tmp_path / method,
            *LIVELY,
            f"decision.calibration={method}",
            recipe="idc-small",
        )
        calibrate(run, method=method)
        redone = Run.open(run.path)
        one, other = (found.classifier.info.model_dump(exclude={"pack"}) for found in (redone, again))
        assert one == other
        assert redone.info["config_sha256"] == again.info["config_sha256"]
        assert redone.recipe == again.recipe
        assert_same_run(redone, again)
        assert redone.info["recalibrated"]["method"] == method


def test_stale_numbers_are_gone(run):
    evaluate(run)
    before = run.metrics()
    (run.path / "report.html").write_text("old")
    settled = calibrate(run, method="isotonic")
    assert settled["removed"] == ["predictions/test.parquet", "evaluation", "report.html"]
    redone = Run.open(run.path)
    assert redone.evaluated_subset == "validation" and not (run.path / "report.html").exists()
    with refuses(RunError, "biopsy evaluate"):
        redone.metrics()
    after = evaluate(redone)
    assert after["calibration"]["method"] == "isotonic"
    assert after.metrics.calibration["before"] == before.calibration["before"]
    assert after["times_opened"] == 2  # looking again is one more look
    assert after["threshold"] == redone.info["threshold"] != before.threshold


def test_logits_stay_raw(run):
    before, _, frame = read(run)
    calibrate(run, method="isotonic")
    after, _, table = read(run)
    np.testing.assert_array_equal(before, after)
    assert not np.array_equal(frame["prob"], table["prob"])
    kept = ["patch_id", "patient_id", "x", "y", "subset", "fold", "target"]
    pd.testing.assert_frame_equal(frame[kept], table[kept])
    about = run.predictions("validation")[1]
    assert about["classifier_sha256"] == Run.open(run.path).classifier.sha256


def test_runs_from_before_there_was_calibration_load_and_can_be_calibrated(run):
    calibrate(run, method="none")
    document = json.loads((run.path / "classifier" / "classifier.json").read_text())
    assert document["calibrator"] == {"method": "none"}
    document["thresholds"] = [{key: document["thresholds"][0][key] for key in ("value", "rule", "chosen_on")}]
    del document["document_sha256"]
    (run.path / "classifier" / "classifier.json").write_text(json.dumps(document))
    recipe = tomllib.loads((run.path / "recipe.toml").read_text())
    for table, key in (
        ("decision", "calibration"),
        ("decision", "operating_points"),
        ("as_published", "calibration"),
    ):
        del recipe[table][key]
    (run.path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    info = json.loads((run.path / "run.json").read_text())
    younger = ("recalibrated", "config_sha256", "files", "document_sha256")
    (run.path / "run.json").write_text(json.dumps({k: v for k, v in info.items() if k not in younger}))
    old = Run.open(run.path)
    metrics = evaluate(old)
    assert metrics["calibration"]["before"] == metrics["calibration"]["after"]
    assert metrics["operating_points"][0]["drift"] == {"sensitivity": None, "specificity": None}
    assert calibrate(old)["calibrator"]["method"] == "platt"
    assert len(evaluate(old.path)["operating_points"]) == 4


def test_it_needs_no_pack(run):
    pack = run.open_pack(verify=False).path
    pack.rename(pack.with_name("elsewhere.pack"))
    assert calibrate(run, method="platt")["calibrator"]["method"] == "platt"
    assert Run.open(run.path).info["config_sha256"] is None


def test_runs_that_cannot_be_calibrated_are_refused(run, tmp_path):
    with refuses(MetricError, "'plat'", "'platt'"):
        calibrate(run, method="plat")
    with FileLock(run.path / LOCK), refuses(RunError, "another process"):
        calibrate(run)
    run.update(status="interrupted", epochs_done=1, epochs=4)
    with refuses(RunError, "1 of 4 epochs"):
        calibrate(run)
