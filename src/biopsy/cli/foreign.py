"""Verbs that bring in what other libraries made: import-keras."""

from pathlib import Path
from typing import Annotated

import typer

import biopsy
from biopsy.cli.options import comma_list


def import_keras(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The recipe whose network it is, or a .toml file.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="The classifier's new folder.", metavar="CLASSIFIER", show_default=False)
    ],
    class_names: Annotated[
        str | None, typer.Option(help="Names of the outputs in their order, with commas.")
    ] = None,
    positive: Annotated[str | None, typer.Option(help="The positive class; the second by default.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of its patches.")] = None,
    patch_px: Annotated[int | None, typer.Option(help="Side of its patches in pixels.")] = None,
) -> None:
    """Make a classifier of a file that Keras saved (.h5, .weights.h5, .keras); prints its folder."""
    biopsy.import_keras(
        file,
        model=model,
        out=out,
        class_names=comma_list(class_names) or None,
        positive=positive,
        mpp=mpp,
        patch_px=patch_px,
    )
    print(out)


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("import-keras")(import_keras)
