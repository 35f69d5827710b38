"""Evaluation: the numbers of a run on one side, with intervals over patients, and the count of openings."""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from biopsy.core.errors import RunError
from biopsy.core.files import read_json, write_json
from biopsy.core.subsets import subset_name
from biopsy.data.ledger import count_openings, record_opening
from biopsy.data.packs import Pack
from biopsy.data.predictions import make_predictions, write_predictions
from biopsy.data.splits import find_split
from biopsy.evaluation.abstention.measure import measure_abstention
from biopsy.evaluation.calibration.measure import measure_calibration
from biopsy.evaluation.colour_baseline import colour_baseline
from biopsy.evaluation.operating_points import measure_decisions
from biopsy.evaluation.results import Evaluation
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.subgroups import describe_intervals, measure_subgroups, pick_columns
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.decisions import check_prevalence
from biopsy.statistics.intervals import (
    describe_method,
    estimate_class_metrics,
    estimate_metrics,
    estimate_patient_metrics,
)
from biopsy.statistics.multiclass import ClassSample, classification_report
from biopsy.statistics.paired import estimate_differences
from biopsy.statistics.resampling import Interval
from biopsy.statistics.weighted_counts import sort_scores
from biopsy.training.postprocessing import warn_of_spread
from biopsy.training.runs import Run

logger = logging.getLogger(__name__)

FORMAT = "biopsy-metrics/1"
LEVEL = 0.95


