"""The verb that shows what a run looks at: explain."""

from pathlib import Path
from typing import Annotated

import typer

import biopsy
from biopsy.cli.console import print_json, print_table
from biopsy.cli.options import AsJson, Device


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
    patch: Annotated[
        list[str] | None, typer.Option(help="Id of a patch; may be repeated.", metavar="ID")
    ] = None,
    errors: Annotated[
        int, typer.Option(help="Where no patch is named: how many errors, and as many that were right.")
    ] = 5,
    method: Annotated[
        str | None, typer.Option(help="saliency, smoothgrad or activations; saliency and activations.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer whose activations are shown; the first convolution.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; explain/ in the run.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a run looks at: maps superimposed on patches, as sheets, pictures and explain.json."""
    written = biopsy.explain(
        run, patch=patch or (), errors=errors, method=method, layer=layer, out=out, device=device
    )
    if as_json:
        print_json(written)
        return
    place = out or run / "explain"
    columns = ("kind", "class", "called", "prob", "patch_id")
    print_table([[entry[key] for key in columns] for entry in _unique(written["patches"])], columns)
    for sheet in written["sheets"]:
        print(place / sheet["picture"])


def _unique(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    """Keep one entry a patch: each stands there once for every method."""
    return list({str(entry["patch_id"]): entry for entry in entries}.values())


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command()(explain)
