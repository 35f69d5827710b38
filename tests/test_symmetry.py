"""Test-time augmentation: the answer of every turned or mirrored patch, exported and explained."""

import numpy as np
import pytest
import torch

from biopsy.core.errors import RecipeError
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.exporting.bundles import measure_parity, write_networks
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits, predict_with_features
from biopsy.models.networks.wrapped import symmetric_views
from conftest import write_pack
from host_models import draw, make_classifier
from refusals import refuses
from tiny_runs import train_tiny

ENGINE = Engine("cpu")


@pytest.fixture
def classifier():
    classifier = make_classifier("residual", patch_px=18)
    classifier.info.tta = "d4"
    return classifier


def predict(classifier, patches, network=None):
    network = network or classifier.network
    return predict_logits(network, classifier.info.preprocessing, patches, engine=ENGINE)


def test_the_views_are_all_turns_and_mirrorings():
    patch = torch.arange(9.0).view(1, 1, 3, 3)
    turned = [torch.rot90(side, k, (2, 3)) for side in (patch, patch.flip(3)) for k in range(4)]
    views = {tuple(view.flatten().tolist()) for view in symmetric_views(patch)}
    assert views == {tuple(view.flatten().tolist()) for view in turned} and len(views) == 8


def test_logits_and_features_do_not_depend_on_the_orientation(classifier):
    patches = draw(3, 18)
    logits, features = predict_with_features(classifier, patches, engine=ENGINE)
    for turned in (
        np.rot90(patches, axes=(1, 2)),
        patches[:, ::-1],
        np.rot90(patches, 2, (1, 2))[:, :, ::-1],
    ):
        other_logits, other_features = predict_with_features(
            classifier, np.ascontiguousarray(turned), engine=ENGINE
        )
        assert np.allclose(logits, other_logits, atol=1e-6)
        assert np.allclose(features, other_features, atol=1e-6)
    by_hand = [
        predict(classifier, np.ascontiguousarray(np.rot90(side, k, (1, 2))), classifier.base_network)
        for side in (patches, patches[:, ::-1])
        for k in range(4)
    ]
    assert np.allclose(logits, np.mean(by_hand, axis=0), atol=1e-6)
    assert np.ptp(by_hand, axis=0).max() > 1e-3


def test_many_patches_are_those_of_one_at_a_time(classifier):
    patches = draw(70, 18)
    singly = np.concatenate([predict(classifier, patches[i : i + 1]) for i in range(0, 70, 10)])
    assert np.allclose(predict(classifier, patches)[::10], singly, atol=1e-6)


def test_patches_that_are_not_square_are_refused():
    with refuses(RecipeError, "tta='d4'", "square"):
        symmetric_views(torch.zeros(1, 3, 4, 6))


@pytest.mark.slow
def test_saved_and_exported_with_the_symmetries(classifier, tmp_path):
    classifier.save(tmp_path / "classifier")
    loaded = Classifier.load(tmp_path / "classifier")
    patches = draw(5, 18)
    assert np.array_equal(predict(loaded, patches), predict(classifier, patches))
    (tmp_path / "bundle").mkdir()
    write_networks(classifier, tmp_path / "bundle")
    parity = measure_parity(classifier, tmp_path / "bundle", patches)
    assert "PyTorch and OpenVINO" in parity["largest_difference"]
    assert max(known["probs"] for known in parity["largest_difference"].values()) < 1e-5


def test_explanations_show_the_single_view_and_the_answer_of_all(classifier):
    patches = draw(4, 18)
    explanation = explain_patches(classifier, patches, method="grad_cam", engine=ENGINE)
    assert explanation.maps.shape[0] == 4
    assert np.allclose(explanation.probs, classifier.probs(predict(classifier, patches)), atol=1e-6)


def test_a_recipe_asks_for_it(tmp_path):
    pack = write_pack(tmp_path, n_patients=8, patches_per_patient=8)
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1", "model.tta=d4")
    assert run.classifier.info.tta == "d4"
    frame, _ = run.predictions("validation")
    rows = pack.rows_of(frame["patch_id"])
    logits = predict_logits(
        run.classifier.network,
        run.classifier.info.preprocessing,
        pack.patches,
        pack.sizes,
        rows,
        engine=ENGINE,
    )
    names = [f"logit_{name}" for name in pack.class_names]
    assert np.allclose(logits, frame[names].to_numpy(np.float32), atol=1e-5)


def test_another_augmentation_leaves_calibration_and_takes_no_compiled_network(classifier, tmp_path):
    classifier.save(tmp_path / "classifier")
    loaded, patches = Classifier.load(tmp_path / "classifier"), draw(5, 18)
    single = loaded.with_tta("none")
    assert np.array_equal(predict(single, patches), predict(loaded, patches, loaded.base_network))
    assert (loaded.info.tta, single.info.tta, single.path) == ("d4", "none", None)
    assert single.sha256 != loaded.sha256 and single.threshold == loaded.threshold
    assert loaded.with_tta(None) is loaded.with_tta("d4") is loaded
    again = single.with_tta("d4")
    assert np.array_equal(predict(again, patches), predict(loaded, patches)) and again.sha256 == loaded.sha256
