"""The input of a report: the records of a run or a study, with or without ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from biopsy.core.loaders import Model
from biopsy.core.text import class_title
from biopsy.data.audit import Audit
from biopsy.data.packs import known_groups
from biopsy.recipes import Recipe
from biopsy.reporting.pseudonyms import KINDS, Pseudonymizer
from biopsy.statistics.resampling import Interval
from biopsy.training.figures import Row
from biopsy.training.metrics import FoldMean, FoldResults, GroupMetrics, GroupSpread, Metrics, PooledMetrics
from biopsy.training.runs import EpochRecord, RunInfo
from biopsy.training.study import StudyInfo


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """What the reports of runs and of studies have in common.

    Attributes:
        metrics: Metrics of the evaluation; of a study, pooled.
        positive_class: The positive class; None for more than two classes.
        predictions: Predictions of the evaluated subset; of a study, the out-of-fold predictions of all runs.
        recipe: The recipe; None for predictions from elsewhere.
        recipe_toml: The recipe as TOML, with defaults.
        ids_hidden: Whether ids have been replaced by numbers.
    """

    metrics: Metrics | PooledMetrics
    positive_class: str | None
    predictions: pd.DataFrame
    class_names: Sequence[str]
    recipe: Recipe | None = None
    recipe_toml: str = ""
    ids_hidden: bool = False

    @property
    def unit(self) -> str:
        """Unit of independent observations: patient, slide or patch."""
        return self.metrics.interval.unit

    @property
    def is_binary(self) -> bool:
        return len(self.class_names) == 2

    @property
    def ranking_metric(self) -> str:
        """Name of the AUROC, as texts show it; for more than two classes it is the mean over classes."""
        return "AUROC" if self.is_binary else "macro AUROC"

    @property
    def positive_index(self) -> int:
        return list(self.class_names).index(self.positive_class or self.class_names[-1])

    @property
    def class_titles(self) -> list[str]:
        """Names by class index, as texts show them."""
        return [class_title(name) for name in self.class_names]

    @property
    def positive(self) -> str:
        """The positive class, as texts show it."""
        return self.class_titles[self.positive_index]

    @property
    def negative(self) -> str:
        """The negative one of two classes, as texts show it."""
        return self.class_titles[1 - self.positive_index]

    @property
    def pooled(self) -> Mapping[str, Interval]:
        """The metrics pooled over all patches."""
        return self.metrics.patch

    @property
    def n_groups(self) -> int:
        """Number of independent observations."""
        return self.metrics.n_patches if self.unit == "patch" else self.metrics.n_patients

    @property
    def is_positive(self) -> np.ndarray:
        """1 for patches of the positive class, else 0, shape ``(n,)``."""
        return (self.predictions["target"].to_numpy() == self.positive_index).astype(int)

    @property
    def group_ids(self) -> pd.Series:
        """The patient (slide) of each patch; null if unknown."""
        return known_groups(self.predictions, self.unit)


@dataclass(frozen=True, kw_only=True)
class RunFacts(EvaluationFacts):
    """Input of the report of a run.

    Attributes:
        run: Content of ``run.json``; None for predictions from elsewhere.
        log: One record per epoch.
        network: Layers as ``(name, type, output_shape, parameters)``.
        input_shape: Input of the network, ``(channels, height, width)``.
        get_patch: Returns a patch ``(H, W, 3)`` uint8 without padding by its ``patch_id``; None shows none.
        patch_px: Side of a patch in the pack.
        mpp: Pixel size of the patches in µm, None if unknown.
        audit: Content of ``audit.json``.
        results: Results of features, by the names registered by sections.
        missing: Missing results and the commands that compute them: ``(title, command)``.
    """

    metrics: Metrics
    run: RunInfo | None = None
    log: Sequence[EpochRecord] = ()
    network: Sequence[Row] = ()
    input_shape: tuple[int, ...] = ()
    get_patch: Callable[[str], np.ndarray] | None = None
    patch_px: int | None = None
    mpp: float | None = None
    audit: Audit | None = None
    results: Mapping[str, object] = field(default_factory=dict)
    missing: Sequence[tuple[str, str]] = ()

    def result(self, name: str, kind: type[Model]) -> Model | None:
        """Return a result of a feature; None if it is missing."""
        result = self.results.get(name)
        assert result is None or isinstance(result, kind)
        return result

    @property
    def is_run(self) -> bool:
        """Whether a run was evaluated, rather than predictions from elsewhere."""
        return self.run is not None

    @property
    def on_subset(self) -> str:
        """The evaluated subset, for captions; empty for predictions from elsewhere."""
        return f" on the {self.metrics.subset} subset" if self.is_run else ""

    @property
    def threshold(self) -> float:
        return self.metrics.threshold["value"] if self.metrics.threshold else 0.5

    @property
    def baseline(self) -> Interval | None:
        """AUROC of the colour-only baseline; None without one."""
        record = self.metrics.baseline
        if record is None or record.auroc is None:
            return None
        return record.interval or Interval(record.auroc)

    @property
    def gain(self) -> Interval | None:
        """AUROC of the model minus that of the colour-only baseline, paired; None without one."""
        return None if self.metrics.baseline is None else self.metrics.baseline.gain


@dataclass(frozen=True, kw_only=True)
class StudyFacts(EvaluationFacts):
    """Input of the report of a study.

    Attributes:
        study: Content of ``study.json``, with ``environment``.
        table: One row per run, with ``fold``, ``seed`` and any of the metric names, ``baseline_auroc``,
            ``tested`` (tested ids), ``n_patches``, ``threshold``, ``chosen_epoch``.
        fold_results: The main metric by fold, and its mean over folds.
        within_folds: Means over folds by metric.
        groups: Results of each patient (slide) over seeds.
    """

    metrics: PooledMetrics
    study: StudyInfo
    table: pd.DataFrame
    fold_results: FoldResults
    within_folds: Mapping[str, FoldMean] = field(default_factory=dict)
    groups: Sequence[GroupSpread] = ()

    @property
    def patients_overlap(self) -> bool:
        """Whether patients are in several subsets of the split."""
        split = self.study.get("split")
        return bool(split and split.get("patients_overlap"))


Facts = TypeVar("Facts", RunFacts, StudyFacts)
Group = TypeVar("Group", GroupMetrics, GroupSpread)


def hide_run(facts: RunFacts, hide: Mapping[str, Callable[[Any, Pseudonymizer], Any]]) -> RunFacts:
    """Replace every id in the facts of a run by a pseudonym.

    Args:
        hide: For each of ``facts.results``, the function that replaces the ids in it.
    """
    pseudonymizer = make_pseudonymizer(
        facts.predictions, facts.run["pack"]["content_sha256"] if facts.run else ""
    )
    show, groups = facts.get_patch, facts.metrics.groups
    hidden = _hide_common(facts, pseudonymizer)
    return replace(
        hidden,
        metrics=replace(hidden.metrics, groups=groups and _hide_groups(groups, facts.unit, pseudonymizer)),
        run=pseudonymizer.nested(facts.run),
        get_patch=None if show is None else lambda alias: show(pseudonymizer.original("patch", alias)),
        audit=pseudonymizer.nested(facts.audit),
        results={
            name: None if value is None else hide[name](value, pseudonymizer)
            for name, value in facts.results.items()
        },
        missing=[(title, pseudonymizer.text(command)) for title, command in facts.missing],
    )


def hide_study(facts: StudyFacts) -> StudyFacts:
    """Replace every id in the facts of a study by a number."""
    pseudonymizer = make_pseudonymizer(facts.predictions, facts.study["pack"]["content_sha256"])
    by_fold = pseudonymizer.table(facts.fold_results.by_fold).sort_values("fold").reset_index(drop=True)
    return replace(
        _hide_common(facts, pseudonymizer),
        study=pseudonymizer.nested(facts.study),
        table=pseudonymizer.table(facts.table).sort_values(["fold", "seed"]).reset_index(drop=True),
        fold_results=replace(facts.fold_results, by_fold=by_fold),
        groups=_hide_groups(facts.groups, facts.unit, pseudonymizer),
    )


def _hide_groups(groups: Sequence[Group], unit: str, pseudonymizer: Pseudonymizer) -> list[Group]:
    """Replace the ids of patients (slides), and order their results by the numbers."""
    hidden = [replace(group, id=pseudonymizer.of(unit, group.id)) for group in groups]
    return sorted(hidden, key=lambda group: group.id)


def _hide_common(facts: Facts, pseudonymizer: Pseudonymizer) -> Facts:
    return replace(
        facts,
        metrics=pseudonymizer.nested(facts.metrics),
        predictions=pseudonymizer.table(facts.predictions),
        recipe=pseudonymizer.nested(facts.recipe),
        recipe_toml=pseudonymizer.text(facts.recipe_toml),
        ids_hidden=True,
    )


def make_pseudonymizer(predictions: pd.DataFrame, pack_sha256: str) -> Pseudonymizer:
    """Return pseudonyms of the ids in predictions, salted by the ``content_sha256`` of their pack."""
    ids = {kind: predictions[f"{kind}_id"] for kind in KINDS if f"{kind}_id" in predictions}
    return Pseudonymizer(ids, pack_sha256)
