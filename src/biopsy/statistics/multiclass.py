"""Samples of more than two classes, counted with any weights of patients, and their metrics.

``macro`` is the unweighted and ``weighted`` the prevalence-weighted mean over classes; means over classes
are undefined if a class has no patches. The predicted class is the most probable one. Values equal
scikit-learn's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biopsy.core.errors import MetricError
from biopsy.core.loaders import FloatOrNan
from biopsy.statistics.calibration import calibration_error
from biopsy.statistics.metrics import METRICS, NO_ECE_INTERVAL, metric, registry
from biopsy.statistics.resampling import Floats, InformativeGroups, divide, fewest_informative
from biopsy.statistics.weighted_counts import (
    LOG_CLIP,
    SortedScores,
    WeightedCounts,
    check_groups,
    sort_scores,
)

SUM_TOLERANCE = 0.02  # of a row's probabilities: many programs write two or three decimals


@dataclass(frozen=True)
class ClassSample:
    """Patches of more than two classes.

    Attributes:
        target: Index into ``class_names``, shape ``(n_patches,)``.
        prob: Probabilities, shape ``(n_patches, n_classes)``.
        pred: Predicted class, ``(n_patches,)``.
        group: Index into ``groups``.
        groups: Patient ids in sorted order, shape ``(n_groups,)``.
    """

    target: NDArray[np.intp]
    prob: Floats
    pred: NDArray[np.intp]
    group: NDArray[np.intp]
    groups: NDArray[np.object_]
    class_names: tuple[str, ...]

    def count(self, weight: Floats | None = None) -> "ClassCounts":
        """Return the counts with one weight per *group* (default: 1)."""
        return ClassCounts(self, np.ones(len(self.groups)) if weight is None else weight)

    def informative_groups(self, needs: Iterable[str] = ()) -> InformativeGroups:
        """Return the groups with patches of the scarcest class; all groups without needs."""
        by_class = self.confusion.sum(axis=2)
        if not list(needs):
            return InformativeGroups(by_class.sum(axis=1))
        return fewest_informative(
            [
                InformativeGroups(by_class[:, k], f"patches of class {name!r}")
                for k, name in enumerate(self.class_names)
            ]
        )

    @cached_property
    def needs(self) -> Mapping[str, str]:
        return {"n_rarest": self.informative_groups(EACH_CLASS).description}

    @cached_property
    def confusion(self) -> Floats:
        """Patches of each group by true and predicted class, ``(n_groups, n_classes, n_classes)``."""
        shape = (len(self.groups), *[len(self.class_names)] * 2)
        cell = np.ravel_multi_index((self.group, self.target, self.pred), shape)
        return np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)

    @cached_property
    def losses(self) -> Floats:
        """Sums of log loss and squared error over the patches of each group, ``(n_groups, 2)``."""
        one_hot = np.eye(len(self.class_names))[self.target]
        true_prob = np.clip(self.prob[np.arange(len(self.target)), self.target], LOG_CLIP, 1 - LOG_CLIP)
        losses = -np.log(true_prob), ((self.prob - one_hot) ** 2).sum(axis=1)
        return np.stack([np.bincount(self.group, loss, len(self.groups)) for loss in losses], axis=1)

    @cached_property
    def one_vs_rest(self) -> list[SortedScores]:
        """Each class (positive) against all others."""
        ids = self.groups[self.group]
        return [
            sort_scores(self.target == k, self.prob[:, k], group_ids=ids, y_pred=self.pred == k)
            for k in range(len(self.class_names))
        ]

    @cached_property
    def top_label(self) -> SortedScores:
        """Correctness of each patch, with the probability of the predicted class."""
        confidence = self.prob[np.arange(len(self.pred)), self.pred]
        return sort_scores(self.target == self.pred, confidence, group_ids=self.groups[self.group])

    @cached_property
    def pairs(self) -> SortedScores:
        """All pairs of patch and class, positive if the patch is of the class."""
        one_hot = np.eye(len(self.class_names))[self.target]
        ids = np.repeat(self.groups[self.group], len(self.class_names))
        return sort_scores(one_hot.ravel(), self.prob.ravel(), group_ids=ids)


@dataclass(frozen=True)
class ClassCounts:
    """Weighted counts of a `ClassSample`.

    Attributes:
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
        """Weight by true class (rows) and predicted class (columns)."""
        return np.tensordot(self.weight, self.sample.confusion, 1)

    @property
    def n_true(self) -> Floats:
        return self.confusion.sum(axis=1)

    @property
    def n_pred(self) -> Floats:
        return self.confusion.sum(axis=0)

    @property
    def n(self) -> float:
        return float(self.confusion.sum())

    @property
    def n_rarest(self) -> float:
        return float(self.n_true.min())

    @property
    def losses(self) -> Floats:
        """Mean log loss and mean squared error."""
        return self.weight @ self.sample.losses / self.n

    def f1_by_class(self) -> Floats:
        """Return the F1 of each class, 0 for one that neither occurs nor is predicted."""
        both = self.n_true + self.n_pred
        return np.divide(2 * self.confusion.diagonal(), both, out=np.zeros(len(both)), where=both > 0)

    def agreement(self, disagreement: Floats) -> float:
        """Return 1 - observed / expected disagreement, Cohen's kappa; NaN if none is expected."""
        expected = float((disagreement * np.outer(self.n_true, self.n_pred)).sum()) / self.n
        return 1 - float((disagreement * self.confusion).sum()) / expected if expected > 0 else float("nan")


