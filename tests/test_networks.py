import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.models.networks import (
    build_network,
    count_parameters,
    describe,
    list_networks,
    network_parameters,
    register_network,
)
from biopsy.models.networks.layers import BatchNorm1d, BatchNorm2d, Dropout, FlattenChannelsLast, OneLogit
from biopsy.models.weight_files import fill_network
from refusals import refuses

NAMES = list_networks()


def test_the_shipped_networks_are_listed():
    assert {"baruah", "cancernet", "dabydeen_hedges", "residual", "vgg16"} <= set(NAMES)


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


@pytest.mark.parametrize(
    ("name", "params", "lr"),
    [
        ("baruah", {"dropout": 0.0}, 1e-3),
        ("cancernet", {}, 3e-3),
        ("dabydeen_hedges", {"dropout": 0.0, "widths": [16, 32, 32]}, 3e-3),
        ("residual", {}, 3e-3),
        pytest.param("residual_p4m", {}, 3e-3, marks=pytest.mark.slow),
    ],
)
def test_a_network_learns_eight_patches(name, params, lr):
    torch.manual_seed(0)
    network = build_network(name, n_classes=2, input_px=32, seed=0, **params).train()
    patches, target = torch.rand(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    patches[target == 1] *= 0.7
    optimiser = torch.optim.Adam(network.parameters(), lr)
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


@pytest.mark.parametrize(
    ("name", "input_px", "total", "trainable"),
    [
        ("cancernet", 48, 1_235_133, 1_233_533),
        ("baruah", 50, 2_010_946, 2_010_946),
        ("vgg16", 96, 15_894_849, 15_894_849),
        ("dabydeen_hedges", 50, 526_786, 526_786),
    ],
)
def test_the_posts_networks_have_the_parameters_keras_counts(name, input_px, total, trainable):
    # keras: model.summary() of the post's network with two classes
    assert count_parameters(build_network(name, n_classes=2, input_px=input_px)) == (total, trainable)


def test_vgg16_has_the_layers_keras_names():
    network = build_network("vgg16", n_classes=2, input_px=96)
    rows = {row.name: row for row in describe(network, 96)}
    convolutions = [name for name, row in rows.items() if row.type == "Conv2d"]
    blocks = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
    assert convolutions == [f"body.block{b}_conv{i + 1}" for b, n in blocks.items() for i in range(n)]
    assert (
        sum(rows[name].parameters for name in convolutions) == 14_714_688
    )  # keras: VGG16(include_top=False)
    assert rows["body.flatten"].output_shape == (4608,)


def test_one_logit_is_a_sigmoid():
    head = OneLogit(5)
    features, target = torch.rand(6, 5), torch.tensor([0, 1, 1, 0, 1, 0])
    z = nn.functional.linear(features, head.weight, head.bias)[:, 0]
    logits = head(features)
    assert torch.allclose(logits.softmax(1)[:, 1], z.sigmoid())
    wanted = nn.functional.binary_cross_entropy_with_logits(z, target.float())
    assert torch.allclose(nn.functional.cross_entropy(logits, target), wanted)


def test_settings_that_the_authors_do_not_state_are_parameters():
    network = build_network(
        "baruah", n_classes=2, input_px=50, filters=8, n_convolutions=3, n_dense=1, dense=16
    )
    types = [row.type for row in describe(network, 50)]
    assert (types.count("Conv2d"), types.count("Linear"), types.count("Dropout")) == (3, 2, 1)
    assert network(torch.rand(2, 3, 50, 50)).shape == (2, 2)
    counts = [
        [row.type for row in describe(build_network("baruah", n_classes=2, input_px=50, **params), 50)]
        for params in ({}, {"dropout_last": True}, {"dropout_last": True, "n_dense": 3})
    ]
    assert [types.count("Dropout") for types in counts] == [2, 3, 4]
    assert counts[1][-2:] == ["Dropout", "Linear"] and counts[0][-2] == "ReLU"
    three = build_network("dabydeen_hedges", n_classes=2, input_px=50, widths=[64, 128, 128], dropout=0.0)
    assert [row.output_shape[0] for row in describe(three, 50) if row.type == "MaxPool2d"] == [64, 128, 128]
    with refuses(RecipeError, "n_convolutions=1", "n_dense=2"):
        build_network("baruah", n_classes=2, input_px=50, n_convolutions=1)
    with refuses(RecipeError, "stage"):
        build_network("dabydeen_hedges", n_classes=2, input_px=50, widths=[])


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
    x = exact.detach()[:3, :, :2, :3].contiguous(memory_format=torch.channels_last).requires_grad_()
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
    with refuses(RecipeError, "'cancernet'"):
        build_network("cancer-net", n_classes=2, input_px=48)
    with refuses(RecipeError, "'droput'", "'dropout'"):
        build_network("residual", n_classes=2, input_px=48, droput=0.1)
    with refuses(RecipeError, "'vgg'", "'vgg16'"):
        network_parameters("vgg")


LIBRARY = ["torchvision:squeezenet1_1", "torchvision:resnet18", "timm:test_resnet", "timm:test_vit"]


@pytest.mark.parametrize("name", LIBRARY)
def test_networks_of_libraries_by_name(name):
    network = build_network(name, n_classes=3, input_px=64, seed=0).eval()
    patches = torch.rand(2, 3, 64, 64)
    assert network(patches).shape == (2, 3)
    assert network.features(patches).shape[0] == 2 and network.features(patches).ndim == 2
    rows = describe(network, 64)
    assert rows[-1].output_shape == (3,) and len(rows) < 40
    same, other = (build_network(name, n_classes=3, input_px=64, seed=s).state_dict() for s in (0, 1))
    assert all(torch.equal(value, same[key]) for key, value in network.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in same.items())


def test_squeezenet_is_torchvisions():
    network = build_network("torchvision:squeezenet1_1", n_classes=2, input_px=64, seed=0).eval()
    theirs = torchvision.models.squeezenet1_1(num_classes=2).eval()
    theirs.features.load_state_dict(network.body.features.state_dict())
    theirs.classifier.load_state_dict(nn.Sequential(*network.head[:-1]).state_dict())
    patches = torch.rand(3, 3, 64, 64)
    assert torch.equal(network(patches), theirs(patches))
    assert torch.equal(network.features(patches), theirs.features(patches).mean((2, 3)))


def test_the_first_fire_modules_of_squeezenet_are_torchvisions(tmp_path):
    whole = torchvision.models.squeezenet1_1(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "squeezenet.pth")
    name = "torchvision:squeezenet1_1"
    network = build_network(name, n_classes=3, input_px=64, seed=0, n_fire=6).eval()
    assert not fill_network(network, name, tmp_path / "squeezenet.pth")
    patches = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = whole.features[:11](patches).mean(dim=(2, 3))
        assert torch.allclose(network.features(patches), wanted, atol=1e-6)
        assert torch.allclose(network.head(network.features(patches)), network(patches))
    assert sum(parameter.numel() for parameter in network.body.parameters()) == 336_320


@pytest.mark.parametrize(
    ("name", "n_fire"), [("squeezenet1_1", 0), ("squeezenet1_1", 9), ("squeezenet1_1", 2.5), ("resnet18", 2)]
)
def test_fire_modules_that_a_network_does_not_have_are_refused(name, n_fire):
    with pytest.raises(RecipeError):
        build_network(f"torchvision:{name}", n_classes=2, input_px=64, n_fire=n_fire)


def test_resnet_with_its_last_layer_apart_is_torchvisions():
    network = build_network("torchvision:resnet18", n_classes=2, input_px=64, seed=0).eval()
    theirs = torchvision.models.resnet18(num_classes=2).eval()
    states = network.body.state_dict() | {f"fc.{key}": w for key, w in network.head.state_dict().items()}
    theirs.load_state_dict(states)
    patches = torch.rand(3, 3, 64, 64)
    assert torch.equal(network(patches), theirs(patches))


def test_a_librarys_vit_takes_another_size():
    network = build_network("timm:test_vit", n_classes=2, input_px=(96, 64), seed=0).eval()
    assert network(torch.rand(1, 3, 64, 96)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "params", "facts"),
    [
        ("timm:resnet81", {}, ["timm", "'resnet81'", "resnet18"]),
        ("timm:resnet18.a1_in2k", {}, ["'resnet18.a1_in2k'", "resnet18.a1_in1k"]),
        ("torchvision:squeezenet", {}, ["'squeezenet'", "squeezenet1_1, squeezenet1_0"]),
        ("timm:zzzzzz", {}, ["timm", "'zzzzzz'"]),
        ("tim:resnet18", {}, ["'tim'", "'timm'"]),
        ("timm:test_resnet", {"pretrained": True}, ["timm:test_resnet", "'pretrained'"]),
        ("torchvision:resnet18", {"dropout": 0.1}, ["torchvision:resnet18", "'dropout'"]),
        ("torchvision:vit_b_32", {}, ["torchvision:vit_b_32", "input_px=50"]),
    ],
)
def test_names_unknown_to_a_library_are_refused(name, params, facts):
    with refuses(RecipeError, *facts):
        build_network(name, n_classes=2, input_px=50, **params)


@pytest.mark.parametrize(
    ("name", "input_px"),
    [
        ("cancernet", 7),
        ("cancernet", (48, 4)),
        ("residual", 15),
        ("baruah", 25),
        ("dabydeen_hedges", 31),
        ("vgg16", 31),
    ],
)
def test_an_input_too_small_is_refused(name, input_px):
    with refuses(RecipeError, name, f"input_px={input_px}"):
        build_network(name, n_classes=2, input_px=input_px)
    least = {"cancernet": 8, "residual": 16, "baruah": 26, "dabydeen_hedges": 32, "vgg16": 32}[name]
    assert build_network(name, n_classes=2, input_px=least).eval()(torch.rand(1, 3, least, least)).shape == (
        1,
        2,
    )


def test_a_registered_network_is_built_by_name(own_registrations):
    @register_network
    def tiny(*, n_classes, input_px, width=3):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * input_px**2, n_classes * width))

    assert network_parameters("tiny") == {"width": 3}
    assert build_network("tiny", n_classes=2, input_px=4, width=5)(torch.rand(1, 3, 4, 4)).shape == (1, 10)