def evaluate(
    run: Run | Path | str,
    *,
    side: str = "test",
    data: Pack | Path | str | None = None,
    split: str | None = None,
    prevalence: float | None = None,
) -> Evaluation:
    """Judge a run on its test or validation side, or on another pack, and keep the numbers in the run.

    Writes ``predictions/<side>.parquet`` and ``evaluation/metrics.json`` (for validation
    ``metrics-val.json``; for another pack both under ``external/<pack>/``). Opening a test side is recorded
    in the pack's ledger.

    Args:
        run: A finished run.
        side: ``"test"`` or ``"val"``.
        data: Another pack with the same classes, of which all patches are judged unless ``split`` is given.
            The run's own pack is known by its content wherever it lies, and judged on the run's own split.
        split: With another pack: the split of that pack whose ``side`` is judged.
        prevalence: Also work out ppv and npv where this share of patches is positive.

    Returns:
        The numbers, which ``metrics.json`` holds; see the file formats page.

    Raises:
        RunError: If the run has not finished, its pack changed, or there is nothing on that side.
        DataError: If the other pack's patches are of another resolution or larger than the classifier's.
    """
    run = Run.open(run)
    classifier = run.classifier
    if side not in ("test", "val"):
        raise RunError(f"side={side!r} cannot be judged: test or val")
    if prevalence is not None:
        check_prevalence(prevalence)
    pack, sides, about = _choose_patches(run, classifier, side, data, split)
    if side == "val" and about["test_is_validation"]:
        raise RunError(
            f"{run.path.name} has no validation subset: as published, it was tuned on its test subset; "
            "evaluate that"
        )
    rows = np.flatnonzero(sides == side)
    if not len(rows):
        raise RunError(
            f"split {about['name']!r} has no {subset_name(side)} patches in {pack.path.name}: make another "
            "with `biopsy split`"
        )
    engine = Engine("auto", run.recipe.train.precision)
    with open_predictor(classifier, engine, len(rows)) as predictor:
        logits = predictor.logits(pack.patches, pack.sizes, rows)
    pack.require_unchanged()
    classifier_sha256 = classifier.sha256
    classifier = classifier.for_patches(pack.table.iloc[rows])
    logits = classifier.add_context(logits, pack.table.iloc[rows])
    probs = classifier.probs(logits)
    threshold, groups = classifier.frozen, pack.group_ids[rows]
    scored = ScoredPatches.of_pack(pack, rows, probs, classifier.threshold)
    place = run.path if _is_own(run, pack) else run.path / "external" / pack.path.stem
    openings = _open_ledger(run, pack, about, side)
    frame = make_predictions(
        pack,
        rows,
        logits,
        probs,
        sides=side,
        fold=about["fold"],
        threshold=classifier.threshold,
        abstained=classifier.abstains(probs),
    )
    write_predictions(
        place / "predictions" / f"{side}.parquet",
        frame,
        {
            "pack_sha256": pack.info.content_sha256,
            "classifier_sha256": classifier_sha256,
            "split": about["name"],
            "threshold": threshold,
            "software": dict([predictor.software]),
        },
    )
    columns = pick_columns(pack.table.iloc[rows])
    subgroups = measure_subgroups(scored, columns, seed=run.info["seed"], level=LEVEL)
    metrics = {
        "format": FORMAT,
        "title": run.recipe.heading,
        "side": side,
        "synthetic": pack.info.is_synthetic,
        "positive_class": pack.info.positive_class,
        "class_names": pack.class_names,
        "n_patches": len(rows),
        "n_patients": len(np.unique(groups)),
        "unit": pack.unit,
        "split": about,
        "threshold": threshold,
        "classifier_sha256": classifier_sha256,
        **measure_predictions(scored, classifier.threshold, seed=run.info["seed"]),
        **_measure_decision(classifier, scored, logits, prevalence, run.info["seed"]),
        "abstention": measure_abstention(
            classifier.info.conformal,
            pack,
            rows,
            probs,
            frame["pred"].to_numpy(int),
            seed=run.info["seed"],
            level=LEVEL,
        ),
        "interval": describe_method(
            len(np.unique(groups)), seed=run.info["seed"], level=LEVEL, unit=pack.unit
        ),
        "baseline": _compare_with_colour(run, pack, sides, side, probs) if _is_own(run, pack) else None,
        "subgroups": subgroups,
        "subgroup_intervals": describe_intervals(subgroups, LEVEL),
        "warnings": [
            *run.info.get("warnings", []),
            *filter(None, [warn_of_spread(classifier, logits, side), scored.warn_unequal_groups()]),
        ],
        "times_opened": openings and openings["times"],
        "ledger": openings,
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = place / "evaluation" / ("metrics.json" if side == "test" else f"metrics-{side}.json")
    write_json(path, metrics)
    return Evaluation(read_json(path, format=FORMAT), frame, run.path)


def measure_predictions(scored: ScoredPatches, threshold: float | None, *, seed: int) -> dict[str, Any]:
    """Return the entries of ``metrics.json`` that follow from probabilities alone.

    Args:
        scored: The patches.
        threshold: At which they are called positive; 0.5 if not given.
        seed: Of bootstrap draws and of the simulated calibration floor.
    """
    options: dict[str, Any] = {"seed": seed, "level": LEVEL, "unit": scored.unit}
    sample, matrix = scored.sample(), scored.confusion()
    report = {"classification_report": classification_report(matrix, scored.class_names)}
    if isinstance(sample, ClassSample):
        pooled, per_class = estimate_class_metrics(sample, **options)
        return {
            "confusion_matrix": matrix,
            **report,
            "patch": _to_dicts(pooled),
            "one_vs_rest": {name: _to_dicts(intervals) for name, intervals in per_class.items()},
        }
    truth, prob, value = scored.is_positive, scored.prob, 0.5 if threshold is None else threshold
    document: dict[str, Any] = {
        "confusion": count_calls(truth, prob, value),
        "at_half": count_calls(truth, prob, 0.5),
        **report,
        "prevalence": float(truth.mean()),
        "patch": _to_dicts(estimate_metrics(sample, **options)),
        "ece_floor": ece_floor(prob, seed=seed),
    }
    if scored.unit != "patch":
        patients = estimate_patient_metrics(
            truth, prob, scored.group_ids, value, level=LEVEL, unit=scored.unit
        )
        document["patient"] = {name: summary.to_dict() for name, summary in patients.items()}
    return document


def _to_dicts(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in intervals.items()}


def _measure_decision(
    classifier: Classifier, scored: ScoredPatches, logits: np.ndarray, prevalence: float | None, seed: int
) -> dict[str, Any]:
    """Return the entries on the calibrator and, for two classes, on thresholds and what acting gains."""
    options: dict[str, Any] = {"seed": seed, "unit": scored.unit, "level": LEVEL}
    target, groups = scored.target, scored.group_ids
    result = {"calibration": measure_calibration(classifier, logits, target, groups, **options)}
    if scored.positive_index is None:
        return result
    return result | measure_decisions(
        scored.is_positive,
        scored.prob,
        groups,
        classifier.info.thresholds,
        prevalence=prevalence,
        **options,
    )


def count_calls(truth: np.ndarray, prob: np.ndarray, threshold: float) -> dict[str, int]:
    """Count true and false positives and negatives at a threshold."""
    called = prob >= threshold
    return {
        "tp": int((called & (truth == 1)).sum()),
        "fp": int((called & (truth == 0)).sum()),
        "fn": int((~called & (truth == 1)).sum()),
        "tn": int((~called & (truth == 0)).sum()),
    }


def _choose_patches(
    run: Run, classifier: Classifier, side: str, data: Pack | Path | str | None, split_name: str | None
) -> tuple[Pack, np.ndarray, dict[str, Any]]:
    """Return the pack, the side of each of its patches, and the ``split`` entry of ``metrics.json``."""
    pack = run.open_pack() if data is None else Pack.open(data)
    check_classes(pack, classifier)
    if _is_own(run, pack):
        if split_name is not None:
            raise RunError(
                f"split={split_name!r} goes with data= of another pack: {run.path.name} is judged on its own "
                "split"
            )
        if data is not None:
            pack.verify()
        about = {key: run.info["split"][key] for key in ("name", "fold", "patients_overlap")}
        about["test_is_validation"] = bool(run.info["split"].get("val_is_test", False))
        return pack, run.sides(pack), about
    pack.verify()
    classifier.check_pack(pack)
    sides = np.full(len(pack), side)
    if split_name is not None:
        split = find_split(pack, split_name)
        if split.n_folds:
            raise RunError(
                f"split {split_name!r} of {pack.path.name} has folds, each of which is tested in its turn: "
                "name a split with sides, or none to judge all its patches"
            )
        sides = split.sides(pack)
    overlap = _find_overlap(run, pack, sides == side)
    about = {"name": split_name, "fold": None, "patients_overlap": overlap, "test_is_validation": False}
    return pack, sides, about


def _is_own(run: Run, pack: Pack) -> bool:
    return pack.info.content_sha256 == run.info["pack"]["content_sha256"]


def check_classes(pack: Pack, classifier: Classifier) -> None:
    """Refuse a pack with other classes than the classifier's.

    Raises:
        RunError: Naming both.
    """
    theirs = (pack.class_names, pack.info.positive_class)
    ours = (classifier.info.class_names, classifier.info.positive_class)
    if theirs != ours:
        raise RunError(
            f"{pack.path} has the classes {theirs[0]}, positive {theirs[1]!r}; the run learned {ours[0]}, "
            f"positive {ours[1]!r}"
        )


def _find_overlap(run: Run, pack: Pack, judged: np.ndarray) -> bool | None:
    """Say whether another pack of the same data set brings back patients the run learned from.

    None where that cannot be known: ids of two data sets do not speak of the same people, and the pack that
    was learned from may be out of reach.
    """
    if pack.info.dataset != run.info["pack"]["dataset"] or "patch" in (pack.unit, run.info["pack"]["unit"]):
        return None
    try:
        learned = run.open_pack(verify=False)
    except RunError:
        return None
    chosen_on = np.isin(run.sides(learned), ("train", "val"))
    seen = np.intersect1d(learned.group_ids[chosen_on], pack.group_ids[judged])
    if len(seen):
        logger.warning("%d of the judged %ss were learned from, %s first", len(seen), pack.unit, seen[0])
    return bool(len(seen))


def _compare_with_colour(
    run: Run, pack: Pack, sides: np.ndarray, side: str, probs: np.ndarray
) -> dict[str, Any]:
    """Return the colour-only baseline; for two classes with intervals, and the gain over it, paired."""
    result = colour_baseline(pack, sides, seed=run.info["seed"], side=side)
    rows, theirs = result.pop("index"), result.pop("probs")
    positive = pack.positive_index
    if positive is None or result["auroc"] is None:
        return result
    truth, groups = (pack.target[rows] == positive).astype(int), pack.group_ids[rows]
    seed, alone = run.info["seed"], sort_scores(truth, theirs[:, positive], group_ids=groups)
    interval = estimate_metrics(alone, seed=seed, names=["auroc"], level=LEVEL, unit=pack.unit)["auroc"]
    gain = estimate_differences(
        truth,
        probs[:, positive],
        theirs[:, positive],
        groups,
        names=["auroc"],
        seed=seed,
        level=LEVEL,
        unit=pack.unit,
    )
    return result | {"interval": interval.to_dict(), "gain": gain["auroc"].to_dict()}


def _open_ledger(run: Run, pack: Pack, split: dict[str, Any], side: str) -> dict[str, Any] | None:
    if side != "test":
        return None
    entry = {
        "run": run.info["id"],
        "recipe": run.info["recipe"],
        "seed": run.info["seed"],
        "split": split["name"] or "all patches",
        "fold": split["fold"],
        "side": side,
    }
    record_opening(pack, run.path, entry)
    return count_openings(pack, split=entry["split"], fold=split["fold"], run_dir=run.path)
