"""One file over HTTP: continued where it stopped, checked, and renamed only when it is whole.

Bytes are collected in ``NAME.biopsy-partial``, which outlives an interruption; the next call asks the server
for the rest. A server that sends the whole file instead is taken at its word and the file starts again.
"""

import gzip
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError

from biopsy.core.errors import DownloadError
from biopsy.core.files import replace_atomic
from biopsy.data.datasets.sources import RemoteFile

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
