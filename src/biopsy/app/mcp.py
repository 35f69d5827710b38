"""The service as tools of the Model Context Protocol, for assistants that start it."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from biopsy.app.jobs import Jobs, JobStatus
from biopsy.app.service import ModelDescription, describe_models, pick_model
from biopsy.core.errors import BiopsyError, DataError
from biopsy.core.loaders import load_json
from biopsy.core.version import __version__
from biopsy.evaluation.predict import predict
from biopsy.models.classifier import Classifier
from biopsy.slides.outputs import SUMMARY

MAX_PATCHES = 200
"""Patches listed in one answer; all are counted."""
_COLUMNS = ("patch_id", "prob", "abstained", "out_of_distribution")
_INSTRUCTIONS = (
    "Classifies patches of breast histopathology and maps slides. Research use only: nothing here is a "
    "diagnosis. Say so, and say which inputs are out of distribution or abstained on. Paths are relative to "
    "the folder that the server was given as its root."
)


def _tell(text: str, root: Path | None) -> str:
    """Return a message with paths below the root, and the tool in place of the command."""
    text = re.sub(rf"{re.escape(str(root))}(?=[\s,;:]|$)", ".", text)
    return text.replace(f"{root}{os.sep}", "").replace("`biopsy slide`", "the tool `map_slide`")


@contextmanager
def _named_errors(root: Path | None) -> Iterator[None]:
    """Let the assistant read the errors of the library; of others it learns only that there was one."""
    try:
        yield
    except (BiopsyError, PermissionError) as error:
        raise ToolError(_tell(str(error), root)) from None


def make_tools(classifiers: Mapping[str, Classifier], jobs: Jobs, device: str) -> MCPServer:
    """Return a server with the tools ``list_models``, ``predict_patches``, ``map_slide`` and ``get_slide``.

    Args:
        jobs: Queue of the slides; patches and slides are read below its root only.
    """
    server = MCPServer("biopsy", version=__version__, instructions=_INSTRUCTIONS, log_level="WARNING")

    @server.tool()
    @_named_errors(jobs.root)
    def list_models() -> list[ModelDescription]:
        """List the models: classes, decision threshold, size of a patch in pixels, um/px, licence."""
        return describe_models(classifiers)

    @server.tool()
    @_named_errors(jobs.root)
    def predict_patches(paths: list[str], model: str | None = None) -> dict[str, object]:
        """Predict patches: images, folders or zips of them, packs. ``prob`` is that of the positive class."""
        classifier = classifiers[pick_model(classifiers, model)]
        with tempfile.TemporaryDirectory() as folder:
            found = [jobs.resolve(path) for path in paths]
            result = predict(classifier, found, out=Path(folder) / "predictions.parquet", device=device)
        rows = result.frame.head(MAX_PATCHES).reset_index(drop=True)
        names = [result.class_names[index] for index in rows["pred"]]
        shown = rows[[name for name in _COLUMNS if name in rows]].assign(pred=names)
        return {
            "n_patches": len(result.frame),
            "n_predicted": result.count_classes(),
            "positive_class": result.positive_class,
            "threshold": result.threshold and result.threshold["value"],
            "patches": shown.astype(object).where(shown.notna(), None).to_dict("records"),
            "skipped": [
                {key: _tell(text, jobs.root) for key, text in item.items()} for item in result.skipped
            ],
        }

    @server.tool()
    @_named_errors(jobs.root)
    def map_slide(path: str, model: str | None = None, mpp: float | None = None) -> JobStatus:
        """Start to map a slide; ``mpp`` is its um/px at level 0, for slides that do not record it."""
        slide = jobs.find(path)
        return jobs.add(pick_model(classifiers, model), slide, mpp)

    @server.tool()
    @_named_errors(jobs.root)
    def get_slide(identity: str) -> dict[str, object]:
        """Return status and progress of a slide; once done, also its summary and its files below --out."""
        try:
            job = jobs.get(identity)
        except KeyError:
            raise DataError(f"there is no slide {identity!r}: map_slide returns its id") from None
        if job["status"] != "done":
            return dict(job)
        files = {name: jobs.result(identity, name) for name in job["results"]}
        below = {name: file.relative_to(jobs.folder).as_posix() for name, file in files.items()}
        return {**job, "files": below, "summary": load_json(files[SUMMARY])}

    return server
