"""Verbs about the tool itself: demo, list."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import biopsy
from biopsy.cli.console import interrupted, print_blocks, print_json
from biopsy.cli.learning import EpochLines
from biopsy.cli.options import AsJson


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


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command()(demo)
    app.command("list")(list_)
