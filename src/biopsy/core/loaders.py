"""Guarded reading of untrusted files: JSON, TOML, arrays and weights.

Together with `tables` (csv, Parquet) and `hdf5`, all such files are read here: regular files only (no pipes,
devices or addresses), with the limits below, without executing code, and with one error, `FileFormatError`.
"""

import contextlib
import functools
import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, overload

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from safetensors import safe_open

from biopsy.core.errors import BiopsyError, FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 2**26  # 64 MiB, ten times an audit of 300,000 patches
MAX_JSON_VALUES = 15_000_000  # up to 70 bytes each in memory
MAX_TOML_BYTES = 2**18  # 256 KiB: a recipe has 5
MAX_DEPTH = 32  # of nested lists and tables; documents of this package have 8, GeoJSON 10
MAX_ARRAY_HEADER = 10_000  # characters, numpy's default
_INT64 = range(-(2**63), 2**63)

Model = TypeVar("Model")
FloatOrNan = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float, of which NaN is null in JSON documents."""


def open_regular(path: Path | str, *, max_bytes: int | None = None) -> io.BufferedReader:
    """Open a regular file for reading.

    Args:
        max_bytes: Maximum size; None for no limit.

    Raises:
        FileFormatError: If it is missing, not a regular file, not readable or too large.
    """
    try:
        # without O_NONBLOCK, opening a named pipe would block
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileFormatError(path, "missing", "does not exist") from None
    except OSError as error:
        raise FileFormatError(path, "unreadable", f"cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise FileFormatError(repr(str(path)), "unreadable", f"is no name of a file: {error}") from None
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
            raise FileFormatError(path, "not-regular", f"is {kind} where a file was expected")
        if max_bytes is not None and status.st_size > max_bytes:
            raise FileFormatError(
                path, "too-large", f"has {status.st_size:,} bytes where at most {max_bytes:,} are read"
            )
    except FileFormatError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_bytes(path: Path | str, *, max_bytes: int) -> bytes:
    """Return the content of a regular file; see `open_regular`."""
    with open_regular(path, max_bytes=max_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)  # takes memory for what it is asked for, not for what is there
    if len(content) > size:
        raise FileFormatError(path, "too-large", f"has more than the {size:,} bytes it is said to have")
    return content


def read_text(path: Path | str, *, max_bytes: int) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark; see `open_regular`."""
    return decode_text(read_bytes(path, max_bytes=max_bytes), path)


def decode_text(content: bytes, path: Path | str) -> str:
    """Return the text of UTF-8 bytes; ``path`` names them in errors."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileFormatError(
            path, "encoding", f"is not UTF-8: byte {content[error.start]:#04x} in line {line}"
        ) from None


def load_json(path: Path | str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file; see `parse_json`."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), path)


def parse_json(content: bytes | str, path: Path | str, *, allow_nan: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        content: UTF-8 bytes, or text.
        path: Name of the file in errors.
        allow_nan: Whether numbers may be NaN or infinite, as in training logs.

    Raises:
        FileFormatError: If it is not JSON, has duplicate keys, too many levels or values, or invalid numbers
            or text.
    """
    text = content if isinstance(content, str) else decode_text(content, path)
    if (n_values := sum(map(text.count, ",[{"))) > MAX_JSON_VALUES:
        raise FileFormatError(
            path, "too-large", f"holds about {n_values:,} values where at most {MAX_JSON_VALUES:,} are read"
        )

    def refuse_constant(name: str) -> NoReturn:
        raise FileFormatError(path, "value", f"holds {name} where a number was expected")

    def make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FileFormatError(path, "duplicate", f"names the key {twice!r} twice in one object")
        return result

    constant = None if allow_nan else refuse_constant
    with refusing(path, "JSON"):
        value = json.loads(text, parse_constant=constant, object_pairs_hook=make_object)
    _check_values(path, value, allow_nan)
    return value


def load_toml(path: Path | str) -> dict[str, object]:
    """Read a TOML file; see `parse_toml`."""
    return parse_toml(read_text(path, max_bytes=MAX_TOML_BYTES), path)


