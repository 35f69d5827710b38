"""Verbs that hand a model to other programs: export."""

from pathlib import Path
from typing import Annotated

import typer

import biopsy
from biopsy.cli.console import print_table, say


def export(
    model: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Pack to try parity on; the run's own by default.", metavar="PACK")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel of the patches, where the model does not say.")
    ] = None,
) -> None:
    """Write a folder that WSInfer, QuPath and ONNX Runtime run; prints how well they agree."""
    bundle = biopsy.export(model, out, data=data, mpp=mpp)
    print(bundle.path)
    rows = [[pair, f"{known['probs']:.1e}"] for pair, known in bundle.parity["largest_difference"].items()]
    print_table(rows, ["", "largest difference of a probability"])
    say(f"on {bundle.parity['n_patches']:,} patches; at most {bundle.parity['tolerance']:g} is allowed")


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command()(export)
