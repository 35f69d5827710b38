"""The verb that sets runs and studies against each other: compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import biopsy
from biopsy.cli.console import print_json, print_table, say
from biopsy.cli.options import AsJson


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|STUDY...", show_default=False)],
    metric: Annotated[str, typer.Option(help="The metric that is to answer.")] = "auroc",
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say how many patients a comparison needs, from one or two at hand."),
    ] = False,
    difference: Annotated[float, typer.Option(help="With --plan: the difference to be seen.")] = 0.03,
    power: Annotated[float, typer.Option(help="With --plan: how often, were it the truth.")] = 0.8,
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
    from biopsy.sharing.differences import list_differences, say_p, say_verdict
    from biopsy.statistics.intervals import FEWEST_GROUPS

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
    from biopsy.sharing.document import metric_label

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
    from biopsy.sharing.document import plural

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


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command()(compare)
