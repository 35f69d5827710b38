"""Stages: in sequence they are the network, and frozen ones are not trained."""

import pytest
import torch
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.models.networks import build_network, count_parameters, list_networks
from biopsy.models.networks.stages import freeze, list_stages, split_frozen
from refusals import refuses

ROWS = [*list_networks(), "torchvision:squeezenet1_1", "torchvision:resnet18", "timm:test_resnet"]


def build(name):
    return build_network(name, n_classes=2, input_px=64, seed=0)


@pytest.mark.parametrize("name", ROWS)
def test_the_frozen_and_the_trainable_part_are_the_network(name):
    network = build(name).eval()
    names = list_stages(network)
    assert names[-1] == "head" and len(set(names)) == len(names) >= 4
    patches = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits = network(patches)
        for trainable in (names[1], names[-2], "head"):
            freeze(network, trainable)
            first, rest = split_frozen(network)
            assert torch.allclose(rest(first(patches)), logits, atol=1e-6)
            assert not any(weight.requires_grad for weight in first.parameters())
            assert all(weight.requires_grad for weight in rest.parameters())
            assert any(True for _ in first.parameters())


@pytest.mark.parametrize("name", [*ROWS, "timm:test_vit"])
def test_what_is_frozen_does_not_move(name):
    torch.manual_seed(0)
    network = build(name)
    trainable = list_stages(network)[2]
    freeze(network, trainable)
    network.train()
    stages = network.stages()
    before = [{key: value.clone() for key, value in stage.state_dict().items()} for _, stage in stages]
    optimiser = torch.optim.SGD([w for w in network.parameters() if w.requires_grad], 0.1)
    nn.functional.cross_entropy(network(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 0, 1])).backward()
    optimiser.step()
    moved = [
        any(not torch.equal(value, old[key]) for key, value in stage.state_dict().items())
        for (_, stage), old in zip(stages, before, strict=True)
    ]
    assert moved == [False, False] + [True] * (len(stages) - 2)


def test_frozen_normalisations_and_dropouts_stay_in_evaluation_mode():
    network = build("cancernet")
    freeze(network, "stage3")
    network.train()
    assert not network.body.norm2_1.training and not network.body.drop2.training
    assert network.body.norm3_1.training and network.drop.training and network.training
    patches = torch.rand(4, 3, 64, 64)
    first, _ = split_frozen(network)
    assert torch.equal(first(patches), first(patches))
    freeze(network, "all")
    assert network.body.norm2_1.training and network.body.drop2.training
    assert all(weight.requires_grad for weight in network.parameters())
    assert split_frozen(network) is None


def test_vgg16_from_block_5_trains_what_the_post_trains():
    network = build_network("vgg16", n_classes=2, input_px=96)
    freeze(network, "block5")
    total, trainable = count_parameters(network)
    assert (trainable, total - trainable) == (8_259_585, 7_635_264)
    assert list_stages(network) == ["block1", "block2", "block3", "block4", "block5", "head"]


def test_a_network_that_is_no_row_is_cut_before_its_head_only():
    network = build("timm:test_vit").eval()
    freeze(network, "blocks")  # the first of blocks.0, blocks.1 ...
    assert network.n_frozen == 1 and not network.body.pos_embed.requires_grad
    assert split_frozen(network) is None
    freeze(network, "head")
    first, rest = split_frozen(network)
    patches = torch.rand(2, 3, 64, 64)
    assert torch.equal(rest(first(patches)), network(patches))


def test_a_stage_named_for_several_is_the_first_of_them():
    network = build("torchvision:resnet18")
    freeze(network, "layer4")
    assert list_stages(network)[network.n_frozen] == "layer4.0"


def test_the_modes_and_the_random_state_are_left_alone():
    network = build("torchvision:resnet18").train()
    freeze(network, "layer4")
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert split_frozen(network) is not None
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("trainable", ["block6", "", "dense"])
def test_an_unknown_stage_is_refused_with_those_there_are(trainable):
    with refuses(RecipeError, "block1, block2, block3, block4, block5, head"):
        freeze(build("vgg16"), trainable)


def test_a_network_without_stages_is_trained_whole():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    freeze(network, "all")
    assert list_stages(network) == [] and split_frozen(network) is None
    with refuses(RecipeError, "'all'"):
        freeze(network, "head")
