"""Reports of runs, studies and evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import check_outputs, read_json, write_atomic, write_output
from biopsy.core.loaders import validate
from biopsy.data.audit import Audit
from biopsy.data.packs import Pack
from biopsy.evaluation.results import Evaluation
from biopsy.evaluation.study_tables import measure_folds
from biopsy.experiments import reproduction, sweeps
from biopsy.experiments.reproduction_page import report_of_reproduction
from biopsy.experiments.reproduction_summary import ReproductionSummary
from biopsy.experiments.study_page import report_of_study
from biopsy.experiments.sweep_page import SweepSummary, report_of_sweep
from biopsy.models.networks import build_network, describe
from biopsy.recipes import Recipe, load_recipe, recipe_toml
from biopsy.reporting.compose import report_of_run
from biopsy.reporting.document import ReportDocument
from biopsy.reporting.facts import RunFacts, StudyFacts, make_pseudonymizer
from biopsy.reporting.html import render_report
from biopsy.reporting.pseudonyms import KINDS, Pseudonymizer
from biopsy.reporting.registry import list_results
from biopsy.training.metrics import StudySummary
from biopsy.training.runs import Run
from biopsy.training.study import Study, StudyInfo, is_study

PAGE = "report.html"

Reported = Run | Study | Evaluation | Path | str


def report(
    runs: Sequence[Reported] | Reported,
    *,
    out: Path | str | None = None,
    hide_ids: bool = False,
    complete: bool = False,
) -> list[Path]:
    """Write one self-contained HTML report for each run, study or evaluation of predictions.

    Args:
        runs: Evaluated runs and studies; in Python also results of `evaluate_predictions`.
        out: Output file for one run, folder for several (default: ``report.html`` in each).
        hide_ids: Replace patient, slide and patch ids by numbers, for sharing.
        complete: First run the commands whose results are missing from the report of a run (error analysis,
            saliency, published hypotheses); otherwise the report lists these commands.

    Returns:
        The paths of the reports.

    Raises:
        RunError: If a run has not been evaluated, or there is no such run.
    """
    requested = [runs] if isinstance(runs, Run | Study | Evaluation | Path | str) else list(runs)
    requested = [item.run if isinstance(item, Evaluation) and item.run else item for item in requested]
    if out is None and any(isinstance(item, Evaluation) for item in requested):
        raise RunError('predictions have no folder: give the report a path, such as out="report.html"')
    out = None if out is None else Path(out)
    written: list[Path] = []
    for item in requested:
        path = _page_path(item, PAGE, out, several=len(requested) > 1)
        if path != out:
            check_outputs(path.parent, path.name, adopt=out is None)
        for name, page in _compose(item, hide_ids, complete=complete):
            path = _page_path(item, name, out, several=len(requested) > 1)
            if path in written:
                raise RunError(
                    f"{path} would be the report of two runs: choose another --out for one of them"
                )
            if path == out:
                write_atomic(path, page)
            else:
                write_output(path, page, adopt=out is None)
            written.append(path)
    return written


def _compose(item: Reported, hide_ids: bool, *, complete: bool) -> list[tuple[str, str]]:
    """Return the pages of a run, study or evaluation as file name and HTML."""
    if isinstance(item, Evaluation):
        facts = RunFacts(
            metrics=item.metrics,
            positive_class=item.metrics.positive_class,
            predictions=item.predictions,
            class_names=item.class_names,
        )
        return [(PAGE, render_report(report_of_run(facts, hide_ids=hide_ids)))]
    if isinstance(item, Study) or (not isinstance(item, Run) and is_study(item)):
        pages = compose_study(Study.open(item), hide_ids=hide_ids)
        return [(name, render_report(page)) for name, page in pages]
    return [
        (PAGE, render_report(report_of_run(gather_run(Run.open(item), complete=complete), hide_ids=hide_ids)))
    ]


def _page_path(item: Reported, name: str, out: Path | None, *, several: bool) -> Path:
    if isinstance(item, Evaluation):
        folder = Path()
    else:
        folder = item.path if isinstance(item, Run | Study) else Path(item)
    if out is None:
        return folder / name
    if out.suffix == ".html" and not several and name == PAGE:
        return out
    return out / f"{folder.name or 'predictions'}-{name}"


def gather_run(run: Run, *, complete: bool = False) -> RunFacts:
    """Return the input of the report of a run; with ``complete``, missing results are computed first.

    Raises:
        RunError: If the run has not been evaluated.
    """
    metrics = run.metrics()
    predictions, _ = run.predictions(metrics.subset or "test")
    recipe, pack = run.recipe, run.open_pack(verify=False)
    side = recipe.preprocessing.input_px
    results, missing = _load_results(run, complete=complete)
    return RunFacts(
        run=run.info,
        metrics=metrics,
        positive_class=metrics.positive_class,
        predictions=predictions,
        class_names=pack.class_names,
        log=run.log(),
        recipe=recipe,
        recipe_toml=recipe_toml(recipe),
        network=_describe_network(recipe, len(pack.class_names)),
        input_shape=(3, side, side),
        get_patch=pack.pixels_by_id(),
        patch_px=pack.info.patch_px,
        mpp=pack.info.mpp,
        audit=find_audit(pack),
        results=results,
        missing=missing,
    )


def _describe_network(recipe: Recipe, n_classes: int) -> list[Any]:
    side = recipe.preprocessing.input_px
    network = build_network(
        recipe.model.name, n_classes=n_classes, input_px=side, seed=None, **recipe.model.params
    )
    return describe(network, side)


def find_audit(pack: Pack) -> Audit | None:
    """Return the pack's audit; None without one."""
    try:
        path = pack.path / "audit.json"
        return validate(path, Audit, read_json(path, format="biopsy-audit/1"))
    except DataError:
        return None


