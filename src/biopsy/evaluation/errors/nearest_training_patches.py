"""The training patches nearest to a patch in the penultimate layer of a network."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances

from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.evaluation.stored_results import affordable_patches
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from biopsy.models.out_of_distribution import REFERENCE_PATCHES
from biopsy.training.runs import Run

N_NEAREST = 3
_FACTOR = 2  # times the number of patches that can be predicted in some seconds


@dataclass(frozen=True)
class NearestTrainingPatches:
    """The nearest training patches of some patches.

    Attributes:
        reference: ``n``, the number of training patches searched, and ``distance``, the unit of distances.
        nearest: For each patch `N_NEAREST` records, the nearest first: ``patch_id``, ``patient_id``,
            ``slide_id``, ``class`` and ``distance``.
    """

    reference: dict[str, Any]
    nearest: list[list[dict[str, Any]]]


def find_nearest_training_patches(
    run: Run, pack: Pack, classifier: Classifier, rows: np.ndarray, *, engine: Engine
) -> NearestTrainingPatches:
    """Find the training patches that are nearest to some patches in the network's penultimate layer.

    Each feature is divided by its standard deviation over the training patches. A distance of 1 is the median
    distance of a training patch to the nearest one of another patient (slide, patch).

    Args:
        run: The run, for its training patches; at most `REFERENCE_PATCHES` of them are drawn with its seed,
            fewer for expensive networks.
        rows: Rows of the patches in the pack.
    """
    train = np.flatnonzero(run.subsets(pack) == "train")
    max_patches = min(
        REFERENCE_PATCHES,
        _FACTOR * affordable_patches(classifier.network, classifier.info.preprocessing.input_px),
    )
    rng = make_rng(run.info["seed"], "training patches alike")
    sampled = np.sort(rng.choice(train, min(len(train), max_patches), replace=False))
    _, features = predict_with_features(
        classifier, pack.patches, pack.sizes, np.concatenate([sampled, rows]), engine=engine
    )
    train_features, query_features = np.split(features.astype(np.float64), [len(sampled)])
    spread = train_features.std(axis=0)
    train_features, query_features = (
        values / np.where(spread > 0, spread, np.inf) for values in (train_features, query_features)
    )
    unit = _typical_distance(train_features, pack.group_ids[sampled])
    distance = euclidean_distances(query_features, train_features) / unit
    reference = {
        "n": len(sampled),
        "distance": f"1 is the median distance of a training patch to the nearest one of another {pack.unit}",
    }
    order = np.argsort(distance, axis=1, kind="stable")[:, :N_NEAREST]
    table = pack.table[["patch_id", "patient_id", "slide_id"]].iloc[sampled].astype(object)
    table = table.where(table.notna(), None).assign(
        **{"class": [pack.class_names[index] for index in pack.target[sampled]]}
    )
    nearest = [
        table.iloc[indices].assign(distance=row[indices]).to_dict("records")
        for row, indices in zip(distance, order, strict=True)
    ]
    return NearestTrainingPatches(reference, nearest)


def _typical_distance(features: np.ndarray, group_ids: np.ndarray) -> float:
    """Return the median distance to the nearest patch of another group, or of any with a single group."""
    distance = euclidean_distances(features)
    excluded = (
        group_ids[:, None] == group_ids[None]
        if len(np.unique(group_ids)) > 1
        else np.eye(len(features), dtype=bool)
    )
    nearest = np.where(excluded, np.inf, distance).min(axis=1, initial=np.inf)
    typical = float(np.median(nearest)) if len(nearest) else 1.0
    return typical if np.isfinite(typical) and typical > 0 else 1.0
