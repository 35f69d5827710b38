"""The commands `view` and `serve`."""

import os
import webbrowser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from biopsy.core.errors import DataError, MissingExtra
from biopsy.models.classifier import Classifier, Tta
from biopsy.training.runs import Run

VIEW_PORT, SERVE_PORT = 8765, 8780


def view(
    paths: Sequence[Path | str] | Path | str,
    *,
    model: Run | Classifier | Path | str | None = None,
    mpp: float | None = None,
    annotations: Path | str | None = None,
    who: str | None = None,
    queue: Path | str | None = None,
    port: int | None = None,
    no_browser: bool = False,
) -> None:
    """Open a page in the browser that shows slides, their maps and patches, and records corrections.

    The page is served to this machine only, until Ctrl-C. Reviews of patches and regions are appended at once
    to the file of annotations, and exported from the page as GeoJSON for QuPath and as a label sheet for
    ``biopsy prepare --labels``.

    Args:
        paths: Slides, maps (``map.parquet``, a slide's folder, or the folder of ``biopsy slide``), runs,
            folders of slides and packs. A map is shown over its slide if the slide is found.
        model: Run, classifier or bundle that explains patches (default: the run's).
        mpp: Pixel size at level 0 in µm. Required for slides that do not record it.
        annotations: File of annotations (default: ``NAME.annotations.jsonl`` beside the first path).
        who: Name of the reviewer (default: the user's account). The page can change it.
        queue: Queue of patches to label, as ``biopsy next`` writes it.
        port: Port of the page (default: the first free one from 8765).
        no_browser: Only print the address.

    Raises:
        DataError: If a path does not exist or holds nothing to look at, or the port is taken.
        SlideError: If no slide can be opened.
        MissingExtra: If the packages of the extra ``app`` are not installed.
    """
    _require_extra("the viewer")
    from biopsy.app.viewer import make_viewer
    from biopsy.app.web import bind, run_server

    with bind("127.0.0.1", port, default=VIEW_PORT) as listener:
        app = make_viewer(paths, model=model, mpp=mpp, annotations=annotations, who=who, queue=queue)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def announce() -> None:
            print(address, flush=True)
            if not no_browser and not webbrowser.open(address):
                print("no browser could be started: open the address in one", flush=True)

        run_server(app, listener, on_start=announce)


def serve(
    models: Sequence[Run | Classifier | Path | str] | Run | Classifier | Path | str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    token: str | None = None,
    root: Path | str | None = None,
    out: Path | str = "biopsy-jobs",
    device: str = "auto",
    tta: Tta | None = None,
    mcp: bool = False,
) -> None:
    """Answer requests over HTTP: images and slides in, predictions and maps out, until Ctrl-C.

    ``POST /predict`` predicts images as ``biopsy predict`` does, the patches of many clients in one batch;
    ``POST /slides`` maps slides as ``biopsy slide`` does, in the background: a job that is interrupted is
    resumed when the server starts again. ``/openapi.json`` describes everything.

    Args:
        models: Runs, classifiers, bundles or names of shipped classifiers; each is named as its folder.
        host: Address to listen on. One that other machines reach needs a token.
        port: Port (default: the first free one from 8780).
        token: Token that every request must send, ``Authorization: Bearer TOKEN`` (default: the environment
            variable ``BIOPSY_TOKEN``, which other users of this machine cannot read off the command line).
        root: Folder below which clients may name slides by path; without it they can only upload.
        out: Folder of the slide jobs and their results.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tta: Test-time augmentation: ``none`` predicts one view of each patch, ``d4`` averages its eight
            symmetries in eight times the time (default: the classifier's own, with which it was calibrated).
        mcp: Run a server of the Model Context Protocol over stdin and stdout instead, which an assistant
            starts (extra "mcp"). Patches and slides are named by paths below ``root``.

    Raises:
        RunError: If a model is none of these.
        DataError: If the port is taken, or there is no token where other machines reach the server.
        MissingExtra: If the packages of the extra ``app`` or ``mcp`` are not installed.
    """
    _require_extra("the service")
    if mcp:
        if port is not None or token is not None:
            raise DataError("--port and --token are for HTTP: omit them, or --mcp")
        return _serve_tools(models, root, out, device, tta)
    from biopsy.app.service import make_service
    from biopsy.app.web import bind, is_loopback, run_server

    token = token or os.environ.get("BIOPSY_TOKEN") or None
    local = is_loopback(host)
    if not local and token is None:
        raise DataError(f"{host} is reached from other machines: give a --token that requests must bear")
    hosts = frozenset({"127.0.0.1", "localhost", "[::1]"}) if local else None
    with bind(host, port, default=SERVE_PORT) as listener:
        app = make_service(models, out=out, root=root, token=token, device=device, tta=tta, hosts=hosts)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        run_server(app, listener, on_start=lambda: print(address, flush=True))


def _serve_tools(
    models: Sequence[Run | Classifier | Path | str] | Run | Classifier | Path | str,
    root: Path | str | None,
    out: Path | str,
    device: str,
    tta: Tta | None,
) -> None:
    if find_spec("mcp") is None:
        raise MissingExtra("mcp", "the Model Context Protocol")
    from biopsy.app.jobs import Jobs
    from biopsy.app.mcp import make_tools
    from biopsy.app.service import Limits, name_models

    if root is None or not Path(root).is_dir():
        raise DataError("--mcp reads patches and slides by path: set --root to the folder that holds them")
    classifiers = name_models(models, tta)
    jobs = Jobs(Path(out), classifiers, root=Path(root), device=device, max_waiting=Limits().waiting_jobs)
    try:
        make_tools(classifiers, jobs, device).run("stdio")
    finally:
        jobs.close()


def _require_extra(purpose: str) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingExtra("app", purpose)
