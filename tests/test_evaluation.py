"""Evaluation: numbers as scikit-learn's, a threshold chosen before, openings counted, other packs judged."""

import json
import shutil

import numpy as np
import pytest
from sklearn import metrics as theirs

from biopsy.core.errors import DataError, PackError, RunError, SplitError
from biopsy.core.files import SEAL, plain, read_json, write_json
from biopsy.core.text import class_title
from biopsy.data.packs import Pack
from biopsy.data.predictions import read_predictions
from biopsy.data.splits import split as make_split
from biopsy.evaluation.colour_baseline import colour_baseline
from biopsy.evaluation.evaluate import evaluate
from biopsy.experiments.reports import report
from biopsy.statistics.decisions import choose_threshold
from biopsy.statistics.metrics import METRICS
from refusals import refuses
from tiny_runs import copy_run, train_tiny

NAMES = (
    "auroc auprc sensitivity specificity ppv npv balanced_accuracy f1 mcc accuracy brier nll ece "
    "calibration_slope calibration_intercept specificity_at_sensitivity_95 specificity_at_sensitivity_98"
).split()
KEYS = (
    "format subset positive_class n_patches n_patients split threshold confusion at_half patch patient "
    "ece_floor interval baseline subgroups subgroup_intervals times_opened"
).split()


@pytest.fixture(scope="module")
def judged(trained_run, tmp_path_factory):
    """A copy of the shared run and of its pack, judged once in both subsets."""
    place = tmp_path_factory.mktemp("judged")
    run = copy_run(trained_run, place)
    evaluate(run)
    evaluate(run, subset="validation")
    return run


@pytest.fixture
def copied(trained_run, tmp_path):
    return copy_run(trained_run, tmp_path)


def edit(path, **fields):
    write_json(path, json.loads(path.read_text()) | fields)


def read(run, subset="test"):
    frame, about = run.predictions(subset)
    return frame["target"].to_numpy(int), frame["prob"].to_numpy(float), frame, about


def values(estimates):
    return {name: estimate["value"] for name, estimate in estimates.items()}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"n_patches": -1}, "n_patches"),
        ({"patch": {"auroc": {"value": "high"}}}, "patch.auroc.value"),
        ({"confusion": {"tp": 1, "fp": 0, "fn": 0}}, "confusion.tn"),
        ({"unit": None}, "unit"),
    ],
)
def test_a_metrics_json_with_an_invalid_entry_is_refused(judged, tmp_path, change, where):
    run = copy_run(judged, tmp_path)
    path = run.path / "evaluation" / "metrics.json"
    document = read_json(path)
    write_json(path, document | change)
    with refuses(RunError, f"metrics.json {where}: ", f"biopsy evaluate {run.path}"):
        run.metrics()
    write_json(path, document)
    assert plain(run.metrics()) == document


def test_a_run_whose_split_tests_nothing_is_evaluated_elsewhere(make_pack, tmp_path):
    pack = make_pack(n_patients=6)
    make_split(pack, protocol="no-test", name="all")
    run = train_tiny(pack, tmp_path / "run", split="all")
    for refused in (run.metrics, lambda: evaluate(run)):
        with refuses(RunError, "no test"):
            refused()
    assert evaluate(run, subset="validation")["n_patches"]
    other = make_pack("other.pack", n_patients=2)
    assert evaluate(run, data=other)["n_patches"] == len(other)


