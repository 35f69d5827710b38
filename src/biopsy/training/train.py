"""Training of a recipe on a pack, resulting in a run with a classifier."""

import contextlib
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from biopsy.core.errors import (
    DataError,
    PackError,
    RunError,
    SplitError,
    TrainingDiverged,
)
from biopsy.core.files import LOCK, NO_SPACE, expand_home, refuse_inputs, replace_atomic, sha256_file
from biopsy.core.storage import stage
from biopsy.data.coordinates import has_coordinates
from biopsy.data.packs import Pack, is_pack
from biopsy.data.prepare import prepare
from biopsy.data.protocols.groups import SUBSETS
from biopsy.data.splits import Split, find_split, list_splits
from biopsy.data.splits import split as make_split
from biopsy.models.engine import Engine
from biopsy.models.hardware import pick_precision
from biopsy.models.networks import count_parameters
from biopsy.models.networks.lora import merge_lora
from biopsy.models.weights import describe_weights, feed_as_encoder, make_network
from biopsy.recipes import Overrides, Recipe, load_recipe, setting_lines
from biopsy.statistics.calibrators import check_method
from biopsy.training.augmentation import Transform, check_transform, describe_transform
from biopsy.training.checkpoints import LAST, load_weights
from biopsy.training.distillation import check_teachers, identify_teachers, list_teachers, predict_teachers
from biopsy.training.distributed import Processes, join_processes
from biopsy.training.figures import draw_training
from biopsy.training.finalize import complete, fit_preprocessing
from biopsy.training.fit import Task, fit, optimiser_of
from biopsy.training.loggers import open_loggers
from biopsy.training.patch_weights import read_patch_weights
from biopsy.training.pretraining_record import require_unseen
from biopsy.training.probe import PROBE, check_probe, fit_probe
from biopsy.training.runs import (
    DOCUMENT,
    EpochRecord,
    OnEpoch,
    PatchCounts,
    Run,
    RunInfo,
    RunInput,
    describe_environment,
    find_cached_run,
    hash_config,
    name_run,
    require_empty,
)
from biopsy.training.sampling import class_weights, sample_epoch, take_fraction, within_patient_shares
from biopsy.training.seen_patients import check_start, record_seen

logger = logging.getLogger(__name__)