MULTICLASS_METRICS = registry(ClassCounts)
"""Metrics of more than two classes by name."""
EACH_CLASS = ("n_rarest",)
ONE_CLASS = "all patches are of one class, and predicted as that class"


@metric("decision", of=ClassCounts, share=True)
def accuracy(counts: ClassCounts) -> float:
    """Return the share of patches whose predicted class is right."""
    return float(counts.confusion.trace()) / counts.n


@metric("decision", of=ClassCounts, needs=EACH_CLASS)
def balanced_accuracy(counts: ClassCounts) -> float:
    """Return the mean over classes of the share of their patches that are predicted as such (recall)."""
    return float((counts.confusion.diagonal() / counts.n_true).mean())


@metric("decision", of=ClassCounts, label="F1, macro", needs=EACH_CLASS)
def f1_macro(counts: ClassCounts) -> float:
    """Return the mean F1 of the classes."""
    return float(counts.f1_by_class().mean())


@metric("decision", of=ClassCounts, label="F1, weighted")
def f1_weighted(counts: ClassCounts) -> float:
    """Return the mean F1 of the classes, weighted by their patches."""
    return float(counts.f1_by_class() @ counts.n_true) / counts.n


@metric("decision", of=ClassCounts, label="Cohen's kappa", bounds=(-1.0, 1.0), undefined=ONE_CLASS)
def kappa(counts: ClassCounts) -> float:
    """Return the agreement of predicted and true class beyond chance, from -1 to 1; 0 is chance."""
    return counts.agreement(1 - np.eye(len(counts.n_true)))


@metric("decision", of=ClassCounts, label="Cohen's kappa, quadratic", bounds=(-1.0, 1.0), undefined=ONE_CLASS)
def kappa_quadratic(counts: ClassCounts) -> float:
    """Return the kappa with squared distances between classes, for ordered classes such as grades."""
    index = np.arange(len(counts.n_true))
    return counts.agreement(np.subtract.outer(index, index).astype(np.float64) ** 2)


@metric(
    "decision",
    of=ClassCounts,
    label="Matthews correlation",
    bounds=(-1.0, 1.0),
    undefined="all patches are of one class, or predicted as one class",
)
def mcc(counts: ClassCounts) -> float:
    """Return the correlation between predicted and true class, from -1 to 1; 0 is chance (Gorodkin 2004)."""
    true, pred, n = counts.n_true, counts.n_pred, counts.n
    spread = float((n**2 - true @ true) * (n**2 - pred @ pred))
    covariance = float(counts.confusion.trace()) * n - float(true @ pred)
    return covariance / float(np.sqrt(spread)) if spread > 0 else float("nan")


@metric("ranking", of=ClassCounts, label="AUROC, macro one-vs-rest", needs=EACH_CLASS)
def auroc(counts: ClassCounts) -> float:
    """Return the mean over classes of the AUROC of each class against the rest."""
    compute = METRICS["auroc"].compute
    return float(np.mean([compute(scores.count(counts.weight)) for scores in counts.sample.one_vs_rest]))


@metric("ranking", of=ClassCounts, label="AUROC, micro")
def auroc_micro(counts: ClassCounts) -> float:
    """Return the AUROC over all pairs of a patch and a class."""
    return METRICS["auroc"].compute(counts.sample.pairs.count(counts.weight))


@metric("probability", of=ClassCounts, label="log loss", better="lower", ideal=0.0, bounds=(0.0, np.inf))
def nll(counts: ClassCounts) -> float:
    """Return the mean negative log-likelihood of the true class in nats; 0 is perfect."""
    return float(counts.losses[0])


