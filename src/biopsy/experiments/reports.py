"""Reports from what runs and studies keep on disk."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import check_outputs, read_json, write_atomic, write_output
from biopsy.data.packs import Pack
from biopsy.evaluation.results import Evaluation
from biopsy.experiments.pages import compose_study
from biopsy.models.networks import build_network, describe
from biopsy.recipes import Recipe, recipe_toml
from biopsy.reporting.compose import report_of_run
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.html import render_report
from biopsy.reporting.registry import list_results
from biopsy.training.runs import Run
from biopsy.training.study import Study, is_study

PAGE = "report.html"

Reported = Run | Study | Evaluation | Path | str

logger = logging.getLogger(__name__)


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
        complete: First run the commands whose results the report of a run lacks (error analysis,
            saliency, published hypotheses); without it the report names them.

    Returns:
        The paths of the reports.

    Raises:
        RunError: If a run has not been evaluated, or there is no such run.
    """
    requested = [runs] if isinstance(runs, Run | Study | Evaluation | Path | str) else list(runs)
    requested = [item.run if isinstance(item, Evaluation) and item.run else item for item in requested]
    if out is None and any(isinstance(item, Evaluation) for item in requested):
        raise RunError('predictions have no folder: say where the report goes, such as out="report.html"')
    out = None if out is None else Path(out)
    written: list[Path] = []
    for item in requested:
        path = _place(item, PAGE, out, several=len(requested) > 1)
        if path != out:
            check_outputs(path.parent, path.name, adopt=out is None)
        for name, page in _compose(item, hide_ids, complete=complete):
            path = _place(item, name, out, several=len(requested) > 1)
            if path in written:
                raise RunError(f"{path} would be the report of two runs: name another --out for one of them")
            if path == out:
                write_atomic(path, page)
            else:
                write_output(path, page, adopt=out is None)
            written.append(path)
    return written


def _compose(item: Reported, hide_ids: bool, *, complete: bool) -> list[tuple[str, str]]:
    """Return the pages of a run, a study or an evaluation: file name and HTML each."""
    if isinstance(item, Evaluation):
        facts = RunFacts(
            run={}, metrics=item.document, predictions=item.predictions, class_names=item.class_names
        )
        return [(PAGE, render_report(report_of_run(facts, hide_ids=hide_ids)))]
    if isinstance(item, Study) or (not isinstance(item, Run) and is_study(item)):
        pages = compose_study(Study.open(item), hide_ids=hide_ids)
        return [(name, render_report(page)) for name, page in pages]
    return [
        (PAGE, render_report(report_of_run(gather_run(Run.open(item), complete=complete), hide_ids=hide_ids)))
    ]


def _place(item: Reported, name: str, out: Path | None, *, several: bool) -> Path:
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
    """Collect what the report of a run is written from; with ``complete``, what is missing is measured first.

    Raises:
        RunError: If the run has not been evaluated.
    """
    metrics = run.metrics()
    predictions, _ = run.predictions(metrics["side"])
    recipe, pack = run.recipe, run.open_pack(verify=False)
    side = recipe.preprocessing.input_px
    results, missing = _load_results(run, complete=complete)
    return RunFacts(
        run=run.info,
        metrics=metrics,
        predictions=predictions,
        class_names=pack.class_names,
        log=run.log(),
        recipe=recipe.model_dump() | {"title": recipe.heading},
        recipe_toml=recipe_toml(recipe),
        network=_describe_network(recipe, len(pack.class_names)),
        input_shape=(3, side, side),
        get_patch=_open_patches(pack),
        patch_px=pack.info.patch_px,
        mpp=pack.info.mpp,
        audit=_find_audit(pack),
        ledger=metrics.get("ledger"),
        results=results,
        missing=missing,
    )


def _describe_network(recipe: Recipe, n_classes: int) -> list[Any]:
    side = recipe.preprocessing.input_px
    network = build_network(recipe.model.name, n_classes=n_classes, input_px=side, **recipe.model.params)
    return describe(network, side)


def _open_patches(pack: Pack) -> Callable[[str], np.ndarray]:
    rows = {patch_id: row for row, patch_id in enumerate(pack.table["patch_id"])}

    def get_patch(patch_id: str) -> np.ndarray:
        row = rows[patch_id]
        width, height = pack.sizes[row]
        return pack.patches[row, :height, :width]

    return get_patch


def _find_audit(pack: Pack) -> dict[str, Any] | None:
    """Return the pack's audit; None where `inspect` has not made one."""
    try:
        return read_json(pack.path / "audit.json", format="biopsy-audit/1")
    except DataError:
        return None


def _load_results(run: Run, *, complete: bool) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what features have measured of a run, and what is missing with the command that makes it."""
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
