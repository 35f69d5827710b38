"""Commands on trained models: evaluate, calibrate, report, predict, compare, explain, errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import biopsy
from biopsy.cli.console import (
    AsJson,
    Device,
    SplitName,
    TrustModel,
    comma_list,
    name_skipped,
    print_json,
    print_table,
    progress,
    say,
)
from biopsy.core.subsets import subset_name


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER|PREDICTIONS", show_default=False)],
    subset: Annotated[
        Literal["test", "validation"], typer.Option(help="Subset of the split to evaluate.")
    ] = "test",
    data: Annotated[
        Path | None, typer.Option(help="Another pack to judge on; the run's own by default.", metavar="PACK")
    ] = None,
    split: SplitName = None,
    prevalence: Annotated[
        float | None,
        typer.Option(help="Also PPV and NPV where this share of patches is positive.", metavar="SHARE"),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="Positive class of a table of two classes.", metavar="CLASS")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Probability from which a patch of a table is predicted positive (default: 0.5)."),
    ] = None,
    subgroups: Annotated[
        str | None,
        typer.Option(help="Columns of a table within whose values metrics are repeated.", metavar="COL,COL"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write the report to this HTML file.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run, or a csv or Parquet table of any program's predictions; 95 % intervals over patients.

    A table has a row per patch: true class (y_true, target, label), probability of the positive class (prob)
    or of each class (prob_<class>), and patient (patient_id, groups).
    """
    evaluation = biopsy.evaluate(
        run,
        subset=subset,
        data=data,
        split=split,
        prevalence=prevalence,
        positive=positive,
        threshold=threshold,
        subgroups=comma_list(subgroups),
        report=report,
    )
    if as_json:
        print_json(evaluation.to_dict())
    else:
        _print_metrics(evaluation)


def _print_metrics(metrics: Mapping[str, Any]) -> None:
    split, unit, opened = metrics["split"], metrics["unit"], metrics["ledger"]
    if split["patients_overlap"]:
        print("PATIENTS OVERLAP on this split: these figures say nothing about a new patient.")
    for warning in metrics.get("warnings", []):
        print(f"WARNING: {warning}")
    of_groups = "" if unit == "patch" else f" of {metrics['n_patients']:,} {unit}s"
    where = f"{subset_name(metrics['side'])} subset of split {split['name']}: " if metrics["side"] else ""
    print(f"{where}{metrics['n_patches']:,} patches{of_groups}")
    if opened:
        print(f"this test subset has been evaluated {opened['times']} times, by {opened['runs']} runs")
    if metrics["baseline"]:
        print(
            f"colour alone reaches AUROC {_number(metrics['baseline']['auroc'])}{_gain(metrics['baseline'])}"
        )
    if metrics.get("abstention"):
        print(_say_abstention(metrics["abstention"]))
    if metrics["positive_class"] is not None:
        _print_threshold(metrics)
    _print_estimates(metrics)
    _print_classes(metrics["classification_report"])
    if metrics["positive_class"] is not None:
        _print_decisions(metrics)
    _print_subgroups(metrics)


def _say_abstention(found: Mapping[str, Any]) -> str:
    if found["quantiles"] is None:
        return f"every patch gets an answer: {found['reason']}"
    share, to = found["patient"]["abstained"]["value"], found["promise"].replace("-", " ")
    promised = f"coverage {found['promised_coverage']:g} promised to {to}"
    return f"no answer for {100 * share:.1f} % of patches; {promised}: {found['verdict']}"


def _print_threshold(metrics: Mapping[str, Any]) -> None:
    threshold, confusion = metrics["threshold"], metrics["confusion"]
    counts = "  ".join(f"{name.upper()} {confusion[name]:,}" for name in ("tp", "fp", "fn", "tn"))
    print(f"positive class {metrics['positive_class']}: {counts}")
    chosen_on = (
        f" ({threshold['rule']}, chosen on {threshold['chosen_on']})" if threshold["chosen_on"] else ""
    )
    print(f"at threshold {threshold['value']:.3f}{chosen_on}")


