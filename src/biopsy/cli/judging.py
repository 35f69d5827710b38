"""Verbs that judge and use what was trained: evaluate, calibrate, report, predict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import biopsy
from biopsy.cli.console import name_skipped, print_json, print_table, progress
from biopsy.cli.options import AsJson, Device, SplitName, TrustModel, comma_list


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER|PREDICTIONS", show_default=False)],
    side: Annotated[Literal["test", "val"], typer.Option(help="Which side to judge on.")] = "test",
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
        side=side,
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
    of_groups = "" if unit == "patch" else f" of {metrics['n_patients']:,} {unit}s"
    where = f"{metrics['side']} side of split {split['name']}: " if metrics["side"] else ""
    print(f"{where}{metrics['n_patches']:,} patches{of_groups}")
    if opened:
        print(f"this test side has been opened {opened['times']} times, for {opened['runs']} runs")
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
        Literal["temperature", "platt", "isotonic", "none"],
        typer.Option(help="What to fit on the validation patients; platt and isotonic: two classes."),
    ] = "temperature",
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
    return text + (f", slope {calibrator['slope']:.3f}" if "slope" in calibrator else "")


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
    out: Annotated[Path | None, typer.Option(help="Where to write it; into the run by default.")] = None,
    hide_ids: Annotated[
        bool, typer.Option("--hide-ids", help="Replace patient and slide ids by numbers, for sharing.")
    ] = False,
) -> None:
    """Write one self-contained HTML file for each run or study; prints their paths."""
    for path in biopsy.report(runs, out=out, hide_ids=hide_ids):
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


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    for verb in (evaluate, calibrate, report, predict):
        app.command()(verb)
