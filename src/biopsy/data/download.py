"""Downloads of public data sets from the sources in `biopsy.data.datasets`.

HTTP downloads are written to ``NAME.biopsy-partial``, resumed after an interruption, verified, and renamed
when complete. If the server ignores the range request, the file is downloaded from the start.

Kaggle data are downloaded by kagglehub, which resumes, verifies and unpacks them in a cache folder. The cache
is placed inside the output folder, where disk space was checked, and the finished folder is renamed.
(kagglehub's ``output_dir`` cannot resume.)
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
from biopsy.core.files import NO_SPACE, replace_atomic
from biopsy.core.results import Written
from biopsy.data.datasets import list_datasets
from biopsy.data.datasets.base import KaggleData, RemoteFile, Source

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
PARTIAL, PACKED = ".biopsy-partial", ".biopsy-packed"
"""Suffixes of incomplete files, and of packed files, which are deleted once unpacked."""
REPORT_EVERY_S = 0.1
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_GONE = {404, 410}
CACHE_VARIABLE = "KAGGLEHUB_CACHE"  # cache folder of kagglehub


@dataclass(frozen=True)
class Progress:
    """Progress of one file: ``done_bytes`` of ``total_bytes`` (None if unknown), and the rate."""

    file: str
    step: Literal["download", "unpack"]
    done_bytes: int
    total_bytes: int | None
    bytes_per_s: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of downloads.

    Attributes:
        tries: Consecutive failures without new bytes before giving up.
        backoff_s: Pause after the first failure in seconds, doubled after each further failure.
        timeout_s: Timeout of a connection in seconds.
    """

    tries: int = 5
    backoff_s: float = 2.0
    timeout_s: float = 30.0


@dataclass(frozen=True)
class FetchResult(Written):
    """Result of `fetch_source`.

    Attributes:
        path: Source for ``prepare``.
        fetched: Files and folders downloaded now.
        kept: Files and folders that existed already.
    """

    name: str
    path: Path
    fetched: tuple[Path, ...]
    kept: tuple[Path, ...]


def find_source(name: str) -> Source:
    sources = {dataset.name: dataset for dataset in list_datasets() if dataset.is_downloadable}
    if name not in sources:
        raise DataError(f"no data set {name!r} to fetch; {suggest(name, sources)}")
    return sources[name]


def fetch_source(
    source: Source,
    out: Path | str,
    *,
    on_progress: OnProgress | None = None,
    retry: RetryPolicy | None = None,
) -> FetchResult:
    """Download a source, such as a data set or a mirror, or resume an interrupted download.

    Files appear under their final names only when complete and verified; existing files are kept. kagglehub
    shows its own progress, so ``on_progress`` is called for other files only.

    Raises:
        MissingExtra: If it is on Kaggle and kagglehub is not installed.
        DownloadError: If the disk is full, the server refuses, the connection keeps failing or a checksum is
            wrong.
    """
    out = Path(out)
    if source.kaggle is not None:
        _import_kagglehub()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{out} cannot be used as a folder ({error.strerror or error})", "disk") from None
    _check_disk(out, needed_bytes(source, out), source.name)
    logger.info("%s; licence: %s; credentials: %s", source.title, source.terms, source.credentials)
    path, fetched, kept = out, [], []
    if source.kaggle is not None:
        path = out / source.kaggle.folder
        if path.exists():
            kept.append(path)
        else:
            path = _download_from_kaggle(source.kaggle, out)
            fetched.append(path)
    for file in source.files:
        target = out / file.final_name
        if target.exists():
            kept.append(target)
        else:
            _fetch_file(file, out, on_progress, retry or RetryPolicy())
            fetched.append(target)
    return FetchResult(source.name, path, tuple(fetched), tuple(kept))


def needed_bytes(source: Source, out: Path) -> int:
    """Return the disk space still needed in ``out`` in bytes; packed files are deleted once unpacked."""
    missing = [file for file in source.files if not (out / file.final_name).exists()]
    packed = max((file.size_bytes or 0 for file in missing if file.unpacked_bytes is not None), default=0)
    final = sum(
        (file.size_bytes or 0) if file.unpacked_bytes is None else file.unpacked_bytes for file in missing
    )
    suffixes = ("", PARTIAL, PACKED, PACKED + PARTIAL)  # of an interrupted fetch
    parts = [out / f"{file.name}{suffix}" for file in missing for suffix in suffixes]
    kaggle = source.kaggle
    kaggle_bytes = kaggle.needed_bytes if kaggle is not None and not (out / kaggle.folder).exists() else 0
    return max(packed + final + kaggle_bytes - sum(map(_size, parts)), 0)