def parse_toml(text: str, path: Path | str) -> dict[str, object]:
    """Return the table of a TOML text; ``path`` names the file in errors.

    Raises:
        FileFormatError: If it is not TOML, has too many levels, or a number beyond 64 bits.
    """
    if len(text) > MAX_TOML_BYTES:
        raise FileFormatError(path, "too-large", f"has {len(text):,} characters, at most {MAX_TOML_BYTES:,}")
    with refusing(path, "TOML"):
        document = tomllib.loads(text)
    _check_values(path, document, allow_nan=False)
    return document


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def validate(path: Path | str, model: type[Model], document: Any) -> Model:
    """Return a document as a pydantic model or a typed dictionary.

    Raises:
        FileFormatError: With the first missing or invalid field.
    """
    try:
        return _adapter(model).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise FileFormatError(
            path, "value", f"{where}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def map_array(path: Path | str, *, dtype: type, ndim: int) -> np.ndarray:
    """Return the array of an ``.npy`` file, memory-mapped and read-only; nothing is unpickled.

    Raises:
        FileFormatError: If it is not such a file, of another dtype or number of dimensions, or its size does
            not match its header.
    """
    with open_regular(path) as file, refusing(path, ".npy"):
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, actual_dtype = read_header(file, max_header_size=MAX_ARRAY_HEADER)
        if actual_dtype != np.dtype(dtype) or len(shape) != ndim or is_fortran:
            raise FileFormatError(
                path,
                "value",
                f"holds {actual_dtype} of shape {shape}, expected {ndim}-dimensional {np.dtype(dtype)}",
            )
        if min(shape) < 0:
            raise FileFormatError(path, "value", f"says that its shape is {shape}")
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        n_bytes = offset + math.prod(shape) * actual_dtype.itemsize
        if n_bytes != size:
            raise FileFormatError(
                path, "syntax", f"has {size:,} bytes where its shape {shape} takes {n_bytes:,}"
            )
        if n_bytes == offset:  # nothing can be mapped
            return np.empty(shape, actual_dtype)
        return np.memmap(file, actual_dtype, "r", offset, shape)


@overload
def read_tensors(
    path: Path | str, *, framework: Literal["numpy"] = "numpy", keep: Callable[[str], bool] = ...
) -> tuple[dict[str, np.ndarray], dict[str, str]]: ...


@overload
def read_tensors(
    path: Path | str, *, framework: Literal["pt"], keep: Callable[[str], bool] = ...
) -> tuple[dict[str, "Tensor"], dict[str, str]]: ...


def read_tensors(
    path: Path | str, *, framework: str = "numpy", keep: Callable[[str], bool] = lambda name: True
) -> tuple[Mapping[str, object], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    Args:
        framework: ``numpy`` or ``pt``: type of the tensors.
        keep: Returns whether to read a name.

    Raises:
        FileFormatError: If it is not a safetensors file, or truncated.
    """
    open_regular(path).close()
    with refusing(path, "safetensors"), safe_open(path, framework=framework) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if keep(name)}
        return tensors, file.metadata() or {}


@contextlib.contextmanager
def refusing(path: Path | str, format: str) -> Iterator[None]:
    """Turn whatever a parser raises on what is not of its format into a `FileFormatError`.

    Errors of this package stay what they are.
    """
    try:
        yield
    except BiopsyError:
        raise
    except RecursionError:
        raise FileFormatError(path, "too-deep", f"nests deeper than the {MAX_DEPTH} levels read") from None
    except Exception as error:  # parsers raise various exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise FileFormatError(path, "syntax", f"cannot be read as {format}: {reason}") from None


def _check_values(path: Path | str, value: Any, allow_nan: bool) -> None:
    """Refuse too many levels, non-finite or too large numbers, and invalid text."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += item.keys()
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
            elif isinstance(item, float) and not (allow_nan or math.isfinite(item)):
                raise FileFormatError(path, "value", f"holds {item} where a number was expected")
            elif isinstance(item, int) and item not in _INT64:
                raise FileFormatError(path, "value", "holds a whole number beyond 64 bits")
            elif isinstance(item, str) and not item.isascii() and _has_surrogate(item):
                raise FileFormatError(path, "encoding", f"holds {ascii(item)[:80]}, which is no text")
        if not deeper:
            return
        level = deeper
    raise FileFormatError(path, "too-deep", f"nests deeper than the {MAX_DEPTH} levels read")


def _has_surrogate(text: str) -> bool:
    """Return whether text has surrogates other than those of bytes in file names."""
    return re.search("[\ud800-\udc7f\udd00-\udfff]", text) is not None
