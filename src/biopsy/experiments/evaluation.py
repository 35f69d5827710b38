"""`biopsy evaluate`: evaluates a run, a classifier, or a table of predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import update_directory
from biopsy.core.tables import write_csv
from biopsy.data.packs import Pack
from biopsy.evaluation.evaluate import evaluate as evaluate_run
from biopsy.evaluation.predictions import evaluate_classifier, evaluate_table, is_table
from biopsy.evaluation.results import Evaluation
from biopsy.models.classifier import DOCUMENT, Classifier
from biopsy.models.shipped import is_shipped
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run

METRICS_CSV, PREDICTIONS_CSV = "metrics.csv", "predictions.csv"


def evaluate(
    run: Run | Classifier | Path | str,
    *,
    subset: Literal["test", "validation"] = "test",
    data: Pack | Path | str | None = None,
    split: str | None = None,
    prevalence: float | None = None,
    positive: str | None = None,
    threshold: float | None = None,
    subgroups: Sequence[str] = (),
    report: Path | str | None = None,
    csv: Path | str | None = None,
) -> Evaluation:
    """Evaluate a run, or a table of predictions of any program, with 95 % intervals over patients.

    For a run, ``predictions/test.parquet`` and ``evaluation/metrics.json`` (validation:
    ``validation.parquet`` and ``metrics-validation.json``; another pack: both under ``external/<pack>/``) are
    written into it, and each evaluation of a test subset is recorded in the pack's ledger. For a table, only
    the report and the csv are written.

    Args:
        run: Finished run; classifier, with ``data``; or csv or Parquet table with a row per patch: true
            class (``y_true``, ``target``, ``label``), probability of the positive class (``prob``) or of
            each class (``prob_<class>``), and patient (``patient_id``, ``groups``).
        subset: Subset of the split to evaluate.
        data: Another pack with the same classes (default: the run's own); the run's own pack, where it
            has moved, is recognised by its content.
        split: With another pack: split whose subset is evaluated (default: all patches).
        prevalence: Prevalence at which PPV and NPV are also computed.
        positive: For a table with two classes: the positive class.
        threshold: For a table: decision threshold (default: the one stored with it, else 0.5).
        subgroups: For a table: columns within whose values metrics are repeated.
        report: Output file of the HTML report.
        csv: Output folder of ``metrics.csv`` and ``predictions.csv``.

    Returns:
        The metrics with intervals; `Evaluation.to_dict` is the content of ``metrics.json``.

    Raises:
        RunError: If the run has not finished, its pack changed, or the subset is empty.
        DataError: If the other pack's patches have another resolution than the classifier's or are larger, a
            table cannot be read, or an argument does not apply.
        MetricError: If the values of a table are invalid.
    """
    if is_table(run):
        _refuse("a table of predictions", subset=None if subset == "test" else subset, data=data, split=split)
        table: Any = run
        evaluation = evaluate_table(
            table, positive=positive, threshold=threshold, subgroups=subgroups, prevalence=prevalence
        )
    elif isinstance(run, Classifier) or (
        not isinstance(run, Run) and (is_shipped(run) or (Path(run) / DOCUMENT).is_file())
    ):
        _refuse("a classifier", positive=positive, threshold=threshold, subgroups=subgroups or None)
        if data is None:
            raise RunError("a classifier has no patches of its own: give a pack with data=")
        evaluation = evaluate_classifier(
            open_classifier(run), data, subset=subset, split=split, prevalence=prevalence
        )
    else:
        _refuse("a run", positive=positive, threshold=threshold, subgroups=subgroups or None)
        evaluation = evaluate_run(run, subset=subset, data=data, split=split, prevalence=prevalence)
    if report is not None:
        from biopsy.experiments.reports import report as write_report  # draws: loaded only for a report

        write_report(evaluation, out=report)
    if csv is not None:
        _write_csv(Path(csv), evaluation)
    return evaluation


def _write_csv(folder: Path, evaluation: Evaluation) -> None:
    """Write the metrics and the predictions as tables for a spreadsheet."""
    with update_directory(folder, METRICS_CSV, PREDICTIONS_CSV) as partial:
        write_csv(partial / METRICS_CSV, evaluation.to_frame().reset_index())
        write_csv(partial / PREDICTIONS_CSV, evaluation.predictions)


def _refuse(evaluated: str, **arguments: object) -> None:
    """Check that arguments which do not apply are not given."""
    for name, value in arguments.items():
        if value is not None:
            raise DataError(f"{name}={value!r} does not apply to {evaluated}: leave it out")
