"""Inputs and outputs by URL, through fsspec: copied to this machine while they are needed, and removed again.

Only inputs and outputs that a user names in a command may be URLs, never values of a table or a document, and
only with the schemes of `SCHEMES`. Copies are in ``$BIOPSY_STAGING`` (default: ``~/.cache/biopsy/staging``),
limited to ``$BIOPSY_STAGING_GB`` gigabytes in all (default: 50): a copy that would exceed them is refused.
Copies of a process that died are removed by the next one.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from biopsy.core.errors import DataError, DownloadError, MissingExtra
from biopsy.core.files import LOCK, MANIFEST, NO_SPACE, sha256_file, temporary_path

SCHEMES = ("s3", "http", "https", "memory")
LIMIT_GB = 50.0
_SILENCE_S = 60.0  # after which a connection counts as dropped

_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+([^/].*)", re.DOTALL)
_VERSION = ("size", "ETag", "LastModified", "Last-Modified", "mtime", "created")
_kept = contextlib.ExitStack()
atexit.register(_kept.close)


def parse_url(path: object) -> str | None:
    """Return a URL of `SCHEMES`, also one that was read as a path (``s3:/bucket``); None for a local path.

    Example:
        >>> parse_url("s3:/bucket/x.svs"), parse_url("slides/x.svs")
        ('s3://bucket/x.svs', None)
    """
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def show_url(url: str) -> str:
    """Return a URL without what may be secret in it: user, password and query."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


@dataclass(frozen=True)
class RemoteFile:
    """Metadata of a remote file.

    Attributes:
        size: Bytes; None if unknown.
        version: What changes with its content, such as its size, time and hash.
    """

    size: int | None
    version: Mapping[str, str]


def list_files(url: str) -> dict[str, RemoteFile]:
    """Return the files of a remote folder by their names relative to it, or the one file by an empty name.

    Raises:
        DownloadError: If there is nothing, or the storage cannot be read.
        MissingExtra: If the packages for the scheme are not installed.
    """
    fs, root = _open(url)
    with _one_error(url):
        if not _is_folder(fs, root):
            return {"": _describe(fs.info(root))}
        found = fs.find(root, detail=True)
    prefix = root.rstrip("/") + "/"
    files = {
        name.removeprefix(prefix): _describe(info) for name, info in found.items() if name.startswith(prefix)
    }
    if not files:
        raise DownloadError(f"{show_url(url)} holds no file", "missing")
    for name in files:
        if ".." in PurePosixPath(name).parts or "\0" in name or name.startswith("/"):
            raise DataError(
                f"{show_url(url)} holds a file named {name!r}, which would be written outside its folder"
            )
    return files


def _describe(info: Mapping[str, object]) -> RemoteFile:
    """Return the record of a file from fsspec's."""
    version = {key: str(info[key]) for key in _VERSION if info.get(key) is not None}
    size = info.get("size")
    return RemoteFile(size if isinstance(size, int) else None, version)


