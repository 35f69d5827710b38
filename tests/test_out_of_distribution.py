"""Patches unlike anything in training: noise and foreign colours are flagged, about 1 % of validation is."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor, predict_with_features
from biopsy.models.networks import build_network
from biopsy.models.out_of_distribution import fit_reference, ood_warning, out_of_distribution_scores
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.slide_io.stain import colour_features
from conftest import draw_patches

ENGINE = Engine("cpu")
PATCHES, TABLE = draw_patches(n_patients=12, patches_per_patient=40)
SIZES = TABLE[["width", "height"]].to_numpy()
TRAIN, VAL = np.arange(240), np.arange(240, 480)


def make_classifier(seed=0):
    info = ClassifierInfo(
        network="cancernet",
        class_names=["non_idc", "idc"],
        positive_class="idc",
        patch_px=16,
        mpp=4.0,
        preprocessing=Preprocessing(input_px=8),
    )
    classifier = Classifier(info, build_network("cancernet", n_classes=2, input_px=8, seed=0))
    with open_predictor(classifier, ENGINE, 1) as predictor:
        fit_reference(classifier, predictor, PATCHES, SIZES, TRAIN, VAL, seed=seed)
    return classifier


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


def measure(classifier, patches, sizes=None):
    _, features = predict_with_features(classifier, patches, sizes, engine=ENGINE)
    return out_of_distribution_scores(classifier, patches, sizes, features)


def test_one_in_a_hundred_validation_patches_is_beyond_each_limit(classifier):
    found = measure(classifier, PATCHES[VAL], SIZES[VAL])
    for kind in ("colour", "feature"):
        assert (found[f"{kind}_distance"] > 1).sum() == 3  # of 240, above the 99th percentile
    assert 3 <= found["out_of_distribution"].sum() <= 6
    beyond = (found[["colour_distance", "feature_distance"]] > 1).any(axis=1)
    assert found["out_of_distribution"].tolist() == beyond.tolist()
    assert classifier.info.out_of_distribution["chosen_on"] == "240 validation patches"


@pytest.mark.parametrize(
    "alter",
    [
        lambda patches: np.random.default_rng(0).integers(0, 256, patches.shape, dtype=np.uint8),
        lambda patches: 255 - patches,
        lambda patches: np.ascontiguousarray(patches[..., [1, 0, 2]]),
        lambda patches: patches // 2,
        lambda patches: np.full_like(patches, 255),
    ],
    ids=["noise", "inverted", "green stain", "half the light", "empty glass"],
)
def test_out_of_distribution_patches_are_flagged(classifier, alter):
    assert measure(classifier, alter(PATCHES[VAL[:50]]))["out_of_distribution"].all()


def test_colour_distance_is_scikit_learns(classifier):
    known, new = (colour_features(PATCHES[rows]).astype(float) for rows in (TRAIN, VAL))
    mean, spread = known.mean(axis=0), known.std(axis=0)
    spread[spread == 0] = 1
    theirs = LedoitWolf().fit((known - mean) / spread).mahalanobis((new - mean) / spread)
    found = measure(classifier, PATCHES[VAL])["colour_distance"]
    np.testing.assert_allclose(found, theirs / np.quantile(theirs, 0.99), rtol=1e-6)


def test_it_is_kept_with_the_classifier(classifier, tmp_path):
    classifier.save(tmp_path / "classifier")
    again = measure(Classifier.load(tmp_path / "classifier"), PATCHES[VAL])
    assert again.equals(measure(classifier, PATCHES[VAL]))
    assert again.equals(measure(make_classifier(), PATCHES[VAL]))


def test_without_a_reference_nothing_is_reported(classifier):
    info = classifier.info.model_copy(update={"out_of_distribution": None})
    found = measure(Classifier(info, classifier.network), PATCHES[:4])
    assert found.shape == (4, 0)


def test_with_another_augmentation_patches_are_told_by_colour_alone(classifier):
    patches = np.concatenate([PATCHES[VAL][:5], 255 - PATCHES[VAL][:5]])
    own, other = measure(classifier, patches), measure(classifier.with_tta("d4"), patches)
    assert list(other) == ["colour_distance", "out_of_distribution"]
    assert other["colour_distance"].equals(own["colour_distance"])
    assert other["out_of_distribution"].tolist() == (other["colour_distance"] > 1).tolist()
    assert other["out_of_distribution"][5:].all()


def test_grey_patches_and_mere_padding_are_flagged_whatever_their_distance(classifier):
    reference = {**classifier.info.out_of_distribution, "limits": {"colour": np.inf, "feature": np.inf}}
    info = classifier.info.model_copy(update={"out_of_distribution": reference})
    unlimited = Classifier(info, classifier.network, extras=classifier.extras)
    patches, sizes = PATCHES[VAL[:4]].copy(), SIZES[VAL[:4]].copy()
    patches[1] = patches[1].mean(axis=-1, keepdims=True)
    sizes[2], sizes[3] = (5, 5), (5, 6)  # of 256 px: less and more than a tenth
    found = measure(unlimited, patches, sizes)["out_of_distribution"]
    assert found.tolist() == [False, True, True, False]


@pytest.mark.parametrize(("quantile", "limit", "expected"), [(0.99, 0.04, "1-2 %"), (0.95, 0.2, "5-10 %")])
def test_a_share_is_unusual_from_twice_what_the_limit_lets_expect(quantile, limit, expected):
    warning = ood_warning(limit + 0.001, quantile)
    assert warning and expected in warning and f"{limit:.0%}" in warning
    assert ood_warning(limit - 0.001, quantile) is None
