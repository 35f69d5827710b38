"""The training patches nearest to a patch in the penultimate layer of a network."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics.pairwise import euclidean_distances
from typing_extensions import TypedDict

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


_Id = str | None
NearestPatch = TypedDict(
    "NearestPatch",
    {"patch_id": str, "patient_id": _Id, "slide_id": _Id, "class": str, "distance": float},
)
"""A training patch and its distance."""


class ReferenceDescription(TypedDict):
    """Number of training patches, and the unit of distances in words."""

    n: int
    distance: str


@dataclass(frozen=True)
class TrainingReference:
    """Training patches of a run that other patches are compared with.

    Each feature is divided by its standard deviation over these patches. A distance of 1 is the median
    distance of a training patch to the nearest one of another patient (slide, patch).

    Attributes:
        patches: ``patch_id``, ``patient_id``, ``slide_id`` and ``class`` of each of the ``n`` patches.
        features: Scaled features of the penultimate layer, float64 ``(n, n_features)``.
        scale: Divisor of each feature, ``(n_features,)``; infinite where a feature does not vary.
        unit: The distance that counts as 1.
        description: ``n`` and the unit in words.
    """

    patches: pd.DataFrame
    features: np.ndarray
    scale: np.ndarray
    unit: float
    description: ReferenceDescription

    @classmethod
    def from_run(cls, run: Run, pack: Pack, classifier: Classifier, *, engine: Engine) -> "TrainingReference":
        """Compute the features of a run's training patches.

        At most `REFERENCE_PATCHES` of them are drawn with its seed, fewer for expensive networks.
        """
        train = np.flatnonzero(run.subsets(pack) == "train")
        max_patches = min(
            REFERENCE_PATCHES,
            _FACTOR * affordable_patches(classifier.network, classifier.info.preprocessing.input_px),
        )
        rng = make_rng(run.info["seed"], "training patches alike")
        sampled = np.sort(rng.choice(train, min(len(train), max_patches), replace=False))
        _, features = predict_with_features(classifier, pack.patches, pack.sizes, sampled, engine=engine)
        spread = features.std(axis=0, dtype=np.float64)
        scale = np.where(spread > 0, spread, np.inf)
        scaled = features / scale
        table = pack.table[["patch_id", "patient_id", "slide_id"]].iloc[sampled].astype(object)
        table = table.where(table.notna(), None).assign(
            **{"class": [pack.class_names[index] for index in pack.target[sampled]]}
        )
        unit = f"1 is the median distance of a training patch to the nearest one of another {pack.unit}"
        return cls(
            patches=table,
            features=scaled,
            scale=scale,
            unit=_typical_distance(scaled, pack.group_ids[sampled]),
            description={"n": len(sampled), "distance": unit},
        )

    def find_nearest(self, features: np.ndarray) -> list[list[NearestPatch]]:
        """Return the `N_NEAREST` training patches of patches with some features, ``(n, n_features)``.

        Returns:
            For each patch, the nearest first.
        """
        distance = euclidean_distances(features / self.scale, self.features) / self.unit
        order = np.argsort(distance, axis=1, kind="stable")[:, :N_NEAREST]
        return [
            self.patches.iloc[indices].assign(distance=row[indices]).to_dict("records")
            for row, indices in zip(distance, order, strict=True)
        ]


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
