"""Files that are written whole or not at all, and documents that say what format they are.

A name under which a user or a later command looks only ever holds a finished file: everything is written
beside it under a temporary name, flushed to disk and renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from biopsy.core.errors import DataError


@contextlib.contextmanager
def replace_atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` if the block succeeds.

    A folder already at ``path`` is removed just before the renaming: the caller has decided that it may go.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write ``content`` to ``path`` whole or not at all."""
    with replace_atomic(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path | str, document: Any) -> None:
    """Write a JSON document atomically; numpy values become numbers, NaN and infinity become null."""
    write_atomic(path, json.dumps(_plain(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str, *, format: str | None = None) -> dict[str, Any]:
    """Read a JSON document and refuse one of another or newer format.

    Args:
        path: The file.
        format: ``"biopsy-<what>/<version>"``; None reads any document.

    Raises:
        DataError: If the file is missing, is no JSON, or has another or a newer format.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not readable as JSON ({error}); it was cut short or altered") from None
    if format is not None:
        found = document.get("format") if isinstance(document, dict) else None
        _check_format(str(path), found, format)
    return document


def sha256_file(path: Path | str) -> str:
    """Give the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_format(path: str, found: object, wanted: str) -> None:
    if found == wanted:
        return
    kind, _, version = wanted.partition("/")
    found_kind, _, found_version = str(found).partition("/")
    if found_kind == kind and found_version.isdigit() and int(found_version) > int(version):
        raise DataError(f"{path} has format {found!r}, newer than {wanted!r}: update biopsy to read it")
    raise DataError(f"{path} has format {found!r} where {wanted!r} was expected")


def _plain(value: Any) -> Any:
    """Turn numpy values, paths and non-finite numbers into what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
