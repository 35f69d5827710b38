"""Adapters of vision transformers: zero at first, alone in training, merged into the classifier."""

import copy
import re

import pytest
import torch
from torch import nn

import biopsy
from biopsy.core.errors import RecipeError
from biopsy.models.classifier import Classifier
from biopsy.models.networks import build_network
from biopsy.models.networks.lora import LoraLinear, add_lora, merge_lora
from biopsy.models.networks.stages import freeze, split_frozen
from biopsy.models.weights import make_network
from biopsy.recipes import load_recipe
from refusals import refuses
from test_encoders import TINY, register_tiny, save_weights
from tiny_runs import assert_same_run, interrupt_at, weights

TRAINED = ("model.lora_rank=4", "train.optimiser=adamw", "train.epochs=2", "train.lr=0.01")
SETTINGS = (*TRAINED, "train.batch_size=8", "train.precision=fp32", "preprocessing.feed=recipe")


@pytest.fixture
def tiny(own_registrations, tmp_path):
    """An encoder of two blocks with a file of weights; its settings in a recipe."""
    encoder = register_tiny(arguments=TINY | {"depth": 2})
    path = save_weights(encoder, tmp_path / "tiny.safetensors", input_px=32)
    return (f"model.name={encoder.tag}", f"model.weights={path}", "preprocessing.input_px=32", *SETTINGS)


def make_adapted(rank=4, *, up=0.0, name="vit_tiny_patch16_224"):
    """Return a network and a copy with adapters, whose second factor is random of a given size."""
    network = build_network(f"timm:{name}", n_classes=3, input_px=32, seed=0).eval()
    for parameter, weight in network.named_parameters():
        if "gamma" in parameter:  # DINOv3's layer scales, of 1e-5 at first
            nn.init.ones_(weight)
    adapted = copy.deepcopy(network)
    freeze(adapted, "head")
    add_lora(adapted, rank, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted.modules():
        if isinstance(layer, LoraLinear):
            nn.init.normal_(layer.up, std=up, generator=generator)
    return network, adapted.eval()


def count_linear(network):
    return sum(isinstance(layer, nn.Linear) for layer in network.modules())


def test_outputs_are_those_of_the_network_at_first():
    network, adapted = make_adapted()
    patches = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(network(patches), adapted(patches))


def test_only_adapters_and_head_are_trained():
    _, adapted = make_adapted(rank=4)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "bias", "down", "up"}
    assert {name for name in trained if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 2 * 4 * 12  # qkv, proj, fc1, fc2 in each of 12 blocks
    n_adapter = sum(w.numel() for n, w in adapted.named_parameters() if n.endswith((".down", ".up")))
    assert n_adapter == 12 * 4 * ((192 + 576) + (192 + 192) + 2 * (192 + 768))
    assert split_frozen(adapted) is None  # its outputs change: nothing can be cached


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_merged_layers_give_the_same_outputs_and_the_same_names(name):
    network, adapted = make_adapted(up=0.05, name=name)
    patches = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        before, frozen = adapted(patches), network(patches)
        merge_lora(adapted)
        after = adapted(patches)
    assert (before - frozen).abs().max() > 1e-2  # the adapters do something
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert adapted.state_dict().keys() == network.state_dict().keys()
    assert count_linear(adapted) == count_linear(network)


def test_every_adapter_is_reached_by_the_gradient(tiny):
    """A layer whose weight the network reads without calling it would not be adapted."""
    network, _ = make_network(load_recipe("probe", tiny), 2, seed=0)
    for layer in network.modules():
        if isinstance(layer, LoraLinear):
            nn.init.normal_(layer.up, std=0.1)
    network(torch.rand(2, 3, 32, 32)).square().sum().backward()
    weights = dict(network.named_parameters())
    assert all((weight.grad is not None) == weight.requires_grad for weight in weights.values())
    assert all(weight.grad.abs().max() > 0 for weight in weights.values() if weight.requires_grad)


def test_adapters_are_drawn_from_the_seed(tiny):
    recipe = load_recipe("probe", tiny)
    state = torch.get_rng_state()
    one, same, other = (make_network(recipe, 2, seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    down = next(name for name in one if name.endswith(".down"))
    assert torch.equal(one[down], same[down]) and not torch.equal(one[down], other[down])


def test_a_training_resumes_and_its_classifier_opens_without_adapters(tiny, make_pack, tmp_path):
    pack = make_pack(n_patients=6)
    options = {"overrides": tiny, "device": "cpu"}
    run = biopsy.train("probe", pack, out=tmp_path / "run", **options)
    assert [record["epoch"] for record in run.log()] == [1, 2]
    assert run.info["parameters"]["trainable"] == 2 * 4 * ((24 + 72) + (24 + 24) + 2 * (24 + 96)) + 2 * 25
    start, _ = make_network(load_recipe("probe", (*tiny, "model.lora_rank=0")), 2, seed=0)
    begun = start.state_dict()
    state = {name: value for name, value in weights(run).items() if not name.startswith("extra.")}
    assert state.keys() == begun.keys()
    changed = {name for name in state if not torch.equal(state[name].float(), begun[name])}
    adapted = {name for name in state if re.search(r"\.(attn|mlp)\.\w+\.weight$", name)}
    assert len(adapted) == 8 and changed == adapted | {"head.weight", "head.bias"}
    opened = Classifier.load(run.path / "classifier")
    assert not any(isinstance(layer, LoraLinear) for layer in opened.base_network.modules())

    with pytest.raises(KeyboardInterrupt):
        biopsy.train("probe", pack, out=tmp_path / "cut", on_epoch=interrupt_at(1), **options)
    assert_same_run(run, biopsy.train(resume=tmp_path / "cut", device="cpu"))


def test_an_encoder_is_trained_from_a_block_on(tiny):
    """Partial fine-tuning: frozen are the blocks before it, and tokens and position embeddings."""
    recipe = load_recipe("probe", (*tiny, "model.lora_rank=0", "model.trainable=blocks.1"))
    network, _ = make_network(recipe, 2, seed=0)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    expected = ("body.vit.blocks.1.", "body.vit.norm.", "head.")
    assert trained == {name for name, _ in network.named_parameters() if name.startswith(expected)}
    network(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("model.trainable=all",), ("model.lora_rank", "model.trainable=head")),
        (("model.lora_rank=-1",), ("model.lora_rank", "-1")),
        (("model.lora_rank=24",), ("24",)),
        (("model.name=torchvision:squeezenet1_1", "model.pretrained=false"), ("model.lora_rank=4",)),
        (("train.optimiser=logistic-regression",), ("model.lora_rank=0",)),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings, words, tiny, make_pack, tmp_path):
    with refuses(RecipeError, *words):
        biopsy.train("probe", make_pack(n_patients=6), overrides=(*tiny, *settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
