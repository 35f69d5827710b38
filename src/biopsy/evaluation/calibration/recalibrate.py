"""Recalibration of a finished run: refits what `fit_postprocessing` fits at the end of training."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from biopsy.core.errors import RunError
from biopsy.core.files import LOCK, remove_outputs, write_atomic
from biopsy.core.results import Result
from biopsy.core.text import count
from biopsy.data.packs import group_by_unit
from biopsy.data.predictions import IDENTITY
from biopsy.models.classifier import Classifier, Threshold
from biopsy.recipes import Recipe, load_recipe, recipe_toml
from biopsy.statistics.calibrators import CalibratorRecord, Method, check_method
from biopsy.statistics.decisions import check_prevalence
from biopsy.training.postprocessing import (
    fit_run_postprocessing,
    logger,
    single_logit_columns,
    warn_of_calibration,
    write_validation,
)
from biopsy.training.runs import Run, hash_config

STALE = ("predictions/test.parquet", "evaluation", "external", "explain", "errors", "report.html")
"""Outputs of a run that depend on its probabilities."""
_STALE_DOCUMENTS = (
    "predictions/test.parquet",
    "report.html",
    "evaluation/metrics*.json",
    "errors/errors.json",
    "errors/errors.parquet",
    "explain/hypotheses.json",
    "explain/faithfulness.json",
    "external/*/evaluation/metrics*.json",
    "external/*/predictions/*.parquet",
)


class RecalibrationDocument(TypedDict):
    """Result of a recalibration: calibrator and thresholds as in ``classifier.json``, removed outputs."""

    run: Path
    calibrator: CalibratorRecord
    thresholds: list[Threshold]
    removed: list[str]


@dataclass(frozen=True, eq=False, repr=False)
class Recalibration(Result):
    """Result of a recalibration: ``run``, ``calibrator``, ``thresholds`` and ``removed`` outputs."""

    document: RecalibrationDocument

    def blocks(self) -> list[str]:
        lines = [f"{self.document['run']}: {_describe_calibrator(self.document['calibrator'])}"]
        lines += [
            f"threshold {threshold['value']:.3f} ({threshold['rule']}, chosen on {threshold['chosen_on']})"
            for threshold in self.document["thresholds"]
        ]
        removed = ", ".join(self.document["removed"])
        return [*lines, *([f"removed outdated outputs: {removed}"] if removed else [])]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per decision threshold."""
        return pd.DataFrame(self.document["thresholds"])


def _describe_calibrator(calibrator: CalibratorRecord) -> str:
    if calibrator["method"] == "none":
        return "not calibrated"
    text = f"{calibrator['method']}, fitted on {calibrator['n_patches']:,} patches"
    if calibrator["unit"] != "patch":
        text += f" of {count(calibrator['n_patients'], calibrator['unit'])}"
    text += f", slope {calibrator['slope']:.4g}" if "slope" in calibrator else ""
    if "prevalence" in calibrator:
        text += f", for {100 * calibrator['prevalence']:.3g} % positive patches"
    return text + (f" ({calibrator['reason']})" if calibrator.get("reason") else "")


def calibrate(
    run: Run | Path | str, *, method: Method = "platt", prevalence: float | None = None
) -> Recalibration:
    """Refit a run's calibration and decision thresholds on its validation predictions.

    ``classifier/``, ``predictions/validation.parquet`` and the recipe in the run are rewritten. Outputs that
    depend on the former probabilities (predictions, metrics and pages of the test subset) are removed;
    `biopsy.evaluate` writes them again and counts as one more evaluation of the test subset.

    Args:
        run: Finished run.
        method: Calibration method; ``isotonic`` needs two classes.
        prevalence: Share of positive patches where the classifier will be used, for which probabilities are
            corrected, such as 0.1; 0: as in validation (default: that of the run's recipe). Two classes.

    Returns:
        ``run``, ``calibrator`` and ``thresholds`` as in ``classifier.json``, and the ``removed`` outputs.

    Raises:
        RunError: If the run has not finished or is in use.
        MetricError: If the method does not exist or is for two classes only, or the prevalence is not from 0
            to 1 or does not apply to the method.
    """
    run = Run.open(run)
    classifier = run.load_for_calibration()
    if prevalence:
        check_prevalence(prevalence)
    check_method(method, len(classifier.info.class_names), prevalence or 0.0)
    try:
        with FileLock(run.path / LOCK, timeout=0):
            return _calibrate(run, classifier, method, prevalence)
    except Timeout:
        raise RunError(f"{run.path} is in use by another process") from None


