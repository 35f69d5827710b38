"""What a patch is like to a network: the training patches nearest to it in the penultimate layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.evaluation.hypotheses.measure import affordable_patches
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from biopsy.models.out_of_distribution import REFERENCE_PATCHES
from biopsy.training.runs import Run

N_NEAREST = 3
_TIMES = 2  # a network that can be asked again about n patches in some seconds is asked about twice as many


@dataclass(frozen=True)
class NearestTrainingPatches:
    """The nearest training patches of some patches.

    Attributes:
        about: ``n`` training patches that were drawn, and ``distance``, in words what a distance of 1 is.
        nearest: For each patch `N_NEAREST` records, the nearest first: ``patch_id``, ``patient_id``,
            ``slide_id``, ``class`` and ``distance``.
    """

    about: dict[str, Any]
    nearest: list[list[dict[str, Any]]]


def find_nearest_training_patches(
    run: Run, pack: Pack, classifier: Classifier, rows: np.ndarray, *, engine: Engine
) -> NearestTrainingPatches:
    """Find the training patches that are nearest to some patches in the network's penultimate layer.

    Each feature is divided by its standard deviation over the training patches. A distance of 1 is the median
    distance of a training patch to the nearest one of another patient (slide, patch).

    Args:
        run: Says which patches were trained on; at most `REFERENCE_PATCHES` of them are drawn with its seed,
            fewer for a network that computes much.
    """
    train = np.flatnonzero(run.subsets(pack) == "train")
    most = min(
        REFERENCE_PATCHES,
        _TIMES * affordable_patches(classifier.network, classifier.info.preprocessing.input_px),
    )
    rng = make_rng(run.info["seed"], "training patches alike")
    drawn = np.sort(rng.choice(train, min(len(train), most), replace=False))
    _, features = predict_with_features(
        classifier, pack.patches, pack.sizes, np.concatenate([drawn, rows]), engine=engine
    )
    known, requested = np.split(features.astype(np.float64), [len(drawn)])
    spread = known.std(axis=0)
    known, requested = (values / np.where(spread > 0, spread, np.inf) for values in (known, requested))
    unit = _typical_distance(known, pack.group_ids[drawn])
    distance = _distances(requested, known) / unit
    about = {
        "n": len(drawn),
        "distance": f"1 is the median distance of a training patch to the nearest one of another {pack.unit}",
    }
    order = np.argsort(distance, axis=1, kind="stable")[:, :N_NEAREST]
    columns = pack.table[["patch_id", "patient_id", "slide_id"]].astype("string")
    nearest = [
        [
            {
                **columns.iloc[drawn[place]].where(columns.iloc[drawn[place]].notna(), None).to_dict(),
                "class": pack.class_names[pack.target[drawn[place]]],
                "distance": float(distance[index, place]),
            }
            for place in places
        ]
        for index, places in enumerate(order)
    ]
    return NearestTrainingPatches(about, nearest)


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return Euclidean distances ``(n_one, n_other)``."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None] - 2 * one @ other.T
    return np.sqrt(np.clip(squares, 0, None))


def _typical_distance(known: np.ndarray, group_ids: np.ndarray) -> float:
    """Return the median distance to the nearest patch of another group; of any where there is one group."""
    distance = _distances(known, known)
    same = (
        group_ids[:, None] == group_ids[None]
        if len(np.unique(group_ids)) > 1
        else np.eye(len(known), dtype=bool)
    )
    nearest = np.where(same, np.inf, distance).min(axis=1, initial=np.inf)
    typical = float(np.median(nearest)) if len(nearest) else 1.0
    return typical if np.isfinite(typical) and typical > 0 else 1.0
