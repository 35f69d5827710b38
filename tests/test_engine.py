import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.models.engine import Engine, count_correct, make_loss, outputs_of
from biopsy.models.networks import build_network
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.recipes.schema import Augmentation
from biopsy.training.batches import Batches
from biopsy.training.optimisers import make_optimiser
from refusals import refuses

LOGITS = torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 0, 1])


def make_batches(**settings):
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (20, 50, 50, 3), dtype=np.uint8)
    spec = Preprocessing(input_px=48)
    given = {"patches": patches, "target": np.arange(20) % 2, "preprocessing": spec, "batch_size": 6}
    return Batches(**given | settings)


def train(precision="fp32", steps=3, seed=0, network="cancernet"):
    engine = Engine("cpu", precision)
    network = engine.place(build_network(network, n_classes=2, input_px=48, seed=seed)).train()
    optimiser = make_optimiser("adagrad", network.parameters(), 1e-2)
    batches = make_batches(augmentation=Augmentation(rotation_deg=20, flip_vertical=True))
    torch.manual_seed(seed)
    losses = []
    for batch, target in batches.iterate(np.arange(6 * steps)):
        loss, logits = engine.train_step(network, optimiser, batch, target, make_loss("softmax"))
        losses.append(loss.item())
        assert logits.shape == (6, 2) and logits.dtype == torch.float32 and not logits.requires_grad
    return losses, network


def test_the_loss_multiplies_by_class_weight_and_divides_by_the_number_of_patches():
    # -log softmax of the target's logit, by hand
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1.5)), math.log(2)]
    assert make_loss("softmax")(LOGITS, TARGET).item() == pytest.approx(sum(each) / 3)
    both = make_loss("softmax", [1.0, 2.5])(LOGITS, TARGET, sample_weight=torch.tensor([0.0, 2.0, 0.5]))
    factors = [0.0, 2.0, 0.5] * np.array([1.0, 2.5])[TARGET.numpy()]
    assert both.item() == pytest.approx(np.dot(factors, each) / 3)
    weighted = make_loss("softmax", [1.0, 2.5])(LOGITS, TARGET).item()
    assert weighted == pytest.approx((each[0] + each[1] + 2.5 * each[2]) / 3)


def test_the_sigmoid_loss_averages_over_outputs():
    def soft(x):
        return math.log(1 + math.exp(x))

    each = [(soft(-1) + soft(-1)) / 2, (soft(-0.5) + soft(2)) / 2, (soft(0) + soft(0)) / 2]
    assert make_loss("sigmoid")(LOGITS, TARGET).item() == pytest.approx(sum(each) / 3)
    weighted = make_loss("sigmoid", [3.0, 1.0])(LOGITS, TARGET).item()
    assert weighted == pytest.approx((3 * each[0] + 3 * each[1] + each[2]) / 3)


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_label_smoothing_is_the_loss_of_a_softened_target(outputs):
    logits, target = torch.tensor([[0.3, -1.2], [2.0, 0.5]]), torch.tensor([0, 1])
    soft = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    if outputs == "softmax":
        expected = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
    else:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, soft)
    assert torch.isclose(make_loss(outputs, label_smoothing=0.2)(logits, target), expected)


def test_right_answers_are_counted_by_arg_max_and_by_each_sigmoid():
    logits = torch.tensor([[2.0, 1.0], [-1.0, -2.0], [-1.0, 3.0], [0.5, 1.0]])
    target = torch.tensor([0, 0, 1, 0])
    assert count_correct(logits, target, "softmax")["accuracy"].item() == 3
    assert "binary_accuracy" not in count_correct(logits, target, "softmax")
    counted = count_correct(logits, target, "sigmoid")
    # by hand at .5: class 0 is (right, wrong), (wrong, right), class 1 (right, right), class 0 (right, wrong)
    assert counted["accuracy"].item() == 3 and counted["binary_accuracy"].item() == 0.5 + 0.5 + 1 + 0.5
    assert [outputs_of(loss) for loss in ("cross-entropy", "binary-cross-entropy")] == ["softmax", "sigmoid"]


def test_binary_cross_entropy_over_two_softmax_outputs_is_cross_entropy():
    probs = LOGITS.softmax(1)
    keras = nn.functional.binary_cross_entropy(probs, nn.functional.one_hot(TARGET).double())
    assert make_loss("softmax")(LOGITS, TARGET).item() == pytest.approx(keras.item())


