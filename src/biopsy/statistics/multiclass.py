"""More than two classes: the sample under any weighting of its patients, and its metrics.

Every metric has its usual definition: accuracy is the share of patches that are right, balanced accuracy the
mean recall, ``macro`` the plain and ``weighted`` the prevalence-weighted mean over classes. Those that take a
mean over classes are undefined where a class has no patches. A patch is called the class of its highest
probability. The numbers equal scikit-learn's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from biopsy.core.errors import MetricError
from biopsy.statistics.calibration import calibration_error
from biopsy.statistics.metrics import METRICS, metric, registry
from biopsy.statistics.weighted_counts import LOG_CLIP, Floats, Ranked, Tally, rank

SUM_TOLERANCE = 0.02  # of a row's probabilities: many programs write two or three decimals


@dataclass(frozen=True)
class ClassSample:
    """Patches of more than two classes.

    Attributes:
        target: Index into ``class_names``, shape ``(n_patches,)``.
        prob: Probabilities, shape ``(n_patches, n_classes)``.
        pred: The class each patch is called, ``(n_patches,)``.
        group: Index into ``groups``.
        groups: Patient ids in sorted order, shape ``(n_groups,)``.
        class_names: Names of the classes.
    """

    target: NDArray[np.intp]
    prob: Floats
    pred: NDArray[np.intp]
    group: NDArray[np.intp]
    groups: NDArray[np.object_]
    class_names: tuple[str, ...]

    def tally(self, weight: Floats | None = None) -> "ClassTally":
        """Count the sample with one weight per *group* (all 1 if not given)."""
        return ClassTally(self, np.ones(len(self.groups)) if weight is None else weight)

    def carriers(self) -> dict[str, int]:
        """Count the groups that hold patches of the class that fewest have."""
        return {"n_rarest": int(self._groups_by_class.min())}

    @cached_property
    def needs(self) -> Mapping[str, str]:
        rarest = self.class_names[int(self._groups_by_class.argmin())]
        return {"n_rarest": f"patches of class {rarest!r}"}

    @cached_property
    def _groups_by_class(self) -> NDArray[np.intp]:
        return (self.confusion.sum(axis=2) > 0).sum(axis=0)

    @cached_property
    def confusion(self) -> Floats:
        """Patches of each group by true and by called class, ``(n_groups, n_classes, n_classes)``."""
        shape = (len(self.groups), *[len(self.class_names)] * 2)
        cell = np.ravel_multi_index((self.group, self.target, self.pred), shape)
        return np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)

    @cached_property
    def losses(self) -> Floats:
        """Sums over each group's patches of log loss and of squared error, ``(n_groups, 2)``."""
        wanted = np.eye(len(self.class_names))[self.target]
        held = np.clip(self.prob[np.arange(len(self.target)), self.target], LOG_CLIP, 1 - LOG_CLIP)
        each = -np.log(held), ((self.prob - wanted) ** 2).sum(axis=1)
        return np.stack([np.bincount(self.group, loss, len(self.groups)) for loss in each], axis=1)

    @cached_property
    def one_vs_rest(self) -> list[Ranked]:
        """Each class against all others: its patches the positive ones."""
        ids = self.groups[self.group]
        return [
            rank(self.target == k, self.prob[:, k], group_ids=ids, called=self.pred == k)
            for k in range(len(self.class_names))
        ]

    @cached_property
    def top_label(self) -> Ranked:
        """Whether each patch is right, under the probability of the class it is called."""
        confidence = self.prob[np.arange(len(self.pred)), self.pred]
        return rank(self.target == self.pred, confidence, group_ids=self.groups[self.group])

    @cached_property
    def pairs(self) -> Ranked:
        """Every pair of patch and class, positive where the patch is of the class."""
        wanted = np.eye(len(self.class_names))[self.target]
        ids = np.repeat(self.groups[self.group], len(self.class_names))
        return rank(wanted.ravel(), self.prob.ravel(), group_ids=ids)