def _fetch_file(file: RemoteFile, out: Path, on_progress: OnProgress | None, retry: RetryPolicy) -> None:
    path, is_packed = out / file.name, file.unpacked_bytes is not None
    is_temporary = is_packed and not path.exists()  # an existing packed file is kept
    path = out / f"{file.name}{PACKED}" if is_temporary else path
    download(file, path, on_progress=on_progress, retry=retry)
    if is_packed:
        unpack(path, out / file.final_name, on_progress=on_progress)
    if is_temporary:
        path.unlink()


def download(
    file: RemoteFile, path: Path, *, on_progress: OnProgress | None = None, retry: RetryPolicy | None = None
) -> None:
    """Download a file to ``path``, which exists afterwards only if it is complete and verified.

    An existing file is verified and kept.

    Raises:
        DownloadError: If the server refuses, the connection keeps failing, the disk is full, or size or
            checksum differ from those published.
    """
    if path.exists():
        _verify(file, path, f"move {path} away and fetch again")
        return
    partial = path.with_name(f"{path.name}{PARTIAL}")
    _download_all(file, partial, on_progress, retry or RetryPolicy())
    try:
        advice = "the download was discarded; fetch again, and if it fails again do not use the file"
        _verify(file, partial, advice)
    except DownloadError:
        partial.unlink()
        raise
    os.replace(partial, path)


def unpack(path: Path, target: Path, *, on_progress: OnProgress | None = None) -> None:
    """Unpack a gzip file to ``target`` atomically."""
    n_bytes = path.stat().st_size
    try:
        with open(path, "rb") as packed, gzip.open(packed) as content, replace_atomic(target) as partial:
            meter = _Meter(path.name, "unpack", 0, n_bytes, on_progress)
            with open(partial, "wb") as output:
                while block := content.read(BLOCK_BYTES):
                    output.write(block)
                    meter.report(packed.tell())
            meter.report(n_bytes, is_last=True)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(
            f"{path} cannot be unpacked ({error}); delete it and fetch again", "changed"
        ) from None
    except OSError as error:
        raise DownloadError(f"{target} could not be written ({error.strerror or error})", "disk") from error


class _ConnectionLost(Exception):
    """A transient connection error."""


def _download_all(
    file: RemoteFile, partial: Path, on_progress: OnProgress | None, retry: RetryPolicy
) -> None:
    """Download the remaining bytes of ``partial``, reconnecting after transient errors."""
    furthest, failures = _size(partial), 0
    while True:
        try:
            return _continue(file, partial, on_progress, retry.timeout_s)
        except _ConnectionLost as drop:
            reached = _size(partial)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= retry.tries:
                raise DownloadError(
                    f"{file.url}: {drop}, {failures} times in a row; {reached:,} bytes are kept in {partial},"
                    " fetch again to resume",
                    "offline",
                ) from None
            pause_s = retry.backoff_s * 2 ** (failures - 1)
            logger.warning("%s: %s; trying again in %.0f s", file.name, drop, pause_s)
            time.sleep(pause_s)


def _continue(file: RemoteFile, partial: Path, on_progress: OnProgress | None, timeout_s: float) -> None:
    """Open one connection and append the received bytes to ``partial``."""
    start = _size(partial)
    if start and start == file.size_bytes:
        return
    response = _request(file.url, start, timeout_s)
    if isinstance(response, str):  # there is nothing after the bytes that were received
        if response == f"bytes */{start}":
            return
        partial.unlink()
        raise _ConnectionLost("the partial file does not match the file on the server")
    with response:
        start, total = _span(response, start)
        if total is not None and file.size_bytes not in (None, total):
            raise DownloadError(
                f"{file.url} is {total:,} bytes long where {file.size_bytes:,} were published;"
                " the file was replaced on the server, so nothing was fetched",
                "changed",
            )
        total = file.size_bytes if total is None else total
        _check_disk(partial.parent, (total or start) - start, file.name)
        done = _append(response, partial, _Meter(file.name, "download", start, total, on_progress))
    if total is not None and done < total:
        raise _ConnectionLost(f"connection closed after {done:,} of {total:,} bytes")


