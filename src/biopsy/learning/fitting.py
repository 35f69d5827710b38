"""The loop over epochs: update, validate, remember, stop."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from biopsy.data.packs import Pack
from biopsy.errors import TrainingDiverged
from biopsy.learning.augmentation import Augmentation
from biopsy.learning.batches import Batches
from biopsy.learning.checkpoints import Progress, load_checkpoint, save_checkpoint
from biopsy.learning.engine import Engine, make_loss
from biopsy.learning.inference import predict_logits
from biopsy.learning.optimisers import learning_rate, make_optimiser, set_learning_rate
from biopsy.learning.preprocessing import Preprocessing
from biopsy.learning.recipes import Recipe
from biopsy.learning.sampling import order_epoch, weigh_classes
from biopsy.seeds import derive

logger = logging.getLogger(__name__)

OnEpoch = Callable[[dict[str, Any]], None]
CHECK_EVERY = 50  # updates between two looks at the loss: on a GPU each look waits for it


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a network is to learn, and from which patches."""

    recipe: Recipe
    pack: Pack
    train: np.ndarray
    val: np.ndarray
    preprocessing: Preprocessing
    engine: Engine
    seed: int
    keep_best: bool
    """Whether the best epoch on validation is kept, rather than the last."""


def fit(network: torch.nn.Module, task: Task, folder: Path, on_epoch: OnEpoch) -> Progress:
    """Train to the last epoch or until validation stops it, from the last checkpoint in ``folder``.

    Args:
        network: With its initial weights.
        task: What to learn.
        folder: Where checkpoints are kept, one after each epoch.
        on_epoch: Called with each epoch's record after its checkpoint is written.

    Raises:
        TrainingDiverged: If the loss is not finite; says at which epoch and step.
    """
    settings = task.recipe.train
    network = task.engine.place(network)
    optimiser = optimiser_of(task.recipe, network)
    progress = load_checkpoint(folder, network, optimiser, task.engine.device)
    batches = _make_batches(task)
    devices = [task.engine.device] if task.engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        while progress.epoch < settings.epochs and not _is_stale(task, progress):
            record = _run_epoch(network, optimiser, task, batches, progress)
            _note_best(task, progress, record)
            progress.history.append(record)
            save_checkpoint(folder, network, optimiser, progress)
            on_epoch(record)
    return progress