def test_metrics_json_has_the_keys_of_the_formats_page(judged):
    metrics = json.loads((judged.path / "evaluation" / "metrics.json").read_text())
    assert metrics.pop(SEAL)
    assert metrics == plain(judged.metrics()) and set(KEYS) <= metrics.keys()
    assert metrics["format"] == "biopsy-metrics/1" and metrics["subset"] == "test"
    assert {"name", "patients_overlap"} <= metrics["split"].keys()
    assert {"value", "rule", "chosen_on"} == metrics["threshold"].keys()
    assert list(metrics["patch"]) == NAMES == list(METRICS)
    pooled_only = {"ece", "calibration_slope", "calibration_intercept"}  # noise within one patient
    assert list(metrics["patient"]) == [name for name in NAMES if name not in pooled_only]
    estimate = {"value", "low", "high", "reason"}
    assert all(estimate == found.keys() for found in metrics["patch"].values())
    summary = estimate | {"n_defined", "median", "worst"}
    assert all(summary == found.keys() for found in metrics["patient"].values())
    assert {"method", "unit", "level", "draws", "seed"} <= metrics["interval"].keys()
    assert metrics["interval"]["unit"] == "patient" and metrics["interval"]["level"] == 0.95
    assert (metrics["n_patches"], metrics["n_patients"]) == (40, 5)
    with_interval = [m for m in metrics["patch"].values() if m["low"] is not None]
    assert with_interval and all(m["low"] <= m["value"] <= m["high"] for m in with_interval)
    assert all(m["reason"] for m in metrics["patch"].values() if m["low"] is None)


def test_numbers_follow_from_the_predictions_file_as_scikit_learn_has_them(judged):
    target, prob, frame, about = read(judged)
    assert 0 < theirs.roc_auc_score(target, prob) < 1 and len(set(prob)) > 20
    pred = (prob >= about["threshold"]["value"]).astype(int)
    assert frame["pred"].tolist() == pred.tolist() and 0 < pred.mean() < 1
    expected = {
        "auroc": theirs.roc_auc_score(target, prob),
        "auprc": theirs.average_precision_score(target, prob),
        "sensitivity": theirs.recall_score(target, pred),
        "specificity": theirs.recall_score(target, pred, pos_label=0),
        "ppv": theirs.precision_score(target, pred),
        "npv": theirs.precision_score(target, pred, pos_label=0),
        "balanced_accuracy": theirs.balanced_accuracy_score(target, pred),
        "f1": theirs.f1_score(target, pred),
        "mcc": theirs.matthews_corrcoef(target, pred),
        "accuracy": theirs.accuracy_score(target, pred),
        "brier": theirs.brier_score_loss(target, prob),
        "nll": theirs.log_loss(target, prob),
    }
    metrics = plain(judged.metrics())
    found = values(metrics["patch"])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    for key, called in (("confusion", pred), ("at_half", (prob >= 0.5).astype(int))):
        (tn, fp), (fn, tp) = theirs.confusion_matrix(target, called).tolist()
        assert metrics[key] == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
        assert sum(metrics[key].values()) == metrics["n_patches"] == len(frame)
    assert metrics["prevalence"] == target.mean()


def test_patients_count_alike_in_the_means_over_patients(judged):
    target, prob, frame, _ = read(judged)
    patients = frame["patient_id"].to_numpy(str)
    each = [theirs.roc_auc_score(target[patients == p], prob[patients == p]) for p in np.unique(patients)]
    found = judged.metrics().patient["auroc"]
    assert found.n_defined == len(each) == 5
    summary = (found.value, found.median, found.worst)
    assert summary == pytest.approx((np.mean(each), np.median(each), min(each)), abs=1e-12)
    groups = judged.metrics().groups
    assert [group.id for group in groups] == np.unique(patients).tolist()
    assert [group.values["auroc"] for group in groups] == pytest.approx(each, abs=1e-12)
    for group in groups:
        part = frame[patients == group.id]
        assert list(group.per_class.values()) == np.bincount(part["target"], minlength=2).tolist()
        assert (group.n_patches, group.n_correct) == (len(part), (part["target"] == part["pred"]).sum())


