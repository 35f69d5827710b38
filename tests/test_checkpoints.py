"""Checkpoints: the same bits go on, the last and the best file belong together, damage is named."""

import copy
import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from biopsy.core.errors import RunError
from biopsy.core.loaders import read_tensors
from biopsy.training.checkpoints import LAST, Progress, load_checkpoint, load_weights, save_checkpoint
from biopsy.training.optimisers import OPTIMISERS, make_optimiser, set_learning_rate
from refusals import refuses

CPU = torch.device("cpu")


def make_network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def step(network: nn.Module, optimiser: torch.optim.Optimizer, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    optimiser.zero_grad()
    network(torch.randn(8, 3, generator=generator)).square().mean().backward()
    set_learning_rate(optimiser, 0.01 / n)
    optimiser.step()


def make_any(name, network, lr):
    return make_optimiser(name, network.parameters(), lr, momentum=0.95 if name == "muon" else 0.0)


def save(folder, epoch=1, best_epoch=None, network=None, name="adam"):
    """Save a network after one step, as after an epoch."""
    network = network or make_network()
    optimiser = make_any(name, network, 0.01)
    step(network, optimiser, epoch)
    progress = Progress(
        epoch, epoch * 3, best_epoch, 0.5, [{"epoch": epoch, "val_loss": 0.1, "val_auroc": None}]
    )
    save_checkpoint(folder, network, optimiser, progress)
    return network, optimiser, progress


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_with_the_same_bits(name, tmp_path):
    network, optimiser, progress = save(tmp_path, name=name)
    other = make_network()
    restored = make_any(name, other, 0.5)
    assert load_checkpoint(tmp_path, other, restored, CPU) == progress
    for n in (2, 3):
        step(network, optimiser, n)
        step(other, restored, n)
    for key, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_weights_of_a_superseded_epoch_are_removed_when_training_goes_on(tmp_path):
    """A process that was killed after it had written the last checkpoint leaves them."""
    save(tmp_path, epoch=1, best_epoch=1)
    superseded = (tmp_path / "best-0001.safetensors").read_bytes()
    network, optimiser, progress = save(tmp_path, epoch=2, best_epoch=2)
    (tmp_path / "best-0001.safetensors").write_bytes(superseded)
    assert load_checkpoint(tmp_path, network, optimiser, CPU) == progress
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-0002.safetensors"]


def test_equal_checkpoints_are_equal_files(tmp_path):
    """The header of safetensors is a hash map, whose order changes from file to file in one process."""
    for index in range(8):
        save(tmp_path / str(index), best_epoch=1)
    for name in (LAST, "best-0001.safetensors"):
        assert len({path.read_bytes() for path in tmp_path.glob(f"*/{name}")}) == 1


@pytest.mark.parametrize("name", OPTIMISERS)
def test_convolutions_with_channels_last_in_memory_go_on_with_the_same_bits(name, tmp_path):
    """A fused step walks weights and moments in the order in which they lie in memory."""

    def make():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2))
        network = network.to(memory_format=torch.channels_last)
        return network, make_any(name, network, 0.01)

    def walk(network, optimiser, n):
        images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(n))
        optimiser.zero_grad()
        network(images.to(memory_format=torch.channels_last)).square().mean().backward()
        optimiser.step()

    network, optimiser = make()
    walk(network, optimiser, 1)
    save_checkpoint(tmp_path, network, optimiser, Progress(1, 1))
    other, restored = make()
    load_checkpoint(tmp_path, other, restored, CPU)
    for n in (2, 3):
        walk(network, optimiser, n)
        walk(other, restored, n)
    for key, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_without_a_checkpoint_training_starts_afresh(tmp_path):
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    optimiser = make_optimiser("sgd", network.parameters(), 0.1)
    assert load_checkpoint(tmp_path, network, optimiser, CPU) == Progress(history=[])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_only_the_best_epochs_weights_are_kept_beside_the_last(tmp_path):
    best = copy.deepcopy(save(tmp_path, 1, best_epoch=1)[0].state_dict())
    last, *_ = save(tmp_path, 2, best_epoch=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-0001.safetensors", LAST]
    for epoch, wanted in ((1, best), (None, last.state_dict())):
        network = make_network()
        load_weights(tmp_path, network, epoch)
        assert all(torch.equal(value, wanted[key]) for key, value in network.state_dict().items())
    save(tmp_path, 3, best_epoch=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-0003.safetensors", LAST]


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = (tmp_path / LAST).read_bytes()

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with refuses(OSError, errno=errno.ENOSPC):
                save(tmp_path, 2, best_epoch=2)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert (tmp_path / LAST).read_bytes() == before


def load(folder, network=None):
    network = network or make_network()
    return load_checkpoint(folder, network, make_optimiser("adam", network.parameters(), 0.01), CPU)


def test_damage_is_named(tmp_path):
    save(tmp_path)
    path = tmp_path / LAST
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with refuses(RunError, "last.safetensors", "safetensors", "new run"):
        load(tmp_path)
    for place in (len(whole) - 1, whole.index(b"step") + 8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with refuses(RunError, "last.safetensors"):
            load(tmp_path)
    save_file(tensors, path)
    with refuses(RunError, "last.safetensors", "format"):
        load(tmp_path)
    path.write_bytes(whole)
    header = json.loads(read_tensors(path)[1]["biopsy"])
    for change in (
        {"format": "biopsy-checkpoint/1"},
        {"progress": []},
        {"progress": {**header["progress"], "history": [{"epoch": 1}]}},
        {"optimiser": {"x": {}}},
        {"groups": None},
        {"groups": []},
    ):
        save_file(tensors, path, metadata={"biopsy": json.dumps(header | change)})
        with pytest.raises(RunError) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    for text in ("[" * 10_000, "[]", "7" * 5000, "\ud800"):
        save_file(tensors, path, metadata={"biopsy": text.encode("utf-8", "replace").decode()})
        with pytest.raises(RunError):
            load(tmp_path)
    for name, value in {"optimiser.9.exp_avg": torch.zeros(3), "optimiser.x.exp_avg": torch.zeros(3)}.items():
        save_file({**tensors, name: value}, path, metadata={"biopsy": json.dumps(header)})
        with pytest.raises(RunError):
            load(tmp_path)


def test_another_network_is_refused(tmp_path):
    save(tmp_path, 1, best_epoch=1)
    wider = make_network(width=5)
    with refuses(RunError, "last.safetensors", "network", "recipe"):
        load(tmp_path, wider)
    with refuses(RunError, "best-0001.safetensors", "network"):
        load_weights(tmp_path, wider, 1)