def _calibrate(run: Run, classifier: Classifier, method: str, prevalence: float | None) -> Recalibration:
    frame, metadata = run.predictions("validation")
    unit, before = run.info["pack"]["unit"], classifier.info.calibrator
    table = "as_published" if run.info["split"]["as_published"] else "decision"
    settings = [f"{table}.calibration={method}"]
    if method == "none":
        prevalence = 0.0
    settings += [f"decision.prevalence={prevalence}"] if prevalence is not None else []
    recipe = load_recipe(run.recipe, settings)
    logits = frame[[f"logit_{name}" for name in classifier.info.class_names]].to_numpy(np.float64)
    target, group_ids = frame["target"].to_numpy(int), group_by_unit(frame, unit)
    single_logits = None
    if classifier.info.context:
        columns = single_logit_columns(classifier)
        if not set(columns) <= set(frame):
            raise RunError(
                f"{run.path}: validation.parquet lacks {', '.join(columns)}, which earlier versions did not "
                "write: train the run again"
            )
        single_logits = frame[columns].to_numpy(np.float64)
    fit_run_postprocessing(run, recipe, classifier, logits, target, group_ids, single_logits=single_logits)
    for message in warn_of_calibration(classifier):
        logger.warning("%s", message)
    config_sha256 = _hash_new_config(run, recipe)
    removed = _remove_stale(run.path)
    classifier.save(run.path / "classifier")
    patches = frame[[*IDENTITY, "subset", "fold", "target"]]
    write_validation(run, classifier, patches, logits, metadata, single_logits=single_logits)
    write_atomic(run.path / "recipe.toml", recipe_toml(recipe))
    run.update(
        threshold=classifier.decision_threshold,
        classifier_sha256=classifier.sha256,
        files=run.hash_files("classifier/classifier.json", "classifier/weights.safetensors", "recipe.toml"),
        config_sha256=config_sha256,
        recalibrated={
            "method": method,
            "before": before["method"],
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    return Recalibration(
        {
            "run": run.path,
            "calibrator": classifier.info.calibrator,
            "thresholds": classifier.info.thresholds,
            "removed": removed,
        }
    )


def _remove_stale(folder: Path) -> list[str]:
    """Remove the outputs that depend on the former probabilities; return which of `STALE` were removed."""
    documents = [
        path.relative_to(folder).as_posix() for name in _STALE_DOCUMENTS for path in folder.glob(name)
    ]
    removed, modified = remove_outputs(folder, *documents)
    for name in ("explain", "errors"):
        nested = remove_outputs(folder / name)
        removed += [f"{name}/{file}" for file in nested[0]]
        modified += [f"{name}/{file}" for file in nested[1]]
    for file in modified:
        logger.warning(
            "%s was modified after it was written and is kept, with the former calibration", folder / file
        )
    return [name for name in STALE if any(file == name or file.startswith(f"{name}/") for file in removed)]


def _hash_new_config(run: Run, recipe: Recipe) -> str | None:
    """Return the hash of the run's new configuration; None if it had none or its pack is unavailable."""
    if not run.info.get("config_sha256"):
        return None
    try:
        pack = run.open_pack(verify=False)
    except RunError:
        return None
    info = run.info
    return hash_config(
        recipe,
        pack,
        run.subsets(pack),
        info["split"],
        info["seed"],
        info["weights"]["sha256"],
        info.get("inputs"),
    )