def test_probabilities_follow_from_the_logits(judged):
    _, _, frame, about = read(judged)
    logits = frame[["logit_non_idc", "logit_idc"]].to_numpy()
    calibrator = judged.classifier.info.calibrator
    scores = calibrator["slope"] * logits + calibrator["intercepts"]
    wanted = 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))
    np.testing.assert_allclose(frame["prob"], wanted, rtol=1e-12)
    np.testing.assert_allclose(frame["prob_idc"] + frame["prob_non_idc"], 1, rtol=1e-12)
    assert about["classifier_sha256"] == judged.classifier.sha256
    assert set(frame["subset"]) == {"test"} and frame["patch_id"].is_unique


def test_the_threshold_was_chosen_on_validation_and_is_fixed(judged):
    target, prob, *_ = read(judged, "validation")
    chosen = choose_threshold(target, prob, "youden")
    wanted = {"value": chosen.value, "rule": "youden", "chosen_on": "validation"}
    assert judged.info["threshold"] == wanted == judged.metrics().threshold
    assert (
        json.loads((judged.path / "evaluation" / "metrics-validation.json").read_text())["threshold"]
        == wanted
    )
    on_test = choose_threshold(*read(judged)[:2], "youden")
    assert on_test.value != chosen.value  # else this test could not tell


def test_validation_is_predicted_as_training_left_it(trained_run, judged):
    before, after = trained_run.predictions("validation")[0], judged.predictions("validation")[0]
    np.testing.assert_allclose(before["prob"], after["prob"], rtol=1e-5)
    assert before.drop(columns=before.filter(regex="prob|logit").columns).equals(
        after.drop(columns=after.filter(regex="prob|logit").columns)
    )


def test_colour_alone_is_shown_beside_it(judged):
    pack = judged.open_pack()
    baseline = plain(judged.metrics().baseline)
    assert baseline["auroc"] == colour_baseline(pack, judged.subsets(pack))[0].auroc
    assert baseline.keys() == {"name", "features", "C", "n_train", "auroc", "reason", "interval", "gain"}
    ours = judged.metrics().patch["auroc"].value
    assert baseline["interval"]["value"] == pytest.approx(baseline["auroc"])
    assert baseline["gain"]["value"] == pytest.approx(ours - baseline["auroc"])


def test_a_pack_that_changes_while_colour_is_compared_is_noticed(copied, monkeypatch):
    def change_then_compare(pack, subsets, **options):
        pixels = pack.path / "patches.npy"
        content = pixels.read_bytes()
        pixels.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return colour_baseline(pack, subsets, **options)

    monkeypatch.setattr("biopsy.evaluation.evaluate.colour_baseline", change_then_compare)
    with pytest.raises(PackError) as error:
        evaluate(copied)
    assert error.value.reason == "altered"
    assert not (copied.path / "evaluation" / "metrics.json").exists()


def test_only_openings_of_the_test_subset_are_counted(copied):
    pack = copied.open_pack()
    assert evaluate(copied, subset="validation")["times_opened"] is None
    assert not (pack.path / "ledger.jsonl").exists()
    assert [evaluate(copied)["times_opened"] for _ in range(2)] == [1, 2]
    assert evaluate(copied, subset="validation")["ledger"] is None
    edit(copied.path / "run.json", id="another")
    ledger = evaluate(copied.path)["ledger"]
    assert ledger == {"times": 3, "runs": 2, "kept_with": "pack", "unreadable": 0}


@pytest.mark.parametrize("change", ["remove", "cut"])
def test_a_ledger_without_the_last_evaluation_is_named(copied, caplog, change):
    ledger = copied.open_pack().path / "ledger.jsonl"
    evaluate(copied)
    evaluate(copied)
    assert "entries are missing" not in caplog.text
    if change == "remove":
        ledger.unlink()
    else:
        ledger.write_text(ledger.read_text().splitlines()[0] + "\n")
    evaluate(copied)
    assert "entries are missing" in caplog.text


