"""The page and the service: view, next, serve."""

from pathlib import Path
from typing import Annotated, Any

import typer

import biopsy
from biopsy.cli.console import AsJson, Device, print_json, print_table

Mpp = Annotated[
    float | None, typer.Option(help="Micrometres per pixel at level 0, for slides that do not say.")
]


def view(
    paths: Annotated[list[Path], typer.Argument(metavar="SLIDE|MAP|RUN|FOLDER|PACK...", show_default=False)],
    model: Annotated[
        Path | None, typer.Option(help="Model that explains patches (default: the run's).")
    ] = None,
    mpp: Mpp = None,
    annotations: Annotated[
        Path | None, typer.Option(help="File of annotations (default: beside the first path).")
    ] = None,
    who: Annotated[str | None, typer.Option(help="Reviewer (default: the account's name).")] = None,
    queue: Annotated[Path | None, typer.Option(help="Queue of patches to label, from `biopsy next`.")] = None,
    port: Annotated[int | None, typer.Option(help="Port (default: the first free one from 8765).")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """Open a page in the browser that shows slides, maps and patches, and records corrections."""
    biopsy.view(
        list(paths),
        model=model,
        mpp=mpp,
        annotations=annotations,
        who=who,
        queue=queue,
        port=port,
        no_browser=no_browser,
    )


def next_(
    model: Annotated[Path, typer.Argument(metavar="RUN|CLASSIFIER|BUNDLE", show_default=False)],
    paths: Annotated[list[Path], typer.Argument(metavar="SLIDE|FOLDER|PACK...", show_default=False)],
    budget: Annotated[int, typer.Option(help="Number of patches to choose.")] = 100,
    out: Annotated[Path, typer.Option(help="The queue's file.")] = Path("queue.csv"),
    mpp: Mpp = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Choose the patches whose labels would teach a model most, and write them as a queue."""
    queue: Any = biopsy.next(model, list(paths), budget=budget, out=out, mpp=mpp, device=device)
    if as_json:
        return print_json(queue.to_dict("records"))
    names = ["patch_id", "patient_id", "prob", "reason"]
    print_table(queue[names].head(20).to_numpy().tolist(), names)
    print(out)


def serve(
    models: Annotated[list[Path], typer.Argument(metavar="RUN|CLASSIFIER|BUNDLE...", show_default=False)],
    host: Annotated[str, typer.Option(help="Address; one that others reach needs --token.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port (default: the first free one from 8780).")] = None,
    token: Annotated[
        str | None, typer.Option(help="Token that requests must bear (default: BIOPSY_TOKEN).")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder below which slides may be named by path.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of slide jobs.")] = Path("biopsy-jobs"),
    device: Device = "auto",
) -> None:
    """Answer requests over HTTP: images and slides in, predictions and maps out."""
    biopsy.serve(list(models), host=host, port=port, token=token, root=root, out=out, device=device)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for function in (view, serve):
        app.command()(function)
    app.command("next")(next_)
