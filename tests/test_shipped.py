"""Classifiers that ship: small, complete, opened by name, told apart from folders, honest on other input."""

import json
import logging
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pandas as pd
import pytest
from huggingface_hub.repocard import metadata_load

import biopsy
from biopsy.core.errors import DataError, FileFormatError, RecipeError, RunError
from biopsy.models.classifier import DOCUMENT, WEIGHTS, Classifier
from biopsy.models.shipped import FOLDER, list_shipped
from biopsy.phantom.cohort import iter_patches
from biopsy.recipes import load_recipe
from biopsy.training.open_model import open_classifier
from command_line import call
from conftest import PROJECT
from refusals import refuses
from tiny_runs import train_tiny

MEGABYTE = 1_000_000
PX = {"idc": 50, "pcam": 96}
CLASSES = {"idc": ["non_idc", "idc"], "pcam": ["normal", "tumour"]}


def write_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])
    return path


@pytest.fixture
def patch(tmp_path):
    """A synthetic H&E patch of IDC's size."""
    return write_png(tmp_path / "patch.png", next(iter_patches(n_patients=1, patches_per_patient=20)).image)


@pytest.mark.parametrize("name", sorted(PX))
def test_each_is_small_and_complete(name):
    assert list_shipped() == sorted(PX)
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) <= MEGABYTE
    classifier = Classifier.load(FOLDER / name)
    info = classifier.info
    assert info.patch_px == PX[name]
    assert (info.class_names, info.positive_class) == (CLASSES[name], CLASSES[name][1])
    assert info.mpp is not None and info.out_of_distribution is not None and info.thresholds
    assert info.calibrator["method"] != "none"
    assert info.calibrator["fitted_on"] == "validation"
    assert "patches" in info.description and info.citation.startswith("Data: ")
    card = (FOLDER / name / "README.md").read_text()
    assert info.description in card and info.citation in card and info.licence in card
    metadata = metadata_load(FOLDER / name / "README.md")
    assert (metadata["license"], metadata["library_name"]) == ("apache-2.0", "biopsy")
    assert metadata["pipeline_tag"] == "image-classification" and metadata["tags"]
    assert (info.context > 0) == (name == "idc")
    [row] = [row for row in biopsy.list("classifiers") if row["name"] == name]
    assert row["description"] == info.description
    assert row["bytes"] == (FOLDER / name / WEIGHTS).stat().st_size


@pytest.mark.slow
def test_the_wheel_holds_them(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in PX:
            for file in (DOCUMENT, WEIGHTS, "README.md"):
                packed = archive.read(f"biopsy/models/shipped/{name}/{file}")
                assert packed == (FOLDER / name / file).read_bytes()


def test_half_precision_keeps_predictions(trained_run, tmp_path):
    original, pack = trained_run.classifier, trained_run.open_pack(verify=False)
    again = Classifier(original.info, original.base_network, original.extras)
    again.save(tmp_path / "half", precision="fp16")
    half = Classifier.load(tmp_path / "half")
    predictions = [
        biopsy.predict(classifier, pack.path, out=tmp_path / f"{number}.csv").frame
        for number, classifier in enumerate((original, half))
    ]
    np.testing.assert_allclose(predictions[0]["prob"], predictions[1]["prob"], atol=0.01)
    np.testing.assert_allclose(
        predictions[0]["colour_distance"], predictions[1]["colour_distance"], rtol=1e-3
    )
    np.testing.assert_allclose(
        predictions[0]["feature_distance"], predictions[1]["feature_distance"], rtol=0.02
    )
    full_bytes = (trained_run.path / "classifier" / WEIGHTS).stat().st_size
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.75 * full_bytes
    weights = half.base_network.state_dict()
    assert all(
        value.dtype.is_floating_point is False or value.element_size() == 4 for value in weights.values()
    )


@pytest.mark.parametrize("name", sorted(PX))
def test_predict_by_name(name, patch, tmp_path, caplog):
    caplog.set_level(logging.INFO, "biopsy")
    frame = biopsy.predict(name, patch, out=tmp_path / "predictions.csv").frame
    info = Classifier.load(FOLDER / name).info
    assert list(frame["patch_id"]) == ["patch.png"]
    assert 0 <= frame["prob"][0] <= 1
    assert frame["out_of_distribution"].dtype == bool
    [line] = [message for message in caplog.messages if message.startswith(f"{name}: ")]
    n_patches = info.description.split()[2]  # Trained on 7,838 patches of 18 patients ...
    assert n_patches in line and len(line) < 120 and "biopsy list classifiers" in line
    assert (" patients" in line) == (name == "idc")
    called = call("predict", name, patch, "--out", tmp_path / "again.csv", "--json")
    assert called.exit_code == 0
    assert json.loads(called.stdout)["n_patches"] == 1


def test_explain_by_name(patch, tmp_path):
    called = call("explain", "idc", "--data", patch, "--method", "saliency", "--out", tmp_path / "maps")
    assert called.exit_code == 0, called.stderr
    assert (tmp_path / "maps" / "saliency.png").is_file()


def test_evaluate_by_name_needs_a_pack(make_pack):
    with refuses(RunError, "data"):
        biopsy.evaluate("idc")
    pack = make_pack(patch_px=50, n_patients=2)
    assert biopsy.evaluate("idc", data=pack)["n_patches"] == len(pack)


@pytest.mark.slow
def test_export_by_name_tries_parity_on_synthetic_patches(tmp_path):
    bundle = biopsy.export("pcam", tmp_path / "bundle")
    assert bundle.parity["pack"] == {"name": "synthetic patches", "content_sha256": None}
    assert all(pair["probs"] <= 1e-4 for pair in bundle.parity["largest_difference"].values())
    assert Classifier.load(bundle.path).info.citation.startswith("Data: ")


def test_a_local_model_of_that_name_is_taken_and_other_folders_are_not(
    trained_run, patch, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "biopsy")
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "idc" / "patch.png", cv2.imread(str(patch)))  # a folder of data, no model
    assert open_classifier("idc").info.patch_px == 50
    assert any("./idc holds no model" in message for message in caplog.messages)
    assert len(biopsy.predict("idc", "idc").frame) == 1  # the name's classifier on the folder's images
    trained = trained_run.classifier
    own = Classifier(trained.info, trained.base_network, trained.extras)
    own.save(tmp_path / "pcam")
    assert open_classifier("pcam").info.patch_px == own.info.patch_px == 16
    assert open_classifier(FOLDER / "pcam").info.patch_px == 96