def identify(url: str) -> str:
    """Return a hash of a remote file's address, size and version, without reading it."""
    version = list_files(url)[""].version
    return hashlib.sha256(json.dumps([url, version], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def staged(url: str) -> Iterator[Path]:
    """Yield the path of a copy of a remote file or folder under its own name; remove it after the block.

    Raises:
        DownloadError: If it cannot be read, or not completely.
        DataError: If it is larger than what the copies may take.
    """
    fs, root = _open(url)
    files = list_files(url)
    folder, name = _staging_folder(), _name(url)
    with temporary_path(folder, folder / name) as partial:
        partial.mkdir()
        n_free = _limit() - _measure(folder)
        _require_room(url, sum(file.size or 0 for file in files.values()), n_free)
        for relative, file in files.items():
            target = partial / name / relative if relative else partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with _one_error(url):
                _copy(fs, f"{root.rstrip('/')}/{relative}" if relative else root, target, n_free)
            n_bytes = target.stat().st_size
            n_free -= n_bytes
            if file.size not in (None, n_bytes):
                raise DownloadError(
                    f"{show_url(url)}: {n_bytes:,} of {file.size:,} bytes came: try again", "offline"
                )
        yield partial / name


def _copy(fs: Any, source: str, target: Path, n_free: float) -> None:
    """Copy a file, and stop when it is larger than its metadata state."""
    from fsspec.callbacks import Callback

    def check(size: int, value: int, **_: object) -> None:
        _require_room(source, value, n_free)

    fs.get_file(source, str(target), callback=Callback(hooks={"room": check}))


def _require_room(url: str, n_bytes: int, n_free: float) -> None:
    if n_bytes > n_free:
        raise DataError(
            f"{show_url(url)} is larger than what is left of {_limit() / 1e9:g} GB for copies in "
            f"{_staging_folder()}: set BIOPSY_STAGING_GB or BIOPSY_STAGING"
        )


def stage(path: Any) -> Any:
    """Return a copy of a remote file or folder that is kept until the program ends; a local path as it is."""
    url = parse_url(path) if isinstance(path, str | Path) else None
    return path if url is None else _kept.enter_context(staged(url))


def is_staged(path: Path) -> bool:
    """Return whether a file or folder is within a copy that this program removes at its end."""
    return path.resolve().is_relative_to(_staging_folder().resolve())


@contextlib.contextmanager
def uploaded(out: Path | str) -> Iterator[Path]:
    """Yield a local folder for what becomes the remote folder ``out``, and upload it after the block.

    What is there already is copied first, so that a command continues. Files that changed are uploaded, also
    where the block ends in an error: what is finished is kept. A local ``out`` is yielded as it is.

    Raises:
        DataError: If nothing can be uploaded by its scheme, or what is there is too large.
        DownloadError: If the storage cannot be reached.
    """
    url = parse_url(out)
    if url is None:
        yield Path(out)
        return
    if url.startswith("http"):
        raise DataError(f"{show_url(url)} is read only: results can be uploaded to s3://")
    fs, root = _open(url)
    with _one_error(url):
        is_there = fs.exists(root)
    if is_there:
        folder = stage(url)
    else:
        parent = _kept.enter_context(temporary_path(_staging_folder(), Path(_name(url))))
        folder = parent / _name(url)
        folder.mkdir(parents=True)
    before = _hash_files(folder)
    try:
        yield folder
    finally:
        after = _hash_files(folder)
        with _one_error(url):
            for name in before.keys() - after.keys():
                fs.rm(f"{root}/{name}")
            for name in after:
                if before.get(name) != after[name]:
                    fs.put_file(str(folder / name), f"{root}/{name}")


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        if url.startswith("http"):  # whose client gives up after five minutes in all, unless it is told
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
            return url_to_fs(url, client_kwargs={"timeout": timeout})
        return url_to_fs(url)
    except ImportError:
        raise MissingExtra("storage", show_url(url)) from None


def _is_folder(fs: Any, root: str) -> bool:
    if "http" not in fs.protocol:
        return fs.isdir(root)
    # A page of links or a slide: asked whether it is a folder, fsspec would read a slide whole as a page.
    address = str(fs.info(root).get("url", root)).partition("?")[0]
    return address.endswith("/") or address.count("/") == 2


@contextlib.contextmanager
def _one_error(url: str) -> Iterator[None]:
    """Turn what clients of storage raise into one error."""
    try:
        yield
    except FileNotFoundError:
        raise DownloadError(f"{show_url(url)} does not exist, or cannot be reached", "missing") from None
    except _list_client_errors() as error:
        if isinstance(error, DownloadError) or getattr(error, "errno", None) in NO_SPACE:
            raise
        text = (" ".join(str(error).split()) or type(error).__name__)[:200]
        is_refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
        raise DownloadError(
            f"{show_url(url)} cannot be reached: {text.replace(url, show_url(url))}",
            "refused" if is_refused else "offline",
        ) from None


def _list_client_errors() -> tuple[type[Exception], ...]:
    clients = {"aiohttp": "ClientError", "botocore.exceptions": "BotoCoreError"}
    loaded = [getattr(sys.modules[module], name) for module, name in clients.items() if module in sys.modules]
    return (OSError, TimeoutError, *loaded)


def _name(url: str) -> str:
    """Return the name of a remote file or folder as that of a copy."""
    name = url.partition("://")[2].partition("?")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.% -]", "_", name).strip(" .") or "staged"


def _staging_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BIOPSY_STAGING") or Path(cache) / "biopsy" / "staging")


def _limit() -> float:
    text = os.environ.get("BIOPSY_STAGING_GB") or str(LIMIT_GB)
    try:
        return float(text) * 1e9
    except ValueError:
        raise DataError(f"BIOPSY_STAGING_GB={text!r} is no number of gigabytes") from None


def _measure(folder: Path) -> int:
    """Return the bytes of all files below a folder, some of which may be removed meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _hash_files(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder: manifests, then others in the order they were written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    paths.sort(key=lambda path: (path.name != MANIFEST, path.stat().st_mtime_ns, path))
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
