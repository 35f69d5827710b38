"""Context: neighbours by hand, missing ones without effect, no look at another slide."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import biopsy
from biopsy.core.errors import DataError
from biopsy.core.results import to_text
from biopsy.data.predictions import read_metadata
from biopsy.evaluation.evaluate import evaluate
from biopsy.evaluation.predict import predict
from biopsy.exporting.bundles import export
from biopsy.models.classifier import Classifier, average_neighbours
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits
from conftest import write_pack
from refusals import refuses
from tiny_runs import LIVELY, copy_run, train_tiny

ENGINE = Engine("cpu")


def make_table(x, y, slide="A"):
    return pd.DataFrame({"x": x, "y": y, "slide_id": slide, "patient_id": slide}).astype(
        {"x": "Int64", "y": "Int64"}
    )


def average(logits, table, length=1.5):
    return average_neighbours(logits, table, patch_px=50, length=length)


def by_hand(logits, x, y, length):
    distance = np.hypot(*(np.stack([x, y])[:, :, None] - np.stack([x, y])[:, None]) / 50)
    weight = np.exp(-distance / length) * (distance <= 5 * length)
    return weight @ logits / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("stride", "length"), [(50, 1.5), (25, 0.5), (50, 3.0)])
def test_averages_by_hand(stride, length):
    rng = np.random.default_rng(0)
    cells = rng.choice(400, 120, replace=False)  # with holes
    x, y = 1 + cells % 20 * stride, 1 + cells // 20 * stride
    logits = rng.normal(size=(120, 3))
    assert np.allclose(average(logits, make_table(x, y), length), by_hand(logits, x, y, length))


def test_a_patch_without_neighbours_keeps_its_logits():
    logits = np.array([[1.0, -1.0], [3.0, 2.0]], np.float32)
    far = average(logits, make_table([0, 5000], [0, 0]))
    assert far.dtype == np.float32 and np.allclose(far, logits, atol=1e-6)
    other_slide = average(logits, make_table([0, 50], [0, 0], ["A", "B"]))
    assert np.allclose(other_slide, logits, atol=1e-6)
    no_place = average(logits, make_table([0, pd.NA], [0, 0]))
    assert np.allclose(no_place, logits, atol=1e-6)


def test_the_shape_of_the_tissue_does_not_change_predictions():
    """Equal logits stay equal wherever neighbours are missing."""
    rng = np.random.default_rng(1)
    cells = rng.choice(100, 40, replace=False)
    logits = np.tile([0.25, -2.0], (40, 1))
    assert np.allclose(average(logits, make_table(cells % 10 * 50, cells // 10 * 50)), logits)


def test_a_slide_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    logits, x = rng.normal(size=(10, 2)), np.arange(10) * 50
    both = make_table(np.tile(x, 2), np.zeros(20, int), np.repeat(["A", "B"], 10))
    together = average(np.concatenate([logits, rng.normal(size=(10, 2))]), both)
    assert np.allclose(together[:10], average(logits, make_table(x, np.zeros(10, int))))


CONTEXT = (*LIVELY, "train.epochs=2", "model.context=1.5")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("context"), n_patients=8, patches_per_patient=9)


@pytest.fixture(scope="module")
def run(pack, tmp_path_factory):
    return train_tiny(pack, tmp_path_factory.mktemp("run") / "run", *CONTEXT, recipe="idc-small")


def logits_of(frame, pack):
    return frame[[f"logit_{name}" for name in pack.class_names]].to_numpy()


def single_logits(run, pack, rows):
    info = run.classifier.info
    network = ENGINE.place(run.classifier.network)
    return predict_logits(network, info.preprocessing, pack.patches, pack.sizes, rows, engine=ENGINE)


def test_a_run_is_calibrated_and_evaluated_with_context(pack, run, tmp_path):
    info = run.classifier.info
    assert info.context == 1.5 and info.single_patch["thresholds"] != info.thresholds
    run = copy_run(run, tmp_path)
    evaluate(run)
    for side in ("validation", "test"):
        frame, _ = run.predictions(side)
        rows = pack.rows_of(frame["patch_id"])
        alone = single_logits(run, pack, rows)
        averaged = average_neighbours(alone, pack.table.iloc[rows], patch_px=info.patch_px, length=1.5)
        assert np.allclose(logits_of(frame, pack), averaged, atol=1e-5)
        assert np.abs(averaged - alone).max() > 1e-3
        probs = run.classifier.probs(averaged)[:, pack.positive_index]
        assert np.allclose(frame["prob"], probs, atol=1e-5)


def test_a_pack_is_predicted_with_context_and_images_without(pack, run, tmp_path, caplog):
    frame = predict(run, pack.path, out=tmp_path / "pack.parquet").frame
    alone = single_logits(run, pack, None)
    whole = average_neighbours(alone, pack.table, patch_px=run.classifier.info.patch_px, length=1.5)
    assert np.allclose(logits_of(frame, pack), whole, atol=1e-5)
    assert "no coordinates" not in caplog.text
    for row in range(2):
        Image.fromarray(pack.patches[row]).save(tmp_path / f"{row}.png")
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    predicted = predict(run, images, out=tmp_path / "images.csv")
    frame = predicted.frame
    assert "no coordinates" in caplog.text
    single = run.classifier.single_patch()
    assert (
        single.info.context == 0 and single.info.thresholds == run.classifier.info.single_patch["thresholds"]
    )
    assert np.allclose(frame["prob"], single.probs(alone[:2])[:, pack.positive_index], atol=1e-5)
    assert read_metadata(predicted.path)["threshold"] == predicted.threshold == single.decision_threshold
    assert f"{single.decision_threshold['value']:.3f}" in to_text(predicted.blocks())
    both = predict(run, [pack.path, *images], out=tmp_path / "both.csv")
    assert both.threshold is None and read_metadata(both.path)["threshold"] is None
    assert both.frame["pred"].tolist()[-2:] == frame["pred"].tolist()


@pytest.mark.slow
def test_a_slide_map_is_made_with_context(pack, run, tmp_path):
    result = biopsy.slide(run, pack.path, out=tmp_path / "maps", device="cpu", precision="fp32", mpp=4.0)
    predicted = predict(run, pack.path, out=tmp_path / "pack.parquet").frame
    assert len(result) == predicted["slide_id"].fillna(predicted["patient_id"]).nunique()
    for slide_map in result:
        expected = predicted.loc[predicted["slide_id"].fillna(predicted["patient_id"]) == slide_map.name]
        assert np.allclose(np.sort(slide_map.probs[:, 1]), np.sort(expected["prob"]), atol=1e-4)


def test_exported_networks_take_single_patches(pack, run, tmp_path):
    bundle = export(run, tmp_path / "bundle")
    assert max(known["probs"] for known in bundle.parity["largest_difference"].values()) < 1e-5
    assert Classifier.load(bundle.path).info.context == 1.5


def test_training_with_context_needs_coordinates(make_pack, tmp_path):
    pack = make_pack(n_patients=8, patches_per_patient=4, columns={"x": None, "y": None})
    with refuses(DataError, "model.context=1.5", "--set model.context=0"):
        train_tiny(pack, tmp_path / "run", *CONTEXT, recipe="idc-small")