def test_a_step_descends_and_returns_the_loss_before_it():
    engine = Engine("cpu")
    network = engine.place(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    optimiser = make_optimiser("sgd", network.parameters(), 0.1)
    batch, target, loss_fn = torch.rand(8, 3, 2, 2), torch.tensor([0, 1] * 4), make_loss("softmax")
    before = loss_fn(network(batch), target).item()
    loss, _ = engine.train_step(network, optimiser, batch, target, loss_fn)
    assert loss.item() == pytest.approx(before)
    assert not loss.requires_grad
    assert loss_fn(network(batch), target).item() < before


def test_the_same_seed_trains_the_same_network_bit_for_bit():
    losses, network = train()
    again, same = train()
    other, _ = train(seed=1)
    assert losses == again != other
    for a, b in zip(network.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bf16_trains_near_fp32():
    exact, _ = train("fp32", steps=1)
    mixed, network = train("bf16", steps=1)
    assert mixed == pytest.approx(exact, rel=0.05)
    assert mixed != exact
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_predict_needs_no_gradients_and_does_not_depend_on_the_batch():
    engine = Engine("cpu")
    network = engine.place(build_network("cancernet", n_classes=2, input_px=48, seed=0)).eval()
    patches = torch.rand(5, 3, 48, 48)
    together = engine.predict(network, patches)
    assert together.dtype == torch.float32 and not together.requires_grad
    alone = torch.cat([engine.predict(network, patches[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_batches_are_the_patches_in_order():
    batches = make_batches(preprocessing=Preprocessing(input_px=50))
    order = np.random.default_rng(1).permutation(20)
    got = list(batches.iterate(order))
    assert [len(target) for _, target in got] == [6, 6, 6, 2] and batches.count(20) == 4
    pixels = torch.cat([batch for batch, _ in got]).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    assert np.array_equal(pixels, batches.patches[order])
    assert np.array_equal(torch.cat([target for _, target in got]), order % 2)


def test_a_last_batch_that_is_not_full_is_dropped_on_request():
    batches = make_batches(drop_last=True)
    assert batches.count(20) == len(list(batches.iterate(np.arange(20)))) == 3
    assert list(batches.iterate(np.arange(5))) == []


def test_batches_from_the_middle_are_those_of_the_whole_pass():
    batches = make_batches(augmentation=Augmentation(rotation_deg=20, hed_jitter=0.1), seed=4)
    order = np.arange(20)
    whole = list(batches.iterate(order, epoch=3))
    rest = list(batches.iterate(order, epoch=3, start=2))
    assert len(rest) == 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[2:], rest, strict=True))
    middle = list(batches.iterate(order, epoch=3, start=1, stop=3))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[1:3], middle, strict=True))
    assert torch.equal(batches.load(order, 3, epoch=3)[0], whole[3][0])
    assert not torch.equal(batches.load(order, 3, epoch=4)[0], whole[3][0])
    assert not torch.equal(
        make_batches(augmentation=batches.augmentation).load(order, 3, epoch=3)[0], whole[3][0]
    )


def test_a_pass_left_early_leaves_no_thread_waiting():
    iterator = make_batches().iterate(np.arange(20))
    next(iterator)
    iterator.close()


def test_padded_patches_are_stretched_from_their_true_size():
    widths = np.full(20, 50)
    widths[7] = 12
    batches = make_batches(widths=widths, heights=np.full(20, 50))
    batch, _ = batches.load(np.array([7]), 0)
    wanted = Preprocessing(input_px=48).prepare(batches.patches[7:8, :, :12])
    assert torch.equal(batch, wanted)


def test_the_device_is_picked_and_reported(caplog):
    with caplog.at_level(logging.INFO):
        engine = Engine("auto")
    assert engine.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert caplog.messages == [f"device: {engine.device} (auto)"]


def test_refusals():
    with refuses(RecipeError, "device='gpu'", "auto"):
        Engine("gpu")
    with refuses(RecipeError, "precision='fp16'", "'bf16'"):
        Engine("cpu", "fp16")
    with refuses(RecipeError, "outputs='softmx'", "'softmax'"):
        make_loss("softmx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here_is_refused():
    with refuses(RecipeError, "device='cuda'", reason="value"):
        Engine("cuda")


@pytest.mark.gpu
def test_training_on_the_gpu_follows_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    losses = {}
    for device in ("cpu", "cuda"):
        engine = Engine(device)
        network = engine.place(build_network("cancernet", n_classes=2, input_px=48, seed=0)).eval()
        optimiser = make_optimiser("adagrad", network.parameters(), 1e-2)
        batches = make_batches(
            device=engine.device, augmentation=Augmentation(rotation_deg=20, hed_jitter=0.1)
        )
        loss_fn = make_loss("softmax", [1, 2.5], device=engine.device)
        steps = [
            engine.train_step(network, optimiser, batch, target, loss_fn)[0]
            for batch, target in batches.iterate(np.arange(18))
        ]
        losses[device] = [loss.item() for loss in steps]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
