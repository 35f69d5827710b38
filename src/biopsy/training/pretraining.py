"""Self-supervised pre-training of a recipe's network on patches of a pack, without their labels.

The method is VICReg (Bardes et al. 2022): embeddings of two views of a patch are made alike, while each of
their dimensions keeps its variance and is decorrelated from the others. It needs neither negative pairs nor a
second network that follows the first, so it works with the small batches of a CPU; and as the variance is
part of its loss, a collapse (equal embeddings of all patches) is prevented and can be measured.

The second view may be of a neighbouring patch of the slide, whose tissue and stain are similar.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional

from biopsy.core.errors import FileFormatError, RecipeError, RunError, SplitError, TrainingDiverged
from biopsy.core.files import LOCK, create_directory, sha256_file, write_atomic, write_json
from biopsy.core.results import Result, number
from biopsy.core.seeds import derive, make_rng
from biopsy.core.text import count, count_patches
from biopsy.data.coordinates import REACH, find_slides, find_step, has_coordinates
from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.models.classifier import WEIGHTS
from biopsy.models.engine import Engine
from biopsy.models.weight_files import is_head
from biopsy.models.weights import describe_weights, feed_as_encoder, make_network
from biopsy.recipes import DEFINING_TABLES, Overrides, Recipe, load_recipe, recipe_toml
from biopsy.training.batches import Batches
from biopsy.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from biopsy.training.finalize import fit_preprocessing
from biopsy.training.fit import Task, optimiser_of
from biopsy.training.optimisers import rate_of, set_learning_rate
from biopsy.training.patch_operations import affine_matrix, send, warp
from biopsy.training.pretraining_record import (
    DOCUMENT,
    FORMAT,
    PretrainingInfo,
    read_pretraining,
    require_unseen,
)
from biopsy.training.runs import EpochRecord, OnEpoch, SeenPatients, describe_environment
from biopsy.training.seen_patients import check_start, record_seen
from biopsy.training.train import choose_split, open_data

logger = logging.getLogger(__name__)

FOLDER = Path("pretrained")
WIDTH = 256  # of the embeddings: their covariance is estimated on one batch
COVARIANCE = 1 / 25  # Bardes et al. 2022, sec. 4.2: 25, 25 and 1, here divided by 25 to keep rates of recipes
RATIO = 4 / 3  # of the sides of a crop, and its inverse, as Chen & He 2021 (SimSiam), app. A
GREY = 0.2  # probability, as there
COLLAPSED = 0.1  # mean standard deviation of the embeddings; 0.3 with random weights, the loss aims at 1


@dataclass(frozen=True, eq=False, repr=False)
class Pretraining(Result):
    """A pre-training; ``pretraining["log"]`` has the loss and the spread of the embeddings by epoch."""

    document: PretrainingInfo
    path: Path

    @property
    def weights(self) -> Path:
        """File of the network's weights, without the head, for ``model.weights``."""
        return self.path / WEIGHTS

    def blocks(self) -> list[str]:
        m, last = self.document, self.document["log"][-1]
        patches = count_patches(m["n_patches"], len(m["patients"] or []), m["unit"])
        return [
            f"{m['network']} pre-trained for {count(m['epochs'], 'epoch')} on {patches}: "
            f"loss {number(last['loss'])}, spread of the embeddings {number(last['spread'])}",
            f"start a training from it with --set model.weights={self.weights}",
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per epoch."""
        return pd.DataFrame(self.document["log"])

    def to_json(self) -> dict[str, object]:
        return {"path": self.path, "weights": self.weights, **self.document}


def pretrain(
    recipe: str | Path | Recipe,
    data: Pack | Path | str,
    *,
    split: Split | str,
    fold: int | None = None,
    seed: int = 0,
    epochs: int = 100,
    neighbours: float = 0.5,
    crop: float = 0.2,
    overrides: Overrides = (),
    out: Path | str | None = None,
    device: str = "auto",
    on_epoch: OnEpoch | None = None,
) -> Pretraining:
    """Pre-train a recipe's network on patches of a pack, without labels (VICReg, Bardes et al. 2022).

    The patches are those of the training subset and of patients in no subset, never of test or validation
    patients. Optimiser, schedule, batch size, precision and augmentation are the recipe's; the views are also
    cropped, and a fifth of them are grey. Weights are of the last epoch, for training with ``model.weights``.
    The same command continues an interrupted pre-training.

    Args:
        recipe: Name of a recipe, or TOML file.
        data: Pack, or an archive to prepare.
        split: Split of the pack, which training must use too.
        fold: Test fold, for a split with folds.
        seed: Random seed of initial weights, order and views.
        epochs: Number of passes over the patches.
        neighbours: Probability that the second view is of a neighbouring patch of the slide; without
            coordinates it is of the same patch.
        crop: Smallest area of a crop, as a fraction of the patch.
        overrides: Changes of recipe settings, ``KEY=VALUE`` such as ``train.lr=0.05``; may be repeated
            (in Python: a list or a mapping).
        out: Output folder (default: a folder in ``pretrained/`` named by recipe, split and seed).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        on_epoch: Called with each epoch's record.

    Raises:
        RecipeError: If the recipe freezes a part of the network, or an option is out of range.
        SplitError: If the split does not exist, fewer than two patches can be used, or the recipe's weights
            were pre-trained on patches of test or validation patients.
        RunError: If the output folder is of another pre-training, or the recipe's weights are of a run that
            has seen test patients.
        TrainingDiverged: If the loss is not finite.
    """
    requested, pack = load_recipe(recipe, overrides), open_data(data)
    requested = feed_as_encoder(requested, pack.info.patch_px, pack.info.mpp)
    engine = Engine(device, requested.train.precision)
    fixed = {"train.precision": engine.precision, "augmentation.stain_transfer": 0.0}  # which reads labels
    requested = load_recipe(requested, fixed)
    _check(requested, epochs, neighbours, crop)
    pack.verify()
    chosen = choose_split(pack, split, requested)
    require_unseen(requested, pack, chosen, fold)
    subsets = chosen.subsets(pack, fold)
    rows = select_patches(pack, subsets)
    network, start = make_network(requested, len(pack.class_names), seed)
    if (warning := check_start(requested, pack, subsets)) is not None:
        start["warning"] = warning
        logger.warning("%s", warning)
    positives = Positives.find(pack.table.iloc[rows], neighbours)
    parts = [requested.name, chosen.name, *([] if fold is None else [f"fold{fold}"]), f"s{seed}"]
    path = FOLDER / "-".join(parts) if out is None else Path(out)
    described = {
        "recipe": requested.name,
        "network": requested.model.name,
        "start": start,
        "pack": {name: getattr(pack.info, name) for name in ("dataset", "content_sha256", "is_synthetic")},
        "split": {"name": chosen.name, "protocol": chosen.protocol, "unit": chosen.unit, "fold": fold},
        "seed": seed,
        "epochs": epochs,
        "neighbours": neighbours,
        "crop": crop,
        "positives": "neighbours" if positives.n_with_neighbours else "same patch",
        "n_patches": len(rows),
        "n_with_neighbours": positives.n_with_neighbours,
        "unit": pack.unit,
        "patients": None if pack.unit == "patch" else np.unique(pack.group_ids[rows]).tolist(),
    }
    info = _begin(path, requested, described, rows, record_seen([], requested, pack, subsets))
    logger.info("network %s: %s", requested.model.name, describe_weights(network, start))
    if neighbours and not positives.n_with_neighbours:
        logger.warning("no patch of %s has neighbours: both views are of the same patch", pack.path.name)
    if info["status"] != "finished":
        task = Task(
            recipe=requested,
            pack=pack,
            train=rows,
            val=rows[:0],
            preprocessing=fit_preprocessing(requested, pack, rows),
            engine=engine,
            seed=seed,
            keep_best=False,
        )
        try:
            with FileLock(path / LOCK, timeout=0):
                info = _fit(path, info, task, positives, network, on_epoch)
        except Timeout:
            raise RunError(f"{path} is being written by another process") from None
    elif sha256_file(path / WEIGHTS) != info["weights_sha256"]:
        raise FileFormatError(
            path / WEIGHTS, "altered", "was changed since it was written: remove the folder"
        )
    for message in info["warnings"]:
        logger.warning("%s", message)
    return Pretraining(info, path)


def _check(recipe: Recipe, epochs: int, neighbours: float, crop: float) -> None:
    if recipe.model.trainable != "all" or recipe.train.optimiser == "logistic-regression":
        raise RecipeError(
            f"recipe {recipe.name!r} trains {recipe.model.trainable!r} of a frozen network, which leaves "
            "nothing to pre-train: use --set model.trainable=all and an optimiser, or another recipe",
            "conflict",
        )
    if epochs < 1:
        raise RecipeError(f"epochs={epochs} is not possible: at least 1", "value")
    if recipe.train.batch_size < 2:
        raise RecipeError(
            "train.batch_size=1 has no spread of embeddings: pre-training needs at least 2", "value"
        )
    if not 0 <= neighbours <= 1:
        raise RecipeError(f"neighbours={neighbours:g} is not a probability: between 0 and 1", "value")
    if not 0 < crop <= 1:
        raise RecipeError(f"crop={crop:g} is not a fraction of the area: above 0, at most 1", "value")


def select_patches(pack: Pack, subsets: np.ndarray) -> np.ndarray:
    """Return the rows of the training subset, and of known patients in no subset, ascending.

    Patients of the validation and test subsets are left out, also where a published split has patches of them
    in training.

    Raises:
        SplitError: If fewer than two patches remain.
    """
    held_out = np.unique(pack.group_ids[np.isin(subsets, ("validation", "test"))])
    is_known = np.zeros(len(pack), bool)
    if pack.unit != "patch":
        is_known = pack.table[f"{pack.unit}_id"].notna().to_numpy()
    may_be_used = (subsets == "train") | ((subsets == "") & is_known)
    rows = np.flatnonzero(may_be_used & ~np.isin(pack.group_ids, held_out))
    if len(rows) < 2:
        raise SplitError(
            f"{len(rows)} patches are of no test or validation {pack.unit}; pre-training needs at least two: "
            "make another split with `biopsy split`",
            "too-few",
        )
    return rows


@dataclass(frozen=True)
class Positives:
    """Neighbours of ``n`` patches on their slides, from which second views are drawn.

    Attributes:
        start: Position in ``neighbours`` of the first neighbour of each patch, and the end, ``(n + 1,)``.
        neighbours: Indices of neighbouring patches.
        probability: Probability of a neighbour, for patches that have one.
    """

    start: np.ndarray
    neighbours: np.ndarray
    probability: float

    @classmethod
    def find(cls, table: pd.DataFrame, probability: float) -> "Positives":
        """Find the neighbours at one grid step, diagonal ones included, among the patches of a table."""
        pairs = [np.empty((0, 2), np.int64)]
        if probability and has_coordinates(table):
            slides = find_slides(table)
            reach = REACH * find_step(slides)
            for rows, positions in slides:
                pairs.append(rows[cKDTree(positions).query_pairs(reach, p=np.inf, output_type="ndarray")])
        one_way = np.concatenate(pairs)
        first, second = np.concatenate([one_way, one_way[:, ::-1]]).T
        order = np.lexsort((second, first))
        start = np.searchsorted(first[order], np.arange(len(table) + 1))
        return cls(start, second[order], probability)

    @property
    def n_with_neighbours(self) -> int:
        return int((np.diff(self.start) > 0).sum())

    def draw(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the patch of the second view for each patch of an order, ``(n,)``."""
        count, (coin, which) = np.diff(self.start)[order], rng.random((2, len(order)))
        second, chosen = order.copy(), (coin < self.probability) & (count > 0)
        offset = (which * count)[chosen].astype(np.int64)
        second[chosen] = self.neighbours[self.start[order[chosen]] + offset]
        return second


@dataclass(frozen=True)
class View:
    """Random resized crop of each patch of a batch, and grey for some: a transform of `Batches`.

    Attributes:
        crop: Smallest area, as a fraction of the patch.
    """

    crop: float

    def __call__(self, batch: Tensor) -> Tensor:
        n, _, height_px, width_px = batch.shape
        area, ratio, x, y, coin = torch.rand(5, n, dtype=torch.float64)
        area, ratio = self.crop + (1 - self.crop) * area, RATIO ** (2 * ratio - 1)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        zeros = torch.zeros_like(area)
        matrix = affine_matrix(
            rotation_deg=zeros,
            shift_x_px=(x - 0.5) * (1 - width) * width_px,
            shift_y_px=(y - 0.5) * (1 - height) * height_px,
            shear_deg=zeros,
            zoom_x=width,
            zoom_y=height,
        )
        batch = warp(batch, matrix)
        is_grey = send(coin < GREY, batch)
        return torch.where(is_grey[:, None, None, None], batch.mean(dim=1, keepdim=True), batch)


class _Embedder(nn.Module):
    """A network without its head, and a projector to the embeddings ``(B, WIDTH)``."""

    def __init__(self, network: nn.Module, input_px: int, seed: int) -> None:
        super().__init__()
        self.network = network.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            n_features = self._features(torch.zeros(2, 3, input_px, input_px)).shape[1]
            torch.manual_seed(derive(seed, "projector"))
            self.projector = nn.Sequential(
                *(nn.Linear(n_features, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()),
                *(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()),
                nn.Linear(WIDTH, WIDTH),
            )

    def _features(self, patches: Tensor) -> Tensor:
        features: Any = self.network.features
        return features(patches)

    def forward(self, patches: Tensor) -> Tensor:
        return self.projector(self._features(patches))


def vicreg_loss(embeddings: Tensor, _: Tensor | None = None) -> Tensor:
    """Return the loss of VICReg, divided by 25, of the first views ``(B, d)`` followed by the second ones."""
    first, second = embeddings.chunk(2)
    loss = functional.mse_loss(first, second)
    for view in (first, second):
        centred = view - view.mean(dim=0)
        covariance = centred.T @ centred / (len(view) - 1)
        variance = covariance.diagonal()
        loss = loss + functional.relu(1 - (variance + 1e-4).sqrt()).mean() / 2
        loss = loss + COVARIANCE * (covariance.square().sum() - variance.square().sum()) / view.shape[1]
    return loss


def _begin(
    path: Path, recipe: Recipe, described: Mapping[str, object], rows: np.ndarray, seen: list[SeenPatients]
) -> PretrainingInfo:
    """Create the folder of a pre-training, or read the document of one with the same settings."""
    settings = [recipe.model_dump(mode="json", include=set(DEFINING_TABLES)), described, rows.tolist()]
    config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if (path / DOCUMENT).is_file():
        info = read_pretraining(path / DOCUMENT)
        if info["config_sha256"] != config:
            raise RunError(f"{path} is of a pre-training with other data or settings: choose another --out")
        return info
    info = PretrainingInfo(
        format=FORMAT,
        status="running",
        config_sha256=config,
        **described,  # type: ignore[typeddict-item]
        seen=seen,
        log=[],
        warnings=[],
        weights_sha256=None,
        environment=describe_environment(),
    )
    with create_directory(path) as partial:
        write_atomic(partial / "recipe.toml", recipe_toml(recipe))
        write_json(partial / DOCUMENT, info)
    return info


def _fit(
    path: Path,
    info: PretrainingInfo,
    task: Task,
    positives: Positives,
    network: nn.Module,
    on_epoch: OnEpoch | None,
) -> PretrainingInfo:
    """Train to the last epoch from the last checkpoint, and write weights and document."""
    recipe, pack, engine = task.recipe, task.pack, task.engine
    model = engine.place(_Embedder(network, recipe.preprocessing.input_px, task.seed))
    optimiser = optimiser_of(recipe, model)
    progress = load_checkpoint(path / "checkpoints", model, optimiser, engine.device)
    views = [
        Batches.from_pack(
            *(pack, recipe, task.train, task.preprocessing),
            drop_last=len(task.train) > recipe.train.batch_size,
            transform=View(info["crop"]),
            device=engine.device,
            seed=derive(task.seed, "view", name),
        )
        for name in ("first", "second")
    ]
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        while progress.epoch < info["epochs"]:
            record = _run_epoch(model, optimiser, task, views, positives, progress, info["epochs"])
            progress.history.append(record)
            pack.require_unchanged()
            save_checkpoint(path / "checkpoints", model, optimiser, progress)
            info = {**info, "log": progress.history}
            write_json(path / DOCUMENT, info)
            if on_epoch:
                on_epoch({**record, "run": str(path)})
    pack.verify()
    body = {name: tensor.cpu() for name, tensor in network.state_dict().items() if not is_head(name)}
    write_atomic(path / WEIGHTS, save({name: tensor.contiguous() for name, tensor in body.items()}))
    spread = progress.history[-1]["spread"]
    warning = (
        f"the embeddings have collapsed: their standard deviation is {spread:.3f}, the loss aims at 1, so "
        "the weights are of no use; use a lower --set train.lr or train.weight_decay"
    )
    info = {**info, "status": "finished", "log": progress.history}
    info["warnings"] = [warning] if spread < COLLAPSED else []
    info["weights_sha256"] = sha256_file(path / WEIGHTS)
    write_json(path / DOCUMENT, info)
    return info


def _run_epoch(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    task: Task,
    views: list[Batches],
    positives: Positives,
    progress: Progress,
    n_epochs: int,
) -> EpochRecord:
    """Run one epoch and return its record, with the mean standard deviation of the embeddings."""
    settings, rows, epoch, started = task.recipe.train, task.train, progress.epoch + 1, time.perf_counter()
    order = make_rng(task.seed, "order", epoch).permutation(len(rows))
    second = positives.draw(order, make_rng(task.seed, "neighbours", epoch))
    steps, lr = views[0].count(len(rows)), settings.lr
    losses: list[Tensor] = []
    spreads: list[Tensor] = []
    n_seen = 0
    torch.manual_seed(derive(task.seed, "dropout", epoch))
    model.train()
    pairs = (view.iterate(rows[part], epoch=epoch) for view, part in zip(views, (order, second), strict=True))
    for (one, target), (other, _) in zip(*pairs, strict=True):
        lr = rate_of(
            settings,
            progress.step + len(losses),
            steps=steps,
            n_epochs=n_epochs,
            history=[past["loss"] for past in progress.history],
        )
        set_learning_rate(optimiser, lr)
        batch = torch.cat([one, other])
        loss, embeddings = task.engine.train_step(model, optimiser, batch, target, vicreg_loss)
        losses.append(loss)
        spreads.append(embeddings[: len(one)].std(dim=0).mean())
        n_seen += len(one)
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise TrainingDiverged(
            f"the loss became {mean_loss:g} in epoch {epoch} of the pre-training: lower the rate with "
            "--set train.lr=..."
        )
    progress.epoch, progress.step = epoch, progress.step + len(losses)
    seconds = time.perf_counter() - started
    return EpochRecord(
        epoch=epoch,
        step=progress.step,
        loss=mean_loss,
        spread=float(torch.stack(spreads).mean()),
        lr=lr,
        images_per_s=n_seen / seconds,
        seconds=seconds,
        time_left_s=seconds * (n_epochs - epoch),
    )