@dataclass(frozen=True)
class ClassTally:
    """Weighted counts of a `ClassSample`.

    Attributes:
        sample: The patches counted.
        weight: One per group, ``(n_groups,)``.
    """

    sample: ClassSample
    weight: Floats

    @property
    def needs(self) -> Mapping[str, str]:
        return self.sample.needs

    @property
    def y_true(self) -> NDArray[np.intp]:
        return self.sample.target

    @property
    def y_pred(self) -> NDArray[np.intp]:
        return self.sample.pred

    @property
    def y_prob(self) -> Floats:
        return self.sample.prob

    @property
    def sample_weight(self) -> Floats:
        """Weight of each patch, ``(n_patches,)``."""
        return self.weight[self.sample.group]

    @cached_property
    def confusion(self) -> Floats:
        """Weight by true class (rows) and called class (columns)."""
        return np.tensordot(self.weight, self.sample.confusion, 1)

    @property
    def n_true(self) -> Floats:
        return self.confusion.sum(axis=1)

    @property
    def n_called(self) -> Floats:
        return self.confusion.sum(axis=0)

    @property
    def n(self) -> float:
        return float(self.confusion.sum())

    @property
    def n_rarest(self) -> float:
        """Weight of the class with the least."""
        return float(self.n_true.min())

    @property
    def losses(self) -> Floats:
        """Mean log loss and mean squared error."""
        return self.weight @ self.sample.losses / self.n

    def f1_by_class(self) -> Floats:
        """Return the F1 of each class, 0 for one that neither occurs nor is called."""
        both = self.n_true + self.n_called
        return np.divide(2 * self.confusion.diagonal(), both, out=np.zeros(len(both)), where=both > 0)

    def agreement(self, disagreement: Floats) -> float:
        """Return 1 - observed / expected disagreement, Cohen's kappa; NaN where none can be expected."""
        expected = float((disagreement * np.outer(self.n_true, self.n_called)).sum()) / self.n
        return 1 - float((disagreement * self.confusion).sum()) / expected if expected > 0 else float("nan")


MULTICLASS_METRICS = registry(ClassTally)
"""Metrics of more than two classes by name."""
EACH_CLASS = ("n_rarest",)
ONE_CLASS = "all patches are of one class, and called that class"


@metric("decision", of=ClassTally, share=True)
def accuracy(tally: ClassTally) -> float:
    """Return the share of patches that are right."""
    return float(tally.confusion.trace()) / tally.n


@metric("decision", of=ClassTally, needs=EACH_CLASS)
def balanced_accuracy(tally: ClassTally) -> float:
    """Return the mean recall."""
    return float((tally.confusion.diagonal() / tally.n_true).mean())


@metric("decision", of=ClassTally, label="F1, macro", needs=EACH_CLASS)
def f1_macro(tally: ClassTally) -> float:
    return float(tally.f1_by_class().mean())


@metric("decision", of=ClassTally, label="F1, weighted")
def f1_weighted(tally: ClassTally) -> float:
    return float(tally.f1_by_class() @ tally.n_true) / tally.n


@metric("decision", of=ClassTally, label="Cohen's kappa", bounds=(-1.0, 1.0), undefined=ONE_CLASS)
def kappa(tally: ClassTally) -> float:
    return tally.agreement(1 - np.eye(len(tally.n_true)))


@metric("decision", of=ClassTally, label="Cohen's kappa, quadratic", bounds=(-1.0, 1.0), undefined=ONE_CLASS)
def kappa_quadratic(tally: ClassTally) -> float:
    """Return kappa with squared distances between classes: for ordered classes, such as grades."""
    place = np.arange(len(tally.n_true))
    return tally.agreement(np.subtract.outer(place, place).astype(np.float64) ** 2)


@metric(
    "decision",
    of=ClassTally,
    label="Matthews correlation",
    bounds=(-1.0, 1.0),
    undefined="all patches are of one class, or called one class",
)
def mcc(tally: ClassTally) -> float:
    """Return Matthews' correlation for more than two classes (Gorodkin 2004)."""
    true, called, n = tally.n_true, tally.n_called, tally.n
    spread = float((n**2 - true @ true) * (n**2 - called @ called))
    covariance = float(tally.confusion.trace()) * n - float(true @ called)
    return covariance / float(np.sqrt(spread)) if spread > 0 else float("nan")


@metric("ranking", of=ClassTally, label="AUROC, macro one-vs-rest", needs=EACH_CLASS)
def auroc(tally: ClassTally) -> float:
    """Return the mean over classes of the AUROC of each class against the rest."""
    compute = METRICS["auroc"].compute
    return float(np.mean([compute(one.tally(tally.weight)) for one in tally.sample.one_vs_rest]))


@metric("ranking", of=ClassTally, label="AUROC, micro")
def auroc_micro(tally: ClassTally) -> float:
    """Return the AUROC over all pairs of a patch and a class."""
    return METRICS["auroc"].compute(tally.sample.pairs.tally(tally.weight))


@metric("probability", of=ClassTally, label="log loss", better="lower", ideal=0.0, bounds=(0.0, np.inf))
def nll(tally: ClassTally) -> float:
    """Return the mean negative log-likelihood of the true class in nats."""
    return float(tally.losses[0])


@metric(
    "probability",
    of=ClassTally,
    label="Brier score, all classes",
    better="lower",
    ideal=0.0,
    bounds=(0.0, 2.0),
)
def brier(tally: ClassTally) -> float:
    """Return the squared error summed over classes, 0 to 2 (Brier 1950)."""
    return float(tally.losses[1])