def optimiser_of(recipe: Recipe, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser a recipe asks for."""
    settings = recipe.train
    return make_optimiser(
        settings.optimiser,
        network.parameters(),
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _run_epoch(
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    task: Task,
    batches: Batches,
    progress: Progress,
) -> dict[str, Any]:
    """Make one pass over the training patches and look at validation; gives the epoch's record."""
    settings, epoch, started = task.recipe.train, progress.epoch + 1, time.perf_counter()
    order = _order(task, epoch)
    weights = weigh_classes(task.pack.target[task.train], len(task.pack.class_names), settings.class_weights)
    loss_fn = make_loss(_outputs(settings.loss), None if weights is None else weights.tolist())
    steps = batches.count(len(order))
    losses: list[Tensor] = []
    correct = torch.zeros((), dtype=torch.int64, device=task.engine.device)
    n_seen, lr = 0, settings.lr
    torch.manual_seed(derive(task.seed, "dropout", epoch))
    network.train()
    for batch, target in batches.iterate(order, epoch=epoch):
        lr = learning_rate(
            progress.step + len(losses),
            lr=settings.lr,
            schedule=settings.schedule,
            decay=settings.decay,
            warmup_steps=settings.warmup_epochs * steps,
            total_steps=settings.epochs * steps,
            history=[past["val_loss"] for past in progress.history],
        )
        set_learning_rate(optimiser, lr)
        loss, logits = task.engine.train_step(network, optimiser, batch, target, loss_fn)
        correct += (logits.argmax(dim=1) == target).sum()
        losses.append(loss)
        n_seen += len(target)
        if len(losses) % CHECK_EVERY == 0:
            _require_finite(losses, epoch, progress.epoch)
    _require_finite(losses, epoch, progress.epoch)
    mean_loss, accuracy = float(torch.stack(losses).mean()), int(correct) / n_seen
    trained = time.perf_counter()
    validation = _validate(network, task)
    if not math.isfinite(validation["val_loss"]):
        raise _diverged(
            validation["val_loss"], f"epoch {epoch}, on validation after {len(losses)} steps", epoch - 1
        )
    record = {"epoch": epoch, "loss": mean_loss, "accuracy": accuracy, **validation, "lr": lr}
    progress.epoch, progress.step = epoch, progress.step + len(losses)
    ended = time.perf_counter()
    return record | {
        "step": progress.step,
        "images_per_s": n_seen / (trained - started),
        "seconds": ended - started,
        "time_left_s": (ended - started) * (settings.epochs - epoch),
    }


def _order(task: Task, epoch: int) -> np.ndarray:
    """Give the rows of an epoch; a last batch of one patch is left out, it has no spread to normalise by."""
    settings = task.recipe.train
    order = order_epoch(task.train, task.pack.target, sampling=settings.sampling, seed=task.seed, epoch=epoch)
    return order[:-1] if len(order) % settings.batch_size == 1 else order


def _validate(network: torch.nn.Module, task: Task) -> dict[str, Any]:
    """Give loss (unweighted), accuracy by arg-max and, for two classes, AUROC on validation."""
    pack, rows = task.pack, task.val
    logits = predict_logits(
        network, task.preprocessing, pack.patches, pack.sizes, rows, engine=task.engine
    ).astype(np.float64)
    target = pack.target[rows]
    loss_fn = make_loss(_outputs(task.recipe.train.loss))
    auroc, positive = None, pack.positive_index
    if positive is not None and len(np.unique(target)) == 2 and np.isfinite(logits).all():
        auroc = float(roc_auc_score(target == positive, logits[:, positive] - logits[:, 1 - positive]))
    return {
        "val_loss": float(loss_fn(torch.from_numpy(logits), torch.from_numpy(target))),
        "val_accuracy": float((logits.argmax(axis=1) == target).mean()),
        "val_auroc": auroc,
    }


def _note_best(task: Task, progress: Progress, record: dict[str, Any]) -> None:
    """Remember the epoch if its monitored value is the best: the highest AUROC or the lowest loss."""
    monitor = task.recipe.train.monitor
    if monitor == "val_auroc" and record["val_auroc"] is None:
        monitor = "val_loss"  # AUROC needs both classes in validation
    value = record[monitor] if monitor == "val_auroc" else -record[monitor]
    record["best"] = math.isfinite(value) and (progress.best_value is None or value > progress.best_value)
    if record["best"]:
        progress.best_epoch, progress.best_value = record["epoch"], value


def _is_stale(task: Task, progress: Progress) -> bool:
    patience = task.recipe.train.early_stopping_patience
    return bool(patience) and progress.epoch - (progress.best_epoch or 0) >= patience


def _make_batches(task: Task) -> Batches:
    settings = task.recipe.train
    return Batches(
        patches=task.pack.patches,
        target=task.pack.target,
        widths=task.pack.sizes[:, 0],
        heights=task.pack.sizes[:, 1],
        preprocessing=task.preprocessing,
        augmentation=Augmentation.from_settings(task.recipe.augmentation),
        batch_size=settings.batch_size,
        drop_last=settings.drop_last and len(_order(task, epoch=1)) > settings.batch_size,
        device=task.engine.device,
        seed=task.seed,
    )


def _outputs(loss: str) -> str:
    return "softmax" if loss == "cross-entropy" else "sigmoid"


def _require_finite(losses: list[Tensor], epoch: int, last_good: int) -> None:
    recent = torch.stack(losses[-CHECK_EVERY:])
    bad = (~torch.isfinite(recent)).nonzero()
    if len(bad):
        step = len(losses) - len(recent) + int(bad[0]) + 1
        raise _diverged(float(recent[bad[0]]), f"epoch {epoch}, step {step}", last_good)


def _diverged(loss: float, where: str, last_good: int) -> TrainingDiverged:
    kept = f"the last good checkpoint is epoch {last_good}" if last_good else "no epoch was finished"
    return TrainingDiverged(
        f"the loss became {loss:g} in {where}; {kept}: lower the rate with --set train.lr=..."
    )
