"""The verbs that look at what may be wrong: mistakes of a run, doubts about labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import biopsy
from biopsy.cli.console import print_json, print_table
from biopsy.cli.options import AsJson, Device


def mistakes(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
    side: Annotated[
        Literal["test", "val"] | None, typer.Option(help="Which side; the one last judged by default.")
    ] = None,
    n: Annotated[int, typer.Option(help="How many of each kind are pictured.")] = 12,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; errors/ in the run.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """List a run's mistakes with what was measured of them, pictures, and what goes with being wrong."""
    found = biopsy.mistakes(run, side=side, n=n, out=out, device=device)
    if as_json:
        print_json(found)
        return
    counts = found["counts"]
    print(
        f"{found['side']} side: {counts['fn']:,} of {counts['fn'] + counts['tp']:,} "
        f"{found['positive_class']} missed, {counts['fp']:,} false alarms among "
        f"{counts['fp'] + counts['tn']:,} others"
    )
    for zone, part in found["zones"].items():
        print(f"{zone}: {part['fn'] + part['fp']:,} errors on {part['n_patches']:,} patches")
    rows = [_row(each) for each in found["contrasts"] if each["n_errors"] and each["n_others"]]
    if rows:
        print_table(rows, ["errors", "property", "wrong", "right", "chance to be higher", ""])
        if any(row[4].endswith(")") for row in rows):
            print(f"intervals hold for all {found['n_comparisons']} comparisons together with 95 %")
    print((out or run / "errors") / "errors.csv")


def _row(found: Mapping[str, Any]) -> list[str]:
    estimate = found["within"] or found["auroc"]
    said = f"{estimate['value']:.3f}" if estimate["value"] is not None else "undefined"
    if estimate["low"] is not None:
        said += f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    means = [f"{found[f'mean_{of}']:.4g}" for of in ("errors", "others")]
    return [found["errors"], found["property"], *means, said, estimate["reason"] or found["verdict"]]


def doubts(
    run: Annotated[Path, typer.Argument(metavar="RUN|STUDY", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the sheet, the page and the pictures.")],
    n: Annotated[int, typer.Option(help="How many labels are listed at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List labels that neighbours and a model speak against: a sheet to decide on. Changes no label."""
    found = biopsy.doubts(run, out=out, n=n)
    if as_json:
        about = {"path": found.path, "page": found.page, "n_listed": len(found.table)}
        print_json({**about, "n_patches": found.n_patches, "n_doubted": found.n_doubted})
        return
    print(f"{found.n_doubted:,} of {found.n_patches:,} labels are doubted; {len(found.table):,} are listed")
    for path in (found.path, found.page):
        print(path)
    print(f"fill the column decision, then: biopsy prepare SOURCE --labels {found.path} --out NEW.pack")


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    for verb in (mistakes, doubts):
        app.command()(verb)