def test_a_pack_that_cannot_be_written_is_evaluated_all_the_same(copied, monkeypatch):
    pack = copied.open_pack()
    monkeypatch.setattr("biopsy.data.ledger.os.access", lambda path, _: path != pack.path)
    assert evaluate(copied)["ledger"] == {
        "times": 1,
        "runs": 1,
        "kept_with": "run",
        "unreadable": 0,
    }
    assert (copied.path / "ledger.jsonl").exists() and not (pack.path / "ledger.jsonl").exists()


def test_a_pack_that_moved_is_known_by_its_content(judged, copied, tmp_path):
    moved = shutil.move(copied.open_pack().path, tmp_path / "moved.pack")
    with refuses(RunError, "own.pack"):
        evaluate(copied)
    found, wanted = evaluate(copied, data=moved), plain(judged.metrics())
    assert {key: found[key] for key in wanted if key != "evaluated"} == {
        key: wanted[key] for key in wanted if key != "evaluated"
    }
    assert not (copied.path / "external").exists()
    with refuses(RunError, "'patients'"):
        evaluate(copied, data=moved, split="patients")


def test_a_test_subset_that_validated_is_reported(copied):
    assert evaluate(copied)["split"]["test_is_validation"] is False
    edit(copied.path / "run.json", split={**copied.info["split"], "test_is_validation": True})
    assert evaluate(copied.path)["split"]["test_is_validation"] is True
    with refuses(RunError, "validation", "test"):
        evaluate(copied.path, subset="validation")


def test_another_pack_is_evaluated_separately(copied, make_pack, caplog):
    other = make_pack("other.pack", n_patients=5, patches_per_patient=6, seed=1)
    metrics = evaluate(copied, data=other.path)
    assert (metrics["n_patches"], metrics["n_patients"], metrics["times_opened"]) == (30, 5, 1)
    assert metrics["threshold"] == copied.info["threshold"] and metrics["baseline"] is None
    assert metrics["split"] == {
        "name": None,
        "fold": None,
        "patients_overlap": True,
        "test_is_validation": False,
    }
    assert "evaluated patients were used in training or validation, first 8863" in caplog.text
    frame, about = read_predictions(copied.path / "external" / "other" / "predictions" / "test.parquet")
    assert frame["patch_id"].tolist() == other.table["patch_id"].tolist()
    assert about["pack_sha256"] == other.info.content_sha256
    auroc = theirs.roc_auc_score(frame["target"].to_numpy(int), frame["prob"])
    assert metrics["patch"]["auroc"]["value"] == pytest.approx(auroc, abs=1e-12)
    assert not (copied.path / "evaluation").exists()


@pytest.mark.parametrize(("dataset", "overlap"), [("synthetic", False), ("elsewhere", None)])
def test_patients_of_another_pack_are_compared_within_a_data_set(copied, make_pack, dataset, overlap):
    other = make_pack(n_patients=4, patches_per_patient=6, columns={"patient_id": "new", "slide_id": "new"})
    edit(other.path / "pack.json", dataset=dataset)
    assert evaluate(copied, data=other.path)["split"]["patients_overlap"] is overlap


def test_a_subset_of_another_packs_split_is_evaluated(copied, make_pack):
    other = make_pack(n_patients=8, patches_per_patient=6, seed=1)
    split = make_split(other, protocol="patients", save=False)
    metrics = evaluate(copied, data=other, split="patients")
    assert metrics["n_patches"] == (split.subsets(other) == "test").sum() < 48
    assert metrics["split"]["name"] == "patients"
    make_split(other, protocol="folds", folds=4)
    with refuses(RunError, "'folds'", "tiny.pack"):
        evaluate(copied, data=other, split="folds")
    with refuses(SplitError, "'patient'", "'patients'"):
        evaluate(copied, data=other, split="patient")