def _request(url: str, start: int, timeout_s: float) -> http.client.HTTPResponse | str:
    """Request a file from byte ``start`` on; return the ``Content-Range`` if there is no such byte."""
    headers = {"User-Agent": "biopsy", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except HTTPError as error:
        error.close()
        if error.code in TRANSIENT_STATUS:
            raise _ConnectionLost(f"the server answered {error.code} {error.reason}") from None
        if error.code == 416 and start:
            return error.headers.get("Content-Range", "")
        raise DownloadError(
            f"{url}: the server answered {error.code} {error.reason}; the file may have moved,"
            " see the data set's page in the documentation",
            "missing" if error.code in _GONE else "refused",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionLost(f"no connection ({getattr(error, 'reason', error)})") from error


def _span(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return the start of the response in the file, and the size of the file (None if unknown)."""
    if response.status != 206:
        length = response.headers.get("Content-Length")
        return 0, int(length) if length else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise DownloadError(
            f"{response.url}: the server sent another range than requested;"
            f" delete the {PARTIAL} file and fetch again",
            "changed",
        )
    return start, None if match[2] == "*" else int(match[2])


def _append(response: http.client.HTTPResponse, partial: Path, meter: "_Meter") -> int:
    """Append the response after the first ``meter.start`` bytes of the file and return its new length."""
    done = meter.start
    try:
        with open(partial, "ab" if done else "wb") as output:
            while block := _read_block(response):
                output.write(block)
                done += len(block)
                meter.report(done)
            output.flush()
            os.fsync(output.fileno())
    except OSError as error:
        raise DownloadError(
            f"{partial} could not be written ({error.strerror or error}); free space and fetch again",
            "disk",
        ) from error
    meter.report(done, is_last=True)
    return done


def _read_block(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionLost(f"connection lost ({error or type(error).__name__})") from error


def _check_disk(folder: Path, n_bytes: int, name: str) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < n_bytes:
        raise DownloadError(
            f"{name} needs {n_bytes / 1e9:.1f} GB in {folder}, where {free_bytes / 1e9:.1f} GB are free;"
            " free some space or choose another folder",
            "disk",
        )


def _verify(file: RemoteFile, path: Path, advice: str) -> None:
    """Compare size and checksum with those published."""
    size_bytes = _size(path)
    if file.size_bytes not in (None, size_bytes):
        raise DownloadError(
            f"{file.name} has {size_bytes:,} bytes, expected {file.size_bytes:,}; {advice}", "changed"
        )
    if file.checksum is None:
        return
    algorithm, _, published = file.checksum.partition(":")
    with open(path, "rb") as content:
        result = hashlib.file_digest(content, algorithm).hexdigest()
    if result != published:
        raise DownloadError(
            f"{file.name} has {algorithm} {result}, expected {published}; {advice}", "changed"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@dataclass
class _Meter:
    """Progress reports, at most one per `REPORT_EVERY_S`."""

    file: str
    step: Literal["download", "unpack"]
    start: int
    total: int | None
    on_progress: OnProgress | None

    def __post_init__(self) -> None:
        self._began = self._reported = time.monotonic()

    def report(self, done: int, *, is_last: bool = False) -> None:
        """Report progress, unless the last report was less than `REPORT_EVERY_S` ago."""
        now = time.monotonic()
        if self.on_progress is None or not (is_last or now - self._reported >= REPORT_EVERY_S):
            return
        self._reported = now
        rate = (done - self.start) / max(now - self._began, 1e-9)
        self.on_progress(Progress(self.file, self.step, done, self.total, rate))


def _import_kagglehub() -> None:
    """Raise MissingExtra if kagglehub is not installed."""
    try:
        import kagglehub  # noqa: F401
    except ImportError:
        raise MissingExtra("fetch", "downloading from Kaggle") from None


def _download_from_kaggle(data: KaggleData, out: Path) -> Path:
    """Download and unpack a Kaggle data set and return its folder.

    The folder is ``out/<name>``, except in Kaggle notebooks, where the data are already mounted.
    """
    import kagglehub
    from kagglehub.exceptions import BackendError, CredentialError, DataCorruptionError, UnauthenticatedError

    cache = out.resolve() / ".biopsy-kagglehub"
    fetch = kagglehub.competition_download if data.kind == "competition" else kagglehub.dataset_download
    try:
        with _cache_at(cache):
            downloaded = Path(fetch(data.handle))
    except (UnauthenticatedError, CredentialError) as error:
        raise DownloadError(_refusal(data, error), "refused") from error
    except (BackendError, DataCorruptionError, zipfile.BadZipFile, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DownloadError(_refusal(data, error), "refused") from error
        reason = "missing" if status in _GONE else "offline"
        if isinstance(error, DataCorruptionError | zipfile.BadZipFile):
            reason = "changed"
        elif getattr(error, "errno", None) in NO_SPACE:
            reason = "disk"
        raise DownloadError(
            f"Kaggle's {data.handle} could not be downloaded ({_one_line(error)}); fetch again to resume,"
            f" or download it manually from {data.page}",
            reason,
        ) from error
    if not downloaded.is_relative_to(cache):
        return downloaded
    folder = out / data.folder
    os.replace(downloaded, folder)
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
        os.environ.pop(CACHE_VARIABLE)
        if before is not None:
            os.environ[CACHE_VARIABLE] = before
