"""Printing of the results of commands, as text or JSON, and exit codes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biopsy.cli.console import log, print_blocks, print_json, print_table
from biopsy.core.text import count, plural

FAILED, SKIPPED = 1, 3
SHOWN_PATCHES = 20  # maximum number of patches whose predictions are printed
MAX_NAMED = 20  # skipped files listed individually

COUNTS = {"odd_sizes": "padded to a square", "duplicates": "identical copies left out"}

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """Printing of the result of a command.

    Attributes:
        group: Heading of the command in the help.
        text: Prints the result, given the options of the call.
        document: Returns the JSON document of ``--json``, given the options.
        skipped: Returns the unreadable inputs, and the file that lists them.
    """

    group: str
    text: Callable[[Any, Options], None]
    document: Callable[[Any, Options], object] = lambda result, options: dict(result)
    skipped: Callable[[Any], tuple[Sequence[Mapping[str, str]], Path]] | None = None


def show(name: str, result: Any, options: Options, *, as_json: bool) -> int:
    """Print the result of a command; return the exit code."""
    command = COMMANDS[name]
    if as_json:
        print_json(command.document(result, options))
    else:
        command.text(result, options)
    if name == "inspect":
        return _name_issues(result["blocking_issues"])
    if name in ("verify", "doctor"):
        return 0 if result.passed else FAILED
    if command.skipped is not None:
        return _name_skipped(*command.skipped(result))
    return 0


def _name_issues(issues: Sequence[str]) -> int:
    for issue in issues:
        log.warning("blocking issue: %s", issue)
    return FAILED if issues else 0


def _name_skipped(skipped: Sequence[Mapping[str, str]], listing: Path) -> int:
    """Log the inputs that could not be read; return the exit code."""
    for item in skipped[:MAX_NAMED]:
        log.warning("skipped %s: %s", item["source"], item["reason"])
    if len(skipped) > MAX_NAMED:
        log.warning("%s more skipped inputs are listed in %s", f"{len(skipped) - MAX_NAMED:,}", listing)
    if skipped:
        log.warning(
            "%s", "1 input was skipped" if len(skipped) == 1 else f"{len(skipped):,} inputs were skipped"
        )
    return SKIPPED if skipped else 0


def _print_path(result: Any, options: Options) -> None:
    print(result.path)


def _path(result: Any, options: Options) -> object:
    return {"path": result.path}


# --- data


def _print_fetch(result: Any, options: Options) -> None:
    if result.kept:
        log.info("already there: %s", ", ".join(path.name for path in result.kept))
    print(result.path)


def _count_tree(folder: Path) -> dict[str, dict[str, int]]:
    """Return the files of an exported tree, by subset and class."""
    from biopsy.data.export_tree import count_tree

    return count_tree(folder)


def _pack_document(pack: Any, options: Options) -> object:
    document = {"path": pack.path, **pack.info.model_dump()}
    if "export_tree" in options:
        document["tree"] = _count_tree(options["export_tree"])
    return document


def _print_pack(pack: Any, options: Options) -> None:
    info = pack.info
    mpp = "unknown" if info.mpp is None else f"{info.mpp:g}"
    print(f"{pack.path}: {info.dataset}, {info.patch_px} px at {mpp} um/px, positive: {info.positive_class}")
    for name, value in info.counts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {n:,}" for key, n in value.items()) or "none"
        label = COUNTS.get(name, name.replace("_", " "))
        print(f"  {label}: {value:,}" if isinstance(value, int) else f"  {label}: {value}")
    if "export_tree" in options:
        tree = _count_tree(options["export_tree"])
        print(f"{options['export_tree']}: original files, class folders numbered in the order of the classes")
        print_table([[subset, *n.values()] for subset, n in tree.items()], ["subset", *tree["training"]])


def _spell_sizes(padded: Mapping[str, Any]) -> str:
    sizes = ", ".join(
        f"{size['width']} x {size['height']} px: {size['count']:,}" for size in padded["by_size"]
    )
    return f"{padded['count']:,} patches" + (f" ({sizes})" if sizes else "")


def _print_audit(audit: Mapping[str, Any], options: Options) -> None:
    exact, labels, groups, division = (
        audit[key] for key in ("exact_duplicates", "label_conflicts", "groups", "split")
    )
    print(f"audit: {audit['paths']['audit']}")
    print(f"  unreadable files: {audit['unreadable']['count']:,}")
    print(f"  padded to a square: {_spell_sizes(audit['odd_sizes'])}")
    print(f"  blank patches: {audit['blank']['count']:,}")
    print(f"  exact duplicates: {exact['patches']:,} patches in {exact['count']:,} groups")
    print(f"  near duplicates: {audit['near_duplicates']['count']:,} pairs")
    conflicts = labels["same_pixels"]["count"], labels["same_place"]["count"]
    print("  label conflicts: {:,} with equal pixels, {:,} at the same position".format(*conflicts))
    if groups["count"]:
        print(f"  {audit['unit']}s: {groups['count']:,}, of one class {groups['one_class']['count']:,}")
        if groups["unknown"]:
            print(f"  patches without a known {audit['unit']}: {groups['unknown']:,}")
    if division and division["may_overlap"] and division["patients_overlap"]:
        reason = "as published" if division["is_published"] else "on purpose"
        print(f"  PATIENTS OVERLAP in split {division['name']}, {reason}: {division['overlap']['count']:,}")
    for picture in audit["paths"]["pictures"]:
        print(f"picture: {picture}")


def _split_document(split: Any, options: Options) -> object:
    names = ("name", "protocol", "unit", "seed", "parameters")
    return {name: getattr(split, name) for name in names} | {"patients_overlap": split.overlap}


def _print_split(split: Any, options: Options) -> None:
    print(f"split {split.name!r} ({split.protocol}) by {split.unit}, seed {split.seed}")
    if split.overlap:
        reason = "as published" if split.is_published else "on purpose"
        print(f"PATIENTS OVERLAP between subsets, {reason}: results on it do not apply to new patients")
    if split.test_is_validation:
        print(
            "the test subset is also the validation subset, as published: all choices are made on test data"
        )
    counts = split.parameters["counts"]
    rows = []
    for fold, subsets in enumerate(counts.get("folds", [counts])):
        for subset, sizes in subsets.items():
            if sizes["patches"]:
                first = [fold, subset] if split.n_folds else [subset]
                rows.append([*first, sizes["patches"], sizes["groups"], *sizes["per_class"].values()])
    header = [*(["fold"] if split.n_folds else []), "subset", "patches", f"{split.unit}s"]
    print_table(rows, header + list(sizes["per_class"]))


# --- training and experiments


def _print_study(study: Any, options: Options) -> None:
    _name_failed(study)
    print(study.path)


def _name_failed(study: Any) -> None:
    for run, reason in study.info["failed"].items():
        log.warning("failed: %s: %s", run, reason)


def _print_probe(probe: Any, options: Options) -> None:
    def estimate(row: Mapping[str, Any], name: str, sign: str = "") -> str:
        if row[name] is None:
            return ""
        low, high = (row[f"{name}_{end}"] for end in ("low", "high"))
        interval = "" if low is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"
        return f"{row[name]:{sign}.3f}{interval}"

    rows = [
        [
            row["encoder"],
            estimate(row, "auroc"),
            estimate(row, "difference", "+"),
            row["knn_auroc"],
            estimate(row, "balanced_accuracy"),
            estimate(row, "ece"),
            row["n_features"],
            row["ms_per_patch"],
            row["licence"],
        ]
        for row in probe["rows"]
    ]
    header = ["encoder", "AUROC (95 %)", "difference from the first", "k-NN AUROC", "balanced accuracy"]
    print_table(rows, [*header, "ECE", "features", "ms a patch", "licence"])
    print(probe["path"])


def _print_reproduction(study: Any, options: Options) -> None:
    from biopsy.experiments.reproduction_summary import list_rows, write_markdown

    _name_failed(study)
    log.info("study %s", study.path)
    print(write_markdown(list_rows(study.summary())), end="")


# --- evaluation


def _print_metrics(metrics: Mapping[str, Any], options: Options) -> None:
    split, unit, opened = metrics["split"], metrics["unit"], metrics["ledger"]
    if metrics.get("title"):
        print(metrics["title"])
    if metrics.get("synthetic"):
        print("The patients are synthetic: these results say nothing about real tissue.")
    if split["patients_overlap"]:
        print("PATIENTS OVERLAP on this split: these results do not apply to new patients.")
    for warning in metrics.get("warnings", []):
        print(f"WARNING: {warning}")
    groups = "" if unit == "patch" else f" of {count(metrics['n_patients'], unit)}"
    subset_text = f"{metrics['subset']} subset of split {split['name']}: " if metrics["subset"] else ""
    print(f"{subset_text}{count(metrics['n_patches'], 'patch')}{groups}")
    if opened:
        times, runs = count(opened["times"], "time"), count(opened["runs"], "run")
        print(f"this test subset has been evaluated {times}, by {runs}")
    if metrics["baseline"]:
        print(
            f"colour-only baseline: AUROC {_number(metrics['baseline']['auroc'])}{_gain(metrics['baseline'])}"
        )
    if metrics.get("abstention"):
        print(abstention_summary(metrics["abstention"]))
    if metrics["positive_class"] is not None:
        _print_threshold(metrics)
    _print_estimates(metrics)
    _print_classes(metrics["classification_report"])
    if metrics["positive_class"] is not None:
        _print_decisions(metrics)
    _print_subgroups(metrics)


def abstention_summary(abstention: Mapping[str, Any]) -> str:
    if abstention["quantiles"] is None:
        return f"no abstention: {abstention['reason']}"
    share = abstention["patient"]["abstained"]["value"]
    scope = "per class" if abstention["guarantee"] == "class-conditional" else "over all classes"
    target = f"target coverage {abstention['target_coverage']:g} {scope}"
    return f"abstains on {100 * share:.1f} % of patches; {target}: {abstention['verdict']}"


def _print_threshold(metrics: Mapping[str, Any]) -> None:
    threshold, confusion = metrics["threshold"], metrics["confusion"]
    counts = "  ".join(f"{name.upper()} {confusion[name]:,}" for name in ("tp", "fp", "fn", "tn"))
    print(f"positive class {metrics['positive_class']}: {counts}")
    chosen_on = threshold["chosen_on"]
    print(
        f"at threshold {threshold['value']:.3f}"
        + (f" ({threshold['rule']}, chosen on {chosen_on})" if chosen_on else "")
    )


def _print_estimates(metrics: Mapping[str, Any]) -> None:
    """Print every metric with its interval."""
    from biopsy.reporting.elements import Footnotes

    header = ["metric", "all patches", f"95 % interval, by {metrics['interval']['unit']}"]
    per_patient = metrics["patient"] or {}
    rows, reasons = [], Footnotes()
    for name, estimate in metrics["patch"].items():
        rows.append([name, _number(estimate), reasons.interval(estimate)])
        if per_patient:
            summary = per_patient.get(name, {})
            rows[-1] += [summary.get("value"), summary.get("worst")]
    print_table(rows, header + (["mean of patients", "worst"] if per_patient else []))
    for note in reasons.notes:
        print(note)


def _print_classes(report: Sequence[Mapping[str, Any]]) -> None:
    """Print the classification report."""
    rows = [
        [row["name"], *(_number(row[key]) for key in ("precision", "recall", "f1")), row["n"]]
        for row in report
    ]
    print_table(rows, ["class", "precision", "recall", "F1", "patches"])


def _print_subgroups(metrics: Mapping[str, Any]) -> None:
    """Print the metrics within each value of each column."""
    from biopsy.reporting.elements import Footnotes

    rows, names, reasons = [], list[str](), Footnotes()
    for column, values in metrics["subgroups"].items():
        for value, part in values.items():
            names = list(part["patch"])
            estimates = [reasons.estimate(item) for item in part["patch"].values()]
            rows.append([column, value, part["n_patches"], part["n_patients"], *estimates])
    if rows:
        print_table(rows, ["column", "subgroup", "patches", "patients", *names])
        for note in reasons.notes:
            print(note)
        print("intervals of subgroups each hold by themselves: not corrected for the number of subgroups")


def _print_decisions(metrics: Mapping[str, Any]) -> None:
    """Print the operating points where chosen and on these patches, and PPV and NPV at a prevalence."""
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
    if metrics["at_prevalence"]:
        table = metrics["at_prevalence"]
        rows = [
            [point["rule"]]
            + [
                _number(point[name]) + ("" if point[name]["low"] is None else f" ({_interval(point[name])})")
                for name in ("ppv", "npv")
            ]
            for point in table["points"]
        ]
        print_table(rows, [f"at prevalence {table['prevalence']:g}", "PPV", "NPV"])


def _gain(baseline: Mapping[str, Any]) -> str:
    """Format the gain over the colour-only baseline, if it has an interval."""
    gain = baseline.get("gain") or {}
    if gain.get("low") is None:
        return ""
    return f"; gain of the model {gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def _number(estimate: Mapping[str, Any] | float | None) -> str:
    value = estimate["value"] if isinstance(estimate, Mapping) else estimate
    return "undefined" if value is None else f"{value:.3f}"


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"none: {estimate['reason']}"
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def _print_calibration(result: Mapping[str, Any], options: Options) -> None:
    print(f"{result['run']}: {_calibrator_summary(result['calibrator'])}")
    for threshold in result["thresholds"]:
        print(f"threshold {threshold['value']:.3f} ({threshold['rule']}, chosen on {threshold['chosen_on']})")
    if result["removed"]:
        print(f"removed outdated outputs: {', '.join(result['removed'])}")


def _calibrator_summary(calibrator: Mapping[str, Any]) -> str:
    if calibrator["method"] == "none":
        return "not calibrated"
    text = f"{calibrator['method']}, fitted on {calibrator['n_patches']:,} patches"
    if calibrator["unit"] != "patch":
        text += (
            f" of {calibrator['n_patients']:,} {calibrator['unit']}{'s' * (calibrator['n_patients'] != 1)}"
        )
    text += f", slope {calibrator['slope']:.4g}" if "slope" in calibrator else ""
    return text + (f" ({calibrator['reason']})" if calibrator.get("reason") else "")


def _prediction_document(prediction: Any, options: Options) -> object:
    frame, names = prediction.frame, prediction.class_names
    counts = {name: int((frame["pred"] == index).sum()) for index, name in enumerate(names)}
    return {
        "path": prediction.path,
        "n_patches": len(frame),
        "pred": counts,
        "n_training": prediction.n_training,
        "skipped": prediction.skipped,
    }


def _print_prediction(prediction: Any, options: Options) -> None:
    document: Any = _prediction_document(prediction, options)
    if 0 < document["n_patches"] <= SHOWN_PATCHES:
        _print_patches(prediction)
    print(prediction.path)
    counts = ", ".join(f"{n:,} {name}" for name, n in document["pred"].items() if n)
    print(f"{count(document['n_patches'], 'patch')}: {counts or 'none'}")
    if prediction.n_training:
        log.warning(
            "%s of these patches were used for training (column subset)", f"{prediction.n_training:,}"
        )


def _print_patches(prediction: Any) -> None:
    """Print class and probability of each patch, and whether it is abstained or out of distribution."""
    rows = []
    for patch in prediction.frame.to_dict("records"):
        name = prediction.class_names[patch["pred"]]
        notes = {"abstains": patch["abstained"], "out of distribution": patch["out_of_distribution"]}
        noted = [note for note, holds in notes.items() if holds is True]
        rows.append([patch["patch_id"], name, f"{patch[f'prob_{name}']:.3f}", ", ".join(noted)])
    print_table(rows, ["patch", "class", "probability", ""])


def _print_comparison(comparison: Mapping[str, Any], options: Options) -> None:
    if "needs" in comparison:
        _print_plan(comparison)
        return
    from biopsy.evaluation.comparison.page import describe_verdict
    from biopsy.statistics.resampling import FEWEST_GROUPS

    unit = comparison["unit"]
    groups = "" if unit == "patch" else f" of {count(comparison['n_patients'], unit)}"
    print(f"{comparison['n_patches']:,} common test patches{groups}; reference: {comparison['reference']}")
    for difference in comparison["differences"]:
        print(f"\n{describe_verdict(comparison, difference)}")
        _print_difference(comparison, difference)
        if comparison["n_patients"] < FEWEST_GROUPS:
            _print_groups(comparison, difference["of"])
    if comparison["changed"]:
        changed = comparison["changed"]
        print(
            f"\ncorrect to wrong: {changed['turned_wrong']:,}, wrong to correct: "
            f"{changed['turned_right']:,}; correct in both {changed['both_right']:,}, wrong in both "
            f"{changed['both_wrong']:,}"
        )
    log.info("comparison %s", comparison["path"])


def _print_difference(comparison: Mapping[str, Any], difference: Mapping[str, Any]) -> None:
    """Print the metrics of two models and their difference."""
    from biopsy.evaluation.comparison.page import format_p, list_differences

    rows, reasons = [], dict[str, None]()
    for row in list_differences({**comparison, "differences": [difference]}):
        if row["low"] is None:
            reasons[str(row["reason"])] = None
        rows.append(
            [
                row["metric"],
                row["reference_value"],
                row["value"],
                _signed(row["difference"]),
                _range(row["low"], row["high"]),
                format_p(row["p_holm"]),
                _range(row["seeds_min"], row["seeds_max"]) if row["seeds_n"] > 1 else "",
            ]
        )
    header = ["metric", difference["to"], difference["of"], "difference"]
    by = f"{comparison['unit']} and seed" if difference["compares"] == "recipes" else comparison["unit"]
    print_table(rows, [*header, f"95 % interval, by {by}", "p (Holm)", "over seeds"])
    if reasons:
        print(f"no interval: {'; '.join(reasons)}")


def _print_groups(comparison: Mapping[str, Any], name: str) -> None:
    """Print the differences within each patient, if there are too few for an interval."""
    from biopsy.reporting.document import metric_label

    first, *_, last = comparison["by_group"][0]["differences"][name]
    rows = []
    for entry in comparison["by_group"]:
        row = [entry["group"], entry["n_patches"]]
        for metric in (first, last):
            seeds = entry["differences"][name][metric]
            row += [
                _signed(seeds["mean"]),
                _range(seeds["min"], seeds["max"]) if seeds["n"] > 1 else "one seed",
            ]
        rows.append(row)
    labels = [metric_label(metric, len(comparison["class_names"])) for metric in (first, last)]
    header = [comparison["unit"], "patches"]
    for label in labels:
        header += [f"difference in {label}", "over seeds"]
    print_table(rows, header)


def _range(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"


def _print_plan(plan: Mapping[str, Any]) -> None:
    units = plural(plan["unit"])
    print(
        f"{units} needed to detect a difference of {plan['difference']:g} in {plan['metric']} with power "
        f"{plan['power']:g}, from the spread between {plan['n_patients_at_hand']:,} {units} of "
        f"{' and '.join(plan['from'])}"
    )
    rows = [
        [need["assumed"], f"{need['sd']:.3f}", need["n_patients"], f"{need['low']:,} to {need['high']:,}"]
        for need in plan["needs"]
    ]
    print_table(rows, ["assumed", f"sd between {units}", units, "95 % interval"])
    if len(plan["from"]) == 1:
        print(
            f"correlation: between the two classifiers' values over {units}; 0.5 is also the number needed "
            "against a fixed value. Two runs give their own correlation."
        )
    if plan["unit"] != "patch":
        print(f"with about {plan['patches_per_patient']:,.0f} patches each")


def _print_errors(analysis: Mapping[str, Any], options: Options) -> None:
    counts = analysis["counts"]
    print(
        f"{analysis['subset']} subset: {counts['fn']:,} false negatives among "
        f"{counts['fn'] + counts['tp']:,} {analysis['positive_class']} patches, {counts['fp']:,} false "
        f"positives among {counts['fp'] + counts['tn']:,} others"
    )
    for zone, part in analysis["zones"].items():
        print(f"{zone}: {part['fn'] + part['fp']:,} errors on {part['n_patches']:,} patches")
    rows = [_contrast_row(row) for row in analysis["contrasts"] if row["n_errors"] and row["n_others"]]
    if rows:
        print_table(rows, ["errors", "property", "mean, wrong", "mean, right", "P(wrong > right) (AUC)", ""])
        if any(row[4].endswith(")") for row in rows):
            print(f"95 % intervals are simultaneous over {analysis['n_comparisons']} comparisons")
    print(options.get("out", options["run"] / "errors") / "errors.csv")


def _contrast_row(contrast: Mapping[str, Any]) -> list[str]:
    estimate = contrast["within"] or contrast["auroc"]
    text = _number(estimate)
    if estimate["low"] is not None:
        text += f" ({_interval(estimate)})"
    means = [f"{contrast[f'mean_{kind}']:.4g}" for kind in ("errors", "others")]
    return [contrast["errors"], contrast["property"], *means, text, estimate["reason"] or contrast["verdict"]]


def _label_document(result: Any, options: Options) -> object:
    document = {"path": result.path, "page": result.page, "n_listed": len(result.table)}
    return {**document, "n_patches": result.n_patches, "n_issues": result.n_issues}


def _print_label_issues(result: Any, options: Options) -> None:
    print(
        f"{result.n_issues:,} of {result.n_patches:,} labels are doubtful; {len(result.table):,} are listed"
    )
    print(result.path, result.page, sep="\n")
    print(
        f"fill in the column decision, then run: biopsy prepare SOURCE --labels {result.path} --out NEW.pack"
    )


def _print_explanations(result: Mapping[str, Any], options: Options) -> None:
    folder = options.get("out") or (Path("explain") if "data" in options else options["model"] / "explain")
    columns = ("kind", "class", "called", "prob", "patch_id")
    patches = {str(entry["patch_id"]): entry for entry in result["patches"]}.values()  # one entry per method
    print_table([[entry[key] for key in columns] for entry in patches], columns)
    for sheet in result["sheets"]:
        print(folder / sheet["picture"])
    if "faithfulness" in options:
        tests = result["faithfulness"]
        groups = count(tests["n_groups"], tests["unit"])
        print(f"\nfaithfulness, {count(tests['n_patches'], 'patch')} of {groups}:")
        for method in tests["methods"]:
            print(method["answer"])
        for method in tests["refused"]:
            print(f"{method['name']}: {method['reason']}")


# --- slides


def _finished(cohort: Any) -> Any:
    return cohort.status[cohort.status["status"] == "done"]


def _slides_document(cohort: Any, options: Options) -> object:
    from biopsy.core.storage import parse_url

    names = ["slide", "source", "n_patches", "mpp", "mpp_source", "positive_mm2", "out_of_distribution"]
    slides = _finished(cohort)[names].to_dict("records")
    return {"out": parse_url(options["out"]) or cohort.out, "slides": slides, "skipped": cohort.failed}


def _print_slides(cohort: Any, options: Options) -> None:
    from biopsy.core.storage import parse_url

    rows = [
        [row.slide, int(row.n_patches), float(row.mpp), row.mpp_source, row.positive_mm2]
        for row in _finished(cohort).itertuples()
    ]
    print_table(rows, ["slide", "patches", "um/px", "from", "positive mm2"])
    print(parse_url(options["out"]) or cohort.out)


def _skipped_slides(cohort: Any) -> tuple[Sequence[Mapping[str, str]], Path]:
    from biopsy.models.out_of_distribution import ood_warning

    for row in _finished(cohort).itertuples():
        warning = ood_warning(row.out_of_distribution, row.out_of_distribution_quantile)
        if warning is not None:
            log.warning("%s: %s", row.slide, warning)
    return cohort.failed, cohort.out / "status.csv"


def _print_queue(queue: Any, options: Options) -> None:
    names = ["patch_id", "patient_id", "prob", "reason"]
    print_table(queue[names].head(MAX_NAMED).to_numpy().tolist(), names)
    print(options.get("out", "queue.csv"))


def _print_nothing(result: None, options: Options) -> None:
    """Print nothing: the command ran until it was stopped."""


# --- others


def _print_reports(paths: Iterable[Path], options: Options) -> None:
    print(*paths, sep="\n")


def _print_demo(path: Path, options: Options) -> None:
    print(f"report: {path}")


def _print_list(rows: Any, options: Options) -> None:
    print_blocks(rows)


def _print_bundle(bundle: Any, options: Options) -> None:
    parity = bundle.parity
    print(bundle.path)
    rows = [[pair, f"{difference['probs']:.1e}"] for pair, difference in parity["largest_difference"].items()]
    print_table(rows, ["", "largest difference of a probability"])
    log.info("on %s patches; tolerance %g", f"{parity['n_patches']:,}", parity["tolerance"])
    if "int8" in parity:
        int8 = parity["int8"]
        print(f"int8: largest difference {int8['largest']:.3f}, {int8['changed_calls']:.1%} of calls change")


def _print_publication(publication: Any, options: Options) -> None:
    log.info("%d files: %s", len(publication.files), publication.url)
    print(publication.model)


def _print_classifier(classifier: Any, options: Options) -> None:
    print(options["out"])


def _print_checks(report: Any, options: Options) -> None:
    """Print a line per check, and the remedy below it."""
    width = max(len(row["name"]) for row in report["checks"])
    for row in report["checks"]:
        print(f"{row['status']}  {row['name']:<{width}}  {row['detail']}")
        if row["remedy"]:
            print(f"      {'':<{width}}  -> {row['remedy']}")
    print(report.heading)


GROUPS = ("Start", "Data", "Training", "Evaluation", "Prediction")
COMMANDS = {
    "demo": Command("Start", _print_demo, lambda path, options: {"report": path}),
    "list": Command("Start", _print_list, lambda rows, options: rows),
    "doctor": Command("Start", _print_checks),
    "fetch": Command("Data", _print_fetch, _path),
    "prepare": Command(
        "Data",
        _print_pack,
        _pack_document,
        lambda pack: (pack.info.skipped, pack.path / "pack.json"),
    ),
    "inspect": Command("Data", _print_audit),
    "split": Command("Data", _print_split, _split_document),
    "label_issues": Command("Data", _print_label_issues, _label_document),
    "train": Command("Training", _print_path, _path),
    "study": Command("Training", _print_study, _path),
    "sweep": Command("Training", _print_study, _path),
    "probe": Command("Training", _print_probe),
    "reproduce": Command(
        "Training", _print_reproduction, lambda study, options: {"path": study.path, **study.summary()}
    ),
    "import_keras": Command(
        "Training",
        _print_classifier,
        lambda classifier, options: {"path": options["out"], "sha256": classifier.sha256},
    ),
    "evaluate": Command("Evaluation", _print_metrics),
    "calibrate": Command("Evaluation", _print_calibration),
    "compare": Command("Evaluation", _print_comparison),
    "errors": Command("Evaluation", _print_errors),
    "explain": Command("Evaluation", _print_explanations),
    "verify": Command("Evaluation", _print_checks),
    "report": Command("Evaluation", _print_reports, lambda paths, options: {"paths": paths}),
    "predict": Command(
        "Prediction",
        _print_prediction,
        _prediction_document,
        lambda prediction: (prediction.skipped, prediction.path),
    ),
    "slide": Command("Prediction", _print_slides, _slides_document, _skipped_slides),
    "next": Command("Prediction", _print_queue, lambda queue, options: queue.to_dict("records")),
    "view": Command("Prediction", _print_nothing, lambda result, options: {}),
    "serve": Command("Prediction", _print_nothing, lambda result, options: {}),
    "export": Command(
        "Prediction", _print_bundle, lambda bundle, options: {"path": bundle.path, **bundle.parity}
    ),
    "publish": Command("Prediction", _print_publication, lambda result, options: asdict(result)),
}
"""Every command, with the heading of the help under which it stands."""