@pytest.mark.parametrize(
    ("change", "error", "facts"),
    [
        ({"class_names": ["idc", "non_idc"]}, RunError, ["['idc', 'non_idc']", "['non_idc', 'idc']"]),
        ({"positive_class": "non_idc"}, RunError, ["positive 'non_idc'", "positive 'idc'"]),
        ({"mpp": 0.5}, DataError, ["0.5 um/px", "4.0"]),
    ],
)
def test_a_pack_that_does_not_fit_is_refused(copied, make_pack, change, error, facts):
    other = make_pack(n_patients=3, patches_per_patient=4)
    edit(other.path / "pack.json", **change)
    with refuses(error, *facts):
        evaluate(copied, data=other.path)
    assert not (other.path / "ledger.jsonl").exists()


def test_refusals(copied, make_pack):
    with refuses(RunError, "subset='train'", "'test'", "'validation'"):
        evaluate(copied, subset="train")
    with refuses(RunError, "split='patients'"):
        evaluate(copied, split="patients")
    edit(copied.path / "run.json", status="interrupted")
    with refuses(RunError, "4 of 4 epochs"):
        evaluate(copied.path)


def test_a_subset_without_patches_is_refused(make_pack, tmp_path):
    pack = make_pack(n_patients=6, patches_per_patient=4, official_subsets=("train", "validation"))
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1")
    with refuses(RunError, "'official'", "test", "tiny.pack"):
        evaluate(run)


def test_three_classes_from_training_to_report(make_pack, tmp_path):
    pack = make_pack(
        n_patients=15, patches_per_patient=9, n_classes=3, official_subsets=("train", "validation", "test")
    )
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1")
    assert run.info["threshold"] is None and run.log()[0]["val_auroc"] is None
    metrics = evaluate(run)
    frame, _ = run.predictions("test")
    target, pred = (frame[name].to_numpy(int) for name in ("target", "pred"))
    probs = frame.filter(regex="^prob_").to_numpy()
    assert "prob" not in frame and pred.tolist() == probs.argmax(axis=1).tolist()
    assert metrics["positive_class"] is None and metrics["subgroups"] == {}
    assert list(metrics["one_vs_rest"]) == pack.class_names
    found = {
        name: [values(estimates)[name] for estimates in metrics["one_vs_rest"].values()]
        for name in ("auroc", "f1")
    }
    each = [theirs.roc_auc_score(target == index, probs[:, index]) for index in range(3)]
    assert found["auroc"] == pytest.approx(each, abs=1e-12)
    pooled = values(metrics["patch"])
    assert pooled["auroc"] == pytest.approx(np.mean(each), abs=1e-12)
    assert pooled["accuracy"] == pytest.approx(theirs.accuracy_score(target, pred), abs=1e-12)
    assert pooled["balanced_accuracy"] == pytest.approx(
        theirs.balanced_accuracy_score(target, pred), abs=1e-12
    )
    assert metrics["calibration"]["after"]["nll"]["value"] == pytest.approx(pooled["nll"], abs=1e-12)
    f1 = theirs.f1_score(target, pred, average=None, labels=range(3), zero_division=0)
    assert found["f1"] == pytest.approx(f1.tolist(), abs=1e-12)
    assert metrics["confusion_matrix"] == theirs.confusion_matrix(target, pred).tolist()
    accuracy = (frame["target"] == frame["pred"]).groupby(frame["patient_id"]).mean().to_dict()
    assert {group["id"]: group["values"]["accuracy"] for group in metrics["groups"]} == accuracy
    page = report(run)[0].read_text()
    assert all(class_title(name) in page for name in pack.class_names)


def test_patches_without_ids_are_their_own_unit(make_pack, tmp_path):
    columns = {"patient_id": None, "slide_id": None}
    pack = make_pack(n_patients=5, patches_per_patient=12, columns=columns)
    run = train_tiny(Pack.open(pack.path), tmp_path / "run", "train.epochs=1")
    metrics = evaluate(run)
    assert metrics["unit"] == metrics["interval"]["unit"] == "patch"
    assert metrics["split"]["patients_overlap"] is None and metrics["patient"] is None
    assert metrics["groups"] == []
    assert metrics["n_patients"] == metrics["n_patches"]
