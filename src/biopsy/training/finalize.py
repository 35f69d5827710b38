"""Final outputs of a training: classifier, thresholds, and predictions on validation."""

import logging

import numpy as np
import torch

from biopsy.data.packs import Pack
from biopsy.data.predictions import describe_patches
from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.engine import outputs_of
from biopsy.models.inference import open_predictor
from biopsy.models.out_of_distribution import REFERENCE_PATCHES, fit_reference
from biopsy.recipes import Recipe
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.training.batch_norm import reestimate_batch_norm
from biopsy.training.checkpoints import Progress
from biopsy.training.fit import Task
from biopsy.training.postprocessing import (
    fit_run_postprocessing,
    warn_of_calibration,
    warn_of_spread,
    write_validation,
)
from biopsy.training.probe import PROBE
from biopsy.training.runs import NormalisationRecord, Run

logger = logging.getLogger(__name__)


def complete(run: Run, network: torch.nn.Module, task: Task, progress: Progress) -> None:
    """Fit the postprocessing on validation, and write the outputs.

    Args:
        run: Gets ``classifier/`` and ``predictions/validation.parquet``, and what was chosen in its record.
    """
    chosen_epoch = progress.best_epoch if task.keep_best else None
    recipe, pack = task.recipe, task.pack
    info = ClassifierInfo(
        network=recipe.model.name,
        params=recipe.model.params,
        class_names=pack.class_names,
        positive_class=pack.info.positive_class,
        patch_px=pack.info.patch_px,
        mpp=pack.info.mpp,
        preprocessing=task.preprocessing,
        outputs=outputs_of(recipe.train.loss),
        tta=recipe.model.tta,
        pack={"name": pack.path.name, "content_sha256": pack.info.content_sha256},
        recipe=recipe.name,
    )
    if run.info["weights"]["pretrained"]:
        info.licence += f", and as that of the weights it began with: {run.info['weights']['licence']}"
    network = task.engine.place(network)
    normalisation = None
    if recipe.train.optimiser != PROBE:  # whose network is frozen, statistics and all
        normalisation = reestimate_batch_norm(
            network,
            task.preprocessing,
            pack,
            task.train,
            engine=task.engine,
            seed=task.seed,
            reestimate=not run.info["split"]["as_published"],
        )
    classifier = Classifier(info, network)
    n_patches = len(task.val) + sum(min(len(rows), REFERENCE_PATCHES) for rows in (task.train, task.val))
    with open_predictor(classifier, task.engine, n_patches) as predictor:
        logits = predictor.logits(pack.patches, pack.sizes, task.val)
        fit_reference(classifier, predictor, pack.patches, pack.sizes, task.train, task.val, seed=task.seed)
    val = pack.target[task.val], pack.group_ids[task.val]
    single_logits = None
    if recipe.model.context:
        classifier.info.context = recipe.model.context
        single_logits, logits = logits, classifier.add_context(logits, pack.table.iloc[task.val])
    fit_run_postprocessing(run, recipe, classifier, logits, *val, single_logits=single_logits)
    warnings = [
        _warn_unsettled(normalisation, progress.step, epoch_chosen=recipe.train.checkpoint == "best"),
        warn_of_spread(classifier, logits, run.validation_subset),
        run.info["weights"].get("warning"),
        *(file.get("warning") for file in run.info.get("inputs", {}).values()),
    ]
    for message in filter(None, [*warn_of_calibration(classifier), *warnings]):
        logger.warning("%s", message)
    classifier.base_network.to("cpu")
    classifier.save(run.path / "classifier")
    split = run.info["split"]
    write_validation(
        run,
        classifier,
        describe_patches(pack, task.val, subset=run.validation_subset, fold=split["fold"]),
        logits,
        {"pack_sha256": pack.info.content_sha256, "split": split["name"]},
        single_logits=single_logits,
    )
    run.update(
        chosen_epoch=chosen_epoch or progress.epoch,
        epochs_done=progress.epoch,
        batch_norm=normalisation,
        warnings=[message for message in warnings if message],
        stopped_early=progress.epoch < recipe.train.epochs,
        threshold=classifier.decision_threshold,
        classifier_sha256=classifier.sha256,
        files=run.hash_files("classifier/classifier.json", "classifier/weights.safetensors", "log.jsonl"),
    )


def _warn_unsettled(record: NormalisationRecord | None, n_updates: int, *, epoch_chosen: bool) -> str | None:
    if record is None or record["settled"]:
        return None
    if not record["reestimated"]:
        return (
            f"the running statistics of batch normalisation had not converged after {n_updates:,} updates "
            "and are kept, as published: predictions differ from those during training"
        )
    return (
        f"the running statistics of batch normalisation had not converged after {n_updates:,} updates and "
        f"were recomputed on {record['n_patches']:,} training patches"
        + ("; the epoch was chosen before that" if epoch_chosen else "")
    )


def fit_preprocessing(
    recipe: Recipe, pack: Pack, train: np.ndarray, *, published: bool = False
) -> Preprocessing:
    """Return the recipe's preprocessing, with mean and std of training patches if requested.

    Args:
        published: Whether to standardise as on the split of the publication.
    """
    preprocessing = recipe.preprocessing
    standardise = preprocessing.standardise
    if published:
        standardise = recipe.as_published.standardise or standardise
    if standardise != "featurewise":
        return preprocessing.fixed()
    total, squares, n_values = np.zeros(3), np.zeros(3), 0
    for start in range(0, len(train), 1024):
        values = pack.patches[train[start : start + 1024]].reshape(-1, 3) * preprocessing.scale
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
        n_values += len(values)
    mean = total / n_values
    std = np.sqrt(squares / n_values - mean**2)
    if preprocessing.channel_order == "bgr":
        mean, std = mean[::-1], std[::-1]
    return preprocessing.fixed(mean=mean.tolist(), std=std.tolist())