def _print_estimates(metrics: Mapping[str, Any]) -> None:
    """Print every metric with its interval."""
    header = ["metric", "patches", f"95 % interval, by {metrics['interval']['unit']}"]
    per_patient = metrics.get("patient", {})
    rows = []
    for name, estimate in metrics["patch"].items():
        rows.append([name, _number(estimate), _interval(estimate)])
        if per_patient:
            summary = per_patient.get(name, {})
            rows[-1] += [summary.get("value"), summary.get("worst")]
    print_table(rows, header + (["mean of patients", "worst"] if per_patient else []))


def _print_classes(report: Sequence[Mapping[str, Any]]) -> None:
    """Print the classification report."""
    rows = [
        [
            row["class"] if "class" in row else f"{row['average']} average",
            *(_number(row[key]) for key in ("precision", "recall", "f1")),
            row["n"],
        ]
        for row in report
    ]
    print_table(rows, ["class", "precision", "recall", "F1", "patches"])


def _print_subgroups(metrics: Mapping[str, Any]) -> None:
    """Print the metrics within each value of each column."""
    rows, names = [], list[str]()
    for column, values in metrics["subgroups"].items():
        for value, found in values.items():
            names = list(found["patch"])
            estimates = [
                f"{_number(found['patch'][name])} ({_interval(found['patch'][name])})" for name in names
            ]
            rows.append([column, value, found["n_patches"], found["n_patients"], *estimates])
    if rows:
        print_table(rows, ["column", "subgroup", "patches", "patients", *names])


def _print_decisions(metrics: Mapping[str, Any]) -> None:
    """Print what the frozen thresholds promised and reach, and what they are worth at another prevalence."""
    chosen = [point for point in metrics["operating_points"] if point["chosen_on"]]
    rows = [
        [point["rule"], f"{point['threshold']:.3f}"]
        + [
            f"{_number(point['where_chosen'][name])} -> {_number(point['achieved'][name])}"
            for name in ("sensitivity", "specificity")
        ]
        for point in chosen
    ]
    if chosen:
        print_table(
            rows, ["threshold by", "from", "sensitivity, chosen -> here", "specificity, chosen -> here"]
        )
    if "at_prevalence" in metrics:
        asked = metrics["at_prevalence"]
        rows = [
            [point["rule"]]
            + [
                f"{_number(point[name])}"
                + ("" if point[name]["low"] is None else f" ({_interval(point[name])})")
                for name in ("ppv", "npv")
            ]
            for point in asked["points"]
        ]
        print_table(rows, [f"at prevalence {asked['prevalence']:g}", "PPV", "NPV"])


def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
    method: Annotated[
        Literal["platt", "intercept", "temperature", "isotonic", "none"],
        typer.Option(help="What to fit on the validation patients; isotonic: two classes."),
    ] = "platt",
    as_json: AsJson = False,
) -> None:
    """Fit a run's calibration anew on its validation patients, and freeze its thresholds again.

    Numbers and pages of the test side that were made before are removed: evaluate makes them again.
    """
    settled = biopsy.calibrate(run, method=method)
    if as_json:
        print_json(settled)
        return
    print(f"{settled['run']}: {_say_calibrator(settled['calibrator'])}")
    for frozen in settled["thresholds"]:
        print(f"threshold {frozen['value']:.3f} ({frozen['rule']}, chosen on {frozen['chosen_on']})")
    if settled["removed"]:
        print(f"removed, for it was made before: {', '.join(settled['removed'])}")


def _say_calibrator(calibrator: Mapping[str, Any]) -> str:
    if calibrator["method"] == "none":
        return "not calibrated"
    text = f"{calibrator['method']}, fitted on {calibrator['n_patches']:,} patches"
    if calibrator["unit"] != "patch":
        text += (
            f" of {calibrator['n_patients']:,} {calibrator['unit']}{'s' * (calibrator['n_patients'] != 1)}"
        )
    text += f", slope {calibrator['slope']:.4g}" if "slope" in calibrator else ""
    return text + (f" ({calibrator['reason']})" if calibrator.get("reason") else "")


