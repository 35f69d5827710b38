"""Verification: everything passes as written; whatever is altered is named, and nothing else."""

import json
import shutil

import numpy as np
import pytest

import biopsy
from biopsy.checks.verify import verify
from biopsy.core.errors import DataError
from biopsy.core.files import read_json, sha256_file, write_json
from biopsy.data.predictions import read_predictions, write_predictions
from biopsy.evaluation.evaluate import evaluate
from biopsy.exporting.bundles import draw_patches, export, write_networks
from biopsy.slides.cohorts import slide
from biopsy.training.runs import Run
from command_line import call
from refusals import refuses
from slide_maps import save_classifier
from tiny_runs import copy_run, train_tiny


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
    run = copy_run(trained_run, tmp_path_factory.mktemp("evaluated"))
    evaluate(run)
    return run


@pytest.fixture
def run(evaluated, tmp_path):
    return copy_run(evaluated, tmp_path)


def statuses(report):
    return {row["name"]: row["status"] for row in report["checks"]}


def failed(report):
    return {name for name, status in statuses(report).items() if status == "FAIL"}


def test_a_run_as_written_passes(run):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    report = verify(run)
    assert report.passed and set(statuses(report).values()) == {"PASS"}
    assert {"run.json", "recipe.toml", "split.csv", "classifier", "pack", "evaluation/metrics.json"} <= set(
        statuses(report)
    )
    assert {f"predictions/{subset}.parquet: sample" for subset in ("validation", "test")} <= set(
        statuses(report)
    )
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert report.to_frame()["status"].eq("PASS").all() and "recomputed" in repr(report)


@pytest.mark.parametrize("name", ["recipe.toml", "split.csv", "log.jsonl", "classifier/weights.safetensors"])
def test_a_changed_file_is_named(run, name):
    with open(run.path / name, "ab") as file:
        file.write(b"\n")
    report = verify(run.path)
    assert name in failed(report) and not report.passed
    assert all(row["remedy"] for row in report["checks"] if row["status"] == "FAIL")


def test_a_changed_record_is_all_that_is_reported(run):
    path = run.path / "run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert statuses(verify(run.path)) == {"run.json": "FAIL"}


def test_a_metric_that_was_made_up_is_found(run):
    """Also where the hash of the document was made to fit."""
    path = run.path / "evaluation" / "metrics.json"
    metrics = read_json(path)
    metrics["patch"]["auroc"]["value"] += 1e-9
    write_json(path, metrics)
    report = verify(run)
    assert failed(report) == {"evaluation/metrics.json"}
    assert "patch.auroc.value" in report.to_frame().loc["evaluation/metrics.json", "detail"]


def test_predictions_of_another_model_are_found(run):
    """Logits, probabilities and metrics that agree with each other, and not with the weights."""
    path = run.path / "predictions" / "test.parquet"
    frame, about = read_predictions(path)
    logits = [name for name in frame if name.startswith("logit_")]
    frame[logits] = frame[logits].to_numpy()[::-1]
    classifier = run.classifier
    probs = classifier.probs(frame[logits].to_numpy())
    frame[[f"prob_{name}" for name in classifier.info.class_names]] = probs
    frame["prob"] = probs[:, classifier.positive_index]
    frame["pred"] = (frame["prob"] >= classifier.threshold).astype(int) == classifier.positive_index
    frame["pred"] = frame["pred"].astype(int)
    frame["abstained"] = classifier.abstains(probs) if classifier.abstains(probs) is not None else False
    write_predictions(path, frame, about)
    report = verify(run)
    assert "predictions/test.parquet: sample" in failed(report)
    assert "predictions/test.parquet: decisions" not in failed(report)


def test_a_pack_that_is_gone_or_altered_fails(run):
    pack = run.open_pack(verify=False).path
    content = bytearray((pack / "patches.npy").read_bytes())
    content[-100] ^= 255
    (pack / "patches.npy").write_bytes(content)
    assert failed(verify(run)) == {"pack"} and failed(verify(pack)) == {"content"}
    shutil.rmtree(pack)
    report = verify(run)
    assert failed(report) == {"pack"} and statuses(report)["evaluation/metrics.json"] == "PASS"


def test_an_unfinished_run_is_a_warning(make_pack, tmp_path):
    run = train_tiny(make_pack(official_subsets=("train", "validation", "test")), tmp_path / "run")
    run.update(status="interrupted", epochs_done=1)
    assert statuses(verify(run))["training"] == "WARN"


