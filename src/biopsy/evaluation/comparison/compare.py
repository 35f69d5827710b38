"""`biopsy compare`: runs and studies on the same test patches, and how many patients a comparison needs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, cast

import numpy as np
import pandas as pd
from scipy import stats
from typing_extensions import TypedDict

from biopsy.core.errors import MetricError, RunError, suggest
from biopsy.core.files import plain, update_directory, write_atomic, write_json
from biopsy.core.results import Result, Table, number
from biopsy.core.tables import write_csv
from biopsy.core.text import count, plural
from biopsy.evaluation.comparison.measure import (
    ComparisonDocument,
    EvaluationSet,
    ModelPredictions,
    Source,
    compare_models,
    find_changed,
)
from biopsy.evaluation.comparison.page import (
    ComparisonFacts,
    describe_verdict,
    hide_comparison,
    report_of_comparison,
    table_of_difference,
    table_of_groups,
    table_of_seeds,
    tabulate_differences,
)
from biopsy.evaluation.study_tables import pool_by_seed
from biopsy.reporting.html import render_report
from biopsy.statistics.power import CORRELATIONS, influence_groups, plan_patients
from biopsy.statistics.resampling import MIN_GROUPS
from biopsy.training.runs import Run
from biopsy.training.study import Study, is_study

DOCUMENT, TABLE, FIGURE = "comparison.json", "comparison.csv", "figure.svg"
CHANGED, PAGE = "changed.csv", "report.html"


class Need(TypedDict):
    """Number of patients needed under an assumption; see `SampleSize`."""

    assumed: str
    sd: float
    n_patients: int
    low: int
    high: int
    power: float


_Sources = TypedDict("_Sources", {"from": list[str]})


class ComparisonPlan(_Sources):
    """Numbers of patients needed, the settings, and the patients of the runs from which they are computed."""

    metric: str
    difference: float
    power: float
    level: float
    unit: str
    n_patients_at_hand: int
    n_effective_patients: float
    patches_per_patient: float
    correlation: NotRequired[float]
    needs: list[Need]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Result of a comparison; ``comparison[key]`` is an entry of ``comparison.json``.

    With ``plan=True``, the number of patients needed per assumed correlation.

    Attributes:
        record: The comparison, or the plan.
    """

    record: ComparisonDocument | ComparisonPlan

    def blocks(self) -> list[str | Table]:
        m = self.record
        if not isinstance(m, ComparisonDocument):
            return _describe_plan(m)
        groups = "" if m.unit == "patch" else f" of {count(m.n_patients, m.unit)}"
        blocks: list[str | Table] = [f"{m.n_patches:,} common test patches{groups}; reference: {m.reference}"]
        for difference in m.differences:
            blocks += [f"\n{describe_verdict(m, difference)}", table_of_difference(m, difference)]
            if m.by_group and m.n_patients < MIN_GROUPS:
                blocks.append(table_of_groups(m, difference))
        seeds = table_of_seeds(m)
        blocks += [] if seeds is None else [seeds]
        if m.changed:
            blocks.append(
                f"\ncorrect to wrong: {m.changed.turned_wrong:,}, wrong to correct: "
                f"{m.changed.turned_right:,}; correct in both {m.changed.both_right:,}, wrong in both "
                f"{m.changed.both_wrong:,}"
            )
        return [*blocks, f"comparison {self['path']}"]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per difference and metric, with interval and p-value, or the rows of a plan."""
        m = self.record
        return tabulate_differences(m) if isinstance(m, ComparisonDocument) else pd.DataFrame(m["needs"])


def _describe_plan(plan: ComparisonPlan) -> list[str | Table]:
    """Return the numbers of patients that a comparison needs."""
    units = plural(plan["unit"])
    rows = [
        [
            need["assumed"],
            f"{need['sd']:.3f}",
            number(need["n_patients"]),
            f"{need['low']:,} to {need['high']:,}",
        ]
        for need in plan["needs"]
    ]
    notes = []
    if len(plan["from"]) == 1:
        notes.append(
            f"correlation: between the two classifiers' values over {units}; 0.5 is also the number needed "
            "against a fixed value. Two runs give their own correlation."
        )
    if plan["unit"] != "patch":
        notes.append(f"with about {plan['patches_per_patient']:,.0f} patches each")
    return [
        f"{units} needed to detect a difference of {plan['difference']:g} in {plan['metric']} with power "
        f"{plan['power']:g}, from the spread between {plan['n_patients_at_hand']:,} {units} of "
        f"{' and '.join(plan['from'])}",
        Table(["assumed", f"sd between {units}", units, "95 % interval"], rows, note="\n".join(notes)),
    ]


def compare(
    runs: Sequence[Run | Study | Path | str] | Run | Study | Path | str,
    *,
    metric: str = "auroc",
    plan: bool = False,
    difference: float = 0.03,
    power: float = 0.8,
    out: Path | str | None = None,
    hide_ids: bool = False,
) -> Comparison:
    """Compare models tested on the same patches, with intervals over patients; or plan a comparison.

    The first run or study is the reference. Writes ``comparison.json``, ``comparison.csv``, ``figure.svg``,
    ``report.html`` and, for two models, ``changed.csv``: the patches whose predicted class differs.

    Args:
        runs: Two or more evaluated runs and studies; each recipe of a study is one model.
        metric: Primary metric; the others are reported too.
        plan: Compute the number of patients a comparison needs, from the variation between the patients of
            one run or the paired differences of two; nothing is written.
        difference: With a plan: difference to detect, in units of the metric.
        power: With a plan: desired power (probability of detecting the difference).
        out: Output folder of the comparison (default: a new folder in ``comparisons/``).
        hide_ids: Replace patient, slide and patch ids by numbers in all outputs.

    Returns:
        The content of ``comparison.json``, with its ``path``; with ``plan``, the plan.

    Raises:
        RunError: If the models were not tested on the same patches of one pack, or fewer than two are given.
        MetricError: If the metric does not exist, or its variance allows no plan.
    """
    models, test_set = gather_models([runs] if isinstance(runs, Run | Study | Path | str) else list(runs))
    if metric not in test_set.metrics:
        raise MetricError(f"metric {metric!r} does not exist: {suggest(metric, test_set.metrics)}", "name")
    if plan:
        planned = _plan(models, test_set, metric, difference, power)
        return Comparison(planned, planned)
    if len(models) < 2:
        raise RunError("a comparison needs two or more runs or studies, found one")
    folder = _choose_folder(models, out)
    names, adopt = (DOCUMENT, TABLE, FIGURE, CHANGED, PAGE), (folder / DOCUMENT).is_file()
    with update_directory(folder, *names, last=DOCUMENT, adopt=adopt) as partial:
        document = compare_models(models, test_set, metric=metric)
        changed = None
        if len(models) == 2:
            changed, summary = find_changed(models[0], models[1], test_set)
            document = replace(document, changed=summary)
        facts = ComparisonFacts(document, changed, _open_patches(models[0]), models[0].frames[0])
        if hide_ids:
            facts = hide_comparison(facts)
        _write(partial, facts)
    return Comparison({**plain(facts.document), "path": str(folder)}, facts.document)


def gather_models(items: Sequence[Run | Study | Path | str]) -> tuple[list[ModelPredictions], EvaluationSet]:
    """Return the predictions of the models and their common test set.

    Raises:
        RunError: If the models were tested on different patches, or one has not been evaluated or is given
            twice.
    """
    places = [(item.path if isinstance(item, Run | Study) else Path(item)).resolve() for item in items]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise RunError(f"{place} is given twice: name another run or study to compare it with")
    pairs = [pair for item in items for pair in _read(item)]
    if not pairs:
        raise RunError("nothing to compare: give runs or studies")
    counts, seen = Counter(model.name for model, _ in pairs), Counter[str]()
    models = []
    for model, _ in pairs:
        seen[model.name] += 1
        name = model.name if counts[model.name] == 1 else f"{model.name} ({seen[model.name]})"
        models.append(replace(model, name=name))
    test_set = pairs[0][1]
    for model, (_, other) in zip(models[1:], pairs[1:], strict=True):
        _check_same(models[0], test_set, model, other)
    return models, test_set


def _read(item: Run | Study | Path | str) -> Iterator[tuple[ModelPredictions, EvaluationSet]]:
    """Yield one model per run, or one per recipe of a study."""
    if isinstance(item, Study) or (not isinstance(item, Run) and is_study(item)):
        yield from _read_study(Study.open(item))
        return
    run = Run.open(item)
    frame, metadata = run.predictions("test")
    seed = run.info["seed"]
    yield (
        ModelPredictions(
            run.path.resolve().name, [seed], [_order(frame)], _describe_source(run, "run", run.path)
        ),
        _find_test_set(run, metadata["pack_sha256"]),
    )


def _read_study(study: Study) -> Iterator[tuple[ModelPredictions, EvaluationSet]]:
    evaluated = study.require_evaluated_runs()
    if not (study.path / "predictions.parquet").exists():
        raise RunError(
            f"{study.path} is a study of another kind ({study.info['question']}), whose runs cannot be "
            f"pooled: compare its runs, such as {evaluated[0].path}"
        )
    pooled, name = study.predictions(), study.path.resolve().name
    recipes = list(dict.fromkeys(pooled["recipe"]))
    for recipe in recipes:
        frames = pool_by_seed(pooled[pooled["recipe"] == recipe])
        run = next(run for run in evaluated if run.info["recipe"] == recipe)
        folds = sorted(frames[0]["fold"].dropna().unique())
        source = replace(_describe_source(run, "study", study.path), fold=None, folds=folds)
        yield (
            ModelPredictions(
                name if len(recipes) == 1 else f"{name}/{recipe}",
                [int(frame["seed"].iloc[0]) for frame in frames],
                [_order(frame) for frame in frames],
                source,
            ),
            _find_test_set(run, study.info["pack"]["content_sha256"]),
        )


def _order(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("patch_id", kind="stable").reset_index(drop=True)


def _describe_source(run: Run, kind: str, path: Path) -> Source:
    split = run.info["split"]
    return Source(
        kind, str(path), run.info["recipe"], split["name"], split["fold"], split["patients_overlap"]
    )


def _find_test_set(run: Run, pack_sha256: str) -> EvaluationSet:
    metrics = run.metrics()
    pack = {"path": run.info["pack"]["path"], "content_sha256": pack_sha256}
    return EvaluationSet(pack, metrics.class_names, metrics.positive_class, metrics.unit)


def _check_same(
    reference: ModelPredictions, test_set: EvaluationSet, model: ModelPredictions, other: EvaluationSet
) -> None:
    if other.pack["content_sha256"] != test_set.pack["content_sha256"]:
        raise RunError(
            f"{reference.name} was tested on {_name_pack(test_set)} and {model.name} on {_name_pack(other)}: "
            "models must be tested on the same pack"
        )
    if (other.class_names, other.positive_class) != (test_set.class_names, test_set.positive_class):
        raise RunError(f"{reference.name} and {model.name} have different classes and cannot be compared")
    first, second = (set(tested.frames[0]["patch_id"]) for tested in (reference, model))
    if first != second:
        raise RunError(
            f"{reference.name} was tested on {len(first):,} patches ({_name_split(reference)}) and "
            f"{model.name} on {len(second):,} ({_name_split(model)}), of which they share "
            f"{len(first & second):,}: models must be tested on the same patches"
        )


def _name_pack(test_set: EvaluationSet) -> str:
    return f"{Path(test_set.pack['path']).name} ({test_set.pack['content_sha256'][:12]})"


def _name_split(model: ModelPredictions) -> str:
    folds = [*model.source.folds, model.source.fold]
    fold_text = ", ".join(str(int(fold)) for fold in folds if fold is not None)
    return f"split {model.source.split}" + (f", fold {fold_text}" if fold_text else "")


def _open_patches(model: ModelPredictions) -> Callable[[str], np.ndarray] | None:
    """Return a function from patch id to pixels; None if the pack is unavailable."""
    path = Path(model.source.path)
    run = Study.open(path).evaluated_runs()[0] if model.source.kind == "study" else Run.open(path)
    try:
        return run.open_pack(verify=False).pixels_by_id()
    except RunError:
        return None


def _choose_folder(models: Sequence[ModelPredictions], out: Path | str | None) -> Path:
    """Return the output folder: new, empty, or of an earlier comparison, which is overwritten."""
    name = "-against-".join(model.name.replace("/", "-").replace(" ", "") for model in reversed(models))
    folder = Path(out) if out is not None else Path("comparisons") / name[:120]
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / DOCUMENT).exists()):
        raise RunError(f"{folder} is not empty and not a comparison: choose another folder with --out")
    return folder


def _write(folder: Path, facts: ComparisonFacts) -> None:
    write_json(folder / DOCUMENT, facts.document)
    write_csv(folder / TABLE, tabulate_differences(facts.document))
    write_atomic(folder / FIGURE, facts.figure)
    if facts.changed is not None:
        write_csv(folder / CHANGED, facts.changed)
    write_atomic(folder / PAGE, render_report(report_of_comparison(facts)))


def _plan(
    models: Sequence[ModelPredictions], test_set: EvaluationSet, metric: str, difference: float, power: float
) -> ComparisonPlan:
    """Return the number of patients needed, from the patients of one model or the pairs of two."""
    if len(models) > 2:
        raise RunError(f"a plan needs one run or two, found {len(models)}")
    influences = [
        influence_groups([test_set.sample(frame) for frame in model.frames], metric, unit=test_set.unit)
        for model in models
    ]
    effective = min(influence.effective for influence in influences)
    n_groups, values = len(influences[0].values), [influence.values for influence in influences]
    plan: ComparisonPlan = {
        "metric": metric,
        "difference": difference,
        "power": power,
        "level": 0.95,
        "unit": test_set.unit,
        "from": [model.name for model in models],
        "n_patients_at_hand": n_groups,
        "n_effective_patients": effective,
        "patches_per_patient": len(models[0].frames[0]) / n_groups,
        "needs": [],
    }
    if len(models) == 2:
        plan["correlation"] = float(stats.pearsonr(*values).statistic)
        deviations = {"paired": np.std(values[1] - values[0], ddof=1)}
    else:
        sd = np.std(values[0], ddof=1)
        deviations = {f"correlation {rho:g}": sd * np.sqrt(2 * (1 - rho)) for rho in CORRELATIONS}
    for name, sd in deviations.items():
        size = plan_patients(float(sd), n_groups, effective=effective, difference=difference, power=power)
        plan["needs"].append(cast("Need", {"assumed": name, **vars(size)}))
    return plan
