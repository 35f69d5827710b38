"""Evaluation of a run on one subset: metrics with intervals over patients, recorded in the pack's ledger."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from biopsy.core.errors import FileFormatError, RunError
from biopsy.core.files import read_json, write_json
from biopsy.core.storage import stage
from biopsy.core.text import count, plural
from biopsy.data.ledger import OpeningCount, count_openings, record_opening
from biopsy.data.packs import Pack, known_groups
from biopsy.data.predictions import describe_patches, write_predictions
from biopsy.data.splits import find_split
from biopsy.evaluation.abstention.measure import measure_abstention
from biopsy.evaluation.calibration.measure import measure_calibration, measure_reliability
from biopsy.evaluation.colour_baseline import colour_baseline
from biopsy.evaluation.measure import (
    measure_decisions,
    measure_each_group,
    measure_performance,
    measure_subgroups,
    pick_columns,
)
from biopsy.evaluation.results import Evaluation
from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.classifier import Classifier, Threshold, fix_threshold
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.statistics.decisions import check_prevalence
from biopsy.statistics.intervals import describe_method, estimate_metrics
from biopsy.statistics.paired import estimate_differences
from biopsy.statistics.weighted_counts import sort_scores
from biopsy.training.metrics import FORMAT, Calibration, ColourBaseline, Metrics, SplitUse, SubgroupIntervals
from biopsy.training.postprocessing import warn_of_spread
from biopsy.training.runs import Run

logger = logging.getLogger(__name__)


def measure(
    scored: ScoredPatches,
    columns: pd.DataFrame,
    thresholds: Sequence[Threshold],
    *,
    groups: pd.Series | None = None,
    prevalence: float | None = None,
    calibration: Calibration | None = None,
    warnings: Sequence[str] = (),
) -> Metrics:
    """Return the metrics of patches with probabilities.

    Args:
        columns: Columns within whose values metrics are repeated, one row per patch.
        thresholds: As in ``classifier.json``; the first is the decision threshold.
        groups: The known patient (slide) of each patch, from `known_groups`, for the results of each.
        calibration: From `measure_calibration`; by default, probabilities are treated as not calibrated.
    """
    threshold = thresholds[0] if thresholds else None
    cutoff = threshold["value"] if threshold else None
    subgroups = measure_subgroups(scored, columns)
    n_subgroups = sum(map(len, subgroups.values()))
    interval = describe_method(scored.n_groups, **scored.resampling)
    if calibration is None:
        reliability = measure_reliability(scored)
        calibration = {"method": "none", "before": reliability, "after": reliability}
    return Metrics(
        positive_class=scored.positive_class,
        class_names=list(scored.class_names),
        n_patches=len(scored),
        n_patients=scored.n_groups,
        unit=scored.unit,
        threshold=threshold and fix_threshold(threshold),
        **vars(measure_performance(scored, cutoff)),
        calibration=calibration,
        **vars(measure_decisions(scored, thresholds, prevalence=prevalence)),
        interval=interval,
        groups=None if groups is None else measure_each_group(scored, groups, cutoff),
        subgroups=subgroups,
        subgroup_intervals=SubgroupIntervals(interval.level, n_subgroups) if n_subgroups else None,
        warnings=[*warnings, *filter(None, [scored.warn_unequal_groups()])],
        evaluated=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def evaluate(
    run: Run | Path | str,
    *,
    subset: str = "test",
    data: Pack | Path | str | None = None,
    split: str | None = None,
    prevalence: float | None = None,
) -> Evaluation:
    """Evaluate a run on its test or validation subset, or on another pack, and keep the metrics in the run.

    Writes ``predictions/<subset>.parquet`` and ``evaluation/metrics.json`` (for validation
    ``metrics-validation.json``; for another pack both under ``external/<pack>/``). Evaluations of a test
    subset are recorded in the pack's ledger.

    Args:
        run: A finished run.
        subset: ``"test"`` or ``"validation"``.
        data: Another pack with the same classes; all its patches are evaluated unless ``split`` is given. A
            copy of the run's own pack is recognised by its content and evaluated on the run's split.
        split: With another pack: the split of that pack whose ``subset`` is evaluated.
        prevalence: Also compute PPV and NPV at this share of positive patches.

    Returns:
        The content of ``metrics.json``; see the file formats page.

    Raises:
        RunError: If the run has not finished, its pack changed, or the subset is empty.
        DataError: If the other pack's patches have another resolution than the classifier's or are larger.
    """
    run = Run.open(run)
    classifier = run.classifier
    if subset not in ("test", "validation"):
        raise RunError(f"subset={subset!r} is unknown: expected 'test' or 'validation'")
    if prevalence is not None:
        check_prevalence(prevalence)
    pack, subsets, split_use = _choose_patches(run, classifier, subset, data, split)
    if subset == "validation" and split_use.test_is_validation:
        raise RunError(
            f"{run.path.name} has no validation subset: as published, it was tuned on its test subset; "
            "evaluate the test subset"
        )
    engine = Engine("auto", run.recipe.train.precision)
    predicted = predict_subset(
        classifier, pack, subsets, subset, split_use, engine=engine, seed=run.info["seed"]
    )
    classifier_sha256 = classifier.sha256
    from biopsy.models.weights import title_recipe  # imports PyTorch

    folder = run.path if _is_own(run, pack) else run.path / "external" / pack.path.stem
    openings = _open_ledger(run, pack, split_use, subset) if subset == "test" else None
    write_predictions(
        folder / "predictions" / f"{subset}.parquet",
        predicted.frame,
        {
            "pack_sha256": pack.info.content_sha256,
            "classifier_sha256": classifier_sha256,
            "split": split_use.name,
            "threshold": predicted.classifier.decision_threshold,
            "software": dict([predicted.software]),
        },
    )
    scored = predicted.scored
    metrics = replace(
        predicted.measure(
            predicted.classifier.info.thresholds,
            prevalence,
            [
                *run.info.get("warnings", []),
                *filter(None, [warn_of_spread(predicted.classifier, predicted.logits, subset)]),
            ],
        ),
        title=title_recipe(run.recipe),
        subset=subset,
        synthetic=pack.info.is_synthetic,
        split=split_use,
        classifier_sha256=classifier_sha256,
        abstention=measure_abstention(predicted.classifier.info.conformal, scored),
        baseline=_compare_with_colour(pack, subsets, subset, scored) if _is_own(run, pack) else None,
        times_opened=None if openings is None else openings["times"],
        ledger=openings,
    )
    path = folder / "evaluation" / ("metrics.json" if subset == "test" else f"metrics-{subset}.json")
    if openings is not None:
        _warn_of_lost_openings(path, pack, openings["times"])
    pack.require_unchanged()
    write_json(path, metrics)
    return Evaluation(read_json(path, format=FORMAT), predicted.frame, run.path)


@dataclass(frozen=True)
class PredictedRows:
    """Predictions of rows of a pack.

    Attributes:
        classifier: The classifier applied, with or without context.
        logits: With context, before calibration, ``(n, n_classes)``.
        scored: The patches with their probabilities.
        columns: Additional columns of the pack.
        software: Name and version of the runtime.
    """

    classifier: Classifier
    logits: np.ndarray
    scored: ScoredPatches
    frame: pd.DataFrame
    columns: pd.DataFrame
    software: tuple[str, str]

    def measure(
        self, thresholds: Sequence[Threshold], prevalence: float | None, warnings: Sequence[str] = ()
    ) -> Metrics:
        """Measure the predictions and the classifier's calibrator."""
        return measure(
            self.scored,
            self.columns,
            thresholds,
            groups=known_groups(self.frame, self.scored.unit),
            prevalence=prevalence,
            calibration=measure_calibration(self.classifier, self.logits, self.scored),
            warnings=warnings,
        )


