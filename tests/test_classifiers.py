"""Classifiers: what is loaded is what was saved, bit for bit; the altered, newer or foreign is refused."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import write_json
from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.networks import build_network
from biopsy.recipes.preprocessing import Preprocessing
from refusals import refuses


def make_classifier(n_classes=2, **changes):
    names = ["non_idc", "idc"] if n_classes == 2 else [f"class_{index}" for index in range(n_classes)]
    info = ClassifierInfo(
        network="cancernet",
        params={"dense_dropout": 0.3},
        class_names=names,
        positive_class="idc" if n_classes == 2 else None,
        patch_px=16,
        mpp=4.0,
        preprocessing=Preprocessing(input_px=8, mean=(0.1, 0.2, 1 / 3)),
        thresholds=[{"value": 1 / 3, "rule": "youden", "chosen_on": "validation"}] if n_classes == 2 else [],
        recipe="cancernet-2020",
        **changes,
    )
    network = build_network("cancernet", n_classes=n_classes, input_px=8, seed=0, dense_dropout=0.3)
    return Classifier(info, network, {"colour_mean": np.linspace(0, 1, 7)})


@pytest.fixture
def saved(tmp_path):
    make_classifier().save(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_saved_and_loaded_gives_the_same_bits(saved):
    before, after = make_classifier(), Classifier.load(saved)
    batch = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(before.network(batch), after.network(batch))
    np.testing.assert_array_equal(after.extras["colour_mean"], before.extras["colour_mean"])
    assert not after.network.training
    assert after.info.preprocessing == before.info.preprocessing
    assert after.threshold == 1 / 3 and after.positive_index == 1
    again = saved.with_name("again")
    after.save(again)
    assert Classifier.load(again).sha256 == after.sha256
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in saved.iterdir()
    }


def test_the_hash_covers_document_and_weights(saved):
    one = Classifier.load(saved)
    with torch.no_grad():
        one.network.head.bias += 1e-3
    one.save(saved.with_name("other"))
    assert Classifier.load(saved.with_name("other")).sha256 != Classifier.load(saved).sha256


def test_altered_weights_are_refused(saved):
    path = saved / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with refuses(RunError, "weights.safetensors", "altered"):
        Classifier.load(saved)
    path.unlink()
    with refuses(RunError, "weights.safetensors", "exist"):
        Classifier.load(saved)


def test_weights_altered_between_opening_and_use_are_refused(saved):
    opened, path = Classifier.load(saved), saved / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError):
        _ = opened.network
    path.write_bytes(content)
    assert opened.network is not None


RESIDUAL = {"network": "residual", "preprocessing": {"input_px": 16}}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"format": "biopsy-classifier/2"}, "'biopsy-classifier/1'"),
        ({"format": "biopsy-pack/1"}, "'biopsy-classifier/1'"),
        ({"patch_px": "wide"}, "patch_px"),
        ({"class_names": ["non_idc", "idc", "c"]}, "'cancernet'"),
        ({"class_names": ["idc", "idc"]}, "class_names"),
        ({"class_names": []}, "class_names"),
        ({"positive_class": "nobody"}, "positive_class"),
        ({"mpp": 0}, "mpp"),
        ({"thresholds": [{"rule": "youden", "chosen_on": "validation"}]}, "thresholds.0.value"),
        ({"thresholds": [{"value": 7, "rule": "youden", "chosen_on": "validation"}]}, "thresholds.0.value"),
        ({"conformal": {"quantiles": ["x", 1]}}, "conformal.quantiles"),
        ({"conformal": {"quantiles": [0.5]}}, "conformal"),
        ({"calibrator": {"method": "isotonic", "prob": [0.5]}}, "calibrator"),
        ({"calibrator": {"method": "magic"}}, "calibrator.method"),
        ({"out_of_distribution": {"limits": {"feature": 1}}}, "out_of_distribution.limits.colour"),
        ({"out_of_distribution": {"limits": {"feature": 1, "colour": 1}}}, "weights.safetensors"),
        (RESIDUAL | {"params": {"base_channels": 10**6}}, "'residual'"),
        (RESIDUAL | {"params": {"base_channels": [24]}}, "base_channels"),
        (RESIDUAL | {"params": {"base_channels": -1}}, "network"),
        ({"network": "cancernett"}, "'cancernet'"),
    ],
)
def test_another_document_is_refused(saved, change, fact):
    path = saved / "classifier.json"
    write_json(path, json.loads(path.read_text()) | change)
    with refuses((RunError, ValueError), fact):
        _ = Classifier.load(saved).network


def test_a_document_changed_by_hand_is_refused(saved):
    path = saved / "classifier.json"
    path.write_text(path.read_text().replace('"licence": "', '"licence": "not '))
    with refuses(RunError, "classifier.json", "changed"):
        Classifier.load(saved)


def test_the_hash_is_the_same_before_saving_and_after(tmp_path):
    classifier = make_classifier()
    classifier.info.thresholds = [
        {"chosen_on": "validation", "more": np.float64(1), "rule": "youden", "value": 0.25}
    ]
    classifier.save(tmp_path / "saved")
    assert Classifier.load(tmp_path / "saved").sha256 == classifier.sha256


def test_a_folder_without_a_classifier_is_refused(tmp_path):
    with refuses(RunError, "classifier.json", "exist"):
        Classifier.load(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_what_was_there(saved, monkeypatch, call):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = Classifier.load(saved).sha256
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for path in (saved, saved.with_name("new")):
            with refuses(OSError, errno=errno.ENOSPC):
                make_classifier(licence="another").save(path)
    assert [path.name for path in saved.parent.iterdir()] == ["classifier"]
    assert Classifier.load(saved).sha256 == before


def test_probabilities_are_softmax_and_sum_to_one():
    logits = np.array([[0.3, -2.0, 5.0], [800.0, -800.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    probs = make_classifier(3).probs(logits)
    np.testing.assert_allclose(probs, softmax(logits.astype(float), axis=1), rtol=1e-12)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-12)


def test_two_sigmoids_become_one_probability_and_keep_the_arg_max():
    classifier = make_classifier(outputs="sigmoid")
    logits = np.random.default_rng(0).normal(0, 3, (50, 2))
    scores = expit(logits)
    probs = classifier.probs(logits)
    np.testing.assert_allclose(probs[:, 1], scores[:, 1] / scores.sum(axis=1), rtol=1e-12)
    assert (probs.argmax(axis=1) == logits.argmax(axis=1)).all()
    far = classifier.probs(np.array([[-800.0, -799.0], [-800.0, 800.0]]))  # both scores underflow
    np.testing.assert_allclose(far, [[1 - expit(1), expit(1)], [0, 1]], rtol=1e-12)


def test_more_than_two_classes_have_no_positive_one(tmp_path):
    classifier = make_classifier(3)
    assert classifier.positive_index is None and classifier.threshold is None
    classifier.save(tmp_path / "classifier")
    assert Classifier.load(tmp_path / "classifier").info.class_names == ["class_0", "class_1", "class_2"]


def test_a_pack_of_another_resolution_or_of_larger_patches_is_refused(make_pack):
    classifier = make_classifier()
    classifier.check_pack(make_pack("same.pack"))
    classifier.check_pack(make_pack("smaller.pack", patch_px=12))
    with refuses(DataError, "20 px", "16 px"):
        classifier.check_pack(make_pack("larger.pack", patch_px=20))
    pack = make_pack("coarse.pack")
    pack.info.mpp = 4.1
    classifier.check_pack(pack)
    pack.info.mpp = 4.5
    with refuses(DataError, "4.5 um/px", "4.0"):
        classifier.check_pack(pack)
    pack.info.mpp = None
    classifier.check_pack(pack)
