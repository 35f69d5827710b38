"""Probes: a logistic regression on the features of a frozen network.

Features are computed once for all patches of a pack and kept in it, ``features/<hash>.npy``, by a hash of
network, weights, preprocessing and patches; every later probe of the same network reads them.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from typing_extensions import TypedDict

from biopsy.core.errors import FileFormatError, RecipeError
from biopsy.core.files import read_json, replace_atomic, sha256_file, write_json
from biopsy.core.loaders import map_array, validate
from biopsy.data.packs import Pack
from biopsy.models.classifier import StartWeights
from biopsy.models.engine import Engine
from biopsy.recipes import Recipe
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.recipes.schema import Augmentation
from biopsy.training.checkpoints import Progress
from biopsy.training.fit import Task
from biopsy.training.runs import EpochRecord, OnEpoch
from biopsy.training.sampling import class_weights

logger = logging.getLogger(__name__)

PROBE = "logistic-regression"
FOLDER, FORMAT = "features", "biopsy-features/1"
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty, scikit-learn's ``C``, of which one is chosen."""
MOST_FOLDS = 5
BATCH_SIZE = 64
MAX_ITERATIONS = 500
COLUMNS = 64
"""Features that are standardised at once."""
DISTANCES_MB = 128
"""Memory for distances to neighbours, which scikit-learn takes three times."""


class CachedFile(NamedTuple):
    """Name of a file of features, and the seconds of computing them."""

    file: str
    seconds: float


class _CachedFeatures(TypedDict):
    sha256: str
    seconds: float


def check_probe(recipe: Recipe) -> None:
    """Refuse settings that are not possible for a probe.

    Raises:
        RecipeError: Naming the setting and its value.
    """
    faults = {
        "model.trainable=head": recipe.model.trainable != "head",
        "model.lora_rank=0": recipe.model.lora_rank != 0,
        "model.tta=none": recipe.model.tta != "none",
        "no augmentation": recipe.augmentation != Augmentation(),
        "train.sampling=none": recipe.train.sampling != "none",
        "no train.patch_weights": recipe.train.patch_weights != "",
        "no train.teacher": recipe.train.teacher != "",
        "train.loss=cross-entropy": recipe.train.loss != "cross-entropy",
    }
    if required := [setting for setting, is_wrong in faults.items() if is_wrong]:
        raise RecipeError(
            f"train.optimiser={PROBE} needs {', '.join(required)}: features are computed once", "conflict"
        )


def fit_probe(network: torch.nn.Module, task: Task, weights: StartWeights, on_epoch: OnEpoch) -> Progress:
    """Fit the linear head of a network on its cached features.

    Args:
        network: With a linear ``head``, whose weights are replaced.
        on_epoch: Called with the one record.

    Returns:
        A history of one record, with the penalty that was chosen.
    """
    head = getattr(network, "head", None)
    if not isinstance(head, torch.nn.Linear):
        raise RecipeError(
            f"{task.recipe.model.name} has no linear head to fit: use a library's network", "network"
        )
    started, pack, rows = time.perf_counter(), task.pack, task.train
    network = task.engine.place(network)
    features, cached_file = cached_features(
        network, pack, task.preprocessing, task.engine, identity=_identify(task, weights)
    )
    names, groups = pack.class_names, pack.group_ids[rows]
    class_weight = class_weights(pack.target[rows], len(names), task.recipe.train.class_weights)
    coefficients, intercepts, penalty = fit_logistic(
        np.asarray(features[rows]),
        pack.target[rows],
        groups,
        n_classes=len(names),
        class_weight=None if class_weight is None else np.asarray(class_weight),
        seed=task.seed,
    )
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(coefficients))
        head.bias.copy_(torch.from_numpy(intercepts))
    train, val = (features[subset] @ coefficients.T + intercepts for subset in (rows, task.val))
    loss, accuracy, auroc = _score(train, pack.target[rows], pack)
    val_loss, val_accuracy, val_auroc = _score(val, pack.target[task.val], pack)
    record = EpochRecord(
        epoch=1,
        step=1,
        best=True,
        penalty=penalty,
        loss=loss,
        accuracy=accuracy,
        auroc=auroc,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
        val_auroc=val_auroc,
        seconds=time.perf_counter() - started,
        images_per_s=len(pack) / cached_file.seconds,
        features=cached_file.file,
        feature_seconds=cached_file.seconds,
        n_features=features.shape[1],
    )
    on_epoch(record)
    return Progress(epoch=1, step=1, best_epoch=1, best_value=record["val_auroc"], history=[record])