def predict_subset(
    classifier: Classifier,
    pack: Pack,
    subsets: np.ndarray,
    subset: str,
    split: SplitUse,
    *,
    engine: Engine,
    seed: int,
) -> PredictedRows:
    """Predict the patches of a subset.

    Raises:
        RunError: If the subset is empty, or the pack changed.
    """
    rows = np.flatnonzero(subsets == subset)
    if not len(rows):
        raise RunError(
            f"split {split.name!r} has no {subset} patches in {pack.path.name}: evaluate another subset or "
            "pack, or make another split with `biopsy split`"
        )
    with open_predictor(classifier, engine, len(rows)) as predictor:
        logits = predictor.logits(pack.patches, pack.sizes, rows)
    pack.require_unchanged()
    table = pack.table.iloc[rows]
    classifier = classifier.for_patches(table)
    logits = classifier.add_context(logits, table)
    frame = classifier.tabulate(describe_patches(pack, rows, subset=subset, fold=split.fold), logits)
    scored = ScoredPatches.of_pack(pack, rows, classifier.probs(logits), classifier.threshold, seed=seed)
    return PredictedRows(classifier, logits, scored, frame, pick_columns(table), predictor.software)


def _choose_patches(
    run: Run, classifier: Classifier, subset: str, data: Pack | Path | str | None, split_name: str | None
) -> tuple[Pack, np.ndarray, SplitUse]:
    """Return the pack, the subset of each of its patches, and the evaluated split."""
    pack = run.open_pack() if data is None else Pack.open(stage(data))
    check_classes(pack, classifier)
    if _is_own(run, pack):
        if split_name is not None:
            raise RunError(
                f"split={split_name!r} needs data= of another pack: {run.path.name} is evaluated on its own "
                "split"
            )
        if data is not None:
            pack.verify()
        own_split = run.info["split"]
        is_validation = bool(own_split.get("test_is_validation", False))
        return (
            pack,
            run.subsets(pack),
            SplitUse(own_split["name"], own_split["fold"], own_split["patients_overlap"], is_validation),
        )
    pack.verify()
    classifier.check_pack(pack)
    subsets = np.full(len(pack), subset)
    if split_name is not None:
        split = find_split(pack, split_name)
        if split.n_folds:
            raise RunError(
                f"split {split_name!r} of {pack.path.name} has folds: choose a split with subsets, or none "
                "to evaluate all patches"
            )
        subsets = split.subsets(pack)
    return pack, subsets, SplitUse(split_name, patients_overlap=_find_overlap(run, pack, subsets == subset))


