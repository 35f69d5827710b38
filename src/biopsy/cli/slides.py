"""The verb that maps whole slides: slide."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import biopsy
from biopsy.cli.console import (
    AsJson,
    Device,
    TrustModel,
    name_skipped,
    print_json,
    print_table,
    progress,
    say,
)

MUCH = 0.1  # share of patches unlike training from which a slide is named


def slide(
    model: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER|BUNDLE", show_default=False)],
    slides: Annotated[
        list[Path],
        typer.Argument(
            help="Slides, folders of slides, csv files with columns slide[,mpp], packs with coordinates.",
            metavar="SLIDE|FOLDER|CSV|PACK...",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Gets a folder a slide, and status.csv.", show_default=False)],
    mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel at level 0, for slides that do not say.")
    ] = None,
    stride_um: Annotated[
        float | None, typer.Option(help="Step of the grid in micrometres; by default a patch's side.")
    ] = None,
    detections: Annotated[
        bool, typer.Option("--detections", help="Also write every cell as a QuPath detection.")
    ] = False,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto takes bf16 where the processor has it.")
    ] = "auto",
    device: Device = "auto",
    trust_model: TrustModel = None,
    as_json: AsJson = False,
) -> None:
    """Map whole slides: probabilities over the tissue, and files that open in QuPath.

    Slides that cannot be read are named and skipped (exit 3); finished ones are not mapped again.
    """
    with progress("mapping") as on_progress:
        cohort: Any = biopsy.slide(
            model,
            list(slides),
            out=out,
            mpp=mpp,
            stride_um=stride_um,
            detections=detections,
            precision=precision,
            device=device,
            trust_model=trust_model,
            on_progress=on_progress,
        )
    done = cohort.status[cohort.status["status"] == "done"]
    if as_json:
        names = ["slide", "source", "n_patches", "mpp", "mpp_source", "positive_mm2", "unlike_training"]
        rows = done[names]
        print_json({"out": cohort.out, "slides": rows.to_dict("records"), "skipped": cohort.failed})
    else:
        print_table(
            [
                [row.slide, int(row.n_patches), float(row.mpp), row.mpp_source, row.positive_mm2]
                for row in done.itertuples()
            ],
            ["slide", "patches", "um/px", "from", "positive mm2"],
        )
        print(cohort.out)
    for row in done[done["unlike_training"] >= MUCH].itertuples():
        say(
            f"{row.slide}: {row.unlike_training:.0%} of the patches checked are unlike anything in training, "
            "where 1% to 2% would be expected: do not rely on what is said of them"
        )
    name_skipped(cohort.failed, str(cohort.out / "status.csv"))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(slide)
