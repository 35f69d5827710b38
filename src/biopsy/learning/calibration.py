"""Calibration as a stage: what is fitted and frozen on validation patients once the weights are chosen.

`settle` does it at the end of training, `calibrate` again on a finished run. To freeze something else on
validation, do it in `settle`, and both have it.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from biopsy.core.errors import RunError
from biopsy.core.files import LOCK, remove_outputs, write_atomic
from biopsy.data.predictions import IDENTITY, tabulate_predictions, write_predictions
from biopsy.learning.abstention import fit_abstention
from biopsy.learning.classifiers import Classifier, score_classes
from biopsy.learning.recipes import Recipe, load_recipe, recipe_toml
from biopsy.learning.runs import Run, hash_question
from biopsy.statistics.calibrators import check_method, fit_calibrator
from biopsy.statistics.intervals import FEWEST_GROUPS
from biopsy.statistics.thresholds import choose_threshold

logger = logging.getLogger(__name__)

STALE = ("predictions/test.parquet", "evaluation", "external", "explain", "errors", "report.html")
"""What a run holds that was made with its former probabilities."""
_STALE_DOCUMENTS = (
    *("predictions/test.parquet", "evaluation/metrics.json", "evaluation/metrics-val.json", "report.html"),
    *("errors/errors.json", "errors/errors.parquet", "explain/conjectures.json", "explain/faithfulness.json"),
    *("external/*/evaluation/metrics.json", "external/*/evaluation/metrics-val.json"),
    *("external/*/predictions/test.parquet", "external/*/predictions/val.parquet"),
)


def settle(
    classifier: Classifier,
    logits: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
    *,
    method: str,
    rules: Sequence[str],
    chosen_on: str,
    unit: str,
    trained_prior: np.ndarray | None = None,
) -> None:
    """Fit the calibrator on validation patches, then freeze thresholds on the calibrated probabilities.

    Args:
        classifier: Gets ``info.calibrator`` and, for two classes, ``info.thresholds``.
        logits: Of the validation patches, ``(n, n_classes)``.
        target: Their classes, ``(n,)``.
        group_ids: The patient (slide, patch) of each.
        method: One of ``statistics.calibrators.METHODS``.
        rules: Of the thresholds; the first one decides.
        chosen_on: The side these patches are of.
        unit: What a group is.
        trained_prior: As `find_trained_prior` gives it.

    Raises:
        MetricError: If a logit is not finite, or the method cannot serve that many classes.
    """
    info, positive, n_groups = classifier.info, classifier.positive_index, len(np.unique(group_ids))
    scores = score_classes(logits, info.outputs)
    at = 1 if positive is None else positive
    fitted = fit_calibrator(scores, target, method, positive_index=at, trained_prior=trained_prior)
    info.calibrator = fitted.to_dict()
    if method != "none":
        info.calibrator |= {
            "asked": method,
            "fitted_on": chosen_on,
            "n_patches": len(target),
            "n_patients": n_groups,
            "unit": unit,
            "warning": _warn_few(n_groups, unit) if fitted.reason is None else None,
        }
        for message in (fitted.reason, info.calibrator["warning"]):
            if message:
                logger.warning("%s", message)
    if positive is not None:
        prob, truth = classifier.probs(logits)[:, positive], (target == positive).astype(int)
        info.thresholds = [_freeze(truth, prob, rule, chosen_on) for rule in dict.fromkeys(rules)]


def _warn_few(n_groups: int, unit: str) -> str | None:
    if unit == "patch" or n_groups >= FEWEST_GROUPS:
        return None
    return f"calibrated on {n_groups} {unit}{'s' * (n_groups > 1)} only: what fits there may not fit the next"


def _freeze(truth: np.ndarray, prob: np.ndarray, rule: str, chosen_on: str) -> dict[str, Any]:
    chosen = choose_threshold(truth, prob, rule)
    return {
        "value": chosen.value,
        "rule": chosen.rule,
        "chosen_on": chosen_on,
        "sensitivity": chosen.sensitivity,
        "specificity": chosen.specificity,
    }


def find_trained_prior(recipe: Recipe, counts: Sequence[int]) -> np.ndarray | None:
    """Give the share of each class as training saw it, where weights or sampling bent it; else None.

    A class weight of max / count (or any other constant / count) makes all classes count alike, and so does
    resampling to equal shares; both together turn their shares round.

    Args:
        recipe: Its class weights and its sampling.
        counts: Training patches of each class before resampling.
    """
    n_times = (recipe.train.class_weights != "none") + (recipe.train.sampling != "none")
    if not n_times:
        return None
    seen = np.asarray(counts, np.float64) ** (1 - n_times)
    return seen / seen.sum()


def settle_run(
    run: Run,
    recipe: Recipe,
    classifier: Classifier,
    logits: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
) -> None:
    """Do as `settle` what the recipe of a run asks for; logits, target and ids are those of validation."""
    split, published = run.info["split"], run.info["split"]["as_published"]
    decision = recipe.as_published if published else recipe.decision
    counts = split["sides"]["train"]["per_class"]
    settle(
        classifier,
        logits,
        target,
        group_ids,
        method=decision.calibration,
        rules=(decision.threshold, *recipe.decision.operating_points),
        chosen_on=run.val_side,
        unit=run.info["pack"]["unit"],
        trained_prior=find_trained_prior(recipe, [counts[name] for name in classifier.info.class_names]),
    )
    classifier.info.conformal = fit_abstention(
        classifier.probs(logits),
        target,
        group_ids,
        recipe.decision.abstention_error,
        promise=recipe.decision.abstention_promise,
        class_names=classifier.info.class_names,
        unit=run.info["pack"]["unit"],
        chosen_on=run.val_side,
        patients_overlap=bool(split["patients_overlap"]),
    )


def calibrate(run: Run | Path | str, *, method: str = "temperature") -> dict[str, Any]:
    """Fit the calibrator of a finished run anew on its stored validation predictions.

    Thresholds are frozen again, ``classifier/`` and ``predictions/val.parquet`` are written anew, and the
    recipe in the run says the method. What was made with the former probabilities (the test side's
    predictions, numbers and pages) is removed, so that nobody reads it: `biopsy.evaluate` makes it again, and
    that counts as one more opening of the test side.

    Args:
        run: A finished run; it may have been made before there was calibration.
        method: ``"temperature"``, ``"platt"``, ``"isotonic"`` (two classes) or ``"none"``.

    Returns:
        ``run``, ``calibrator`` and ``thresholds`` as in ``classifier.json``, and what was ``removed``.

    Raises:
        RunError: If the run has not finished or is in use.
        MetricError: If the method does not exist or is for two classes only.
    """
    run = Run.open(run)
    classifier = run.classifier
    check_method(method, len(classifier.info.class_names))
    try:
        with FileLock(run.path / LOCK, timeout=0):
            return _calibrate(run, classifier, method)
    except Timeout:
        raise RunError(f"{run.path} is in use by another process") from None


def _calibrate(run: Run, classifier: Classifier, method: str) -> dict[str, Any]:
    frame, about = run.predictions("val")
    unit, before = run.info["pack"]["unit"], classifier.info.calibrator
    table = "as_published" if run.info["split"]["as_published"] else "decision"
    recipe = load_recipe(run.recipe, [f"{table}.calibration={method}"])
    logits = frame[[f"logit_{name}" for name in classifier.info.class_names]].to_numpy(np.float64)
    target, group_ids = frame["target"].to_numpy(int), frame[f"{unit}_id"].to_numpy(str)
    settle_run(run, recipe, classifier, logits, target, group_ids)
    question_sha256 = _ask_again(run, recipe)
    removed = _remove_stale(run.path)
    classifier.save(run.path / "classifier")
    write_validation(run, classifier, frame[[*IDENTITY, "side", "fold", "target"]], logits, about)
    write_atomic(run.path / "recipe.toml", recipe_toml(recipe))
    run.update(
        threshold=classifier.frozen,
        classifier_sha256=classifier.sha256,
        question_sha256=question_sha256,
        recalibrated={
            "method": method,
            "before": before["method"],
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    return {
        "run": run.path,
        "calibrator": classifier.info.calibrator,
        "thresholds": classifier.info.thresholds,
        "removed": removed,
    }


def _remove_stale(folder: Path) -> list[str]:
    """Remove what was made with a run's former probabilities, and nothing else; return which of `STALE`."""
    documents = [
        path.relative_to(folder).as_posix() for name in _STALE_DOCUMENTS for path in folder.glob(name)
    ]
    removed, kept = remove_outputs(folder, *documents)
    for name in ("explain", "errors"):
        below = remove_outputs(folder / name)
        removed, kept = (
            [*files, *(f"{name}/{file}" for file in more)]
            for files, more in zip((removed, kept), below, strict=True)
        )
    for file in kept:
        logger.warning(
            "%s was changed since it was written and stays: it is of the former calibration", folder / file
        )
    return [name for name in STALE if any(file == name or file.startswith(f"{name}/") for file in removed)]