def test_an_unknown_name_names_the_nearest():
    with refuses(RunError, "'pcam'"):
        open_classifier("pcamm")


def test_training_starts_from_them(make_pack, tmp_path):
    pack = make_pack(n_patients=6)
    recipe = load_recipe("idc-small", {"model.weights": "idc"})
    assert recipe.model.pretrained
    assert not load_recipe("idc-small", {"model.weights": "idc", "model.pretrained": False}).model.pretrained
    settings = ("model.weights=idc", "preprocessing.input_px=16", "train.epochs=1", "train.lr=1e-9")
    settings += ("train.ema_decay=0", "train.precision=fp32", "train.weight_decay=0")
    run = train_tiny(pack, tmp_path / "run", *settings, recipe="idc-small")
    assert (run.info["weights"]["weights"], run.info["weights"]["licence"]) == ("idc", "apache-2.0")
    ours, theirs = (c.base_network.state_dict() for c in (run.classifier, Classifier.load(FOLDER / "idc")))
    kernels = [name for name, value in ours.items() if value.ndim == 4]
    assert kernels
    for name in kernels:  # the learning rate moves nothing
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "settings", "error", "reason"),
    [
        ("cancernet-2020", (), RecipeError, "weights"),  # another network
        # another size of the same network
        ("idc-small", ("model.params.base_channels=8",), FileFormatError, "architecture"),
    ],
)
def test_training_refuses_weights_of_another_network(make_pack, tmp_path, recipe, settings, error, reason):
    with refuses(error, reason=reason):
        train_tiny(
            make_pack(n_patients=6),
            tmp_path / "run",
            "model.weights=idc",
            "preprocessing.input_px=16",
            *settings,
            recipe=recipe,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(PX))
def test_a_pack_of_another_resolution_is_refused(name, tmp_path):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    pack = biopsy.Pack.from_arrays(
        images, [0, 1], class_names=["non_idc", "idc"], mpp=2.0, out=tmp_path / "pack"
    )
    with refuses(DataError, "um/px"):
        biopsy.predict(name, pack.path)


@pytest.mark.parametrize("name", sorted(PX))
def test_input_that_is_no_such_patch_is_reported(name, patch, tmp_path, caplog):
    px, image = PX[name], cv2.imread(str(patch))
    grey = cv2.cvtColor(cv2.cvtColor(cv2.resize(image, (px, px)), cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2RGB)
    folder = tmp_path / "odd"
    write_png(folder / "grey.png", grey)
    write_png(folder / "tiny.png", image[:8, :8])
    write_png(folder / "white.png", np.full((px, px, 3), 255, np.uint8))
    write_png(folder / "large.png", np.zeros((px + 1, px + 1, 3), np.uint8))
    prediction = biopsy.predict(name, folder, out=tmp_path / "predictions.csv")
    assert [item["source"].rpartition("/")[2] for item in prediction.skipped] == ["large.png"]
    unlike = prediction.frame.set_index("patch_id")["out_of_distribution"]
    assert unlike.to_dict() == {"grey.png": True, "tiny.png": True, "white.png": True}
    assert any("out-of-distribution" in message for message in caplog.messages)


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(PX))
def test_skin_is_reported_to_be_out_of_distribution(name, data_dir, tmp_path):
    called = call("slide", name, data_dir / "wsi" / "CMU-1-Small-Region.svs", "--out", tmp_path / "maps")
    assert called.exit_code == 0, called.stderr
    [slide] = pd.read_csv(tmp_path / "maps" / "status.csv").to_dict("records")
    assert slide["out_of_distribution"] >= 0.2
    assert slide["out_of_distribution_quantile"] == 0.95
    assert "5-10 % expected" in called.stderr


@pytest.mark.data
def test_breast_tissue_at_its_resolution_is_mapped(data_dir, tmp_path):
    image = data_dir / "wsi" / "idc_stitched_unlabelled_2001x1551.png"
    slide_map = biopsy.slide("idc", image, mpp=4.0, out=tmp_path / "maps")
    assert len(slide_map.to_frame()) > 100
