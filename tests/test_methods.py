"""Grad-CAM, integrated gradients and occlusion: as defined, on every network, and as captum has them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.evaluation.saliency.methods import METHODS, ExplanationRequest, gradients, occlusion
from biopsy.evaluation.saliency.methods.gradients import COMPLETE_WITHIN, integrate_gradients
from biopsy.evaluation.saliency.methods.layers import find_last_maps, find_layer
from biopsy.evaluation.saliency.methods.occlusion import occlude
from biopsy.models.networks import build_network
from host_models import list_network_cases
from refusals import refuses
from test_explanation import CPU, PX, draw_patches, make_classifier, make_linear, make_network

LIBRARIES = [
    ("torchvision:squeezenet1_1", 64, "body.features.12"),
    ("torchvision:resnet18", 64, "body.layer4.1"),
    ("timm:resnet18", 64, "body.layer4.1.act2"),
    ("timm:convnext_atto", 64, "body.stages.3.blocks.1"),
]
TRANSFORMER = "timm:vit_tiny_patch16_224"
PEERS = ["cancernet", "residual", "vgg16"]


def ask(network, patches, class_index=1, layer=None, blank=1.0):
    batch = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    index = torch.full((len(patches),), class_index)
    return ExplanationRequest(network.eval(), batch, index, torch.full((3, 1, 1), blank), layer)


# --- every network


@pytest.mark.parametrize("name", list_network_cases())
def test_every_method_explains_every_network(name, monkeypatch):
    monkeypatch.setattr(gradients, "MIN_STEPS", 2)
    monkeypatch.setattr(gradients, "MAX_STEPS", 2)
    monkeypatch.setattr(gradients, "DRAWS", 2)
    monkeypatch.setattr(occlusion, "WINDOWS", 2)
    px = 32 if name == "vgg16" else PX
    classifier, patches = make_classifier(make_network(name, px), input_px=px), draw_patches(1, px)
    before = {key: value.clone() for key, value in classifier.network.state_dict().items()}
    classifier.network.requires_grad_(False)
    for method in METHODS.values():
        first, again = (explain_patches(classifier, patches, method=method.name, engine=CPU) for _ in "ab")
        assert first.maps.shape[2:] == (px, px) and np.isfinite(first.maps).all()
        assert (first.maps.min() < 0) <= (method.signed or method.name == "activations")
        np.testing.assert_array_equal(first.maps, again.maps)
        if method.name != "grad_cam":  # may be nothing at all: no place that raises the score
            assert np.abs(first.maps).max() > 0
    assert all(torch.equal(before[key], value) for key, value in classifier.network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "px"), [each[:2] for each in LIBRARIES])
def test_every_method_explains_networks_of_libraries(name, px, monkeypatch):
    monkeypatch.setattr(gradients, "MAX_STEPS", 32)
    classifier = make_classifier(make_network(name, px), input_px=px)
    for method in METHODS:
        maps = explain_patches(classifier, draw_patches(1, px), method=method, engine=CPU).maps
        assert maps.shape[2:] == (px, px) and np.isfinite(maps).all()


@pytest.mark.slow
def test_a_transformer_is_explained_by_what_needs_no_maps(monkeypatch):
    monkeypatch.setattr(gradients, "MAX_STEPS", 32)
    classifier = make_classifier(build_network(TRANSFORMER, n_classes=2, input_px=32, seed=0), input_px=32)
    for method in ("saliency", "integrated_gradients", "occlusion"):
        maps = explain_patches(classifier, draw_patches(1, 32), method=method, engine=CPU).maps
        assert np.abs(maps).max() > 0
    with refuses(RecipeError, "tokens", "integrated_gradients"):
        explain_patches(classifier, draw_patches(1, 32), method="grad_cam", engine=CPU)


# --- Grad-CAM


def test_grad_cam_by_hand():
    conv = nn.Conv2d(3, 2, 1, bias=False)
    linear = nn.Linear(2, 2, bias=False)
    network = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[..., None, None])  # red and green
        linear.weight.copy_(torch.tensor([[0.0, 0.0], [3.0, -1.0]]))
    asked = ask(network, draw_patches(2, 8), layer="1")
    found = METHODS["grad_cam"].compute(asked)
    wanted = (3 * asked.batch[:, :1] - asked.batch[:, 1:2]) / 64  # the pooling's share of each place
    torch.testing.assert_close(found, wanted.clamp(min=0))
    assert (wanted < 0).any(), "what speaks against the class is left out"
    other = METHODS["grad_cam"].compute(ask(network, draw_patches(2, 8), class_index=0, layer="1"))
    assert other.abs().max() == 0, "nothing raises a score that is always 0"


@pytest.mark.parametrize(
    ("name", "px", "layer"),
    [
        ("cancernet", PX, "body.relu3_3"),
        ("vgg16", PX, "body.block5_relu3"),
        ("residual", PX, "blocks.3"),
    ],
)
def test_the_last_maps_are_those_before_pooling(name, px, layer):
    network = build_network(name, n_classes=2, input_px=px, seed=0)
    assert find_last_maps(network, px) == layer
    assert find_layer(network, layer) == layer


@pytest.mark.slow
@pytest.mark.parametrize(("name", "px", "layer"), LIBRARIES)
def test_the_last_maps_of_libraries(name, px, layer):
    assert find_last_maps(build_network(name, n_classes=2, input_px=px, seed=0), px) == layer


def test_grad_cam_of_any_layer_and_not_without_maps():
    classifier = make_classifier(make_network("cancernet"))
    named = explain_patches(classifier, draw_patches(2), method="grad_cam", layer="body.conv1_1", engine=CPU)
    assert named.layer == "body.conv1_1" and named.maps.shape == (2, 1, PX, PX)
    for layer, fact, reason in (
        ("body.dense", "(256,)", "network"),
        ("body.conv9", "body.conv3_3", "name"),
    ):
        with refuses(RecipeError, f"'{layer}'", fact, reason=reason):
            explain_patches(classifier, draw_patches(1), method="grad_cam", layer=layer, engine=CPU)
    with refuses(RecipeError, "integrated_gradients"):
        explain_patches(make_classifier(make_linear(), input_px=8), draw_patches(1, 8), method="grad_cam")


# --- integrated gradients


def test_integrated_gradients_of_a_linear_network_are_weight_times_way():
    network, patches = make_linear(), draw_patches(2, 8)
    found = METHODS["integrated_gradients"].compute(ask(network, patches))
    weight = network[1].weight[1].detach().reshape(3, 8, 8)
    wanted = (weight * (ask(network, patches).batch - 1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_integrated_gradients_add_up_to_the_difference_from_white():
    network = make_network("residual")
    patches = np.concatenate([draw_patches(2), np.full((1, PX, PX, 3), 255, np.uint8)])
    asked = ask(network, patches)
    found = METHODS["integrated_gradients"].compute(asked)
    with torch.no_grad():
        difference = asked.scores(asked.batch) - asked.scores(torch.ones_like(asked.batch))
    gap = (found.sum(dim=(1, 2, 3)) - difference).abs()
    assert (gap <= COMPLETE_WITHIN * difference.abs().clamp(min=1)).all()
    assert difference[:2].abs().min() > 0.01 and found[2].abs().max() == 0


def test_steps_are_doubled_until_it_adds_up_and_it_is_reported_where_it_does_not(monkeypatch, caplog):
    class Step(nn.Module):  # its gradient is nearly everywhere 0: the hardest to integrate
        def forward(self, batch):
            score = 100 * torch.sigmoid(400 * (batch.mean(dim=(1, 2, 3)) - 0.83))
            return torch.stack([torch.zeros_like(score), score], dim=1)

    taken = []

    def count(asked, n_steps):
        taken.append((n_steps, len(asked.batch)))
        return integrate_gradients(asked, n_steps)

    monkeypatch.setattr(gradients, "integrate_gradients", count)
    patches = np.concatenate([np.full((1, 4, 4, 3), 0, np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)])
    with caplog.at_level("INFO", logger="biopsy"):
        found = METHODS["integrated_gradients"].compute(ask(Step(), patches))
    assert taken[0] == (32, 2) and taken[1] == (64, 1), "what adds up is not asked again"
    assert float(found[0].sum()) == pytest.approx(-100, rel=COMPLETE_WITHIN) and not caplog.records
    monkeypatch.setattr(gradients, "MAX_STEPS", 32)
    with caplog.at_level("INFO", logger="biopsy"):
        METHODS["integrated_gradients"].compute(ask(Step(), patches))
    assert "of 1 patches miss the difference of scores by up to" in caplog.text


def test_white_is_what_the_preprocessing_makes_of_it():
    network = make_linear()
    classifier = make_classifier(
        network, input_px=8, channel_order="bgr", mean=(0.5, 0.1, 0), std=(0.2, 1, 1)
    )
    white = explain_patches(
        classifier, np.full((1, 8, 8, 3), 255, np.uint8), method="integrated_gradients", engine=CPU
    )
    np.testing.assert_allclose(white.maps, 0, atol=1e-6)


# --- occlusion


def test_occlusion_of_a_linear_network_is_the_weight_under_the_window():
    network, patches = make_linear(), draw_patches(1, 8)
    asked = ask(network, patches)
    hidden = asked.batch.mean(dim=(2, 3), keepdim=True)
    found = occlude(asked, hidden, 2, 2)
    weight = network[1].weight[1].detach().reshape(3, 8, 8)
    lost = (weight * (asked.batch - hidden)[0]).sum(dim=0).reshape(4, 2, 4, 2).sum(dim=(1, 3))
    np.testing.assert_allclose(
        found[0, 0].numpy(), lost.numpy().repeat(2, axis=0).repeat(2, axis=1), rtol=1e-3, atol=1e-4
    )


def test_occlusion_finds_the_corner_that_counts():
    class Corner(nn.Module):
        def forward(self, batch):
            score = -batch[:, :, :8, :8].mean(dim=(1, 2, 3))  # dark in the upper left
            return torch.stack([torch.zeros_like(score), score], dim=1)

    patch = np.full((1, 48, 48, 3), 200, np.uint8)
    patch[0, :8, :8] = 20
    patch[0, 30:, 30:] = 20
    found = METHODS["occlusion"].compute(ask(Corner(), patch))[0, 0].numpy()
    assert found[:6, :6].min() > 0 and np.abs(found[12:]).max() < 1e-6 and np.abs(found[:, 12:]).max() < 1e-6


# --- captum


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
def test_grad_cam_is_captums(name):
    captum = pytest.importorskip("captum.attr")
    network, patches = make_network(name), draw_patches(3)
    layer = find_last_maps(network, PX)
    for index in (0, 1):
        asked = ask(network, patches, index, layer)
        theirs = captum.LayerGradCam(network, network.get_submodule(layer)).attribute(
            asked.batch, target=index, relu_attributions=True
        )
        torch.testing.assert_close(METHODS["grad_cam"].compute(asked), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
def test_integrated_gradients_are_captums(name):
    captum = pytest.importorskip("captum.attr")
    network, patches = make_network(name), draw_patches(2)
    asked = ask(network, patches, blank=0.9)
    theirs = captum.IntegratedGradients(network).attribute(
        asked.batch, torch.full_like(asked.batch, 0.9), target=1, n_steps=20, method="gausslegendre"
    )
    torch.testing.assert_close(integrate_gradients(asked, 20), theirs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "window", "stride"), [("cancernet", 12, 7), ("residual", 10, 5), ("vgg16", 25, 13)]
)
def test_occlusion_is_captums(name, window, stride):
    captum = pytest.importorskip("captum.attr")
    network, patches = make_network(name), draw_patches(2)
    asked = ask(
        network.double(), patches
    )  # captum asks in other batches, and single precision rounds by them
    asked = replace(asked, batch=asked.batch.double())
    hidden = asked.batch.mean(dim=(2, 3), keepdim=True).expand_as(asked.batch)
    theirs = captum.Occlusion(network).attribute(
        asked.batch,
        sliding_window_shapes=(3, window, window),
        strides=(3, stride, stride),
        baselines=hidden,
        target=1,
    )
    ours = occlude(asked, hidden, window, stride)
    torch.testing.assert_close(ours, theirs[:, :1], rtol=1e-5, atol=1e-5, check_dtype=False)
