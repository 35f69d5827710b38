"""The verb that shows what a run or a classifier looks at: explain."""

from pathlib import Path
from typing import Annotated, Any

import typer

import biopsy
from biopsy.cli.console import print_json, print_table
from biopsy.cli.options import AsJson, Device

_METHODS = "saliency, smoothgrad, grad_cam, integrated_gradients, occlusion or activations"


def explain(
    model: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="For a classifier: a pack, or images in a folder or zip.", metavar="PACK|PATH"),
    ] = None,
    patch: Annotated[
        list[str] | None, typer.Option(help="Id of a patch; may be repeated.", metavar="ID")
    ] = None,
    errors: Annotated[
        int, typer.Option(help="Where no patch is named: how many errors, and as many that were right.")
    ] = 5,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_METHODS}; may be repeated. By default saliency, grad_cam and activations.", metavar="M"
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer that activations or grad_cam look at.", metavar="L")
    ] = None,
    faithfulness: Annotated[
        bool, typer.Option("--faithfulness", help="Also test whether the maps mean anything: a minute.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; explain/ in the run.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a model looks at: maps superimposed on patches, as sheets, pictures and explain.json."""
    written = biopsy.explain(
        model,
        data=data,
        patch=patch or (),
        errors=errors,
        method=method or (),
        layer=layer,
        faithfulness=faithfulness,
        out=out,
        device=device,
    )
    if as_json:
        print_json(written)
        return
    place = out or (model / "explain" if data is None else Path("explain"))
    columns = ("kind", "class", "called", "prob", "patch_id")
    print_table([[entry[key] for key in columns] for entry in _unique(written["patches"])], columns)
    for sheet in written["sheets"]:
        print(place / sheet["picture"])
    if faithfulness:
        _print_faithfulness(written["faithfulness"])


def _unique(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    """Keep one entry a patch: each stands there once for every method."""
    return list({str(entry["patch_id"]): entry for entry in entries}.values())


def _print_faithfulness(found: dict[str, Any]) -> None:
    print(f"\nfaithfulness, {found['n_patches']} patches of {found['n_groups']} {found['unit']}(s):")
    for each in found["methods"]:
        print(each["answer"])
    for each in found["refused"]:
        print(f"{each['name']}: {each['reason']}")


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command()(explain)
