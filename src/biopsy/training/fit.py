"""Training loop."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from biopsy.core.errors import TrainingDiverged
from biopsy.core.seeds import derive
from biopsy.data.packs import Pack
from biopsy.models.classifier import score_classes
from biopsy.models.engine import Engine, LossFunction, count_correct, make_loss, outputs_of
from biopsy.models.inference import predict_logits
from biopsy.recipes import Recipe
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.training.augmentation import Transform
from biopsy.training.batches import Batches
from biopsy.training.cached_features import cache_backbone_features, predict_rest
from biopsy.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from biopsy.training.device_patches import place_patches
from biopsy.training.distributed import ALONE, Processes
from biopsy.training.optimisers import make_optimiser, rate_of, set_learning_rate
from biopsy.training.runs import EpochRecord, OnEpoch
from biopsy.training.sampling import class_weights, sample_epoch, sample_passes
from biopsy.training.weight_averaging import WeightAverage

CHECK_EVERY = 50  # updates between checks of the loss, which synchronise with the GPU


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training task: recipe, data, preprocessing and engine.

    Attributes:
        train: Rows of the pack to train on, ``(n_train,)``.
        val: Rows of the pack to validate on, ``(n_val,)``.
    """

    recipe: Recipe
    pack: Pack
    train: np.ndarray
    val: np.ndarray
    preprocessing: Preprocessing
    engine: Engine
    seed: int
    keep_best: bool
    """Whether to keep the best epoch on validation instead of the last."""
    transform: Transform | None = None
    """Transform of training batches after the recipe's augmentation."""
    patch_weights: np.ndarray | None = None
    """Weight of every patch of the pack in the loss, float32 ``(n_patches,)``."""
    teacher: np.ndarray | None = None
    """Probabilities of the teacher for the training patches, float32 ``(n_patches, n_classes)``."""
    processes: Processes = ALONE


def fit(network: torch.nn.Module, task: Task, folder: Path, on_epoch: OnEpoch) -> Progress:
    """Train to the last epoch or early stopping, from the last checkpoint in ``folder``.

    Args:
        network: Network with initial weights.
        on_epoch: Called with each epoch's record after its checkpoint is written, by the first process.

    Raises:
        TrainingDiverged: If the loss is not finite; with epoch and step.
    """
    settings = task.recipe.train
    network = task.engine.place(network)
    optimiser = optimiser_of(task.recipe, network)
    average = WeightAverage(network, settings.ema_decay) if settings.ema_decay else None
    progress = load_checkpoint(folder, network, optimiser, task.engine.device, average)
    drop_last = settings.drop_last and len(_order(task, 1)) > settings.batch_size
    batches = Batches.from_pack(
        task.pack,
        task.recipe,
        task.train,
        task.preprocessing,
        drop_last=drop_last,
        transform=task.transform,
        device=task.engine.device,
        seed=task.seed,
        processes=task.processes,
    )
    steps = settings.steps_per_epoch or batches.count(len(_order(task, 1)))
    rows = np.union1d(task.train, task.val)
    n_visits = (settings.epochs - progress.epoch) * (steps * settings.batch_size + len(task.val))
    cache = cache_backbone_features(
        network, batches, rows, n_visits, engine=task.engine, folder=folder.parent
    )
    devices = [task.engine.device] if task.engine.device.type == "cuda" else []
    with cache as (rest, batches), torch.random.fork_rng(devices=devices):
        n_trained = (settings.epochs - progress.epoch) * steps * settings.batch_size
        batches = place_patches(batches, task.train, n_trained)
        learner = task.processes.wrap(rest)
        while progress.epoch < settings.epochs and not _is_stale(task, progress):
            record = _run_epoch(learner, rest, optimiser, task, batches, progress, steps, average)
            _note_best(task, progress, record)
            progress.history.append(record)
            task.pack.require_unchanged()
            if task.processes.is_first:
                save_checkpoint(folder, network, optimiser, progress, average)
                on_epoch(record)
    return progress