def test_training_again_gives_the_same_weights(make_pack, tmp_path):
    run = train_tiny(make_pack(official_subsets=("train", "validation", "test")), tmp_path / "run")
    row = verify(run, retrain=True).to_frame().loc["training again"]
    assert row["status"] == "PASS" and "bit for bit" in row["detail"]
    run.update(seed=run.info["seed"] + 1)
    assert statuses(verify(Run.open(run.path), retrain=True))["training again"] == "FAIL"


def test_a_pack_passes_with_its_splits(make_pack):
    pack = make_pack(n_patients=9)
    biopsy.split(pack, protocol="patients", name="mine")
    assert statuses(verify(pack)) == {"files": "PASS", "content": "PASS", "split mine": "PASS"}
    path = pack.path / "splits" / "mine.csv"
    path.write_text(path.read_text().replace("train", "test"))
    assert failed(verify(pack)) == {"split mine"}
    (pack.path / "patches.parquet").write_bytes(b"")
    assert statuses(verify(pack)) == {"files": "FAIL"}


@pytest.mark.slow
def test_a_bundle_passes_and_code_is_not_run_without_consent(trained_run, tmp_path):
    bundle = export(trained_run, tmp_path / "bundle").path
    found = statuses(verify(bundle))
    assert found.pop("TorchScript") == "WARN" and set(found.values()) == {"PASS"}
    assert {"ONNX Runtime", "OpenVINO"} <= set(found)
    digest = sha256_file(bundle / "torchscript_model.pt")
    assert set(statuses(verify(bundle, trust_model=digest)).values()) == {"PASS"}
    other = export(trained_run, tmp_path / "other").path
    (bundle / "model.onnx").write_bytes((other / "model.onnx").read_bytes()[:-40])
    assert failed(verify(bundle)) == {"files"}
    document = read_json(bundle / "bundle.json")
    write_json(bundle / "bundle.json", document | {"files": []})
    assert "bundle.json" in failed(verify(bundle))


@pytest.mark.slow
def test_networks_of_other_weights_are_found(trained_run, tmp_path):
    bundle = export(trained_run, tmp_path / "bundle").path
    classifier = trained_run.classifier
    with_other = type(classifier)(classifier.info, classifier.base_network, classifier.extras)
    for parameter in with_other.base_network.parameters():
        parameter.data.mul_(1.5)
    shutil.rmtree(bundle / "openvino")
    write_networks(with_other, bundle)
    document = read_json(bundle / "bundle.json")
    document["files"] = {name: sha256_file(bundle / name) for name in document["files"]}
    write_json(bundle / "bundle.json", document)
    assert {"ONNX Runtime", "OpenVINO"} <= failed(verify(bundle))


@pytest.mark.slow
def test_parity_patches_are_tissue_of_the_size_wanted():
    patches = draw_patches(24)
    assert patches.shape[1:] == (24, 24, 3) and patches.dtype == np.uint8 and len(patches) == 256
    assert np.array_equal(patches, draw_patches(24)) and patches.std() > 10


@pytest.fixture
def maps(make_slide, tmp_path):
    slides = [make_slide("a.tiff"), make_slide("b.tiff", seed=1)]
    slide(save_classifier(tmp_path / "classifier"), slides, out=tmp_path / "out", stride_um=8)
    return tmp_path / "out"


def test_maps_pass_and_what_does_not_follow_is_named(maps):
    one = verify(maps / "a")
    assert set(statuses(one).values()) == {"PASS"} and "regions.geojson" in statuses(one)
    assert len(verify(maps)["checks"]) == 2 * len(one["checks"])
    summary = read_json(maps / "b" / "summary.json")
    summary["mapped_mm2"] *= 2
    write_json(maps / "b" / "summary.json", summary)
    assert failed(verify(maps)) == {"b: areas"}
    regions = json.loads((maps / "a" / "regions.geojson").read_text())
    regions["features"].pop()
    (maps / "a" / "regions.geojson").write_text(json.dumps(regions))
    report = verify(maps / "a")
    assert failed(report) == {"regions.geojson"} and statuses(report)["other files"] == "WARN"


def test_paths_that_cannot_be_verified_are_refused(tmp_path, make_pack):
    with refuses(DataError, tmp_path):
        verify(tmp_path)
    with refuses(DataError, "run"):
        verify(make_pack(), retrain=True)


def test_the_command_exits_with_1_on_a_failure(make_pack):
    pack = make_pack().path
    result = call("verify", pack, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["status"] == "PASS"
    (pack / "patches.parquet").unlink()
    result = call("verify", pack)
    assert result.exit_code == 1 and result.stdout.startswith("FAIL  files")
