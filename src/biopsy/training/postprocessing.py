"""Postprocessing fitted on validation patients: calibration, decision thresholds, conformal sets."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from biopsy.core.text import count, plural
from biopsy.data.predictions import decide, write_predictions
from biopsy.models.classifier import Classifier, SinglePatch, Threshold, score_classes
from biopsy.recipes import Recipe
from biopsy.statistics.abstention import ConformalRecord, Guarantee, fit_conformal, split_conformal
from biopsy.statistics.calibrators import MIN_SPREAD, fit_calibrator, spread_of
from biopsy.statistics.decisions import choose_threshold
from biopsy.statistics.resampling import MIN_GROUPS
from biopsy.training.runs import Run


def fit_abstention(
    probs: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
    alpha: float,
    *,
    guarantee: Guarantee,
    class_names: list[str],
    unit: str,
    chosen_on: str,
    patients_overlap: bool,
) -> ConformalRecord:
    """Return the ``conformal`` entry of ``classifier.json``.

    Args:
        probs: Calibrated probabilities of the calibration patches, ``(n, n_classes)``.
        target: Their classes, ``(n,)``.
        class_names: In the order of the columns of ``probs``.
        patients_overlap: Whether patients are in several subsets, so that there is no guarantee.
    """
    fitted = fit_conformal(
        probs, target, group_ids, alpha, guarantee=guarantee, unit=unit, class_names=class_names
    )
    if patients_overlap:
        fitted["quantiles"] = None
        fitted["reason"] = (
            f"{plural(unit)} are in several subsets of this split, so errors on {chosen_on} give no "
            f"guarantee for a new {unit}"
        )
    plain = split_conformal(probs, target, alpha, guarantee=guarantee)
    return {**fitted, "chosen_on": chosen_on, "per_patch_quantiles": plain["quantiles"]}


logger = logging.getLogger(__name__)

MAX_CHANGED = 0.01  # of the predictions


def fit_postprocessing(
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
    prevalence: float = 0.0,
) -> None:
    """Fit the calibrator on validation patches, then thresholds on the calibrated probabilities.

    Args:
        classifier: Gets ``info.calibrator`` and, for two classes, ``info.thresholds``.
        logits: Of the validation patches, ``(n, n_classes)``.
        target: Their classes, ``(n,)``.
        group_ids: The patient (slide, patch) of each.
        method: One of ``statistics.calibrators.METHODS``.
        trained_prior: As `find_trained_prior` gives it.
        prevalence: Share of positive patches where the classifier is used; 0: as in validation.

    Raises:
        MetricError: If a logit is not finite, or the method does not support the number of classes or the
            prevalence.
    """
    info, positive, n_groups = classifier.info, classifier.positive_index, len(np.unique(group_ids))
    scores = score_classes(logits, info.outputs)
    at = 1 if positive is None else positive
    fitted = fit_calibrator(
        scores,
        target,
        method,
        n_groups=n_groups,
        positive_index=at,
        trained_prior=trained_prior,
        prevalence=prevalence,
    )
    info.calibrator = fitted.to_dict()
    if method != "none":
        info.calibrator |= {
            "asked": method,
            "fitted_on": chosen_on,
            "n_patches": len(target),
            "n_patients": n_groups,
            "unit": unit,
            "warning": _warn_few(n_groups, unit),
        }
    if prevalence:
        info.calibrator |= {"prevalence": prevalence, "fitted_prevalence": float((target == at).mean())}
    if positive is not None:
        prob, truth = classifier.probs(logits)[:, positive], (target == positive).astype(int)
        info.thresholds = [
            _choose_threshold(truth, prob, rule, chosen_on, prevalence) for rule in dict.fromkeys(rules)
        ]


def warn_of_calibration(classifier: Classifier) -> list[str]:
    """Return warnings of a calibration: another method than requested, or few patients."""
    calibrator = classifier.info.calibrator
    reason = calibrator.get("reason")
    instead = f"calibrated by an intercept alone: {reason}" if reason else None
    return [message for message in (instead, calibrator.get("warning")) if message]


def _warn_few(n_groups: int, unit: str) -> str | None:
    if unit == "patch" or n_groups >= MIN_GROUPS:
        return None
    return f"calibrated on {count(n_groups, unit)} only: calibration may not generalise to others"


def _choose_threshold(
    truth: np.ndarray, prob: np.ndarray, rule: str, chosen_on: str, prevalence: float
) -> Threshold:
    chosen = choose_threshold(truth, prob, rule, prevalence=prevalence)
    return Threshold(
        value=chosen.value,
        rule=chosen.rule,
        chosen_on=chosen_on,
        sensitivity=chosen.sensitivity,
        specificity=chosen.specificity,
    )


def warn_of_spread(classifier: Classifier, logits: np.ndarray, subset: str) -> str | None:
    """Return a warning if the scores of a classifier barely differ between patches, else None.

    That is if their standard deviation is below `MIN_SPREAD`, or more than `MAX_CHANGED` of the predictions
    change when logits are rounded to half precision, as other hardware may round differently.
    """
    spread = spread_of(score_classes(logits, classifier.info.outputs))
    rounded = logits.astype(np.float16).astype(np.float64)
    positive, threshold = classifier.positive_index, classifier.threshold
    y_pred, rounded_pred = (
        decide(classifier.probs(values), positive, threshold) for values in (logits, rounded)
    )
    n_changed = int((y_pred != rounded_pred).sum())
    if spread >= MIN_SPREAD and n_changed <= max(2, MAX_CHANGED * len(logits)):
        return None
    return (
        f"scores barely differ between {subset} patches (standard deviation {spread:.2g} before calibration)"
        f"; {n_changed:,} of {len(logits):,} predictions change when scores are rounded to half precision"
    )


def find_trained_prior(
    recipe: Recipe, counts: Sequence[int], sampled: Sequence[float] | None = None
) -> np.ndarray | None:
    """Return the class proportions of training if changed by class weights or sampling, else None.

    A class weight of max / count (or any other constant / count) makes all classes count alike, and so does
    resampling to equal shares; both together turn their shares round.

    Args:
        counts: Training patches of each class.
        sampled: Shares of the classes in an epoch, where sampling or patch weights make them neither those of
            the patches nor equal.
    """
    train = recipe.train
    is_as_counted = train.sampling in ("none", "within-patient")  # the latter where it changes no share
    if sampled is None and train.class_weights == "none" and is_as_counted:
        return None
    if sampled is None:
        sampled = list(counts) if is_as_counted else [1.0] * len(counts)
    seen = np.asarray(sampled, np.float64) / (1 if train.class_weights == "none" else np.asarray(counts))
    return seen / seen.sum()


def fit_run_postprocessing(
    run: Run,
    recipe: Recipe,
    classifier: Classifier,
    logits: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
    *,
    single_logits: np.ndarray | None = None,
) -> None:
    """Call `fit_postprocessing` with the recipe of a run; logits, target and ids are of validation.

    Args:
        single_logits: Logits without neighbours of a classifier with ``context``, for ``info.single_patch``.
    """
    if single_logits is not None:
        single = classifier.single_patch()
        fit_run_postprocessing(run, recipe, single, single_logits, target, group_ids)
        classifier.info.single_patch = SinglePatch(
            calibrator=single.info.calibrator,
            thresholds=single.info.thresholds,
            conformal=single.info.conformal,
        )
    split, published = run.info["split"], run.info["split"]["as_published"]
    decision = recipe.as_published if published else recipe.decision
    names = classifier.info.class_names
    counts, shares = split["subsets"]["train"]["per_class"], split.get("class_shares")
    sampled = None if shares is None else [shares[name] for name in names]
    fit_postprocessing(
        classifier,
        logits,
        target,
        group_ids,
        method=decision.calibration,
        rules=(decision.threshold, *recipe.decision.operating_points),
        chosen_on=run.validation_subset,
        unit=run.info["pack"]["unit"],
        trained_prior=find_trained_prior(recipe, [counts[name] for name in names], sampled),
        prevalence=recipe.decision.prevalence if decision.calibration != "none" else 0.0,
    )
    classifier.info.conformal = fit_abstention(
        classifier.probs(logits),
        target,
        group_ids,
        recipe.decision.abstention_error,
        guarantee=recipe.decision.abstention_guarantee,
        class_names=names,
        unit=run.info["pack"]["unit"],
        chosen_on=run.validation_subset,
        patients_overlap=bool(split["patients_overlap"]),
    )


def single_logit_columns(classifier: Classifier) -> list[str]:
    """Return the columns of a table of validation predictions with the logits without neighbours."""
    return [f"single_logit_{name}" for name in classifier.info.class_names]


def write_validation(
    run: Run,
    classifier: Classifier,
    patches: pd.DataFrame,
    logits: np.ndarray,
    metadata: Mapping[str, object],
    *,
    single_logits: np.ndarray | None = None,
) -> None:
    """Write ``predictions/validation.parquet``, the predictions of a fitted classifier on validation.

    Args:
        classifier: Classifier with calibrator and thresholds.
        patches: `IDENTITY`, subset, fold and target of each patch.
        logits: ``(n, n_classes)``.
        metadata: ``pack_sha256`` and ``split``.
        single_logits: Logits without neighbours of a classifier with ``context``, ``(n, n_classes)``.
    """
    frame = classifier.tabulate(patches, logits)
    if single_logits is not None:
        frame[single_logit_columns(classifier)] = single_logits.astype(np.float64)
    full_metadata = {
        **metadata,
        "classifier_sha256": classifier.sha256,
        "threshold": classifier.decision_threshold,
    }
    write_predictions(run.path / "predictions" / "validation.parquet", frame, full_metadata)