def _identify(task: Task, weights: StartWeights) -> dict[str, object]:
    """Return everything that features depend on, besides the pack."""
    return {
        "network": task.recipe.model.name,
        "params": task.recipe.model.params,
        "weights": weights["sha256"] or f"random, seed {task.seed}",
        "preprocessing": dict(vars(task.preprocessing)),
        "precision": task.engine.precision,
    }


def cached_features(
    network: torch.nn.Module,
    pack: Pack,
    preprocessing: Preprocessing,
    engine: Engine,
    *,
    identity: Mapping[str, object],
) -> tuple[np.ndarray, CachedFile]:
    """Return the features of all patches of a pack, cached in the pack.

    Args:
        network: Placed on the engine's device, with ``features``.
        pack: The pack, in which features are cached if it is writable.

    Returns:
        float32 ``(n, n_features)``, and the cached file.
    """
    metadata, name = {"pack": pack.info.content_sha256, **identity}, identity["network"]
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, default=list).encode()).hexdigest()
    path = pack.path / FOLDER / f"{digest[:16]}.npy"
    try:
        about = path.with_suffix(".json")
        cached = validate(about, _CachedFeatures, read_json(about, format=FORMAT))
        if cached["sha256"] == sha256_file(path):
            logger.info("features of the patches by the network %s are in the pack: %s", name, path.name)
            return map_array(path, dtype=np.float32, ndim=2), CachedFile(path.name, cached["seconds"])
        logger.warning("features are computed again: %s was changed", path)
    except FileFormatError as error:
        if error.reason != "missing":
            logger.warning("features are computed again: %s", error)
    logger.info(
        "computing the features of %s patches by %s, whose weights stay as they are",
        *(f"{len(pack):,}", name),
    )
    started = time.perf_counter()
    features = _compute(network, pack, preprocessing, engine)
    seconds = time.perf_counter() - started
    metadata |= {"format": FORMAT, "file": path.name, "seconds": seconds}
    try:
        path.parent.mkdir(exist_ok=True)
        with replace_atomic(path) as partial, partial.open("wb") as file:
            np.save(file, features)
        write_json(path.with_suffix(".json"), metadata | {"sha256": sha256_file(path)})
    except OSError as error:
        logger.warning("features are not kept in the pack (%s): they are computed again next time", error)
    return features, CachedFile(path.name, seconds)


