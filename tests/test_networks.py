import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from biopsy.errors import RecipeError
from biopsy.learning.networks import (
    build_network,
    count_parameters,
    describe,
    list_networks,
    network_parameters,
    register_network,
    registry,
)
from biopsy.learning.networks.layers import BatchNorm1d, BatchNorm2d, Dropout, FlattenChannelsLast

NAMES = list_networks()


def test_the_shipped_networks_are_listed():
    assert {"cancernet", "residual"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("input_px", "n_classes"), [(48, 2), (50, 3)])
def test_shapes(name, input_px, n_classes):
    network = build_network(name, n_classes=n_classes, input_px=input_px, seed=0).eval()
    patches = torch.rand(3, 3, input_px, input_px)
    features = network.features(patches)
    assert network(patches).shape == (3, n_classes)
    assert features.ndim == 2 and len(features) == 3
    assert torch.equal(network.head(features), network(patches))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_network_gives_the_same_logits(name, tmp_path):
    network = build_network(name, n_classes=2, input_px=48, seed=1)
    network(torch.rand(8, 3, 48, 48))  # moves the running statistics
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    other = build_network(name, n_classes=2, input_px=48)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    patches = torch.rand(4, 3, 48, 48)
    assert torch.equal(network.eval()(patches), other.eval()(patches))


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_network_and_leaves_global_randomness_alone(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (
        build_network(name, n_classes=2, input_px=48, seed=s).state_dict() for s in (7, 7, 8)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_a_network_learns_eight_patches(name):
    torch.manual_seed(0)
    network = build_network(name, n_classes=2, input_px=32, seed=0).train()
    patches, target = torch.rand(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(patches), target).backward()
        optimiser.step()
    assert nn.functional.cross_entropy(network(patches), target) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_described_are_the_layers_there_are(name):
    network = build_network(name, n_classes=2, input_px=48, seed=0)
    rows = describe(network, 48)
    assert sum(row.parameters for row in rows) == count_parameters(network)[0]
    assert rows[-1].output_shape == (2,)
    assert network.training and not any(module._forward_hooks for module in network.modules())


def test_cancernet_has_the_parameters_keras_counts():
    # keras: model.summary() of the post's network, 48x48x3 and two classes
    assert count_parameters(build_network("cancernet", n_classes=2, input_px=48)) == (1_235_133, 1_233_533)


def test_cancernet_layers_in_the_posts_order():
    rows = describe(build_network("cancernet", n_classes=2, input_px=48), 48)
    assert [row.type for row in rows[:5]] == [
        "SeparableConv2d",
        "ReLU",
        "BatchNorm2d",
        "MaxPool2d",
        "Dropout",
    ]
    assert [row.output_shape for row in rows if row.type == "MaxPool2d"] == [
        (32, 24, 24),
        (64, 12, 12),
        (128, 6, 6),
    ]
    assert [row.parameters for row in rows if row.type == "SeparableConv2d"] == [
        155,
        2400,
        4736,
        8896,
        17664,
        17664,
    ]


def test_cancernet_takes_width_height_depth_and_classes():
    network = build_network("cancernet", n_classes=4, input_px=(64, 40), channels=1)
    assert network(torch.rand(2, 1, 40, 64)).shape == (2, 4)
    assert describe(network, (64, 40))[0].output_shape == (32, 40, 64)


def test_frozen_parameters_are_not_trainable():
    network = build_network("residual", n_classes=2, input_px=48)
    network.stem.requires_grad_(False)
    total, trainable = count_parameters(network)
    statistics = sum(b.numel() for b in network.buffers() if b.is_floating_point())
    assert total - trainable == sum(p.numel() for p in network.stem.parameters()) + statistics


def test_initial_weights_are_glorot_uniform():
    network = build_network("cancernet", n_classes=2, input_px=48, seed=3)
    weight, limit = network.body.dense.weight.detach(), (6 / (4608 + 256)) ** 0.5
    assert weight.abs().max() <= limit
    assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)
    depthwise = network.body.conv3_1.depthwise.weight  # Keras: fans 9 * 64 in, 9 out
    assert 0.95 < depthwise.abs().max() / (6 / (9 * 65)) ** 0.5 <= 1
    assert not any(p.detach().any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_batch_normalisation_is_keras_s():
    norm = build_network("cancernet", n_classes=2, input_px=48).body.norm1_1
    assert (norm.eps, norm.momentum) == (1e-3, 0.01)


def test_flattening_is_in_keras_s_order():
    patches = torch.rand(2, 3, 4, 5)
    assert np.array_equal(
        FlattenChannelsLast()(patches), patches.numpy().transpose(0, 2, 3, 1).reshape(2, -1)
    )


def test_batch_normalisation_of_images_is_pytorchs_in_double_precision():
    torch.manual_seed(0)
    x = (torch.randn(8, 5, 6, 7) * torch.linspace(0.1, 3, 5).view(5, 1, 1) + 2).relu()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(8, 5, 6, 7)
    ours, theirs = BatchNorm2d(5, eps=1e-3), nn.BatchNorm2d(5, eps=1e-3).double()
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2), ours.bias.uniform_()
    theirs.load_state_dict(ours.state_dict())
    exact = x.detach().double().requires_grad_()
    got, wanted = ours(x), theirs(exact)
    got.backward(grad)
    wanted.backward(grad.double())
    assert got.is_contiguous(memory_format=torch.channels_last)
    pairs = [(got, wanted), (x.grad, exact.grad), (ours.weight.grad, theirs.weight.grad)]
    pairs += [(ours.bias.grad, theirs.bias.grad), (ours.running_mean, theirs.running_mean)]
    for a, b in [*pairs, (ours.running_var, theirs.running_var)]:
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=2e-5)
    x = exact.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: BatchNorm2d(5, eps=1e-3).double()(x), x)


