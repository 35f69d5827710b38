"""The average of weights: by hand, warm-up, restored after use, through training."""

import pytest
import torch
from torch import nn

from biopsy.training.checkpoints import load_weights
from biopsy.training.weight_averaging import WeightAverage
from conftest import write_pack
from tiny_runs import train_tiny

SETTINGS = ("train.epochs=2", "train.ema_decay=0.9", "train.checkpoint=last")


def test_average_by_hand():
    network = nn.BatchNorm1d(1)
    average = WeightAverage(network, decay=0.5)
    expected = 1.0
    for step, value in enumerate((3.0, 5.0, -1.0), start=1):
        with torch.no_grad():
            network.weight.fill_(value)
            network.running_var.fill_(value)
            network.num_batches_tracked.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(average.state["weight"]) == pytest.approx(expected)
    assert float(average.state["running_var"]) == pytest.approx(expected)
    assert int(average.state["num_batches_tracked"]) == 3


def test_applied_only_within_the_context():
    network = nn.Linear(2, 1)
    average = WeightAverage(network, decay=0.9)
    start = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1)
    with average.applied():
        assert torch.equal(network.weight, start)
    assert torch.equal(network.weight, start + 1)


def test_the_averaged_weights_are_validated_and_become_the_classifier(tmp_path):
    pack = write_pack(tmp_path, n_patients=8, patches_per_patient=8)
    run = train_tiny(pack, tmp_path / "averaged", *SETTINGS)
    plain = train_tiny(pack, tmp_path / "plain", "train.epochs=2", "train.checkpoint=last")
    assert [r["loss"] for r in run.log()] == [r["loss"] for r in plain.log()]  # training itself is the same
    assert run.log()[-1]["val_loss"] != plain.log()[-1]["val_loss"]
    network = run.classifier.network
    trained = {name: tensor.clone() for name, tensor in network.named_parameters()}
    load_weights(run.path / "checkpoints", network, None)
    assert all(torch.equal(trained[name], tensor) for name, tensor in network.named_parameters())
    best = train_tiny(pack, tmp_path / "best", *SETTINGS, "train.checkpoint=best")
    epoch = best.info["chosen_epoch"]
    load_weights(best.path / "checkpoints", network, epoch)
    chosen = dict(best.classifier.network.named_parameters())
    assert all(torch.equal(chosen[name], tensor) for name, tensor in network.named_parameters())
