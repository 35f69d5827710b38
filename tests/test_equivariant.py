"""Networks equivariant to the symmetries of the square: exact in each layer, trained, stored and exported."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.exporting.bundles import measure_parity, write_networks
from biopsy.models.classifier import Classifier
from biopsy.models.networks import build_network, count_parameters
from biopsy.models.networks.equivariant import SymmetricBatchNorm2d, SymmetricConv2d, SymmetricPool
from biopsy.models.networks.wrapped import symmetric_views
from host_models import draw, make_classifier
from refusals import refuses

NAME = "residual_p4m"


def turn(images, symmetry):
    """One of the eight symmetries of images ``(..., H, W)``."""
    return torch.rot90(images.flip(-1) if symmetry >= 4 else images, symmetry % 4, dims=(-2, -1))


def order_after(symmetry):
    """Which of the eight maps stands at each place after a symmetry of the input."""
    corners = torch.arange(4.0).reshape(2, 2)
    views = [turn(corners, other) for other in range(8)]
    return [
        next(old for old in range(8) if torch.equal(turn(turn(corners, old), symmetry), views[place]))
        for place in range(8)
    ]


def turn_maps(maps, symmetry):
    """The same symmetry of ``(B, 8 * C, H, W)``: maps are turned and exchange places."""
    moved = maps.unflatten(1, (8, -1))[:, order_after(symmetry)].flatten(1, 2)
    return turn(moved, symmetry)


def settled(**params):
    """A network with statistics of data, and blocks that are not their shortcuts."""
    network = build_network(NAME, n_classes=2, **{"input_px": 50, "seed": 1} | params)
    px = params.get("input_px", 50)
    generator = torch.Generator().manual_seed(0)
    for block in network.blocks:
        nn.init.constant_(block.norm2.weight, 0.7)
    for _ in range(6):
        network(torch.rand(4, 3, px, px, generator=generator))
    return network.eval()


def layers():
    torch.manual_seed(0)
    yield "lifting", SymmetricConv2d(3, 2, 3, padding=1, from_image=True), 9
    yield "lifting, even", SymmetricConv2d(3, 2, 4, 2, 1, from_image=True), 10
    yield "group", SymmetricConv2d(3, 2, 3, padding=1), 10
    yield "group, halved", SymmetricConv2d(3, 2, 3, 2, 1), 9
    yield "group, even", SymmetricConv2d(3, 2, 4, 2, 1), 10
    yield "pointwise", SymmetricConv2d(3, 2, 1), 6
    yield "norm", SymmetricBatchNorm2d(3), 6
    yield "norm in use", SymmetricBatchNorm2d(3).eval(), 6


@pytest.mark.parametrize("symmetry", range(8))
@pytest.mark.parametrize(("layer", "px"), [pytest.param(x, px, id=name) for name, x, px in layers()])
def test_a_layer_turns_with_its_input(layer, px, symmetry):
    from_image = getattr(layer, "n_orders", 8) == 1
    x = torch.rand(2, 3 if from_image else 24, px, px, generator=torch.Generator().manual_seed(1))
    if isinstance(layer, SymmetricBatchNorm2d):
        nn.init.uniform_(layer.weight), nn.init.uniform_(layer.bias)
    with torch.no_grad():
        moved = layer(turn(x, symmetry) if from_image else turn_maps(x, symmetry))
        wanted = turn_maps(layer(x), symmetry)
    assert wanted.std() > 0.05
    torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("input_px", [16, 48, 50, 53])
def test_logits_are_invariant(input_px):
    network = settled(input_px=input_px)
    patches = torch.rand(4, 3, input_px, input_px, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits = network(symmetric_views(patches)).unflatten(0, (8, 4))
        features = network.features(symmetric_views(patches)).unflatten(0, (8, 4))
    assert (logits - logits[0]).abs().max() < 1e-5
    assert (features - features[0]).abs().max() < 1e-5 and logits.std() > 1e-2


def test_logits_are_invariant_in_training():
    network = settled().train()
    patches = torch.rand(4, 3, 50, 50)
    wanted, found = network(patches), network(turn(patches, 5))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_order_and_place_within_a_filter_matter():
    torch.manual_seed(0)
    layer, x = SymmetricConv2d(2, 2, 3, padding=1), torch.rand(1, 16, 6, 6)
    rolled = x.unflatten(1, (8, 2)).roll(1, dims=1).flatten(1, 2)
    assert (layer(x).mean((2, 3)) - layer(rolled).mean((2, 3))).abs().max() > 1e-3
    filters = layer.filters().detach()
    assert filters.shape == (16, 16, 3, 3)
    assert torch.equal(filters[:2], layer.weight)  # the first symmetry changes nothing
    for row in range(16):
        assert torch.equal(filters[row].flatten().sort()[0], layer.weight[row % 2].flatten().sort()[0])


@pytest.mark.parametrize("from_image", [True, False])
def test_gradients_are_those_of_the_ordinary_convolution(from_image):
    torch.manual_seed(0)
    layer = SymmetricConv2d(2, 3, 3, padding=1, from_image=from_image).double()
    x = torch.rand(2, layer.in_channels, 5, 5, dtype=torch.float64)
    own = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    pytorchs = torch.autograd.grad(layer.eval()(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(own, pytorchs)
    layer.train()

    def output(weight):
        return torch.func.functional_call(layer, {"weight": weight}, x)

    assert torch.autograd.gradcheck(output, layer.weight)


def test_batch_normalisation_is_that_of_the_eight_maps_together():
    norm, x = SymmetricBatchNorm2d(3), torch.rand(4, 24, 5, 6) * torch.arange(1, 4).repeat(8).view(-1, 1, 1)
    maps = x.unflatten(1, (8, 3))
    mean = maps.mean((0, 1, 3, 4)).view(3, 1, 1)
    std = (maps.var((0, 1, 3, 4), correction=0).view(3, 1, 1) + norm.eps).sqrt()
    wanted = norm(x)
    first = {name: tensor.clone() for name, tensor in norm.named_buffers()}
    torch.testing.assert_close(wanted, ((maps - mean) / std).flatten(1, 2), atol=1e-5, rtol=1e-4)
    fast = SymmetricBatchNorm2d(3)
    found = fast(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(fast, name), first[name], atol=1e-6, rtol=1e-4)


def test_the_pool_is_a_mean_over_pixels_and_symmetries():
    x = torch.rand(2, 24, 4, 5)
    wanted = x.numpy().reshape(2, 8, 3, 20).mean(axis=(1, 3))
    np.testing.assert_allclose(SymmetricPool()(x), wanted, atol=1e-6)


def test_weights_are_an_eighth_at_the_same_width():
    def kernels(name, base):
        network = build_network(name, n_classes=2, input_px=33, base_channels=base)
        return sum(w.numel() for key, w in network.named_parameters() if "conv" in key)

    assert 8 * kernels(NAME, 24) == kernels("residual", 24)
    total, trainable = count_parameters(build_network(NAME, n_classes=2, input_px=50))
    assert total - trainable == 2 * (3 * 3 + 3 * (6 + 12 + 15))  # means and variances, one a channel


@pytest.mark.slow
def test_a_stored_classifier_and_its_exports_give_the_same_probabilities(tmp_path):
    network = settled()
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    other = build_network(NAME, n_classes=2, input_px=50)
    other.load_state_dict(load_file(tmp_path / "network.safetensors"))
    patches = torch.rand(4, 3, 50, 50)
    assert torch.equal(network(patches), other.eval()(patches))
    classifier = make_classifier(NAME, patch_px=50, input_px=50)
    classifier.base_network.load_state_dict(network.state_dict())
    classifier.save(tmp_path / "classifier")
    stored = Classifier.load(tmp_path / "classifier")
    folder = tmp_path / "networks"
    folder.mkdir()
    write_networks(stored, folder)
    parity = measure_parity(stored, folder, draw(20, 50))
    assert all(known["probs"] < 1e-5 for known in parity["largest_difference"].values())
    assert len(parity["largest_difference"]) == 6  # of PyTorch, TorchScript, ONNX, OpenVINO


@pytest.mark.parametrize(
    ("params", "facts"),
    [
        ({"input_px": (64, 48)}, ["64x48"]),
        ({"input_px": 15}, ["input_px=15"]),
        ({"base_channels": 20}, ["base_channels=20", "8"]),
        ({"base_channels": 0}, ["base_channels=0"]),
    ],
)
def test_inputs_without_the_eight_symmetries_are_refused(params, facts):
    with refuses(RecipeError, NAME, *facts):
        build_network(NAME, n_classes=2, **{"input_px": 50} | params)