def _is_own(run: Run, pack: Pack) -> bool:
    return pack.info.content_sha256 == run.info["pack"]["content_sha256"]


def check_classes(pack: Pack, classifier: Classifier) -> None:
    """Check that a pack has the classes of a classifier.

    Raises:
        RunError: If the classes or the positive class differ.
    """
    theirs = (pack.class_names, pack.info.positive_class)
    ours = (classifier.info.class_names, classifier.info.positive_class)
    if theirs != ours:
        raise RunError(
            f"{pack.path} has the classes {theirs[0]}, positive {theirs[1]!r}; the run learned {ours[0]}, "
            f"positive {ours[1]!r}"
        )


def _find_overlap(run: Run, pack: Pack, evaluated: np.ndarray) -> bool | None:
    """Return whether another pack of the same data set contains patients of training or validation.

    None if unknown: ids of different data sets cannot be compared, and the training pack may be unavailable.
    """
    if pack.info.dataset != run.info["pack"]["dataset"] or "patch" in (pack.unit, run.info["pack"]["unit"]):
        return None
    try:
        training_pack = run.open_pack(verify=False)
    except RunError:
        return None
    chosen_on = np.isin(run.subsets(training_pack), ("train", "validation"))
    seen = np.intersect1d(training_pack.group_ids[chosen_on], pack.group_ids[evaluated])
    if len(seen):
        logger.warning(
            "%d evaluated %s were used in training or validation, first %s",
            *(len(seen), plural(pack.unit), seen[0]),
        )
    return bool(len(seen))


def _compare_with_colour(
    pack: Pack, subsets: np.ndarray, subset: str, scored: ScoredPatches
) -> ColourBaseline:
    """Return the colour-only baseline, for two classes with its interval and the paired gain over it."""
    baseline, probs = colour_baseline(pack, subsets, seed=scored.seed, subset=subset)
    if scored.positive_index is None or baseline.auroc is None:
        return baseline
    truth, prob, groups = scored.is_positive, probs[:, scored.positive_index], scored.group_ids
    alone = sort_scores(truth, prob, group_ids=groups)
    gain = estimate_differences(truth, scored.prob, prob, groups, names=["auroc"], **scored.resampling)
    return replace(
        baseline,
        interval=estimate_metrics(alone, ["auroc"], **scored.resampling)["auroc"],
        gain=gain["auroc"],
    )


def _warn_of_lost_openings(path: Path, pack: Pack, times: int) -> None:
    """Warn if the last evaluation of this run was counted as a later one than this."""
    try:
        before = read_json(path, format=FORMAT).get("times_opened") if path.exists() else None
    except FileFormatError:
        return
    if isinstance(before, int) and times <= before:
        logger.warning(
            "the ledger of %s counts %s, but the last evaluation of this run was number %d: entries are "
            "missing, from a ledger that was changed or a pack that was made again",
            *(pack.path.name, count(times, "evaluation"), before),
        )


def _open_ledger(run: Run, pack: Pack, split: SplitUse, subset: str) -> OpeningCount:
    name = split.name or "all patches"
    entry = {
        "run": run.info["id"],
        "recipe": run.info["recipe"],
        "seed": run.info["seed"],
        "split": name,
        "fold": split.fold,
        "subset": subset,
    }
    record_opening(pack, run.path, entry)
    return count_openings(pack, split=name, fold=split.fold, run_dir=run.path)
