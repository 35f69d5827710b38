"""Inference: rows in the order asked for, true sizes, the same in one batch and in several."""

import numpy as np
import pytest
import torch

import biopsy.models.inference as inference
from biopsy.models import compiling, runtimes
from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.engine import Engine
from biopsy.models.inference import (
    open_predictor,
    predict_classifier,
    predict_logits,
    predict_with_features,
)
from biopsy.models.networks import build_network
from biopsy.recipes.preprocessing import Preprocessing
from conftest import draw_patches

ENGINE = Engine("cpu")
PREPROCESSING = Preprocessing(input_px=8)
PATCHES = draw_patches(n_patients=2, patches_per_patient=9)[0]


def make_network(name="cancernet", preprocessing=PREPROCESSING):
    """A network whose normalisation knows the patches: untrained, its logits would be next to nothing."""
    torch.manual_seed(0)  # of dropout
    network = build_network(name, n_classes=2, input_px=preprocessing.input_px, seed=0)
    for module in network.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    network.train()(preprocessing.prepare(PATCHES))
    return network.eval()


def is_close(found, wanted):
    """Say whether logits agree but for the order of sums, which batches of other sizes change."""
    return np.allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture
def patches():
    return PATCHES


def ask(network, patches, sizes=None, index=None, **options):
    preprocessing = options.pop("preprocessing", Preprocessing(input_px=8))
    return predict_logits(network, preprocessing, patches, sizes, index, engine=ENGINE, **options)


def test_rows_come_in_the_order_requested(network, patches):
    whole = ask(network, patches)
    assert whole.shape == (18, 2) and whole.dtype == np.float32
    assert np.ptp(whole[:, 0]) > 0.1
    index = np.array([7, 0, 17, 7, 3])
    assert is_close(ask(network, patches, index=index), whole[index])


def test_logits_are_the_networks_own(network, patches):
    batch = torch.from_numpy(patches[:, ::2, ::2]).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        assert is_close(ask(network, patches[:, ::2, ::2]), network(batch).numpy())


def test_several_batches_are_as_one(network, patches, monkeypatch):
    whole = ask(network, patches)
    monkeypatch.setattr(inference, "BATCH_SIZE", 5)
    assert is_close(ask(network, patches), whole)


def test_nothing_asked_gives_nothing(network, patches):
    assert ask(network, patches, index=np.array([], int)).shape == (0, 2)


def test_a_memory_map_is_as_an_array(network, patches, tmp_path):
    np.save(tmp_path / "patches.npy", patches)
    mapped = np.load(tmp_path / "patches.npy", mmap_mode="r")
    np.testing.assert_array_equal(ask(network, mapped), ask(network, patches))


def test_padded_patches_are_stretched_from_their_true_size(network, patches):
    sizes = np.full((18, 2), 16)
    sizes[4], sizes[11] = (9, 16), (16, 5)
    padded = patches.copy()
    padded[4, :, 9:], padded[11, 5:] = 0, 0
    found = ask(network, padded, sizes)
    alone = np.concatenate([ask(network, patches[4:5, :, :9]), ask(network, patches[11:12, :5])])
    assert is_close(found[[4, 11]], alone)
    rest = np.delete(np.arange(18), [4, 11])
    assert is_close(found[rest], ask(network, patches)[rest])
    kept = ask(network, padded, sizes, preprocessing=Preprocessing(input_px=8, resize_mode="pad"))
    assert is_close(kept, ask(network, padded))
    assert not is_close(kept[4], found[4])


@pytest.mark.parametrize("training", [True, False])
def test_the_networks_mode_is_left_as_it_was(patches, training):
    network = make_network().train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first, second = ask(network, patches), ask(network, patches)
    np.testing.assert_array_equal(first, second)
    assert network.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def make_classifier(name="cancernet", network=None, **changes):
    info = ClassifierInfo(
        network=name,
        class_names=["a", "b"],
        positive_class="b",
        patch_px=16,
        mpp=None,
        preprocessing=changes.pop("preprocessing", Preprocessing(input_px=8)),
        **changes,
    )
    return Classifier(info, network or make_network(name, info.preprocessing))


def test_features_are_the_input_of_the_last_layer(network, patches):
    index = np.array([5, 2])
    logits, features = predict_with_features(
        make_classifier(network=network), patches, index=index, engine=ENGINE
    )
    assert features.shape == (2, 256)
    head = network.head
    assert is_close(features @ head.weight.detach().numpy().T + head.bias.detach().numpy(), logits)
    assert is_close(logits, ask(network, patches, index=index))


@pytest.mark.parametrize(
    ("name", "tta"),
    [
        ("cancernet", "none"),
        ("residual", "none"),
        pytest.param("baruah", "d4", marks=pytest.mark.slow),
        pytest.param("baruah", "none", marks=pytest.mark.slow),
        pytest.param("cancernet", "d4", marks=pytest.mark.slow),
        pytest.param("residual", "d4", marks=pytest.mark.slow),
    ],
)
def test_openvino_is_within_1e5_of_pytorch(name, tta, monkeypatch):
    monkeypatch.setattr(runtimes, "MIN_PATCHES_TO_CONVERT", 1)
    classifier = make_classifier(name, tta=tta, preprocessing=Preprocessing(input_px=32, resize="bilinear"))
    rng = np.random.default_rng(0)
    index, sizes = rng.permutation(np.repeat(np.arange(18), 9)), rng.integers(5, 17, (18, 2))
    preprocessing = classifier.info.preprocessing
    wanted = predict_logits(classifier.network, preprocessing, PATCHES, sizes, index, engine=ENGINE)
    with open_predictor(classifier, ENGINE, len(index)) as predictor:
        assert predictor.software[0] == "openvino"
        logits, features = predictor.logits_and_features(PATCHES, sizes, index)
        assert np.array_equal(predictor.logits(PATCHES, sizes, index), logits)
    probs = classifier.probs(wanted)[:, 1]
    assert np.ptp(probs) > 2e-3
    np.testing.assert_allclose(classifier.probs(logits)[:, 1], probs, rtol=0, atol=1e-5)
    widths, heights = sizes[index].T
    with torch.inference_mode():
        batch = preprocessing.prepare(PATCHES[index], widths, heights)
        np.testing.assert_allclose(features, classifier.network.features(batch).numpy(), rtol=1e-4, atol=1e-4)


def test_few_patches_are_not_worth_a_conversion(monkeypatch):
    def refuse(_):
        raise ZeroDivisionError

    monkeypatch.setattr(compiling, "try_to_convert", refuse)
    classifier = make_classifier()
    assert predict_classifier(classifier, PATCHES, engine=ENGINE).shape == (18, 2)
    with (
        pytest.raises(ZeroDivisionError),
        open_predictor(classifier, ENGINE, runtimes.MIN_PATCHES_TO_CONVERT),
    ):
        pass