@metric(
    "probability", of=ClassTally, label="expected calibration error, top label", better="lower", ideal=0.0
)
def ece(tally: ClassTally) -> float:
    """Return the calibration error of the called class's probability (Guo et al. 2017), equal-mass bins."""
    top: Tally = tally.sample.top_label.tally(tally.weight)
    return calibration_error(top.ranked.prob, top.pos, top.neg)


def class_sample(
    target: ArrayLike,
    probs: ArrayLike,
    class_names: Sequence[str],
    *,
    group_ids: ArrayLike,
    pred: ArrayLike | None = None,
) -> ClassSample:
    """Return a sample of more than two classes, checked and ready to be counted.

    Args:
        target: Index into ``class_names`` per patch, shape ``(n_patches,)``.
        probs: Probabilities, shape ``(n_patches, n_classes)``, each row summing to one.
        class_names: At least three.
        group_ids: Patient (or slide) per patch.
        pred: The class each patch is called; that of its highest probability if not given.

    Raises:
        MetricError: If shapes, classes, probabilities or groups allow no metric.
    """
    target, probs = np.asarray(target), np.asarray(probs, dtype=np.float64)
    check_class_probs(target, probs, class_names)
    codes, groups = pd.factorize(np.asarray(group_ids, dtype=object), sort=True)
    if len(codes) != len(target) or (codes < 0).any():
        raise MetricError(
            f"{np.count_nonzero(codes >= 0)} group ids stand beside {len(target)} patches: "
            "give each patch the patient it came from"
        )
    called = probs.argmax(axis=1) if pred is None else np.asarray(pred, np.intp)
    return ClassSample(
        target.astype(np.intp), probs, called, codes, np.asarray(groups, dtype=object), tuple(class_names)
    )


def check_class_probs(target: NDArray, probs: Floats, class_names: Sequence[str]) -> None:
    """Refuse targets and probabilities that do not fit the classes.

    Raises:
        MetricError: Naming the first row that is wrong.
    """
    n_classes = len(class_names)
    if probs.ndim != 2 or probs.shape[1] != n_classes or n_classes < 2:
        raise MetricError(f"probs has shape {probs.shape} for {n_classes} classes: one column each")
    if target.shape != probs.shape[:1]:
        raise MetricError(f"target has shape {target.shape} and probs {probs.shape}: give one row per patch")
    if not len(target):
        raise MetricError("there are no patches to measure: at least one is needed")
    if not np.isin(target, np.arange(n_classes)).all():
        raise MetricError(f"targets are not all an index into the {n_classes} class names")
    sums = probs.sum(axis=1)
    for wrong, what in (
        (~((probs >= 0) & (probs <= 1)).all(axis=1), "probabilities outside 0-1 or missing"),
        (~(np.abs(sums - 1) <= SUM_TOLERANCE), "probabilities that do not sum to one"),
    ):
        if wrong.any():
            at = int(np.argmax(wrong))
            raise MetricError(f"{wrong.sum()} rows have {what}; the first is row {at}: {probs[at].tolist()}")


def classification_report(confusion: ArrayLike, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and patches of each class, and their averages, from a confusion matrix.

    Args:
        confusion: Patches by true class (rows) and called class (columns).
        class_names: Names of the classes.

    Returns:
        A row per class with its name as ``class``, then rows with ``average``: ``"macro"`` (plain mean),
        ``"weighted"`` (by patches of each class) and ``"micro"`` (over all patches: all three are accuracy).
        None where a class is never called (precision), has no patches (recall), or neither (F1), and in a
        mean over such a class.
    """
    matrix = np.asarray(confusion, np.float64)
    right, n_true, n_called = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)

    def divide(above: Floats, below: Floats) -> Floats:
        return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)

    columns = {
        "precision": divide(right, n_called),
        "recall": divide(right, n_true),
        "f1": divide(2 * right, n_true + n_called),
    }
    accuracy, n = right.sum() / matrix.sum(), int(matrix.sum())
    rows: list[dict[str, Any]] = [
        {"class": name, **{key: _or_none(values[k]) for key, values in columns.items()}, "n": int(n_true[k])}
        for k, name in enumerate(class_names)
    ]
    macro = {key: _or_none(values.mean()) for key, values in columns.items()}
    weighted = {
        key: _or_none(values[n_true > 0] @ n_true[n_true > 0] / matrix.sum())
        for key, values in columns.items()
    }
    micro: dict[str, float | None] = dict.fromkeys(columns, float(accuracy))
    averages = {"macro": macro, "weighted": weighted, "micro": micro}
    return rows + [{"average": name, **values, "n": n} for name, values in averages.items()]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
