import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.training.optimisers import (
    OPTIMISERS,
    count_plateaus,
    learning_rate,
    make_optimiser,
    orthogonalise,
    set_learning_rate,
)
from refusals import refuses

GRADIENTS = np.random.default_rng(0).normal(0, [1e-4, 1e-2, 1, 0], (10, 4))  # the last weight gets none
START = np.array([0.5, -0.2, 0.1, 0.3])
LR, DECAY = 1e-2, 1e-2 / 40
NEEDED = {"muon": {"momentum": 0.95, "nesterov": True}}


def run(name, lr_of_step=lambda step: LR, **options):
    weight = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimiser = make_optimiser(name, [weight], LR, **options)
    for step, gradient in enumerate(GRADIENTS):
        set_learning_rate(optimiser, lr_of_step(step))
        weight.grad = torch.tensor(gradient)
        optimiser.step()
    return weight.detach().numpy()


def test_adagrad_of_keras_2_by_hand():
    """keras 2.2, optimizers.Adagrad: lr / (1 + decay * iterations), a += g^2, p -= lr * g / (sqrt(a) + e)."""
    weight, accumulator = START.copy(), np.zeros(4)
    for step, gradient in enumerate(GRADIENTS):
        accumulator += gradient**2
        weight -= LR / (1 + DECAY * step) * gradient / (np.sqrt(accumulator) + 1e-7)
    rates = lambda step: learning_rate(step, lr=LR, schedule="inverse-time", decay=DECAY)  # noqa: E731
    assert np.allclose(run("adagrad-keras2", rates), weight, rtol=1e-6)


def test_adagrad_of_keras_3_by_hand():
    weight, accumulator = START.copy(), np.full(4, 0.1)
    for gradient in GRADIENTS:
        accumulator += gradient**2
        weight -= LR * gradient / np.sqrt(accumulator + 1e-7)
    assert np.allclose(run("adagrad"), weight, rtol=1e-9, atol=0)


def test_adam_of_keras_by_hand():
    weight, m, v = START.copy(), np.zeros(4), np.zeros(4)
    for step, gradient in enumerate(GRADIENTS, start=1):
        m += (gradient - m) * 0.1
        v += (gradient**2 - v) * 0.001
        weight -= LR * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (np.sqrt(v) + 1e-7)
    assert np.allclose(run("adam"), weight, rtol=1e-9, atol=0)


def test_adamw_without_weight_decay_by_hand():
    weight, m, v = START.copy(), np.zeros(4), np.zeros(4)
    for step, gradient in enumerate(GRADIENTS, start=1):
        m += (gradient - m) * 0.1
        v += (gradient**2 - v) * 0.001
        weight -= LR * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    assert np.allclose(run("adamw"), weight, rtol=1e-9, atol=0)


def test_rmsprop_of_keras_by_hand():
    weight, v = START.copy(), np.zeros(4)
    for gradient in GRADIENTS:
        v = 0.9 * v + 0.1 * gradient**2
        weight -= LR * gradient / np.sqrt(v + 1e-7)
    assert np.allclose(run("rmsprop"), weight, rtol=1e-9, atol=0)


def test_rmsprop_of_keras_2_by_hand():
    """keras 2.2, optimizers.RMSprop: a = rho * a + (1 - rho) * g^2, p -= lr * g / (sqrt(a) + e)."""
    weight, v = START.copy(), np.zeros(4)
    for gradient in GRADIENTS:
        v = 0.9 * v + 0.1 * gradient**2
        weight -= LR * gradient / (np.sqrt(v) + 1e-7)
    assert np.allclose(run("rmsprop-keras2"), weight, rtol=1e-9, atol=0)
    assert not np.allclose(run("rmsprop"), weight, rtol=1e-3, atol=0)


def test_sgd_with_momentum_by_hand():
    weight, velocity = START.copy(), np.zeros(4)
    for gradient in GRADIENTS:
        velocity = 0.9 * velocity + gradient
        weight -= LR * velocity
    assert np.allclose(run("sgd", momentum=0.9), weight, rtol=1e-9, atol=0)


def test_sgd_with_nesterov_and_weight_decay_by_hand():
    weight, velocity = START.copy(), np.zeros(4)
    for gradient in GRADIENTS:
        velocity = 0.9 * velocity + gradient
        weight -= LR * (gradient + 0.9 * velocity)
    assert np.allclose(run("sgd", momentum=0.9, nesterov=True), weight, rtol=1e-9, atol=0)


def test_weight_decay_spares_biases():
    network = nn.Linear(3, 2)
    optimiser = make_optimiser("sgd", network.parameters(), 0.1, weight_decay=0.5)
    before = copy.deepcopy(network.state_dict())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert torch.equal(network.bias, before["bias"])
    assert torch.allclose(network.weight, before["weight"] * 0.95)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_saved_and_loaded_goes_on_as_never_stopped(name):
    def steps(optimiser, network, numbers):
        for number in numbers:
            x = torch.rand(8, 6, generator=torch.Generator().manual_seed(number))
            optimiser.zero_grad()
            network(x).square().mean().backward()
            optimiser.step()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimiser = make_optimiser(name, network.parameters(), 0.05, **NEEDED.get(name, {}))
    steps(optimiser, network, range(3))
    resumed = copy.deepcopy(network)
    again = make_optimiser(name, resumed.parameters(), 0.05, **NEEDED.get(name, {}))
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    steps(optimiser, network, range(3, 6))
    steps(again, resumed, range(3, 6))
    for layer, other in zip(network, resumed, strict=True):
        assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_frozen_weights_stay(name):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    optimiser = make_optimiser(name, network.parameters(), 0.1, **NEEDED.get(name, {}))
    network(torch.rand(3, 4)).sum().backward()
    optimiser.step()
    assert torch.equal(network[0].weight, before)
    assert sum(len(group["params"]) for group in optimiser.param_groups) == 2


