"""The real data sets, fetched from where they are published, as `biopsy.data.datasets` says.

A file over HTTP is continued where it stopped, checked, and renamed only when it is whole: bytes are
collected in ``NAME.biopsy-partial``, which outlives an interruption; the next call asks the server for the
rest. A server that sends the whole file instead is taken at its word and the file starts again.

Kaggle's data come through Kaggle's own client: kagglehub resumes, checks and unpacks. It does so in a cache
folder; ours lies inside the output folder, so that the space is taken where it was checked and the finished
folder need only be renamed. (Its ``output_dir`` would refuse to go on after an interruption.) Beside it,
only weights and classifiers of the Hugging Face hub (`biopsy.models`) use the network.
"""

import contextlib
import gzip
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError

from biopsy.core.errors import DataError, DownloadError, MissingExtra, suggest
from biopsy.core.files import replace_atomic
from biopsy.data.datasets import list_datasets
from biopsy.data.datasets.base import KaggleData, RemoteFile, Source

logger = logging.getLogger(__name__)


BLOCK_BYTES = 1 << 20
PARTIAL = ".biopsy-partial"
"""How the name of a file ends that has not come whole yet."""
REPORT_EVERY_S = 0.1
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Progress:
    """How far one file is: ``done_bytes`` of ``total_bytes`` (None if unknown), and how fast it goes."""

    file: str
    step: Literal["download", "unpack"]
    done_bytes: int
    total_bytes: int | None
    bytes_per_s: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Patience:
    """How long to put up with a bad connection.

    Attributes:
        tries: Failures in a row, without one new byte, before giving up.
        backoff_s: Pause after the first failure in seconds, doubled after each further one.
        timeout_s: Silence after which a connection counts as dropped, in seconds.
    """

    tries: int = 5
    backoff_s: float = 2.0
    timeout_s: float = 30.0


class _Dropped(Exception):
    """The connection failed in a way that may pass."""


class _NothingBeyond(Exception):
    """The server has no bytes behind those that are there; carries its Content-Range."""


def download(
    file: RemoteFile,
    path: Path,
    *,
    on_progress: OnProgress | None = None,
    patience: Patience | None = None,
) -> None:
    """Fetch a file to ``path``, which exists afterwards only if it is whole and has the right checksum.

    A file already at ``path`` is checked and kept.

    Raises:
        DownloadError: If the server refuses, the connection keeps failing, the disk is full, or the content
            is not what was published.
    """
    if path.exists():
        _check(file, path, f"move {path} away and fetch again")
        return
    partial = path.with_name(f"{path.name}{PARTIAL}")
    _complete(file, partial, on_progress, patience or Patience())
    try:
        _check(
            file, partial, "what came was discarded; fetch again, and if it fails again do not use the file"
        )
    except DownloadError:
        partial.unlink()
        raise
    os.replace(partial, path)


def unpack(path: Path, target: Path, *, on_progress: OnProgress | None = None) -> None:
    """Unpack a gzip file to ``target``, whole or not at all."""
    try:
        with open(path, "rb") as packed, gzip.open(packed) as content, replace_atomic(target) as partial:
            meter = _Meter(path.name, "unpack", 0, path.stat().st_size, on_progress)
            with open(partial, "wb") as output:
                while block := content.read(BLOCK_BYTES):
                    output.write(block)
                    meter.report(packed.tell())
            meter.finish(path.stat().st_size)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(f"{path} cannot be unpacked ({error}); delete it and fetch again") from None
    except OSError as error:
        raise DownloadError(f"{target} could not be written ({error.strerror or error})") from error


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        DownloadError: If fewer than ``needed_bytes`` are free where ``folder`` is.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DownloadError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB in {folder}, where {free_bytes / 1e9:.1f} GB are free;"
            " free some space or choose another folder"
        )


def _complete(file: RemoteFile, partial: Path, on_progress: OnProgress | None, patience: Patience) -> None:
    """Bring ``partial`` to its full length, through as many connections as it takes."""
    furthest, failures = _size(partial), 0
    while True:
        try:
            return _continue(file, partial, on_progress, patience.timeout_s)
        except _Dropped as drop:
            reached = _size(partial)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= patience.tries:
                raise DownloadError(
                    f"{file.url}: {drop}, {failures} times in a row; {reached:,} bytes are kept in {partial},"
                    " fetch again to go on from there"
                ) from None
            pause_s = patience.backoff_s * 2 ** (failures - 1)
            logger.warning("%s: %s; trying again in %.0f s", file.name, drop, pause_s)
            time.sleep(pause_s)


def _continue(file: RemoteFile, partial: Path, on_progress: OnProgress | None, timeout_s: float) -> None:
    """Make one connection and append what it brings."""
    start = _size(partial)
    if start and start == file.size_bytes:
        return
    try:
        response = _open(file.url, start, timeout_s)
    except _NothingBeyond as answer:
        if str(answer) == f"bytes */{start}":
            return
        partial.unlink()
        raise _Dropped("what was kept does not fit the server's file") from None
    with response:
        start, total = _span(response, start)
        if total is not None and file.size_bytes not in (None, total):
            raise DownloadError(
                f"{file.url} is {total:,} bytes long where {file.size_bytes:,} were published;"
                " the file there was replaced, so nothing was fetched"
            )
        total = file.size_bytes if total is None else total
        check_disk(partial.parent, (total or start) - start, file.name)
        done = _append(response, partial, _Meter(file.name, "download", start, total, on_progress))
    if total is not None and done < total:
        raise _Dropped(f"connection closed after {done:,} of {total:,} bytes")