def _gain(baseline: Mapping[str, Any]) -> str:
    """Write how much better than colour the model is, where an interval says so."""
    gain = baseline.get("gain") or {}
    if gain.get("low") is None:
        return ""
    return f"; the model's is {gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def _number(estimate: Mapping[str, Any] | float | None) -> str:
    value = estimate["value"] if isinstance(estimate, Mapping) else estimate
    return "undefined" if value is None else f"{value:.3f}"


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"none: {estimate['reason']}"
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|STUDY...", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Output file or folder (default: in the run).")] = None,
    hide_ids: Annotated[
        bool, typer.Option("--hide-ids", help="Replace patient and slide ids by numbers, for sharing.")
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="First run the commands whose results the report lacks.")
    ] = False,
) -> None:
    """Write one self-contained HTML report for each run or study; prints their paths."""
    for path in biopsy.report(runs, out=out, hide_ids=hide_ids, complete=complete):
        print(path)


def predict(
    model: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER|BUNDLE", show_default=False)],
    paths: Annotated[
        list[Path],
        typer.Argument(help="Images, folders, zips, packs.", metavar="PATH...", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(help="The table to write.")] = None,
    format: Annotated[
        Literal["csv", "parquet", "kaggle"],
        typer.Option(help="Format of the table; kaggle is a submission: id and probability."),
    ] = "csv",
    device: Device = "auto",
    trust_model: TrustModel = None,
    as_json: AsJson = False,
) -> None:
    """Predict patches; unreadable ones are named, skipped and counted (exit 3)."""
    with progress("predicting") as on_progress:
        prediction = biopsy.predict(
            model,
            paths,
            out=out,
            format=format,
            device=device,
            trust_model=trust_model,
            on_progress=on_progress,
        )
    frame = prediction.frame
    counts = {str(name): int(count) for name, count in frame["pred"].value_counts().items()}
    if as_json:
        print_json(
            {"path": prediction.path, "n_patches": len(frame), "pred": counts, "skipped": prediction.skipped}
        )
    else:
        print(prediction.path)
        print(
            f"{len(frame):,} patches: "
            + (", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none")
        )
    name_skipped(prediction.skipped, str(prediction.path))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|STUDY...", show_default=False)],
    metric: Annotated[str, typer.Option(help="Primary metric.")] = "auroc",
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say how many patients a comparison needs, from one or two at hand."),
    ] = False,
    difference: Annotated[float, typer.Option(help="With --plan: difference to detect.")] = 0.03,
    power: Annotated[float, typer.Option(help="With --plan: desired power.")] = 0.8,
    out: Annotated[
        Path | None,
        typer.Option(help="The comparison's own folder; without it, comparisons/ gets one.", metavar="DIR"),
    ] = None,
    hide_ids: Annotated[
        bool, typer.Option("--hide-ids", help="Replace patient and slide ids by numbers, for sharing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs or studies tested on the same patches, over patients; the first is the reference."""
    found = biopsy.compare(
        runs, metric=metric, plan=plan, difference=difference, power=power, out=out, hide_ids=hide_ids
    )
    if as_json:
        print_json(found)
    elif plan:
        _print_plan(found)
    else:
        _print_comparison(found)


def _print_comparison(found: Mapping[str, Any]) -> None:
    from biopsy.evaluation.comparison.page import list_differences, say_p, say_verdict
    from biopsy.statistics.resampling import FEWEST_GROUPS

    of_groups = "" if found["unit"] == "patch" else f" of {found['n_patients']:,} {found['unit']}(s)"
    print(f"the same {found['n_patches']:,} test patches{of_groups}; the reference is {found['reference']}")
    for one in found["differences"]:
        print(f"\n{say_verdict(found, one)}")
        rows, reasons = [], dict[str, None]()
        for row in list_differences({**found, "differences": [one]}):
            if row["low"] is None:
                reasons[str(row["reason"])] = None
            rows.append(
                [
                    row["metric"],
                    row["reference_value"],
                    row["value"],
                    _signed(row["difference"]),
                    _range(row["low"], row["high"]),
                    say_p(row["p_holm"]),
                    *([_range(row["seeds_min"], row["seeds_max"])] if row["seeds_n"] > 1 else [""]),
                ]
            )
        header = ["metric", one["to"], one["of"], "difference", f"95 % interval, by {found['unit']}"]
        print_table(rows, [*header, "p (Holm)", "over seeds"])
        if reasons:
            print(f"no interval: {'; '.join(reasons)}")
        if found["n_patients"] < FEWEST_GROUPS:
            _print_groups(found, one["of"])
    if "changed" in found:
        changed = found["changed"]
        print(
            f"\nturned from right to wrong: {changed['turned_wrong']:,}, from wrong to right: "
            f"{changed['turned_right']:,}; right by both {changed['both_right']:,}, wrong by both "
            f"{changed['both_wrong']:,}"
        )
    say(f"comparison {found['path']}")


def _print_groups(found: Mapping[str, Any], name: str) -> None:
    """Print each of a few patients: what there is to say where no interval over patients is."""
    from biopsy.reporting.document import metric_label

    first, *_, last = found["by_group"][0]["differences"][name]
    rows = [
        [
            entry["group"],
            entry["n_patches"],
            *(
                text
                for metric in (first, last)
                for seeds in [entry["differences"][name][metric]]
                for text in (
                    _signed(seeds["mean"]),
                    _range(seeds["min"], seeds["max"]) if seeds["n"] > 1 else "one each",
                )
            ),
        ]
        for entry in found["by_group"]
    ]
    labels = [metric_label(metric, len(found["class_names"])) for metric in (first, last)]
    header = [found["unit"], "patches", f"gain in {labels[0]}", "over seeds", f"in {labels[1]}", "over seeds"]
    print_table(rows, header)


def _range(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"


def _print_plan(found: Mapping[str, Any]) -> None:
    from biopsy.core.text import plural

    units = plural(found["unit"])
    print(
        f"{units} needed to see a difference of {found['difference']:g} in {found['metric']} with power "
        f"{found['power']:g}, from the spread between {found['n_patients_at_hand']:,} {units} of "
        f"{' and '.join(found['from'])}"
    )
    rows = [
        [need["assumed"], f"{need['sd']:.3f}", need["n_patients"], f"{need['low']:,} to {need['high']:,}"]
        for need in found["needs"]
    ]
    print_table(rows, ["assumed", f"sd between {units}", units, "as sure as the spread is known"])
    if len(found["from"]) == 1:
        print(
            "correlation: of the two classifiers' ups and downs from one to the next; .5 is also the number "
            "needed against a fixed value. Two runs give their own."
        )
    if found["unit"] != "patch":
        print(f"each with about {found['patches_per_patient']:,.0f} patches, as here")


def errors(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
    subset: Annotated[
        Literal["test", "validation"] | None,
        typer.Option(help="Subset to analyse (default: the one evaluated last)."),
    ] = None,
    n: Annotated[int, typer.Option(help="Number of patches of each kind to picture.")] = 12,
    out: Annotated[Path | None, typer.Option(help="Output folder (default: errors/ in the run).")] = None,
    hypotheses: Annotated[
        bool, typer.Option("--hypotheses", help="Also test the published hypotheses about errors.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Analyse a run's misclassified patches: a table, pictures, and the properties associated with errors."""
    found = biopsy.errors(run, subset=subset, n=n, out=out, hypotheses=hypotheses, device=device)
    if as_json:
        print_json(found)
        return
    counts = found["counts"]
    print(
        f"{subset_name(found['side'])} subset: {counts['fn']:,} false negatives among "
        f"{counts['fn'] + counts['tp']:,} {found['positive_class']} patches, {counts['fp']:,} false "
        f"positives among {counts['fp'] + counts['tn']:,} others"
    )
    for zone, part in found["zones"].items():
        print(f"{zone}: {part['fn'] + part['fp']:,} errors on {part['n_patches']:,} patches")
    rows = [_row(each) for each in found["contrasts"] if each["n_errors"] and each["n_others"]]
    if rows:
        print_table(rows, ["errors", "property", "mean, wrong", "mean, right", "P(wrong > right) (AUC)", ""])
        if any(row[4].endswith(")") for row in rows):
            print(f"95 % intervals are simultaneous over {found['n_comparisons']} comparisons")
    print((out or run / "errors") / "errors.csv")


def _row(found: Mapping[str, Any]) -> list[str]:
    estimate = found["within"] or found["auroc"]
    said = f"{estimate['value']:.3f}" if estimate["value"] is not None else "undefined"
    if estimate["low"] is not None:
        said += f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    means = [f"{found[f'mean_{of}']:.4g}" for of in ("errors", "others")]
    return [found["errors"], found["property"], *means, said, estimate["reason"] or found["verdict"]]


def label_issues(
    run: Annotated[Path, typer.Argument(metavar="RUN|STUDY", show_default=False)],
    out: Annotated[Path, typer.Option(help="Output folder for labels.csv, labels.html and pictures.")],
    n: Annotated[int, typer.Option(help="Maximum number of labels to list.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List probable label errors in a sheet for expert review; labels themselves are not changed."""
    found = biopsy.label_issues(run, out=out, n=n)
    if as_json:
        about = {"path": found.path, "page": found.page, "n_listed": len(found.table)}
        print_json({**about, "n_patches": found.n_patches, "n_doubted": found.n_doubted})
        return
    print(f"{found.n_doubted:,} of {found.n_patches:,} labels are doubtful; {len(found.table):,} are listed")
    for path in (found.path, found.page):
        print(path)
    print(
        f"fill in the column decision, then run: biopsy prepare SOURCE --labels {found.path} --out NEW.pack"
    )


_METHODS = "saliency, smoothgrad, grad_cam, integrated_gradients, occlusion or activations"


def explain(
    model: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="For a classifier: a pack, or images in a folder or zip.", metavar="PACK|PATH"),
    ] = None,
    patch: Annotated[
        list[str] | None, typer.Option(help="Id of a patch; may be repeated.", metavar="ID")
    ] = None,
    errors: Annotated[
        int, typer.Option(help="Without --patch: number of misclassified patches, plus as many correct.")
    ] = 5,
    random: Annotated[int, typer.Option(help="Instead: number of patches drawn at random.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of --random.")] = 0,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_METHODS}; may be repeated. By default saliency, grad_cam and activations.", metavar="M"
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer that activations or grad_cam look at; may be repeated.", metavar="L"),
    ] = None,
    faithfulness: Annotated[
        bool, typer.Option("--faithfulness", help="Also run faithfulness tests (about one minute).")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; explain/ in the run.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a model looks at: maps superimposed on patches, as sheets, pictures and explain.json."""
    written = biopsy.explain(
        model,
        data=data,
        patch=patch or (),
        errors=errors,
        random=random,
        seed=seed,
        method=method or (),
        layer=layer,
        faithfulness=faithfulness,
        out=out,
        device=device,
    )
    if as_json:
        print_json(written)
        return
    place = out or (model / "explain" if data is None else Path("explain"))
    columns = ("kind", "class", "called", "prob", "patch_id")
    print_table([[entry[key] for key in columns] for entry in _unique(written["patches"])], columns)
    for sheet in written["sheets"]:
        print(place / sheet["picture"])
    if faithfulness:
        _print_faithfulness(written["faithfulness"])


def _unique(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    """Keep one entry a patch: each stands there once for every method."""
    return list({str(entry["patch_id"]): entry for entry in entries}.values())


def _print_faithfulness(found: dict[str, Any]) -> None:
    print(f"\nfaithfulness, {found['n_patches']} patches of {found['n_groups']} {found['unit']}(s):")
    for each in found["methods"]:
        print(each["answer"])
    for each in found["refused"]:
        print(f"{each['name']}: {each['reason']}")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (evaluate, calibrate, report, predict, compare, errors, label_issues, explain):
        app.command()(command)