@pytest.mark.parametrize("shape", [(6, 6), (4, 15), (15, 4)])
def test_orthogonalised_matrices_have_the_directions_of_the_nearest_orthogonal_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert s.min() > 0.02 * matrix.norm()  # smaller ones need more than five steps
    result = orthogonalise(matrix)
    inside = u.T @ result @ vh.T  # the directions stay, all values are about 1
    assert torch.allclose(inside, torch.diag(inside.diagonal()), atol=1e-9)
    assert (inside.diagonal() > 0.65).all() and (inside.diagonal() < 1.25).all()
    assert torch.allclose(orthogonalise(1e-3 * matrix), result)
    assert not orthogonalise(torch.zeros(shape)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_pytorchs(nesterov):
    generator = torch.Generator().manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    start = ours[0].weight.detach().flatten(1).clone()
    theirs = nn.Parameter(start.clone())
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    optimiser = make_optimiser("muon", ours.parameters(), 0.02, **options)
    other = torch.optim.Muon([theirs], 0.02, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        gradient = torch.randn(ours[0].weight.shape, generator=generator)
        ours[0].weight.grad, theirs.grad = gradient, gradient.flatten(1)
        optimiser.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours[0].weight.flatten(1) - theirs).norm() < 0.02 * moved  # theirs multiplies in bfloat16


def test_muon_leaves_to_adamw_what_is_no_matrix():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 2)
    )
    twin = copy.deepcopy(network)
    optimiser = make_optimiser("muon", network.parameters(), 0.01, weight_decay=0.1, momentum=0.95)
    reference = make_optimiser("adamw", twin.parameters(), 0.01, weight_decay=0.1)
    assert [len(group["params"]) for group in optimiser.param_groups] == [1, 2, 5]
    for _ in range(3):
        x = torch.rand(5, 3, 6, 6)
        for model, steps in ((network, optimiser), (twin, reference)):
            steps.zero_grad()
            model(x).square().mean().backward()
        for own, copied in zip(network.parameters(), twin.parameters(), strict=True):
            copied.grad = own.grad.clone()
        optimiser.step()
        reference.step()
    same = [torch.equal(*pair) for pair in zip(network.parameters(), twin.parameters(), strict=True)]
    assert same == [False, *[True] * 7]
    update = (network[0].weight - twin[0].weight).norm()
    assert 0 < update < 3 * 2 * 0.01 * 0.25 * math.sqrt(27 * 4)  # of both, at most the size of AdamW's


def test_schedules_by_hand():
    assert learning_rate(7, lr=0.1) == 0.1
    assert learning_rate(4000, lr=0.01, schedule="inverse-time", decay=1 / 4000) == pytest.approx(0.005)
    cosine = [learning_rate(step, lr=1.0, schedule="cosine", total_steps=100) for step in (0, 50, 100, 150)]
    assert cosine == pytest.approx([1, 0.5, 0, 0])
    cycle = [
        learning_rate(step, lr=0.5, schedule="one-cycle", total_steps=100) for step in (0, 15, 30, 65, 100)
    ]
    assert cycle == pytest.approx([0.02, 0.26, 0.5, 0.25, 0])
    warm = {"lr": 1.0, "schedule": "cosine", "warmup_steps": 10, "total_steps": 110}
    assert [learning_rate(step, **warm) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1, 1, 0.5])


def test_plateau_waits_as_keras_does():
    assert count_plateaus([], 2) == 0
    assert count_plateaus([1, 0.9, 0.95, 0.8], 2) == 0
    assert count_plateaus([1, 0.9, 0.95, 0.9], 2) == 1  # equal is no improvement
    assert count_plateaus([1, 1, 1, 1, 1], 2) == 2
    rate = learning_rate(0, lr=1.0, schedule="plateau", history=[1] * 7)
    assert rate == pytest.approx(0.01)


def test_refusals():
    params = [nn.Parameter(torch.zeros(1))]
    with refuses(RecipeError, "'adgrad'", "'adagrad'"):
        make_optimiser("adgrad", params, 0.1)
    with refuses(RecipeError, "unfreeze"):
        make_optimiser("adam", [torch.zeros(1)], 0.1)
    with refuses(RecipeError, "'adam'", "momentum=0.9"):
        make_optimiser("adam", params, 0.1, momentum=0.9)
    with refuses(RecipeError, "'muon'", "train.momentum"):
        make_optimiser("muon", params, 0.1)
    for name in ("rmsprop", "rmsprop-keras2"):
        with refuses(RecipeError, f"'{name}'", "weight_decay=0.1", reason="conflict"):
            make_optimiser(name, params, 0.1, weight_decay=0.1)
    with refuses(RecipeError, "'cosine'"):
        learning_rate(0, lr=0.1, schedule="cosin")
    with refuses(RecipeError, "'cosine'", "total_steps", reason="setting"):
        learning_rate(0, lr=0.1, schedule="cosine")