def test_channels_last_training_is_exact_to_float32():
    network = build_network("cancernet", n_classes=2, input_px=48, seed=0, stage_dropout=0, dense_dropout=0)
    patches = torch.rand(32, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    got = network.features(patches.contiguous(memory_format=torch.channels_last))
    wanted = network.double().features(patches.double())
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_batch_normalisation_of_features_keeps_the_batchs_own_variance():
    x = torch.tensor([[1.0], [3.0], [8.0]])
    norm = BatchNorm1d(1, momentum=0.1)
    norm(x)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * x.var(correction=0).item())
    assert norm.running_mean.item() == pytest.approx(0.4)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(64, 1001), (16, 7, 30, 30)])
def test_dropout_drops_its_share_and_keeps_the_mean(p, shape):
    torch.manual_seed(0)
    x = torch.ones(shape)
    y = Dropout(p).train()(x)
    assert (y == 0).float().mean() == pytest.approx(p, abs=0.01)
    assert y.unique().tolist() == [0, pytest.approx(1 / (1 - p))]
    assert not torch.equal(y, Dropout(p).train()(x))
    assert torch.equal(Dropout(p).eval()(x), x)


def test_dropout_follows_the_global_seed_and_passes_gradients():
    x = torch.rand(8, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(Dropout(0.25).train()(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    results[0].sum().backward()
    assert torch.allclose(x.grad * x, results[0])


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'cancernet'"):
        build_network("cancer-net", n_classes=2, input_px=48)
    with pytest.raises(RecipeError, match="has no parameter 'droput'; did you mean 'dropout'"):
        build_network("residual", n_classes=2, input_px=48, droput=0.1)
    with pytest.raises(RecipeError, match="no network is called 'vgg'"):
        network_parameters("vgg")


@pytest.mark.parametrize(("name", "input_px"), [("cancernet", 7), ("cancernet", (48, 4)), ("residual", 15)])
def test_an_input_too_small_is_refused(name, input_px):
    with pytest.raises(RecipeError, match="at least"):
        build_network(name, n_classes=2, input_px=input_px)


def test_a_registered_network_is_built_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @register_network
    def tiny(*, n_classes, input_px, width=3):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * input_px**2, n_classes * width))

    assert network_parameters("tiny") == {"width": 3}
    assert build_network("tiny", n_classes=2, input_px=4, width=5)(torch.rand(1, 3, 4, 4)).shape == (1, 10)