@metric(
    "probability",
    of=ClassCounts,
    label="Brier score, all classes",
    better="lower",
    ideal=0.0,
    bounds=(0.0, 2.0),
)
def brier(counts: ClassCounts) -> float:
    """Return the squared error summed over classes, from 0 (perfect) to 2 (Brier 1950)."""
    return float(counts.losses[1])


@metric(
    "probability",
    of=ClassCounts,
    label="expected calibration error, top label",
    better="lower",
    ideal=0.0,
    no_interval=NO_ECE_INTERVAL,
    pooled_only=True,
)
def ece(counts: ClassCounts) -> float:
    """Return the calibration error of the predicted class's probability; 0 is perfect.

    Guo et al. 2017, with bins of equal mass.
    """
    top: WeightedCounts = counts.sample.top_label.count(counts.weight)
    return calibration_error(top.scores.prob, top.pos, top.neg)


def class_sample(
    target: ArrayLike,
    probs: ArrayLike,
    class_names: Sequence[str],
    *,
    group_ids: ArrayLike,
    pred: ArrayLike | None = None,
) -> ClassSample:
    """Return a validated sample of more than two classes.

    Args:
        target: Index into ``class_names`` per patch, shape ``(n_patches,)``.
        probs: Probabilities, shape ``(n_patches, n_classes)``, each row summing to one.
        pred: Predicted class of each patch (default: the most probable one).
    """
    target, probs = np.asarray(target), np.asarray(probs, dtype=np.float64)
    check_class_probs(target, probs, class_names)
    codes, groups = check_groups(group_ids, len(target))
    pred = probs.argmax(axis=1) if pred is None else np.asarray(pred, np.intp)
    return ClassSample(target.astype(np.intp), probs, pred, codes, groups, tuple(class_names))


def check_class_probs(target: NDArray, probs: Floats, class_names: Sequence[str]) -> None:
    """Validate targets and probabilities."""
    n_classes = len(class_names)
    if probs.ndim != 2 or probs.shape[1] != n_classes or n_classes < 2:
        raise MetricError(f"probs has shape {probs.shape} for {n_classes} classes: one column each", "shape")
    if target.shape != probs.shape[:1]:
        raise MetricError(
            f"target has shape {target.shape} and probs {probs.shape}: give one row per patch", "shape"
        )
    if not len(target):
        raise MetricError("there are no patches to measure: at least one is needed", "empty")
    if not np.isin(target, np.arange(n_classes)).all():
        raise MetricError(f"targets are not all an index into the {n_classes} class names", "target")
    sums = probs.sum(axis=1)
    for wrong, problem in (
        (~((probs >= 0) & (probs <= 1)).all(axis=1), "probabilities outside 0-1 or missing"),
        (~(np.abs(sums - 1) <= SUM_TOLERANCE), "probabilities that do not sum to one"),
    ):
        if wrong.any():
            at = int(np.argmax(wrong))
            raise MetricError(
                f"{wrong.sum()} rows have {problem}; the first is row {at}: {probs[at].tolist()}", "prob"
            )


@dataclass(frozen=True)
class ClassReport:
    """A row of the classification report: a class or an average over classes; NaN where undefined."""

    name: str
    precision: FloatOrNan
    recall: FloatOrNan
    f1: FloatOrNan
    n: int


def classification_report(confusion: ArrayLike, class_names: Sequence[str]) -> list[ClassReport]:
    """Return precision, recall, F1 and patches of each class, and their averages, from a confusion matrix.

    Args:
        confusion: Patches by true class (rows) and predicted class (columns).

    Returns:
        A row per class, then ``macro average`` (plain mean), ``weighted average`` (by patches of each class)
        and ``micro average`` (over all patches: all three are accuracy). NaN if a class is never predicted
        (precision), has no patches (recall), or neither (F1), and in a mean over such a class.
    """
    matrix = np.asarray(confusion, np.float64)
    right, n_true, n_pred = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    columns = [divide(right, n_pred), divide(right, n_true), divide(2 * right, n_true + n_pred)]
    occurs, n = n_true > 0, matrix.sum()
    rows = {name: ([column[k] for column in columns], n_true[k]) for k, name in enumerate(class_names)}
    rows["macro average"] = [column.mean() for column in columns], n
    rows["weighted average"] = [column[occurs] @ n_true[occurs] / n for column in columns], n
    rows["micro average"] = [right.sum() / n] * 3, n
    return [
        ClassReport(name, float(precision), float(recall), float(f1), int(total))
        for name, ((precision, recall, f1), total) in rows.items()
    ]
