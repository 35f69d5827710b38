"""Guarded reading of tables: csv files that users bring."""

import csv
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv

from biopsy.core.errors import FileFormatError
from biopsy.core.loaders import read_bytes

MAX_CSV_BYTES = 2**28  # 256 MiB, also once unpacked: 2 million rows of 120 characters
MAX_CELLS = 50_000_000  # an empty cell takes one byte in a file and eight or more in memory
MAX_COLUMNS = 2_000  # of a million columns one row fills the memory
_DELIMITERS = ",;\t"
_WHOLE = r"[+-]?(?:0|[1-9][0-9]{0,17})"  # fits 64 bits; no leading zeros, which only names have
_NUMBER = r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"


def read_csv_table(
    path: Path | str, *, aliases: Mapping[str, str] | None = None, required: Sequence[str] = ()
) -> pd.DataFrame:
    """Read a csv file, every cell as text.

    Only an empty cell is missing (``NA`` is a name like any other); rows whose cells are all empty are left
    out. The delimiter is a comma, a semicolon or a tab, whichever the heading has most of. Gzipped files are
    unpacked. An address is not opened.

    Args:
        path: The file, UTF-8 with or without a byte order mark.
        aliases: Names of columns in lower case, and what each is called in the result, whatever its case in
            the file.
        required: Columns of the result that must be there.

    Raises:
        FileFormatError: If it is missing, too large, not UTF-8, no table, lacks a column, or two columns have
            one name, as written or by ``aliases``.
    """
    content = read_bytes(path, max_bytes=MAX_CSV_BYTES)
    if content.startswith(b"\x1f\x8b"):
        content = _gunzip(path, content)
    return parse_csv(content, path, aliases=aliases, required=required)


def parse_csv(
    content: bytes,
    path: Path | str,
    *,
    aliases: Mapping[str, str] | None = None,
    required: Sequence[str] = (),
) -> pd.DataFrame:
    """Read the content of a csv file as `read_csv_table` does; ``path`` is what errors call it."""
    delimiter, header = _read_header(path, content)
    n_cells = sum(content.count(mark) for mark in (delimiter.encode(), b"\n", b"\r"))
    if len(header) > MAX_COLUMNS or n_cells > MAX_CELLS:
        raise FileFormatError(
            path,
            "too-large",
            f"has {len(header):,} columns and about {n_cells:,} cells where at most {MAX_COLUMNS:,} columns "
            f"and {MAX_CELLS:,} cells are read",
        )
    names = _name_columns(path, header, aliases or {})
    missing = [name for name in required if name not in names]
    if missing:
        raise FileFormatError(
            path, "columns", f"has the columns {', '.join(names)}; {', '.join(missing)} is missing"
        )
    numbered = [str(number) for number in range(len(names))]
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(content),
            pa.csv.ReadOptions(use_threads=False, column_names=numbered, block_size=len(content) + 1),
            pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(numbered, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        raise FileFormatError(path, "syntax", f"cannot be read as csv: {str(error)[:200]}") from None
    frame = table.to_pandas().set_axis(names, axis="columns").iloc[1:]
    return frame[frame.notna().any(axis=1)].reset_index(drop=True)


def infer_numbers(column: pd.Series) -> pd.Series:
    """Return a column of text as numbers if every cell is one, as it is if not.

    Cells such as ``007`` or a whole number beyond 64 bits are names; a column that has one stays text.
    """
    cells = column.dropna()
    if cells.empty or not cells.str.fullmatch(_NUMBER).all():
        return column
    if cells.str.fullmatch(_WHOLE).all():
        return pd.to_numeric(column).astype("Int64" if column.isna().any() else "int64")
    if cells.str.fullmatch("[+-]?[0-9]+").all():
        return column
    values = pd.to_numeric(column).astype("float64")
    return values if values.abs().max() < float("inf") else column


def _gunzip(path: Path | str, content: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(MAX_CSV_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(path, "syntax", f"cannot be unpacked by gzip: {error}") from None
    if len(unpacked) > MAX_CSV_BYTES:
        raise FileFormatError(path, "too-large", f"unpacks to more than {MAX_CSV_BYTES:,} bytes")
    return unpacked


def _read_header(path: Path | str, content: bytes) -> tuple[str, list[str]]:
    """Return the delimiter and the names in the first row, after checks of the whole content."""
    if b"\0" in content:
        raise FileFormatError(path, "encoding", "holds NUL bytes: save it as csv in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise FileFormatError(
            path,
            "encoding",
            f"is not UTF-8 (byte {content[error.start]:#04x} in row {row}): save it as UTF-8",
        ) from None
    if content.count(b'"') % 2:
        raise FileFormatError(path, "syntax", "has a quotation mark that is never closed")
    heading = text.lstrip("\r\n")
    first = heading[: 2**20].partition("\n")[0].partition("\r")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    try:
        header = next(csv.reader(io.StringIO(heading, newline=None), delimiter=delimiter), [])
    except csv.Error as error:
        raise FileFormatError(path, "syntax", f"cannot be read as csv: {error}") from None
    if not any(name.strip() for name in header):
        raise FileFormatError(path, "syntax", "is empty where a csv with a heading was expected")
    return delimiter, header


def _name_columns(path: Path | str, header: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    names: list[str] = []
    for number, written in enumerate(header):
        name = written.strip() or f"Unnamed: {number}"
        name = aliases.get(name.lower(), name)
        if name in names:
            twice = header[names.index(name)].strip()
            raise FileFormatError(
                path,
                "duplicate",
                f"has the columns {twice!r} and {written.strip()!r}, which are one: keep one",
            )
        names.append(name)
    return names
