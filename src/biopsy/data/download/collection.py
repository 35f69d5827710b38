"""All that belongs to one data set, fetched into one folder."""

import logging
from dataclasses import dataclass
from pathlib import Path

from biopsy.core.errors import DataError, DownloadError, suggest
from biopsy.data.datasets import list_datasets
from biopsy.data.datasets.sources import RemoteFile, Source
from biopsy.data.download.kaggle import download_from_kaggle, require_kagglehub
from biopsy.data.download.transfer import PARTIAL, OnProgress, Patience, check_disk, download, unpack

logger = logging.getLogger(__name__)

PACKED = ".biopsy-packed"
"""How the name of a packed file ends that goes as soon as it is unpacked."""


@dataclass(frozen=True)
class FetchResult:
    """What a fetch left behind.

    Attributes:
        name: The data set.
        path: What to give to ``prepare``.
        fetched: Files and folders that came now.
        kept: Those that were there already.
    """

    name: str
    path: Path
    fetched: tuple[Path, ...]
    kept: tuple[Path, ...]


def fetch(name: str, out: Path | str, *, on_progress: OnProgress | None = None) -> FetchResult:
    """Download a public data set, or go on with a download that was interrupted.

    Files appear under their final names only when whole and checked; what is there already is not fetched
    again. kagglehub shows its own progress, so ``on_progress`` hears only of the other files.

    Args:
        name: ``"idc"``, ``"pcam"`` or ``"hcd"``.
        out: The folder to put it in; created if missing.
        on_progress: Called a few times a second with a ``Progress``.

    Raises:
        DataError: If no data set has that name.
        MissingExtra: If it is on Kaggle and kagglehub is not installed.
        DownloadError: If there is too little room, the server refuses, the connection keeps failing or a
            checksum is wrong.
    """
    return fetch_source(find_source(name), out, on_progress=on_progress)


def find_source(name: str) -> Source:
    """Return what is downloaded of the data set of that name.

    Raises:
        DataError: If there is none, with the nearest right name.
    """
    sources = {source.name: source for dataset in list_datasets() if (source := dataset.source)}
    if name not in sources:
        raise DataError(f"no data set {name!r} to fetch; {suggest(name, sources)}")
    return sources[name]


def describe(name: str) -> str:
    """Say in a few lines what a data set is, how much room it takes, its licence and what it asks for.

    Example:
        >>> print(describe("pcam").splitlines()[0])
        PatchCamelyon (PCam), the published HDF5 files
    """
    source = find_source(name)
    lines = [
        source.title,
        f"room needed: {needed_bytes(source, Path()) / 1e9:.1f} GB at most",
        f"licence: {source.licence}",
        f"credentials: {source.credentials}",
    ]
    return "\n".join([*lines, f"page: {source.kaggle.page}"] if source.kaggle else lines)


def fetch_source(
    source: Source,
    out: Path | str,
    *,
    on_progress: OnProgress | None = None,
    patience: Patience | None = None,
) -> FetchResult:
    """Fetch a source that need not be a data set's: a mirror, or a set of one's own. See ``fetch``."""
    out = Path(out)
    if source.kaggle is not None:
        require_kagglehub()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{out} cannot be used as a folder ({error.strerror or error})") from None
    check_disk(out, needed_bytes(source, out), source.name)
    logger.info("%s; licence: %s; credentials: %s", source.title, source.licence, source.credentials)
    path, fetched, kept = out, [], []
    if source.kaggle is not None:
        path = out / source.kaggle.folder
        if path.exists():
            kept.append(path)
        else:
            path = download_from_kaggle(source.kaggle, out)
            fetched.append(path)
    for file in source.files:
        target = out / file.final_name
        if target.exists():
            kept.append(target)
        else:
            _fetch_file(file, out, on_progress, patience)
            fetched.append(target)
    return FetchResult(source.name, path, tuple(fetched), tuple(kept))


def needed_bytes(source: Source, out: Path) -> int:
    """Room that is still needed in ``out``, in bytes: a packed file goes as soon as it is unpacked."""
    missing = [file for file in source.files if not (out / file.final_name).exists()]
    packed = max((file.size_bytes or 0 for file in missing if file.unpacked_bytes is not None), default=0)
    final = sum(
        (file.size_bytes or 0) if file.unpacked_bytes is None else file.unpacked_bytes for file in missing
    )
    there = sum(path.stat().st_size for file in missing for path in _parts(file, out) if path.exists())
    kaggle = source.kaggle
    kaggle_bytes = kaggle.needed_bytes if kaggle is not None and not (out / kaggle.folder).exists() else 0
    return max(packed + final + kaggle_bytes - there, 0)


def _fetch_file(
    file: RemoteFile, out: Path, on_progress: OnProgress | None, patience: Patience | None
) -> None:
    path, is_packed = out / file.name, file.unpacked_bytes is not None
    own = is_packed and not path.exists()  # a packed file that was there before is the user's and stays
    path = out / f"{file.name}{PACKED}" if own else path
    download(file, path, on_progress=on_progress, patience=patience)
    if is_packed:
        unpack(path, out / file.final_name, on_progress=on_progress)
    if own:
        path.unlink()


def _parts(file: RemoteFile, out: Path) -> list[Path]:
    """What an interrupted fetch may have left: the packed file, or the beginning of it."""
    name = file.name if file.unpacked_bytes is None else f"{file.name}{PACKED}"
    return [out / file.name, out / name, out / f"{name}{PARTIAL}"]
