"""Commands around it: demo, list, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import biopsy
from biopsy.cli.console import AsJson, interrupted, print_blocks, print_json, print_table, say
from biopsy.cli.training import EpochLines


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("biopsy-demo"),
) -> None:
    """Synthetic cohort, pack, training, evaluation, report: minutes on two cores, nothing downloaded."""
    try:
        path = biopsy.demo(out=out, on_epoch=EpochLines())
    except KeyboardInterrupt:
        interrupted("run the same command again to go on")
    print(f"report: {path}")


def list_(
    kind: Annotated[Literal["datasets", "models", "recipes"], typer.Argument(show_default=False)],
    as_json: AsJson = False,
) -> None:
    """List what is shipped, with licences, published numbers and cost."""
    rows = biopsy.list(kind)
    if as_json:
        print_json(rows)
    else:
        print_blocks(rows)


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
    """Add the commands of this file."""
    app.command()(demo)
    app.command("list")(list_)
    app.command()(export)