def _append(response: http.client.HTTPResponse, partial: Path, meter: "_Meter") -> int:
    """Write the response behind the first ``meter.start`` bytes of the file; give its length then."""
    done = meter.start
    try:
        with open(partial, "ab" if done else "wb") as output:
            for block in _blocks(response):
                output.write(block)
                done += len(block)
                meter.report(done)
            output.flush()
            os.fsync(output.fileno())
    except OSError as error:
        raise DownloadError(
            f"{partial} could not be written ({error.strerror or error}); make room and fetch again to go on"
        ) from error
    meter.finish(done)
    return done


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read1(BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _Dropped(f"connection lost ({error or type(error).__name__})") from error
        if not block:
            return
        yield block


def _open(url: str, start: int, timeout_s: float) -> http.client.HTTPResponse:
    """Ask for a file from byte ``start`` on."""
    headers = {"User-Agent": "biopsy", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except HTTPError as error:
        error.close()
        if error.code in PASSING_STATUS:
            raise _Dropped(f"the server answered {error.code} {error.reason}") from None
        if error.code == 416 and start:
            raise _NothingBeyond(error.headers.get("Content-Range", "")) from None
        raise DownloadError(
            f"{url}: the server answered {error.code} {error.reason}; the file may have moved,"
            " see the data set's page in the documentation"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(f"no connection ({getattr(error, 'reason', error)})") from error


def _span(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Where in the file the response begins, and how long the whole file is (None if not said)."""
    if response.status != 206:
        length = response.headers.get("Content-Length")
        return 0, int(length) if length else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise DownloadError(
            f"{response.url}: the server sent another part of the file than was asked for;"
            f" delete the {PARTIAL} file and fetch again"
        )
    return start, None if match[2] == "*" else int(match[2])


def _check(file: RemoteFile, path: Path, advice: str) -> None:
    """Compare length and checksum with what was published."""
    size_bytes = path.stat().st_size
    if file.size_bytes not in (None, size_bytes):
        raise DownloadError(
            f"{file.name} has {size_bytes:,} bytes, published are {file.size_bytes:,}; {advice}"
        )
    if file.checksum is None:
        return
    algorithm, _, published = file.checksum.partition(":")
    with open(path, "rb") as content:
        result = hashlib.file_digest(content, algorithm).hexdigest()
    if result != published:
        raise DownloadError(f"{file.name} has {algorithm} {result}, published is {published}; {advice}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Meter:
    """Reports progress a few times a second."""

    def __init__(
        self,
        file: str,
        step: Literal["download", "unpack"],
        start: int,
        total: int | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.file, self.step, self.start, self.total = file, step, start, total
        self._on_progress = on_progress
        self._began = self._reported = time.monotonic()

    def report(self, done: int) -> None:
        """Say how far it is, unless that was said a moment ago."""
        if time.monotonic() - self._reported >= REPORT_EVERY_S:
            self.finish(done)

    def finish(self, done: int) -> None:
        """Say how far it is."""
        self._reported = time.monotonic()
        if self._on_progress is not None:
            rate = (done - self.start) / max(self._reported - self._began, 1e-9)
            self._on_progress(Progress(self.file, self.step, done, self.total, rate))


CACHE_VARIABLE = "KAGGLEHUB_CACHE"  # kagglehub's documented way to move its cache


def require_kagglehub() -> None:
    """Raise MissingExtra if kagglehub is not installed."""
    try:
        import kagglehub  # noqa: F401
    except ImportError:
        raise MissingExtra("fetch", "downloading from Kaggle") from None


def download_from_kaggle(data: KaggleData, out: Path) -> Path:
    """Download and unpack, and give the folder that holds the files.

    That folder is ``out/<name>``, except inside Kaggle's own notebooks, where the data are mounted already
    and stay where they are.

    Raises:
        MissingExtra: If kagglehub is not installed.
        DownloadError: If Kaggle refuses, or the download fails.
    """
    require_kagglehub()
    import kagglehub
    from kagglehub.exceptions import BackendError, CredentialError, DataCorruptionError, UnauthenticatedError

    cache = out.resolve() / ".biopsy-kagglehub"
    ask = kagglehub.competition_download if data.kind == "competition" else kagglehub.dataset_download
    try:
        with _cache_at(cache):
            result = Path(ask(data.handle))
    except (UnauthenticatedError, CredentialError) as error:
        raise DownloadError(_refusal(data, error)) from error
    except (BackendError, DataCorruptionError, zipfile.BadZipFile, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DownloadError(_refusal(data, error)) from error
        raise DownloadError(
            f"Kaggle's {data.handle} could not be downloaded ({_one_line(error)}); fetch again to go on,"
            f" or download it by hand from {data.page}"
        ) from error
    if not result.is_relative_to(cache):
        return result
    folder = out / data.folder
    os.replace(result, folder)
    shutil.rmtree(cache)
    return folder


def _refusal(data: KaggleData, error: Exception) -> str:
    rules = f", accept the rules at {data.page}/rules" if data.kind == "competition" else ""
    return (
        f"Kaggle refused {data.handle} ({_one_line(error)}); log in at kaggle.com{rules},"
        " create an API token in your account's settings, put it into ~/.kaggle/access_token and fetch again"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before


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
