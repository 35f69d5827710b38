"""Explanations: gradients and activations are what they are called, on the patch's own pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.evaluation.saliency.methods import METHODS
from biopsy.evaluation.saliency.methods.gradients import input_gradient
from biopsy.evaluation.saliency.methods.layers import find_first_layer, find_layer
from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.engine import Engine
from biopsy.models.networks import build_network
from biopsy.recipes.preprocessing import Preprocessing
from host_models import list_network_cases
from refusals import refuses

CPU = Engine("cpu")
PX = 50  # the least that every shipped network takes, with room to spare


def make_classifier(network, *, input_px=PX, class_names=("benign", "idc"), positive="idc", **preprocessing):
    info = ClassifierInfo(
        network="made up",
        class_names=list(class_names),
        positive_class=positive,
        patch_px=input_px,
        mpp=None,
        preprocessing=Preprocessing(input_px=input_px, **preprocessing),
    )
    return Classifier(info, network)


def make_linear(input_px=8, n_classes=2, seed=0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * input_px**2, n_classes))
    torch.manual_seed(seed)
    with torch.no_grad():  # without a mean, or brightness alone would decide
        network[1].weight.normal_()
        network[1].weight -= network[1].weight.mean(dim=1, keepdim=True)
    return network


def draw_patches(n, px=PX, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8)


def make_network(name, px=PX):
    """A network whose normalisations have seen patches: before, its gradients are next to nothing."""
    network = build_network(name, n_classes=2, input_px=px, seed=0)
    for module in network.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(Preprocessing(input_px=px).prepare(draw_patches(8, px, seed=1)))
    return network.eval()


# --- saliency


@pytest.mark.parametrize("target_class", ["benign", "idc"])
@pytest.mark.parametrize("method", ["saliency", "smoothgrad"])
def test_saliency_of_a_linear_network_is_its_weights(target_class, method):
    network = make_linear()
    patches = np.concatenate([draw_patches(2, 8), np.full((1, 8, 8, 3), 200, np.uint8)])  # one is constant
    found = explain_patches(
        make_classifier(network, input_px=8), patches, method=method, target_class=target_class, engine=CPU
    )
    weights = network[1].weight[("benign", "idc").index(target_class)].detach().reshape(3, 8, 8)
    assert found.maps.shape == (3, 1, 8, 8)
    for one in found.maps[:, 0]:
        np.testing.assert_allclose(one, weights.abs().amax(dim=0), rtol=1e-5)


def test_the_score_is_taken_before_the_softmax():
    network, patches = make_linear(), draw_patches(1, 8)
    with torch.no_grad():
        network[1].bias[1] += 1e4  # after the softmax every gradient would be 0
    found = explain_patches(make_classifier(network, input_px=8), patches, engine=CPU)
    assert found.probs[0, 1] == 1 and found.maps.min() > 0


def test_the_class_explained_is_the_positive_or_the_most_probable_one():
    patches = draw_patches(12, 8)
    binary = explain_patches(make_classifier(make_linear(), input_px=8), patches, engine=CPU)
    assert (binary.class_index == 1).all() and len(set(binary.probs.argmax(axis=1))) == 2
    three = make_classifier(make_linear(n_classes=3), input_px=8, class_names="abc", positive=None)
    found = explain_patches(three, patches, engine=CPU)
    np.testing.assert_array_equal(found.class_index, found.probs.argmax(axis=1))
    assert len(set(found.class_index)) > 1
    weights = three.network[1].weight.detach().reshape(3, 3, 8, 8).abs().amax(dim=1).numpy()
    np.testing.assert_allclose(found.maps[:, 0], weights[found.class_index], rtol=1e-5)


@pytest.mark.parametrize("name", list_network_cases())
def test_gradients_of_every_network_are_finite_differences(name):
    network = make_network(name).double()
    rng = np.random.default_rng(0)
    batch = torch.from_numpy(rng.random((1, 3, PX, PX)))
    gradient = input_gradient(network, batch, torch.tensor([1]))[0]
    places = [np.unravel_index(int(gradient.abs().argmax()), gradient.shape)]
    places += [tuple(place) for place in rng.integers(0, (3, PX, PX), (4, 3))]
    step, highest = 1e-7, float(gradient.abs().max())
    for place in places:
        moved = torch.zeros_like(batch)
        moved[(0, *place)] = step
        with torch.no_grad():
            slope = (network(batch + moved) - network(batch - moved))[0, 1] / (2 * step)
        assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-4, abs=1e-4 * highest)
    assert highest > 1e-6


@pytest.mark.parametrize("name", list_network_cases())
def test_every_network_is_explained_also_with_frozen_weights(name):
    network = make_network(name)
    classifier, patches = make_classifier(network), draw_patches(3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    free = explain_patches(classifier, patches, engine=CPU)
    network.requires_grad_(False)
    frozen = explain_patches(classifier, patches, engine=CPU)
    assert free.maps.shape == (3, 1, PX, PX) and np.isfinite(free.maps).all()
    assert (free.maps.max(axis=(1, 2, 3)) > 0).all()
    np.testing.assert_array_equal(free.maps, frozen.maps)
    first = explain_patches(classifier, patches, method="activations", engine=CPU)
    assert first.layer == find_first_layer(network, PX) and first.maps.shape[1] > 1
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.training


def test_two_classes_with_one_logit_between_them_have_the_same_saliency():
    classifier, patches = (
        make_classifier(build_network("vgg16", n_classes=2, input_px=32, seed=0), input_px=32),
        draw_patches(2, 32),
    )
    maps = [
        explain_patches(classifier, patches, target_class=name, engine=CPU).maps for name in ("benign", "idc")
    ]
    np.testing.assert_allclose(maps[0], maps[1], rtol=1e-5)


def test_each_patch_may_have_its_own_class():
    classifier, patches = make_classifier(make_network("residual", 32), input_px=32), draw_patches(3, 32)
    by_class = [
        explain_patches(classifier, patches, None, "saliency", name, engine=CPU).maps
        for name in ("benign", "idc")
    ]
    result = explain_patches(classifier, patches, None, "saliency", np.array([1, 0, 1]), engine=CPU)
    assert result.class_index.tolist() == [1, 0, 1]
    expected = np.stack([by_class[1][0], by_class[0][1], by_class[1][2]])
    np.testing.assert_allclose(result.maps, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["cancernet", "residual", "vgg16"])
def test_saliency_is_captums(name):
    captum = pytest.importorskip("captum.attr")
    network = make_network(name)
    classifier, patches = make_classifier(network, std=(0.5, 0.2, 0.3)), draw_patches(4)
    ours = explain_patches(classifier, patches, target_class="benign", engine=CPU).maps[:, 0]
    batch = classifier.info.preprocessing.prepare(patches)
    theirs = captum.Saliency(network.eval()).attribute(batch.requires_grad_(True), target=0, abs=True)
    np.testing.assert_allclose(ours, theirs.amax(dim=1).numpy(), rtol=1e-4, atol=1e-7)


def test_noise_of_smoothgrad_is_the_same_every_time_and_not_nothing():
    classifier = make_classifier(make_network("cancernet"))
    patches = draw_patches(2)
    first, second = (explain_patches(classifier, patches, method="smoothgrad", engine=CPU).maps for _ in "ab")
    np.testing.assert_array_equal(first, second)
    plain = explain_patches(classifier, patches, engine=CPU).maps
    assert np.corrcoef(first.ravel(), plain.ravel())[0, 1] < 0.95


# --- from the network's pixels to the patch's


def test_maps_lie_on_the_true_pixels_of_each_patch():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2))
    weights = torch.zeros(2, 3, 4, 4)
    weights[1, 0, :, 2:] = 1.0  # the right half counts
    with torch.no_grad():
        network[1].weight.copy_(weights.flatten(1))
    sizes = np.array([[8, 8], [6, 4]])
    stretched = make_classifier(network, input_px=4)
    maps = explain_patches(stretched, draw_patches(2, 8), sizes, engine=CPU).maps[:, 0]
    np.testing.assert_allclose(maps[0].mean(axis=0), [0, 0, 0, 0.25, 0.75, 1, 1, 1], atol=1e-6)
    assert maps[1, :4, 5].min() == 1 and maps[1, :4, 0].max() == 0
    assert maps[1, 4:].max() == 0 and maps[1, :, 6:].max() == 0
    padded = make_classifier(network, input_px=4, resize_mode="pad")
    maps = explain_patches(padded, draw_patches(2, 8), sizes, engine=CPU).maps[:, 0]
    np.testing.assert_allclose(maps[1, 0], [0, 0, 0, 0.25, 0.75, 1, 0, 0], atol=1e-6)
    assert maps[1, 4:].max() == 0


def test_patches_go_through_the_classifiers_own_preprocessing():
    class Middle(nn.Module):
        def forward(self, batch):
            return torch.stack([batch.new_zeros(len(batch)), (batch[:, 0] ** 2).sum(dim=(1, 2)) / 2], dim=1)

    patch = np.zeros((1, 4, 4, 3), np.uint8)
    patch[0, 1, 2] = (10, 20, 51)  # the gradient of half a square is what was fed: blue stands first
    classifier = make_classifier(Middle(), input_px=4, channel_order="bgr", mean=(0.1, 0, 0), std=(0.5, 1, 1))
    found = explain_patches(classifier, patch, engine=CPU).maps[0, 0]
    assert found[1, 2] == pytest.approx((51 / 255 - 0.1) / 0.5, abs=1e-6)
    assert found[0, 0] == pytest.approx(0.2, abs=1e-6)


# --- activations


def test_activations_are_a_layers_output():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    network = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5 * 64, 2))
    classifier, patches = make_classifier(network, input_px=8), draw_patches(3, 8)
    batch = classifier.info.preprocessing.prepare(patches)
    wanted = conv(batch).detach().numpy()
    plain = explain_patches(classifier, patches, method="activations", layer="0", engine=CPU)
    np.testing.assert_allclose(plain.maps, wanted, rtol=1e-5, atol=1e-6)
    assert plain.maps.min() < 0, "the rectifier after it writes in place"
    rectified = explain_patches(classifier, patches, method="activations", engine=CPU)
    assert rectified.layer == "1"
    np.testing.assert_allclose(rectified.maps, wanted.clip(0), rtol=1e-5, atol=1e-6)
    mean = explain_patches(classifier, patches, method="activations", channels="mean", engine=CPU)
    np.testing.assert_allclose(mean.maps[:, 0], wanted.clip(0).mean(axis=1), rtol=1e-4, atol=1e-6)


def test_activations_of_a_constant_patch_are_constant_inside():
    classifier = make_classifier(make_network("cancernet"))
    maps = explain_patches(
        classifier, np.full((1, PX, PX, 3), 120, np.uint8), method="activations", engine=CPU
    )
    inside = maps.maps[0, :, 2:-2, 2:-2]
    assert np.ptp(inside, axis=(1, 2)).max() < 1e-5 and maps.maps.max() > 0


def test_the_first_layer_is_the_first_convolution_or_its_rectifier():
    cancernet = build_network("cancernet", n_classes=2, input_px=PX, seed=0)  # still in training mode
    assert find_first_layer(cancernet, PX) == "body.relu1_1"
    residual = build_network("residual", n_classes=2, input_px=PX, seed=0)
    assert find_first_layer(residual, PX) == "stem.2"
    assert find_layer(residual, "blocks.0") == "blocks.0"
    bare = nn.Sequential(nn.Conv2d(3, 2, 3), nn.MaxPool2d(2), nn.ReLU())
    assert find_first_layer(bare, 16) == "0", "what follows a pooling is no longer the convolution's"


# --- refusals


@pytest.mark.parametrize(
    ("asked", "reason", "facts"),
    [
        ({"method": "salience"}, "name", ["'salience'", "'saliency'"]),
        ({"layer": "body.conv1_1"}, "conflict", ["layer='body.conv1_1'", "saliency"]),
        (
            {"method": "activations", "layer": "body.conv1_7"},
            "name",
            ["'body.conv1_7'", "body.conv1_1"],
        ),
        ({"method": "activations", "layer": "body.dense"}, "network", ["'body.dense'", "(256,)"]),
        ({"target_class": "icd"}, "name", ["'icd'", "'idc'"]),
        ({"channels": "some"}, "value", ["channels='some'"]),
    ],
)
def test_options_that_do_not_fit_are_refused(asked, reason, facts):
    classifier = make_classifier(make_network("cancernet"))
    with refuses(RecipeError, *facts, reason=reason):
        explain_patches(classifier, draw_patches(1), engine=CPU, **asked)


def test_a_network_without_convolutions_has_no_first_layer():
    with refuses(RecipeError, reason="network"):
        explain_patches(make_classifier(make_linear(), input_px=8), draw_patches(1, 8), method="activations")


def test_every_method_describes_what_it_shows_and_its_limits():
    assert {"saliency", "activations"} <= set(METHODS)
    for method in METHODS.values():
        assert method.shows and method.caveat and method.compute.__doc__