def _load_results(run: Run, *, complete: bool) -> tuple[dict[str, object], list[tuple[str, str]]]:
    """Return the results of a run by feature, and the titles and commands of missing ones."""
    results, missing = {}, []
    for name, kind in list_results().items():
        result = kind.load(run)
        applies = result is None and bool(kind.title) and kind.applies(run)
        if applies and complete and kind.make is not None:
            kind.make(run)
            result = kind.load(run)
        if applies and result is None:
            missing.append((kind.title, kind.command.format(run=run.path)))
        results[name] = result
    return results, missing


def gather_study(study: Study) -> dict[str, StudyFacts]:
    """Return the input of the reports of a study, by recipe.

    Raises:
        RunError: If none of its runs has been evaluated.
    """
    runs = study.require_evaluated_runs()
    summary = study.summary(StudySummary)
    table, predictions = study.table(), study.predictions()
    facts = {}
    for name, entry in summary.recipes.items():
        recipe = load_recipe(next(run for run in runs if run.info["recipe"] == name).recipe)
        rows = table[table["recipe"] == name].copy()
        rows["fold"] = rows["fold"].fillna(0).astype(int)
        facts[name] = StudyFacts(
            study={**study.info, "environment": runs[0].info["environment"]},
            table=rows,
            predictions=predictions[predictions["recipe"] == name],
            metrics=entry.pooled,
            fold_results=measure_folds(rows),
            within_folds=entry.within_folds,
            positive_class=summary.positive_class,
            class_names=entry.pooled.class_names,
            groups=entry.groups,
            recipe=recipe,
            recipe_toml=recipe_toml(recipe),
        )
    return facts


def compose_study(study: Study, *, hide_ids: bool) -> list[tuple[str, ReportDocument]]:
    """Return the pages of a study as file name and report.

    Raises:
        RunError: If none of its runs has been evaluated.
    """
    if not (study.info.get("search") and sweeps.shown_runs(study)):
        study.require_evaluated_runs()
    kind, pseudonymizer = study.info["question"], _make_pseudonymizer(study) if hide_ids else None
    if kind == sweeps.KIND:
        info: StudyInfo = {**study.info, "environment": sweeps.shown_runs(study)[0].info["environment"]}
        figure, summary = sweeps.draw_study(study), study.summary(SweepSummary)
        return [(PAGE, report_of_sweep(info, summary, study.table(), figure, pseudonymizer))]
    if kind == reproduction.KIND:
        info = {**study.info, "environment": study.evaluated_runs()[0].info["environment"]}
        return [(PAGE, report_of_reproduction(info, study.summary(ReproductionSummary), pseudonymizer))]
    facts = gather_study(study)
    names = [PAGE] if len(facts) == 1 else [f"report-{recipe}.html" for recipe in facts]
    pages = [report_of_study(fact, hide_ids=hide_ids) for fact in facts.values()]
    return list(zip(names, pages, strict=True))


def _make_pseudonymizer(study: Study) -> Pseudonymizer:
    """Return pseudonyms of the patients, slides and patches tested in a study."""
    columns = [f"{kind}_id" for kind in KINDS]
    frames = [run.predictions("test")[0] for run in study.evaluated_runs()] or [pd.DataFrame(columns=columns)]
    ids = pd.concat(frames)[columns].drop_duplicates()
    return make_pseudonymizer(ids, study.info["pack"]["content_sha256"])