def write_validation(
    run: Run,
    classifier: Classifier,
    about: pd.DataFrame,
    logits: np.ndarray,
    metadata: Mapping[str, Any],
) -> None:
    """Write ``predictions/val.parquet``: what a classifier, once settled, says of validation.

    Args:
        run: Whose validation side it is.
        classifier: With calibrator and thresholds.
        about: `IDENTITY`, side, fold and target of each patch.
        logits: ``(n, n_classes)``.
        metadata: ``pack_sha256`` and ``split``.
    """
    probs, info = classifier.probs(logits), classifier.info
    frame = tabulate_predictions(
        about,
        info.class_names,
        classifier.positive_index,
        logits,
        probs,
        threshold=classifier.threshold,
        abstained=classifier.abstains(probs),
    )
    known = {**metadata, "classifier_sha256": classifier.sha256, "threshold": classifier.frozen}
    write_predictions(run.path / "predictions" / "val.parquet", frame, known)


def _ask_again(run: Run, recipe: Recipe) -> str | None:
    """Give the question that the run answers now; None where its pack is out of reach, or it had none."""
    if not run.info.get("question_sha256"):
        return None
    try:
        pack = run.open_pack(verify=False)
    except RunError:
        return None
    info = run.info
    return hash_question(
        recipe, pack, run.sides(pack), info["split"], info["seed"], info["weights"]["sha256"]
    )