CURVES = ("loss", "accuracy", "auroc")
RUNS = Path("runs")
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def train(
    recipe: str | Path | Recipe | None = None,
    data: Pack | Path | str | None = None,
    *,
    split: Split | str | None = None,
    fold: int | None = None,
    seed: int = 0,
    overrides: Overrides = (),
    out: Path | str | None = None,
    device: str = "auto",
    plot: Path | str | None = None,
    tensorboard: bool = False,
    mlflow: bool = False,
    wandb: bool = False,
    resume: Run | Path | str | None = None,
    transform: Transform | None = None,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Train a recipe on the training patients of a pack, or resume an interrupted run.

    The test subset is not used, except for validation on a published split that did so, which run and report
    state. A finished run in ``out`` or ``runs/`` with the same recipe, pack, split, seed and initial weights
    is returned without training again.

    Started by torchrun, or by SLURM with ``MASTER_ADDR`` set, the processes share every batch; the first one
    writes the run, and the others return it before its classifier is made.

    Args:
        recipe: Name of a recipe, or TOML file.
        data: Pack, or an archive to prepare. With ``resume``: the pack of the run, if it has moved.
        split: Split of the pack, or a protocol without further options (default: the official one, else
            by patient).
        fold: Test fold, for a split with folds.
        seed: Random seed of initial weights, order, augmentation and dropout.
        overrides: Changes of recipe settings, ``KEY=VALUE`` such as ``train.epochs=2``; may be repeated
            (in Python: a list or a mapping).
        out: Output folder of the run (default: a new folder in ``runs/``).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; of several processes each takes its own.
        plot: Output file of the training curves: loss, accuracy and AUROC (.png, .svg or .pdf).
        tensorboard: Also write TensorBoard events into the run.
        mlflow: Also log settings and epochs to MLflow, at ``MLFLOW_TRACKING_URI``.
        wandb: Also log settings and epochs to Weights & Biases (``WANDB_MODE=offline`` keeps them on this
            machine).
        resume: Run to resume; recipe, split and seed are its own.
        transform: Transform of training patches after the recipe's augmentation: a transform of
            ``torchvision.transforms.v2``, applied per patch, or any function of a batch ``(B, 3, input_px,
            input_px)``, float32 RGB in 0-1, that keeps shape and type. Such runs are not reused; resuming
            one needs the same transform.
        on_epoch: Called with each epoch's record.

    Raises:
        RunError: If the run cannot be resumed, the output folder is not empty, or initial weights or a
            teacher have seen test patients.
        RecipeError: If the transform changes the shape or type of a batch.
        TrainingDiverged: If the loss is not finite.
    """
    if plot is not None and Path(plot).suffix not in PLOT_SUFFIXES:
        raise RunError(f"curves cannot be drawn to {plot}: its name must end in {', '.join(PLOT_SUFFIXES)}")
    if plot is not None:
        refuse_inputs(plot, None if isinstance(data, Pack) else data)

    def begin() -> tuple[Run, Pack]:
        if resume is not None:
            continued = _continue(resume, data, recipe, split, fold, out, *setting_lines(overrides))
            _check_same_transform(continued[0], transform)
            return continued
        if recipe is None or data is None:
            raise RunError(
                "training needs a recipe and data, or resume= and the folder of an interrupted run"
            )
        requested = load_recipe(recipe, overrides)
        if out is not None:
            _require_room(Path(out), seed, transform)
        pack = open_data(data)
        requested = feed_as_encoder(requested, pack.info.patch_px, pack.info.mpp)
        requested = _fix_precision(requested, device)
        if transform is not None:
            check_transform(transform, requested.preprocessing.input_px)
        return _begin(requested, pack, split, fold, seed, out, transform)

    with join_processes(device) as (processes, device):
        begun = processes.do_first(begin)
        path = processes.broadcast(begun[0].path if begun else Path())
        run, pack = begun or _follow(path)
        engine = Engine(device, run.recipe.train.precision)
        if run.info["status"] != "finished":
            chosen = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}
            loggers = [name for name, is_on in chosen.items() if is_on]
            with _hold_lock(run) if processes.is_first else contextlib.nullcontext():
                _train(run, pack, engine, processes, loggers, transform, on_epoch)
    if plot is not None and processes.is_first:
        curves = draw_training(run.log(), chosen_epoch=run.info["chosen_epoch"], quantities=CURVES)
        with replace_atomic(plot) as partial:
            curves.savefig(partial, format=Path(plot).suffix[1:])
    return run


@contextlib.contextmanager
def _hold_lock(run: Run) -> Iterator[None]:
    """Hold the lock of a run, so that no other process trains it; explain errors of a full disk."""
    try:
        with FileLock(run.path / LOCK, timeout=0):
            yield
    except Timeout:
        raise RunError(f"{run.path} is being trained by another process") from None
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise RunError(
            f"{error.filename or run.path} could not be written ({error.strerror}): free space, then "
            f"resume with `biopsy train --resume {run.path}`"
        ) from None


def _follow(path: Path) -> tuple[Run, Pack]:
    """Open the run of rank 0, which has verified the pack."""
    run = Run.open(path)
    return run, run.open_pack(verify=False)


def open_data(data: Pack | Path | str) -> Pack:
    """Open a pack, or prepare an archive or folder of patches into a pack in the same folder."""
    if isinstance(data, Pack):
        return data
    source = Path(stage(data))
    if (source / DOCUMENT).is_file():
        used = Run.open(source).info["pack"]["path"]
        raise DataError(f"{source} is a run, not data: name a pack, such as its own, {used}")
    if is_pack(source) or not source.exists() or source.suffix == ".pack":
        return Pack.open(source)
    return prepare(source, source.with_name(f"{source.stem}.pack"))


def _fix_precision(recipe: Recipe, device: str) -> Recipe:
    """Return a recipe with ``train.precision = "auto"`` replaced by the precision of this device.

    It is stored with the run, so resuming and evaluating use it on other devices too.
    """
    precision = pick_precision(recipe.train.precision, device)
    if precision == recipe.train.precision:
        return recipe
    logger.info("precision: %s (auto)", precision)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def _begin(
    recipe: Recipe,
    pack: Pack,
    split_name: Split | str | None,
    fold: int | None,
    seed: int,
    out: Path | str | None,
    transform: Transform | None,
) -> tuple[Run, Pack]:
    """Validate the settings, and create the run or return a cached one."""
    pack.verify()
    split = choose_split(pack, split_name, recipe)
    subsets = split.subsets(pack, fold)
    network, weights = make_network(recipe, len(pack.class_names), seed)
    _check(recipe, pack, split, subsets, network)
    require_unseen(recipe, pack, split, fold)
    if (warning := check_start(recipe, pack, subsets)) is not None:
        weights["warning"] = warning
    used = take_fraction(np.flatnonzero(subsets == "train"), pack.target, recipe.train.fraction, seed)
    inputs = _find_inputs(recipe, pack, subsets)
    shares = _share_classes(recipe, pack, used, _read_weights(inputs, pack, used))
    if recipe.train.sampling == "undersample":
        used = sample_epoch(used, pack.target, sampling="undersample", seed=seed, epoch=1)
    total, trainable = count_parameters(network)
    run_id = name_run(recipe.name, seed)
    path = Path(out) if out is not None else RUNS / run_id
    info: RunInfo = {
        "id": run_id,
        "status": "running",
        "command": _repeat(path, pack, split, fold, seed),
        "recipe": recipe.name,
        "seed": seed,
        "split": {
            "name": split.name,
            "protocol": split.protocol,
            "fold": fold,
            "unit": split.unit,
            "as_published": split.is_published,
            "test_is_validation": split.test_is_validation,
            "patients_overlap": split.overlap,
            "subsets": {subset or "left out": _count(pack, subsets == subset) for subset in (*SUBSETS, "")},
            "used": _count(pack, np.isin(np.arange(len(pack)), used)),
        },
        "pack": {
            "path": str(pack.path.resolve()),
            "name": pack.path.name,
            "dataset": pack.info.dataset,
            "content_sha256": pack.info.content_sha256,
            "synthetic": pack.info.is_synthetic,
            "n_patches": len(pack),
            "n_patients": pack.info.counts["patients"],
            "unit": pack.unit,
        },
        "parameters": {"total": total, "trainable": trainable},
        "weights": weights,
        "epochs": recipe.train.epochs,
        "epochs_done": 0,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "environment": describe_environment(),
    }
    if inputs:
        info["inputs"] = inputs
    if recipe.model.pretrained or recipe.train.teacher:
        info["seen"] = record_seen(list_teachers(recipe.train.teacher), recipe, pack, subsets)
    if shares is not None:
        info["split"]["class_shares"] = shares
    if transform is not None:
        info["transform"], info["config_sha256"] = describe_transform(transform), None
    else:
        config = hash_config(recipe, pack, subsets, info["split"], seed, weights["sha256"], inputs)
        info["config_sha256"] = config
        result = find_cached_run(config, sorted(RUNS.glob("*")) if out is None else [path])
        if result is not None:
            return _reuse_run(result, pack), pack
    logger.info("network %s: %s", recipe.model.name, describe_weights(network, weights))
    table = pd.DataFrame({"patch_id": pack.table["patch_id"], "subset": subsets})
    return Run.create(path, info, recipe, table), pack


def _require_room(out: Path, seed: int, transform: Transform | None) -> None:
    """Refuse a folder with anything but a finished run, which may have the same configuration.

    Raises:
        RunError: If the folder is not empty.
    """
    try:
        run = Run.open(out)
    except RunError:
        require_empty(out)
    else:
        if run.info["status"] != "finished" or run.info["seed"] != seed or transform is not None:
            require_empty(out)


def _reuse_run(run: Run, pack: Pack) -> Run:
    """Return a cached run, with the path of its pack updated if it has moved."""
    logger.info(
        "%s of %s has the same configuration and is reused (set --out to train again in another folder)",
        run.path,
        run.info["started"][:10],
    )
    if not is_pack(run.info["pack"]["path"]):
        run.take_pack(pack)
    return run


def _check(recipe: Recipe, pack: Pack, split: Split, subsets: np.ndarray, network: torch.nn.Module) -> None:
    """Check for errors that would stop the training later."""
    for subset in ("train", "test" if split.test_is_validation else "validation"):
        if subset not in subsets:
            raise SplitError(
                f"split {split.name!r} has no {subset} patches: validation is needed to choose the epoch; "
                "make a split with `biopsy split`",
                "too-few",
            )
    target = pack.target[subsets == "train"]
    if len(np.unique(target)) < 2:
        raise SplitError(
            f"all training patches of split {split.name!r} are {pack.class_names[target[0]]!r}: "
            "training needs two classes",
            "classes",
        )
    for index in np.setdiff1d(pack.target[subsets != ""], target):
        logger.warning(
            "split %r has no training patches of class %r: the model will not learn to predict it",
            *(split.name, pack.class_names[index]),
        )
    class_weights(target, len(pack.class_names), recipe.train.class_weights)
    check_method(recipe.decision.calibration, len(pack.class_names), recipe.decision.prevalence)
    if recipe.model.context and not has_coordinates(pack.table[subsets != ""]):
        raise DataError(
            f"model.context={recipe.model.context:g} needs coordinates of the patches, and "
            f"{pack.path.name} has none: train with --set model.context=0"
        )
    if recipe.train.optimiser == PROBE:
        check_probe(recipe)
    else:
        optimiser_of(recipe, network)


def _find_inputs(recipe: Recipe, pack: Pack, subsets: np.ndarray) -> dict[str, RunInput]:
    """Return the files and classifiers that settings of ``[train]`` name, with their hashes."""
    inputs: dict[str, RunInput] = {}
    if recipe.train.patch_weights:
        path = expand_home(recipe.train.patch_weights).resolve()
        inputs["patch_weights"] = {"source": str(path), "sha256": sha256_file(path)}
    if teachers := recipe.train.teacher:
        inputs["teacher"] = identify_teachers(teachers)
        if (warning := check_teachers(teachers, pack, subsets)) is not None:
            inputs["teacher"]["warning"] = warning
    return inputs


def _require_unchanged(inputs: dict[str, RunInput]) -> None:
    """Check that the files and classifiers of a resumed run are those that it began with."""
    for setting, file in inputs.items():
        source = file["source"]
        sha256 = identify_teachers(source)["sha256"] if setting == "teacher" else sha256_file(source)
        if sha256 != file["sha256"]:
            raise RunError(
                f"{source} (train.{setting}) was changed since the run began: restore it, or start a new run",
                "altered",
            )


def _read_weights(inputs: dict[str, RunInput], pack: Pack, train: np.ndarray) -> np.ndarray | None:
    file = inputs.get("patch_weights")
    return read_patch_weights(file["source"], pack, train) if file else None


def _predict_teachers(
    inputs: dict[str, RunInput],
    recipe: Recipe,
    pack: Pack,
    train: np.ndarray,
    engine: Engine,
    processes: Processes,
) -> np.ndarray | None:
    if "teacher" not in inputs:
        return None
    source, temperature = inputs["teacher"]["source"], recipe.train.teacher_temperature
    logger.info("%s predicts %s training patches", source, f"{len(train):,}")
    return predict_teachers(source, pack, train, engine=engine, processes=processes, temperature=temperature)


def _share_classes(
    recipe: Recipe, pack: Pack, train: np.ndarray, patch_weights: np.ndarray | None
) -> dict[str, float] | None:
    """Return the share of each class in training, where sampling by patient or patch weights change it."""
    sampling, target = recipe.train.sampling, pack.target[train]
    if sampling != "within-patient" and patch_weights is None:
        return None
    if sampling == "within-patient":
        factor = recipe.train.single_class_weight
        weight = within_patient_shares(train, pack.target, pack.group_ids, factor)
        if np.allclose(weight, weight[0], atol=0):
            logger.info("sampling within patients draws all patches equally often")
            if patch_weights is None:
                return None
    else:
        weight = np.ones(len(train)) if sampling == "none" else 1 / np.bincount(target)[target]
    if patch_weights is not None:
        weight = weight * patch_weights[train]
    totals = np.bincount(target, weight, minlength=len(pack.class_names))
    return dict(zip(pack.class_names, (totals / totals.sum()).tolist(), strict=True))


def _repeat(path: Path, pack: Pack, split: Split, fold: int | None, seed: int) -> str:
    """Return the command that repeats the training; overrides are in the recipe of the run."""
    words = ["biopsy", "train", f"{path.name}/recipe.toml", "--data", pack.path.name, "--split", split.name]
    words += [] if fold is None else ["--fold", str(fold)]
    return shlex.join([*words, "--seed", str(seed)])


def _count(pack: Pack, chosen: np.ndarray) -> PatchCounts:
    per_class = np.bincount(pack.target[chosen], minlength=len(pack.class_names)).tolist()
    return {
        "patches": int(chosen.sum()),
        "groups": len(np.unique(pack.group_ids[chosen])),
        "per_class": dict(zip(pack.class_names, per_class, strict=True)),
    }


def choose_split(pack: Pack, name: Split | str | None, recipe: Recipe) -> Split:
    """Return a split by name; ``as-published`` is made from the recipe if the pack has none."""
    if isinstance(name, Split):
        return name
    if name == "as-published" and name not in list_splits(pack):
        return make_split(pack, protocol=name, recipe=recipe.as_published.split, save=False)
    return find_split(pack, name)


def _continue(
    resume: Run | Path | str, data: Pack | Path | str | None, *settings: object
) -> tuple[Run, Pack]:
    if any(value is not None for value in settings):
        raise RunError("a resumed run has its recipe and settings: omit them, or start a new run")
    run = Run.open(resume)
    if run.info["status"] == "finished":
        raise RunError(
            f"{run.path} is finished and cannot be resumed; evaluate it with `biopsy evaluate {run.path}`"
        )
    if data is not None:
        run.take_pack(Pack.open(data))
    pack = run.open_pack()
    if pack.path.resolve() != Path(run.info["pack"]["path"]):
        run.take_pack(pack)
        logger.info("the pack was moved to %s", pack.path)
    now, then = describe_environment(), run.info["environment"]
    changed = [f"{name} {then[name]} -> {now[name]}" for name in now if now[name] != then.get(name)]
    if changed:
        logger.warning("resumed on another machine or version: %s; results may not be bit-identical", changed)
    return run, pack


def _check_same_transform(run: Run, transform: Transform | None) -> None:
    """Check that the transform is the one with which the run was started."""
    original, current = (
        run.info.get("transform"),
        None if transform is None else describe_transform(transform),
    )
    if original != current:
        raise RunError(
            f"{run.path} was started with transform={original}, not {current}: use the same transform"
        )


def _train(
    run: Run,
    pack: Pack,
    engine: Engine,
    processes: Processes,
    logger_names: Sequence[str],
    transform: Transform | None,
    on_epoch: OnEpoch | None,
) -> None:
    recipe, started, before = run.recipe, time.perf_counter(), run.info["seconds"]
    inputs = run.info.get("inputs", {})
    _require_unchanged(inputs)
    subsets = run.subsets(pack)
    published = run.info["split"]["as_published"]
    checkpoint = recipe.as_published.checkpoint if published else recipe.train.checkpoint
    seed, train_subset = run.info["seed"], np.flatnonzero(subsets == "train")
    train = take_fraction(train_subset, pack.target, recipe.train.fraction, seed)
    task = Task(
        recipe=recipe,
        pack=pack,
        train=train,
        val=np.flatnonzero(subsets == run.validation_subset),
        preprocessing=fit_preprocessing(recipe, pack, train, published=published),
        engine=engine,
        seed=seed,
        keep_best=checkpoint == "best",
        patch_weights=_read_weights(inputs, pack, train),
        teacher=_predict_teachers(inputs, recipe, pack, train, engine, processes),
        transform=transform,
        processes=processes,
    )
    folder = run.path / "checkpoints"
    begun = (folder / LAST).exists()  # the checkpoint's weights replace those that training began with
    network, _ = make_network(recipe, len(pack.class_names), seed, load=not begun)
    if not processes.is_first:
        if recipe.train.optimiser != PROBE:
            fit(network, task, folder, lambda record: None)
        return
    run.info.pop("reason", None)  # of an earlier interruption
    run.update(
        status="running",
        device=str(engine.device),
        precision=engine.precision,
        processes=processes.world_size,
    )
    loggers, is_finished = open_loggers(logger_names, run), False

    def note(record: EpochRecord) -> None:
        run.write_log([*(past for past in run.log() if past["epoch"] < record["epoch"]), record])
        run.update(epochs_done=record["epoch"], seconds=before + time.perf_counter() - started)
        values = {name: value for name, value in record.items() if isinstance(value, float)}
        for epoch_logger in loggers:
            epoch_logger.log(values, record["epoch"])
        if on_epoch:
            on_epoch({**record, "run": str(run.path)})

    try:
        if recipe.train.optimiser == PROBE:
            progress = fit_probe(network, task, run.info["weights"], note)
        else:
            progress = fit(network, task, folder, note)
            processes.leave()
            load_weights(folder, network, progress.best_epoch if task.keep_best else None)
            merge_lora(network)
        is_finished = True
    except KeyboardInterrupt:
        run.update(status="interrupted")
        raise KeyboardInterrupt(str(run.path)) from None
    except PackError as error:
        run.update(status="interrupted", reason=str(error))
        raise
    except TrainingDiverged as error:
        run.update(status="failed", reason=str(error))
        raise
    finally:
        for epoch_logger in loggers:
            epoch_logger.close(is_finished=is_finished)
    pack.require_unchanged()
    pack.verify()
    run.write_log(progress.history)
    complete(run, network, task, progress)
    pack.require_unchanged()  # of which completing has read the training and validation patches again
    run.update(status="finished", seconds=before + time.perf_counter() - started)