def _compute(
    network: torch.nn.Module, pack: Pack, preprocessing: Preprocessing, engine: Engine
) -> np.ndarray:
    was_training, chunks = network.training, []
    network.eval()
    features: Any = _Features(network)
    try:
        for start in range(0, len(pack), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            sizes = pack.sizes[rows]
            batch = preprocessing.prepare(
                np.asarray(pack.patches[rows]), sizes[:, 0], sizes[:, 1], device=engine.device
            )
            chunks.append(engine.predict(features, batch).float().cpu().numpy())
    finally:
        network.train(was_training)
    return np.concatenate(chunks)


class _Features(torch.nn.Module):
    """A network whose output is its features."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.network.features(batch)  # type: ignore[operator]


def fit_logistic(
    features: np.ndarray,
    target: np.ndarray,
    groups: np.ndarray,
    *,
    n_classes: int,
    class_weight: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit a logistic regression with a penalty chosen by grouped cross-validation of the log loss.

    Args:
        features: ``(n, n_features)``; standardised inside.
        target: Class of each, ``(n,)``; every class must occur.
        groups: The patient of each, ``(n,)``: none is on both sides of a fold.
        class_weight: One a class; None weighs all patches alike.

    Returns:
        Coefficients ``(n_classes, n_features)`` and intercepts ``(n_classes,)`` for the features as they are,
        float32, and the ``C`` that was chosen.
    """
    scaled, mean, spread = _standardize(features)
    weights = np.ones(len(target)) if class_weight is None else class_weight[target]
    penalty = _choose_penalty(scaled, target, groups, weights, n_classes, seed)
    model = _fit(scaled, target, weights, penalty)
    coefficients, intercepts = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if n_classes == 2:
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        intercepts = np.concatenate([np.zeros_like(intercepts), intercepts])
    coefficients = coefficients / spread
    return (
        coefficients.astype(np.float32),
        (intercepts - coefficients @ mean).astype(np.float32),
        penalty,
    )


def _standardize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features of mean 0 and standard deviation 1, float32, and both; never all of them in float64."""
    scaled = np.empty(features.shape, np.float32)
    mean, spread = np.empty((2, features.shape[1]))
    for start in range(0, features.shape[1], COLUMNS):
        block = slice(start, start + COLUMNS)
        columns = features[:, block].astype(np.float64)
        mean[block], spread[block] = columns.mean(axis=0), columns.std(axis=0)
        spread[block][spread[block] == 0] = 1.0
        scaled[:, block] = (columns - mean[block]) / spread[block]
    return scaled, mean, spread


def _choose_penalty(
    scaled: np.ndarray,
    target: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray,
    n_classes: int,
    seed: int,
) -> float:
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold

    n_folds = min(MOST_FOLDS, len(np.unique(groups)))
    if n_folds < 2:
        logger.warning("one training patient: the penalty of the probe cannot be chosen and is C=1")
        return 1.0
    losses = np.zeros(len(PENALTIES))
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for fitted, held_out in folds.split(scaled, target, groups):
        if len(np.unique(target[fitted])) < n_classes:
            continue
        for index, penalty in enumerate(PENALTIES):
            probs = _fit(scaled[fitted], target[fitted], weights[fitted], penalty).predict_proba(
                scaled[held_out]
            )
            losses[index] += len(held_out) * log_loss(
                target[held_out], probs, sample_weight=weights[held_out], labels=range(n_classes)
            )
    return float(PENALTIES[int(losses.argmin())]) if losses.any() else 1.0


def _fit(scaled: np.ndarray, target: np.ndarray, weights: np.ndarray, penalty: float) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties on separable features
        return LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS).fit(scaled, target, weights)


def _score(logits: np.ndarray, target: np.ndarray, pack: Pack) -> tuple[float, float, float | None]:
    """Return loss, accuracy and, for two classes, AUROC."""
    from scipy.special import softmax
    from sklearn.metrics import log_loss, roc_auc_score

    probs, positive = softmax(logits.astype(np.float64), axis=1), pack.positive_index
    labels = range(len(pack.class_names))
    auroc = None
    if positive is not None and len(np.unique(target)) == 2:
        auroc = float(roc_auc_score(target == positive, probs[:, positive]))
    loss = float(log_loss(target, probs, labels=labels))
    return loss, float((logits.argmax(axis=1) == target).mean()), auroc


def neighbour_votes(
    train: np.ndarray, target: np.ndarray, features: np.ndarray, *, n_classes: int, n_neighbours: int = 20
) -> np.ndarray:
    """Return the class proportions among the nearest training patches, ``(n, n_classes)``.

    Nearest by the cosine of the features, as in the k-NN evaluation of DINO (Caron et al. 2021), unweighted.
    """
    from sklearn import config_context
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(n_neighbours, len(train)), metric="cosine").fit(train, target)
    votes = np.zeros((len(features), n_classes))
    with config_context(working_memory=DISTANCES_MB):
        votes[:, model.classes_] = model.predict_proba(features)
    return votes
