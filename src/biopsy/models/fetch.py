"""Downloads of data sets and of pretrained weights."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from biopsy.core.errors import DownloadError
from biopsy.data.datasets.base import RemoteFile, Source
from biopsy.data.download import FetchResult, OnProgress, fetch_source, find_source
from biopsy.models.hub import hub_errors

if TYPE_CHECKING:
    from biopsy.models.weights import Weights

logger = logging.getLogger(__name__)

PREFIX = "weights:"


def fetch(name: str, out: Path | str, *, on_progress: OnProgress | None = None) -> FetchResult:
    """Download a public data set or pretrained weights.

    An interrupted download is continued; files appear under their final names only when complete and
    verified. Prints the folder to give to ``prepare``, or the one that ``$BIOPSY_WEIGHTS`` should name.

    Args:
        name: ``idc``, ``pcam``, ``hcd``, or ``weights:TAG`` with a tag of ``biopsy list models``, such as
            ``weights:torchvision:resnet18``.
        out: Output folder, created if missing.
        on_progress: Called with a `Progress`; kagglehub and Hugging Face show their own.

    Raises:
        DataError: If the name is unknown, or the checksum of the weights is wrong.
        RecipeError: If the tag is unknown, or the licence was not accepted.
        MissingExtra: If it is on Kaggle and kagglehub is not installed.
        DownloadError: If the disk is full, the server refuses, the connection keeps failing or a
            checksum is wrong.
    """
    result = (
        _fetch_weights(name.removeprefix(PREFIX), out, on_progress)
        if name.startswith(PREFIX)
        else fetch_source(find_source(name), out, on_progress=on_progress)
    )
    if result.kept:
        logger.info("already there: %s", ", ".join(path.name for path in result.kept))
    return result


def _fetch_weights(tag: str, out: Path | str, on_progress: OnProgress | None) -> FetchResult:
    from biopsy.models.weights import find_weights, require_digest, require_licence

    weights = find_weights(tag)
    require_licence(weights)
    target = Path(out) / weights.file
    if target.exists():
        result = FetchResult(weights.tag, Path(out), (), (target,))
    elif weights.hub is not None:
        result = _fetch_from_hub(weights, Path(out))
    else:
        if not weights.url:
            raise DownloadError(
                f"the weights {weights.tag!r} have no fixed address: get {weights.file} from {weights.page}",
                "missing",
            )
        source = Source(weights.tag, weights.tag, weights.licence, files=(RemoteFile(weights.url),))
        result = fetch_source(source, out, on_progress=on_progress)
    require_digest(target, weights.digest)
    return result


def _fetch_from_hub(weights: "Weights", out: Path) -> FetchResult:
    from huggingface_hub import hf_hub_download

    assert weights.hub is not None
    repository, file = weights.hub
    with hub_errors(repository):
        downloaded = Path(hf_hub_download(repository, file, local_dir=out / ".biopsy-hub"))
    downloaded.replace(out / weights.file)
    return FetchResult(weights.tag, out, (out / weights.file,), ())