def optimiser_of(recipe: Recipe, network: torch.nn.Module) -> torch.optim.Optimizer:
    settings = recipe.train
    return make_optimiser(
        settings.optimiser,
        network.parameters(),
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


def _run_epoch(
    learner: torch.nn.Module,
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    task: Task,
    batches: Batches,
    progress: Progress,
    steps: int,
    average: WeightAverage | None,
) -> EpochRecord:
    """Run one epoch with validation, and return its record; the learner is the network, wrapped to train."""
    settings, epoch, started = task.recipe.train, progress.epoch + 1, time.perf_counter()
    processes = task.processes
    weights = class_weights(task.pack.target[task.train], len(task.pack.class_names), settings.class_weights)
    outputs = outputs_of(settings.loss)
    loss_fn = make_loss(
        outputs,
        None if weights is None else weights.tolist(),
        label_smoothing=settings.label_smoothing,
        device=task.engine.device,
        teacher_weight=settings.teacher_weight,
        temperature=settings.teacher_temperature,
    )
    losses: list[Tensor] = []
    correct: dict[str, Tensor] = {}
    n_seen, lr = 0, settings.lr
    torch.manual_seed(derive(task.seed, "dropout", epoch) + processes.rank)
    learner.train()
    for batch, target, rows, n in _next_batches(task, batches, progress.step, steps):
        task.pack.require_unchanged()
        lr = rate_of(
            settings,
            progress.step + len(losses),
            steps=steps,
            n_epochs=settings.epochs,
            history=[past["val_loss"] for past in progress.history],
        )
        set_learning_rate(optimiser, lr)
        loss, logits = task.engine.train_step(
            learner, optimiser, batch, target, _bind(loss_fn, task, rows), weight=processes.weight(n)
        )
        own = processes.count(n)
        for name, count in count_correct(logits[:own], target[:own], outputs).items():
            correct[name] = correct.get(name, 0) + count
        losses.append(loss)
        if average is not None:
            average.update(progress.step + len(losses))
        n_seen += n
        if len(losses) % CHECK_EVERY == 0:
            _require_finite(processes, losses, epoch, progress.epoch)
    _require_finite(processes, losses, epoch, progress.epoch)
    mean_loss = float(processes.mean(torch.stack(losses)).mean())
    accuracy = {name: float(processes.sum(count)) / n_seen for name, count in correct.items()}
    trained = time.perf_counter()
    with average.applied() if average else contextlib.nullcontext():
        val_loss, val_accuracy, val_auroc = _validate(network, task, batches)
    if not math.isfinite(val_loss):
        raise _diverged(val_loss, f"epoch {epoch}, on validation after {len(losses)} steps", epoch - 1)
    progress.epoch, progress.step = epoch, progress.step + len(losses)
    ended = time.perf_counter()
    record = EpochRecord(
        epoch=epoch,
        loss=mean_loss,
        **accuracy,  # type: ignore[typeddict-item]
        val_loss=val_loss,
        **val_accuracy,
        val_auroc=val_auroc,
        lr=lr,
        step=progress.step,
        images_per_s=n_seen / (trained - started),
        seconds=ended - started,
        time_left_s=(ended - started) * (settings.epochs - epoch),
    )
    return processes.broadcast(record)  # by which all choose and stop alike


def _bind(loss_fn: LossFunction, task: Task, rows: np.ndarray) -> LossFunction:
    """Return the loss of a batch of some rows of the pack, with their weights and the teacher's view."""
    given = {"sample_weight": task.patch_weights, "teacher": task.teacher}
    parts = {
        name: torch.from_numpy(values[rows]).to(task.engine.device)
        for name, values in given.items()
        if values is not None
    }
    return partial(loss_fn, **parts) if parts else loss_fn


def _order(task: Task, number: int) -> np.ndarray:
    """Return the shuffled rows of a pass, without a last batch of one patch (batch normalisation)."""
    settings, is_by_patient = task.recipe.train, task.recipe.train.sampling == "within-patient"
    order = sample_epoch(
        task.train,
        task.pack.target,
        sampling=settings.sampling,
        seed=task.seed,
        epoch=number,
        groups=task.pack.group_ids if is_by_patient else None,
        single_class_weight=settings.single_class_weight,
    )
    return order[:-1] if len(order) % settings.batch_size == 1 else order


def _next_batches(
    task: Task, batches: Batches, step: int, n_steps: int
) -> Iterator[tuple[Tensor, Tensor, np.ndarray, int]]:
    """Yield this process's part of the next updates' batches, over consecutive shuffled passes.

    Each item has the part, its rows of the pack, and the number of patches of the whole batch.
    """
    per_pass = batches.count(len(_order(task, 1)))
    for number, start, stop in sample_passes(step, n_steps, per_pass):
        order = _order(task, number)
        parts = batches.iterate(order, epoch=number, start=start, stop=stop)
        for index, (batch, target) in enumerate(parts, start):
            rows = batches.rows(order, index)
            yield batch, target, rows, batches.size(len(order), index)


def _validate(
    network: torch.nn.Module, task: Task, batches: Batches
) -> tuple[float, dict[str, float], float | None]:
    """Return loss (unweighted), accuracies by name and, for two classes, AUROC on validation."""
    pack, rows, outputs = task.pack, task.val, outputs_of(task.recipe.train.loss)
    own = rows[task.processes.part(len(rows))]
    task.processes.copy_state(network)  # running statistics of batch normalisation are each process's own
    if batches.cached_features is not None:
        logits = predict_rest(network, batches.cached_features, own, engine=task.engine)
    else:
        logits = predict_logits(
            network, task.preprocessing, pack.patches, pack.sizes, own, engine=task.engine
        )
    logits = task.processes.gather(logits, len(rows))
    guess, target = torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(pack.target[rows])
    correct = count_correct(guess, target, outputs)
    auroc, positive = None, pack.positive_index
    if positive is not None and len(target.unique()) == 2 and np.isfinite(logits).all():
        scores = score_classes(logits, outputs)
        auroc = float(
            roc_auc_score(pack.target[rows] == positive, scores[:, positive] - scores[:, 1 - positive])
        )
    accuracy = {f"val_{name}": float(count) / len(rows) for name, count in correct.items()}
    return float(make_loss(outputs)(guess, target)), accuracy, auroc


def _note_best(task: Task, progress: Progress, record: EpochRecord) -> None:
    """Update the best epoch by the monitored value: highest AUROC or lowest loss."""
    auroc = record["val_auroc"] if task.recipe.train.monitor == "val_auroc" else None
    value = -record["val_loss"] if auroc is None else auroc  # AUROC needs both classes in validation
    record["best"] = math.isfinite(value) and (progress.best_value is None or value > progress.best_value)
    if record["best"]:
        progress.best_epoch, progress.best_value = record["epoch"], value


def _is_stale(task: Task, progress: Progress) -> bool:
    patience = task.recipe.train.early_stopping_patience
    return bool(patience) and progress.epoch - (progress.best_epoch or 0) >= patience


def _require_finite(processes: Processes, losses: list[Tensor], epoch: int, last_good: int) -> None:
    recent = processes.mean(torch.stack(losses[-CHECK_EVERY:]))
    bad = (~torch.isfinite(recent)).nonzero()
    if len(bad):
        step = len(losses) - len(recent) + int(bad[0]) + 1
        raise _diverged(float(recent[bad[0]]), f"epoch {epoch}, step {step}", last_good)


def _diverged(loss: float, where: str, last_good: int) -> TrainingDiverged:
    hint = f"the last good checkpoint is epoch {last_good}" if last_good else "no epoch was finished"
    return TrainingDiverged(
        f"the loss became {loss:g} in {where}; {hint}: lower the rate with --set train.lr=..."
    )
