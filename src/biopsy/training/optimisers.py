"""Optimisers as in Keras, and learning rates as a pure function of the step, for exact resuming."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from biopsy.core.errors import RecipeError, suggest
from biopsy.recipes.schema import Train

KERAS_EPSILON = 1e-7
SCHEDULES: tuple[str, ...] = get_args(Train.model_fields["schedule"].annotation)
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.1, 3
ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 1 / 25
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5  # Jordan et al. 2024
UPDATE_RMS = 0.2  # of AdamW's updates, Liu et al. 2025


class KerasAdam(Adam):
    """Adam with epsilon as in Keras: added to the root *before* bias correction."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            group["keras_steps"] = group.get("keras_steps", 0) + 1
            group["eps"] = KERAS_EPSILON / math.sqrt(1 - group["betas"][1] ** group["keras_steps"])
        return super().step(closure)


class KerasRMSprop(Optimizer):
    """RMSprop as in Keras 3: rho .9 and the epsilon inside the root, sqrt(v + e)."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "rho": 0.9, "eps": KERAS_EPSILON})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter]["velocity"] = torch.zeros_like(parameter)
                velocity, grad = self.state[parameter]["velocity"], parameter.grad
                velocity.mul_(group["rho"]).addcmul_(grad, grad, value=1 - group["rho"])
                parameter.addcdiv_(grad, (velocity + group["eps"]).sqrt_(), value=-group["lr"])
        return closure() if closure else None


class Muon(AdamW):
    """Muon (Jordan et al. 2024): momentum, orthogonalised; AdamW for what is no matrix.

    The momentum of a weight of two or more dimensions, flattened to ``(rows, columns)``, is replaced by the
    nearest semi-orthogonal matrix, times .2 sqrt(max(rows, columns)), the root mean square of an update of
    AdamW (Liu et al. 2025), so that one learning rate serves both. AdamW updates the last layer, depthwise
    convolutions, embeddings (one row) and weights of one dimension. Weight decay is decoupled in both.
    """

    def __init__(
        self, weights: Sequence[Tensor], lr: float, *, momentum: float, nesterov: bool, weight_decay: float
    ) -> None:
        last = max((index for index, weight in enumerate(weights) if weight.ndim > 1), default=None)
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        vectors: list[Tensor] = []
        for index, weight in enumerate(weights):
            if weight.ndim < 2:
                vectors.append(weight)
            else:
                (others if index == last or min(weight.shape[:2]) == 1 else matrices).append(weight)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "momentum": momentum, "nesterov": nesterov},
            {"params": others},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        group = self.param_groups[0]
        for weight in group["params"]:
            if (grad := weight.grad) is None:
                continue
            if not (state := self.state[weight]):  # with the step, which Adam expects of every state
                state |= {"step": torch.zeros((), device=weight.device), "momentum": torch.zeros_like(weight)}
            state["step"] += 1
            mean = state["momentum"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean
            rows, columns = update.flatten(1).shape
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            scale = UPDATE_RMS * math.sqrt(max(rows, columns))
            weight.add_(orthogonalise(update.flatten(1)).view(weight.shape), alpha=-group["lr"] * scale)
            weight.grad = None  # by which AdamW leaves it out
        return super().step(closure)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about the nearest semi-orthogonal matrix, by a Newton-Schulz iteration of five steps.

    Singular values become about 1 (.7 to 1.2), those near 0 less (Jordan et al. 2024).
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


_OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    # epsilon inside the root, sqrt(a + e), is the same as starting the accumulator at .1 + e
    "adagrad": partial(Adagrad, initial_accumulator_value=0.1 + KERAS_EPSILON, eps=0, fused=True),
    "adagrad-keras2": partial(Adagrad, eps=KERAS_EPSILON, fused=True),
    "adam": partial(KerasAdam, eps=KERAS_EPSILON, fused=True),
    "adamw": partial(AdamW, weight_decay=0.0, fused=True),  # torch's default is .01
    "sgd": partial(SGD, fused=True),
    "rmsprop": KerasRMSprop,
    "rmsprop-keras2": partial(RMSprop, alpha=0.9, eps=KERAS_EPSILON),  # torch's own: sqrt(v) + e
}
OPTIMISERS = (*_OPTIMISERS, "muon")


def make_optimiser(
    name: str,
    params: Iterable[Tensor],
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Return an optimiser for the trainable parameters.

    Args:
        name: ``adagrad`` (Keras 3 and tf.keras 2: accumulator from .1), ``adagrad-keras2`` (Keras 2.2: from
            0), ``adam``, ``rmsprop`` (Keras 3: epsilon inside the root), ``rmsprop-keras2`` (Keras 2: beside
            it), ``adamw``, ``sgd``, ``muon`` (see `Muon`).
        params: The network's parameters from input to output; frozen ones are left out.
        lr: Learning rate; :func:`set_learning_rate` changes it before each step.
        weight_decay: Penalty on the weights (``adamw``, ``muon``: taken off the weights themselves); not on
            biases and the weights of normalisation layers, which have one dimension.
        momentum: Of ``sgd`` and ``muon``.
        nesterov: Of both: Nesterov's momentum.

    Raises:
        RecipeError: If the name is unknown, an option is not that optimiser's, or nothing is left to train.
    """
    if name not in OPTIMISERS:
        raise RecipeError(f"no optimiser is called {name!r}; {suggest(name, OPTIMISERS)}", "name")
    if momentum and name not in ("sgd", "muon"):
        raise RecipeError(f"optimiser {name!r} takes no momentum={momentum!r}; use 'sgd'", "conflict")
    if name == "muon" and not momentum:
        raise RecipeError(
            "optimiser 'muon' needs momentum above 0; set train.momentum, such as 0.95", "conflict"
        )
    if nesterov and not momentum:
        raise RecipeError("nesterov=True needs momentum above 0; set train.momentum", "conflict")
    if weight_decay and name.startswith("rmsprop"):
        raise RecipeError(
            f"optimiser {name!r} takes no weight_decay={weight_decay!r}; use 'adamw'", "conflict"
        )
    trained = [parameter for parameter in params if parameter.requires_grad]
    if not trained:
        raise RecipeError("no parameter of the network is to be trained; unfreeze some of it", "network")
    if name == "muon":
        return Muon(trained, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    make = _OPTIMISERS[name]
    if name == "sgd":
        make = partial(make, momentum=momentum, nesterov=nesterov)
    groups: list[Any] = trained
    if weight_decay:
        groups = [
            {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
            {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
        ]
    return make(groups, lr=lr)


def rate_of(settings: Train, step: int, *, steps: int, n_epochs: int, history: Sequence[float]) -> float:
    """Return the learning rate of an update of a recipe; ``steps`` are the updates of an epoch.

    The other arguments are those of `learning_rate`.
    """
    return learning_rate(
        step,
        lr=settings.lr,
        schedule=settings.schedule,
        decay=settings.decay,
        warmup_steps=settings.warmup_epochs * steps,
        total_steps=n_epochs * steps,
        history=history,
    )


def learning_rate(
    step: int,
    *,
    lr: float,
    schedule: str = "constant",
    decay: float = 0.0,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    history: Sequence[float] = (),
) -> float:
    """Return the learning rate of one update.

    Args:
        step: Updates done before this one; the first is 0.
        lr: The rate at full height.
        schedule: ``constant``; ``inverse-time``, Keras's ``lr / (1 + decay * step)``; ``cosine``, down to 0
            at ``total_steps``; ``one-cycle`` (Smith 2018), up from a 25th over the first 30 % of
            ``total_steps``, then down to 0, both along a cosine; ``plateau``, a tenth after every three
            epochs without a new best.
        decay: Of ``inverse-time``.
        warmup_steps: Updates over which any schedule climbs linearly to its value.
        total_steps: Updates of the whole run, for ``cosine`` and ``one-cycle``.
        history: Validation loss of every finished epoch, for ``plateau``.

    Raises:
        RecipeError: If the schedule is unknown, or ``total_steps`` is missing.

    Example:
        >>> learning_rate(40, lr=1e-2, schedule="inverse-time", decay=1 / 40)
        0.005
    """
    if schedule not in SCHEDULES:
        raise RecipeError(f"no schedule is called {schedule!r}; {suggest(schedule, SCHEDULES)}", "name")
    if schedule in ("cosine", "one-cycle") and total_steps is None:
        raise RecipeError(f"schedule {schedule!r} needs total_steps", "setting")
    if schedule == "inverse-time":
        lr /= 1 + decay * step
    elif schedule == "cosine":
        assert total_steps is not None
        lr *= _cosine((step - warmup_steps) / max(total_steps - warmup_steps, 1))
    elif schedule == "one-cycle":
        assert total_steps is not None
        rise = ONE_CYCLE_RISE * total_steps
        if step < rise:
            lr *= 1 - (1 - ONE_CYCLE_START) * _cosine(step / rise)
        else:
            lr *= _cosine((step - rise) / max(total_steps - rise, 1))
    elif schedule == "plateau":
        lr *= PLATEAU_FACTOR ** count_plateaus(history, PLATEAU_PATIENCE)
    return lr * min(1.0, (step + 1) / warmup_steps) if warmup_steps else lr


def _cosine(done: float) -> float:
    """Return a cosine from 1 to 0 for ``done`` from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def count_plateaus(history: Sequence[float], patience: int) -> int:
    """Return the number of times that the loss had no new minimum for ``patience`` epochs (Keras)."""
    best, waited, plateaus = math.inf, 0, 0
    for loss in history:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited >= patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus


def set_learning_rate(optimiser: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = lr
