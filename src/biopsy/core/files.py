"""Atomic writing of files, without replacing files of the user.

Files and folders are written under a temporary name in the same folder and renamed. Temporary files of
processes that died are removed by the next process that writes into that folder.

Only files written by this package are replaced or removed:

* `create_directory` makes a new folder, and refuses folders that are not empty;
* `update_directory` writes into a folder that may contain files of the user. Its manifest lists the files
  written by this package and their hashes: other files, files changed since, and links are kept, and
  `UserFileError` is raised if one is in the place of an output;
* `replace_atomic` replaces a file named by the user, unless it is an input of the same command
  (`refuse_inputs`).
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from biopsy.core.errors import DataError, FileFormatError, UserFileError
from biopsy.core.loaders import load_json, open_regular

logger = logging.getLogger(__name__)

SEAL = "document_sha256"

MANIFEST = ".biopsy-manifest.json"
MANIFEST_FORMAT = "biopsy-manifest/1"
LOCK = ".biopsy-lock"
"""Name of the lock file of an output folder."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_PARTIAL = re.compile(r"\.biopsy-([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{8}\.partial")
_in_use: set[str] = set()  # temporary names of this process

Entries = dict[str, str | None]
"""SHA-256 of the files of a manifest by relative name, None while a file is being written."""


def expand_home(path: str) -> Path:
    """Return a path whose leading ``~`` or ``~user`` is the home folder; unknown users are kept."""
    return Path(os.path.expanduser(path))


# --- temporary names
@functools.cache
def machine_id() -> str:
    """Return an id of the machine (and PID namespace), within which processes can be checked."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def temporary_path(folder: Path, target: Path) -> Iterator[Path]:
    """Yield a temporary path in ``folder`` for ``target``, removed at the end if it still exists."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    partial = folder / f".biopsy-{machine_id()}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    _in_use.add(partial.name)
    try:
        yield partial
    except OSError as error:
        if error.errno in NO_SPACE:  # such errors do not name their file, or by its temporary name
            error.filename = str(error.filename or target).replace(str(partial), str(target))
        raise
    finally:
        _remove(partial)
        _in_use.discard(partial.name)


def remove_abandoned(folder: Path | str) -> None:
    """Remove temporary files and folders of processes that have died from a folder, if it exists.

    Only temporary files of this machine are removed.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            owner = _PARTIAL.fullmatch(name)
            if owner and owner[1] == machine_id() and not is_alive(int(owner[2])) and name not in _in_use:
                _remove(Path(folder) / name)


def is_vacant(folder: Path | str) -> bool:
    """Return whether a folder does not exist, or contains only temporary files of this package."""
    folder = Path(folder)
    return not folder.exists() or (
        folder.is_dir() and all(_PARTIAL.fullmatch(path.name) for path in folder.iterdir())
    )


def is_alive(pid: int) -> bool:
    """Return whether another process of this machine is alive; True if unknown."""
    if pid == os.getpid():
        return False  # temporary files of this process are in `_in_use`
    if os.name != "posix":
        return True  # cannot be checked on Windows
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- files and folders that a user names
@contextlib.contextmanager
def replace_atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path, renamed to ``path`` if the block succeeds.

    If ``path`` is a link, its target is replaced.

    Raises:
        UserFileError: If ``path`` is a folder, a device or a pipe.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or pipe"
        raise UserFileError(path, "not-a-file", f"is {kind} where a file is to be written: name a file")
    with temporary_path(path.parent, path) as partial:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    if path.name != MANIFEST and _read_manifest(path.parent).get(path.name):
        _write_manifest(path.parent, _read_manifest(path.parent) | {path.name: sha256_file(path)})


@contextlib.contextmanager
def create_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder, renamed to ``path`` if the block succeeds.

    Raises:
        UserFileError: If ``path`` is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    _require_free(path)
    with temporary_path(path.parent, path) as partial:
        partial.mkdir()
        yield partial
        _require_free(path)
        if path.exists():
            path.rmdir()
        os.replace(partial, path)


def _require_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserFileError(path, "not-empty", "exists already: name a folder that does not, or remove it")


def refuse_inputs(out: Path | str, *inputs: Path | str | None) -> None:
    """Refuse to overwrite inputs of the same command.

    Raises:
        UserFileError: If ``out`` is one of them, or an existing file inside one.
    """
    out = Path(out)
    if not out.exists():
        return
    for path in (Path(item) for item in inputs if item is not None):
        inside = out.is_file() and path.is_dir() and path.resolve() in out.resolve().parents
        if path.exists() and (inside or out.samefile(path)):
            relation = "is in" if inside else "is"
            raise UserFileError(out, "input", f"{relation} {path}, an input: choose another output")


# --- folders that may hold a user's files
@contextlib.contextmanager
def update_directory(
    path: Path | str, *names: str, last: str | None = None, adopt: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder, whose files are moved to ``path`` if the block succeeds.

    A new folder is created atomically. In an existing folder, files of ``names`` written by this package are
    replaced, or removed if they are not written now; other files are kept.

    Args:
        names: Relative names of output files, or prefixes that end in ``*``.
        last: File that marks the outputs as complete: it is removed first and written last.
        adopt: Whether existing files of these names in a folder without a manifest are replaced.

    Raises:
        UserFileError: Before the block, if a file of ``names`` was not written by this package or was changed
            since; after it, if such a file is in the place of an output.
    """
    folder = Path(path)
    if folder.is_symlink():
        folder = folder.resolve()
    check_outputs(folder, *names, adopt=adopt)
    with temporary_path(folder if folder.exists() else folder.parent, folder) as partial:
        partial.mkdir()
        yield partial
        written: Entries = {**hash_files(partial)}
        if not folder.exists():
            _write_manifest(partial, written)
            try:
                return os.replace(partial, folder)
            except OSError:
                if not folder.exists():  # another process may have made it meanwhile
                    raise
                (partial / MANIFEST).unlink()
        _move_outputs(partial, folder, written, names, last, adopt)


def write_output(path: Path | str, content: bytes | str, *, adopt: bool = False) -> None:
    """Write one file into a folder that may contain files of the user; see `update_directory`."""
    path = Path(path)
    with update_directory(path.parent, path.name, adopt=adopt) as folder:
        write_atomic(folder / path.name, content)


def check_outputs(folder: Path | str, *names: str, adopt: bool = False) -> None:
    """Check in advance that `update_directory` can write its outputs.

    Raises:
        UserFileError: If a file of ``names`` was not written by this package, or was changed since.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserFileError(folder, "not-a-folder", "is a file where a folder is to be written: name another")
    entries = _read_manifest(folder, names if adopt else ())
    for name in dict.fromkeys([*(name for name in entries if _matches_any(name, names)), *names]):
        _require_replaceable(folder, name, entries)


@contextlib.contextmanager
def hold_outputs(folder: Path | str, *names: str, adopt: bool = False) -> Iterator[None]:
    """Check output files as `check_outputs` does, and reserve them for repeated writing in the block.

    Their hashes are recorded at the end. After a crash they count as written by this package.
    """
    folder = Path(folder)
    check_outputs(folder, *names, adopt=adopt)
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, _read_manifest(folder) | dict.fromkeys(names))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # full disk: they stay reserved
            entries = _read_manifest(folder)
            existing: Entries = {
                name: sha256_file(folder / name) for name in names if (folder / name).is_file()
            }
            _write_manifest(folder, {name: entries[name] for name in entries if name not in names} | existing)


def find_changed(folder: Path | str) -> list[str] | None:
    """Return the files of a manifest that were changed or removed since; None without a manifest."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None
    entries = _read_manifest(folder)
    return [name for name, sha256 in entries.items() if not _has_hash(folder / name, sha256)]


def remove_outputs(folder: Path | str, *documents: str) -> tuple[list[str], list[str]]:
    """Remove the files of a folder's manifest, and empty folders.

    Args:
        documents: Further files to remove.

    Returns:
        Names of the removed files, and of those kept because they were changed.
    """
    folder = Path(folder)
    entries = dict.fromkeys(documents) | _read_manifest(folder)
    kept = [name for name in entries if _find_obstacle(folder, name, entries) is not None]
    removed = [name for name in entries if name not in kept and (folder / name).exists()]
    for name in removed:
        _unlink(folder, name)
    (folder / MANIFEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
    return removed, kept


def _move_outputs(
    partial: Path, folder: Path, written: Entries, names: tuple[str, ...], last: str | None, adopt: bool
) -> None:
    """Move files into a folder one by one, updating the manifest first."""
    entries = _read_manifest(folder, names if adopt else ())
    stale = [name for name in entries if _matches_any(name, names) and name not in written]
    new = [name for name in written if not _has_hash(folder / name, written[name])]
    for name in (*stale, *new):
        _require_replaceable(folder, name, entries)
    others = {name: entries[name] for name in entries if name not in stale} | written
    if not stale and not new and others == entries:
        return
    _write_manifest(folder, others | dict.fromkeys((*stale, *new)))
    if last in new and len(new) + len(stale) > 1:
        (folder / str(last)).unlink(missing_ok=True)
    for name in stale:
        _unlink(folder, name)
    for source in sorted(path for path in partial.rglob("*") if path.is_dir()):
        (folder / source.relative_to(partial)).mkdir(exist_ok=True)
    for name in new:
        if name != last:
            os.replace(partial / name, folder / name)
    _write_manifest(folder, others)
    if last in new:
        os.replace(partial / str(last), folder / str(last))


def _matches_any(name: str, names: tuple[str, ...]) -> bool:
    return any(name.startswith(part[:-1]) if part.endswith("*") else name == part for part in names)


def _has_hash(path: Path, sha256: str | None) -> bool:
    return path.is_file() and not path.is_symlink() and sha256_file(path) == sha256


def _find_obstacle(folder: Path, name: str, entries: Entries) -> Path | None:
    """Return the path in the place of an output not written by this package, None if there is none."""
    path = folder / name
    for parent in reversed(PurePosixPath(name).parents[:-1]):
        way = folder / parent
        if way.is_symlink() or (way.exists() and not way.is_dir()):
            return way
    is_free = not path.is_symlink() and not path.exists()
    is_reserved = name in entries and entries[name] is None and path.is_file() and not path.is_symlink()
    return None if is_free or is_reserved or (name in entries and _has_hash(path, entries[name])) else path


def _require_replaceable(folder: Path, name: str, entries: Entries) -> None:
    path = _find_obstacle(folder, name, entries)
    if path is None:
        return
    edited = name in entries and path.is_file() and not path.is_symlink()
    reason = "was changed since biopsy wrote it" if edited else "was not written by biopsy"
    advice = "move it away, or choose another name or folder to write to"
    raise UserFileError(path, "edited" if edited else "foreign", f"{reason}: {advice}")


def _unlink(folder: Path, name: str) -> None:
    """Remove a file, and its parent folders if they are empty."""
    (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for way in PurePosixPath(name).parents[:-1]:
            (folder / way).rmdir()


def _read_manifest(folder: Path, adopted: tuple[str, ...] = ()) -> Entries:
    """Return the entries of a folder's manifest; without one, entries of existing ``adopted`` files."""
    try:
        entries = read_json(folder / MANIFEST, format=MANIFEST_FORMAT).get("files")
    except DataError:
        return {name: None for name in adopted if (folder / name).is_file()}
    return {name: entries[name] for name in entries if _is_inside(name)} if isinstance(entries, dict) else {}


def _is_inside(name: str) -> bool:
    """Return whether a name in a manifest is inside the folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _write_manifest(folder: Path, entries: Entries) -> None:
    write_json(
        folder / MANIFEST,
        {"format": MANIFEST_FORMAT, "files": {name: entries[name] for name in sorted(entries)}},
    )


# --- contents
def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write ``content`` to ``path`` atomically."""
    with replace_atomic(path) as partial:
        # Surrogates (names that are not UTF-8) are escaped as in JSON.
        partial.write_bytes(
            content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        )


def write_json(path: Path | str, document: Any) -> None:
    """Write a JSON document atomically; numpy values become numbers, NaN and infinity become null.

    Documents with a ``format`` get the hash of their content as ``document_sha256``, verified by `read_json`.
    """
    content = plain(document)
    if isinstance(content, dict) and "format" in content:
        content.pop(SEAL, None)
        content[SEAL] = _hash_document(content)
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(
    path: Path | str,
    *,
    format: str | None = None,
    remedy: str = "make it again",
    may_lack_hash: bool = False,
) -> dict[str, object]:
    """Read a JSON document of `write_json` and verify its hash.

    Args:
        format: ``"biopsy-<what>/<version>"``; None reads any.
        remedy: Advice on changed documents, for the error.
        may_lack_hash: Whether to read documents without a hash (of the first versions) with a warning.

    Raises:
        FileFormatError: If the file is missing, not JSON, of another or a newer format, or was changed.
    """
    document = load_json(path)
    if not isinstance(document, dict):
        raise FileFormatError(
            path, "value", f"holds a {type(document).__name__} where an object was expected"
        )
    if format is not None:
        _check_format(path, document.get("format"), format)
    seal = document.pop(SEAL, None)
    if seal is None and may_lack_hash:
        warn_unsealed(path)
    elif seal is None and "format" in document:
        raise FileFormatError(
            path, "altered", f"has no {SEAL}: it was written by an older version or by hand; {remedy}"
        )
    elif seal is not None and seal != _hash_document(document):
        raise FileFormatError(path, "altered", f"was changed since it was written; {remedy}")
    return document


def file_state(path: Path | str) -> tuple[int, int, int] | None:
    """Return inode, size in bytes and modification time in ns of a file; None if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files in a folder and its subfolders by relative name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _check_format(path: Path | str, actual: object, expected: str) -> None:
    if actual == expected:
        return
    kind, _, version = expected.partition("/")
    actual_kind, _, actual_version = str(actual).partition("/")
    if actual_kind == kind and actual_version.isdigit() and int(actual_version[:9]) > int(version):
        raise FileFormatError(
            path, "format", f"has format {actual!r}, newer than {expected!r}: update biopsy to read it"
        )
    text = repr(actual)[:80]
    raise FileFormatError(path, "format", f"has format {text} where {expected!r} was expected")


def _hash_document(document: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.cache
def warn_unsealed(path: Path | str, seal: str = SEAL) -> None:
    """Warn once per process about a file without a hash."""
    logger.warning("%s has no %s to verify it: it was written by an older version", path, seal)


def plain(value: Any) -> Any:
    """Convert dataclasses, numpy values, paths and non-finite numbers to JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
