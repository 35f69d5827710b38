"""Patches with true class and probabilities, the input of every measurement of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from biopsy.core.text import plural
from biopsy.data.packs import Pack, group_by_unit
from biopsy.data.predictions import decide
from biopsy.statistics.intervals import measure_size_trend
from biopsy.statistics.multiclass import ClassSample, class_sample
from biopsy.statistics.resampling import InformativeGroups, Resampling
from biopsy.statistics.weighted_counts import SortedScores, sort_scores

SIMILAR, UNEQUAL = 0.9, 0.7  # effective over actual number of patients: docs/concepts/intervals.md
FEW, TREND_P = 20, 0.1


@dataclass(frozen=True, kw_only=True)
class ScoredPatches:
    """Patches to evaluate.

    Attributes:
        target: Index into ``class_names``, ``(n,)``.
        probs: ``(n, n_classes)``.
        pred: The predicted class, ``(n,)``.
        group_ids: Patient (slide, patch) id per patch, ``(n,)``.
        positive_class: For two classes, the one whose recall is the sensitivity; else None.
        unit: Unit of the groups: ``patient``, ``slide`` or ``patch``.
        seed: Seed of the bootstrap and of the simulated calibration floor.
    """

    target: np.ndarray
    probs: np.ndarray
    pred: np.ndarray
    group_ids: np.ndarray
    class_names: Sequence[str]
    positive_class: str | None
    unit: str
    seed: int = 0

    @classmethod
    def of_pack(
        cls, pack: Pack, rows: np.ndarray, probs: np.ndarray, threshold: float | None, *, seed: int = 0
    ) -> "ScoredPatches":
        """Return rows of a pack with their probabilities; ``threshold`` as in `tabulate_predictions`."""
        return cls(
            target=pack.target[rows],
            probs=probs,
            pred=decide(probs, pack.positive_index, threshold),
            group_ids=pack.group_ids[rows],
            class_names=pack.class_names,
            positive_class=pack.info.positive_class,
            unit=pack.unit,
            seed=seed,
        )

    @classmethod
    def of_predictions(
        cls,
        frame: pd.DataFrame,
        class_names: Sequence[str],
        positive_class: str | None,
        unit: str,
        *,
        seed: int = 0,
    ) -> "ScoredPatches":
        """Return the patches of a table of predictions."""
        return cls(
            target=frame["target"].to_numpy(int),
            probs=frame[[f"prob_{name}" for name in class_names]].to_numpy(float),
            pred=frame["pred"].to_numpy(int),
            group_ids=group_by_unit(frame, unit).astype(object),
            class_names=class_names,
            positive_class=positive_class,
            unit=unit,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.target)

    def take(self, chosen: np.ndarray) -> "ScoredPatches":
        """Return a subset of the patches, selected by index or mask."""
        arrays = {name: getattr(self, name)[chosen] for name in ("target", "probs", "pred", "group_ids")}
        return replace(self, **arrays)

    @property
    def resampling(self) -> Resampling:
        """Options of the intervals over groups."""
        return {"seed": self.seed, "unit": self.unit}

    @property
    def n_groups(self) -> int:
        return len(np.unique(self.group_ids))

    @property
    def positive_index(self) -> int | None:
        return None if self.positive_class is None else list(self.class_names).index(self.positive_class)

    @property
    def is_positive(self) -> np.ndarray:
        """1 for patches of the positive class, else 0, ``(n,)``."""
        return (self.target == self.positive_index).astype(int)

    @property
    def prob(self) -> np.ndarray:
        """Probability of the positive class."""
        assert self.positive_index is not None
        return self.probs[:, self.positive_index]

    def sample(self) -> SortedScores | ClassSample:
        """Return the patches as input of the metrics for two classes or for more."""
        ids = self.group_ids
        if self.positive_index is None:
            return class_sample(self.target, self.probs, self.class_names, group_ids=ids, pred=self.pred)
        y_pred = self.pred == self.positive_index
        return sort_scores(self.is_positive, self.prob, group_ids=ids, y_pred=y_pred)

    def warn_unequal_groups(self) -> str | None:
        """Return a warning if pooled metrics and their intervals depend on which groups have most patches.

        They do where groups with more patches are harder. Few groups cannot show that: very different sizes
        are then enough.
        """
        groups = InformativeGroups(np.unique(self.group_ids, return_counts=True)[1].astype(float))
        if self.unit == "patch" or groups.n < 2 or groups.effective >= SIMILAR * groups.n:
            return None
        error = 1 - np.take_along_axis(self.probs, self.target[:, None], axis=1)[:, 0]
        trend = measure_size_trend(self.target, error, self.group_ids)
        units = plural(self.unit)
        if trend is not None and trend.p < TREND_P:
            return (
                f"{units} with more patches are harder (rank correlation {trend.correlation:.2f} over "
                f"{groups.n} {units}, p {trend.p:.2g}): pooled metrics may be too optimistic and their "
                f"intervals too narrow; prefer the means over {units}"
            )
        if groups.n < FEW and groups.effective < UNEQUAL * groups.n:
            return (
                f"{groups.n} {units} of very different size have an effective number of "
                f"{groups.effective:.1f}: if {units} with more patches are harder, pooled metrics are "
                f"too optimistic and their intervals too narrow; prefer the means over {units}"
            )
        return None

    def confusion(self) -> np.ndarray:
        """Return patches by true class (rows) and predicted class (columns)."""
        return confusion_matrix(self.target, self.pred, len(self.class_names))


def confusion_matrix(target: np.ndarray, pred: np.ndarray, n_classes: int) -> np.ndarray:
    """Return counts by true class (rows) and predicted class (columns); much faster than scikit-learn's."""
    return np.bincount(target * n_classes + pred, minlength=n_classes**2).reshape(n_classes, n_classes)
