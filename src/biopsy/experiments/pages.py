"""Pages of studies: what each kind of study has to say, gathered from its folder."""

from typing import Any

import pandas as pd

from biopsy.core.errors import RunError
from biopsy.core.files import read_json
from biopsy.evaluation.study_tables import SUMMARY_FORMAT
from biopsy.experiments import reproduction, sweeps
from biopsy.experiments.reproduction_page import ReproductionFacts, report_of_reproduction
from biopsy.experiments.study_page import report_of_study
from biopsy.experiments.sweep_page import SweepFacts, report_of_sweep
from biopsy.recipes import load_recipe, recipe_toml
from biopsy.reporting.document import ReportDocument
from biopsy.reporting.facts import StudyFacts
from biopsy.reporting.pseudonyms import KINDS, Pseudonymizer
from biopsy.training.study import Study


def gather_study(study: Study) -> dict[str, StudyFacts]:
    """Collect what the report of a study is written from, recipe by recipe.

    Raises:
        RunError: If none of its runs has been evaluated.
    """
    runs = study.judged_runs()
    if not runs:
        raise RunError(f"{study.path} has no evaluated run: go on with `biopsy study`")
    summary = read_json(study.path / "metrics.json", format=SUMMARY_FORMAT)
    table, predictions, first = study.table(), study.predictions(), runs[0].metrics()
    facts = {}
    for name, entry in summary["recipes"].items():
        recipe = load_recipe(next(run for run in runs if run.info["recipe"] == name).recipe)
        rows = table[table["recipe"] == name].copy()
        rows["fold"] = rows["fold"].fillna(0).astype(int)
        facts[name] = StudyFacts(
            study={**study.info, "environment": runs[0].info["environment"]},
            table=rows,
            predictions=predictions[predictions["recipe"] == name],
            metrics={
                **entry.get("pooled", {}),
                "positive_class": first["positive_class"],
                "split": study.info["split"],
                "within_folds": entry.get("within_folds", {}),
            },
            class_names=first["class_names"],
            baselines=_baseline_by_group(rows),
            recipe=recipe.model_dump() | {"title": recipe.heading},
            recipe_toml=recipe_toml(recipe),
        )
    return facts


def _baseline_by_group(rows: Any) -> dict[str, float]:
    """Return the colour-only AUROC of each patient that is tested alone in a fold."""
    alone = rows[~rows["tested"].astype(str).str.contains(" ")].dropna(subset=["baseline_auroc"])
    return dict(zip(alone["tested"].astype(str), alone["baseline_auroc"].astype(float), strict=True))


def compose_study(study: Study, *, hide_ids: bool) -> list[tuple[str, ReportDocument]]:
    """Return the pages of a study: file name and report each.

    Raises:
        RunError: If none of its runs has been evaluated.
    """
    if not (study.judged_runs() or (study.info.get("search") and sweeps.shown_runs(study))):
        raise RunError(f"{study.path} has no evaluated run: give the command that made it again")
    if study.info["question"] == sweeps.KIND:
        return [("report.html", report_of_sweep(_gather_sweep(study), hide_ids=hide_ids))]
    if study.info["question"] == reproduction.KIND:
        return [("report.html", report_of_reproduction(_gather_reproduction(study), hide_ids=hide_ids))]
    facts = gather_study(study)
    names = ["report.html"] if len(facts) == 1 else [f"report-{recipe}.html" for recipe in facts]
    pages = [report_of_study(fact, hide_ids=hide_ids) for fact in facts.values()]
    return list(zip(names, pages, strict=True))


def _gather_sweep(study: Study) -> SweepFacts:
    return SweepFacts(
        study={**study.info, "environment": sweeps.shown_runs(study)[0].info["environment"]},
        summary=study.summary(),
        table=study.table(),
        figure=sweeps.draw_study(study),
        recipe_toml="".join(study.info["recipes"].values()),
        pseudonymizer=_name_ids(study),
    )


def _gather_reproduction(study: Study) -> ReproductionFacts:
    return ReproductionFacts(
        study={**study.info, "environment": study.judged_runs()[0].info["environment"]},
        summary=study.summary(),
        pseudonymizer=_name_ids(study),
    )


def _name_ids(study: Study) -> Pseudonymizer:
    """Number everybody that the study's runs tested."""
    columns = [f"{kind}_id" for kind in KINDS]
    frames = [run.predictions("test")[0] for run in study.judged_runs()] or [pd.DataFrame(columns=columns)]
    ids = pd.concat(frames)[columns].drop_duplicates()
    return Pseudonymizer({kind: ids[f"{kind}_id"] for kind in KINDS}, study.info["pack"]["content_sha256"])
