"""Tables as csv files: what users bring is read guardedly, what is written runs nothing in a spreadsheet.

A spreadsheet takes a cell that begins with ``= + - @``, a tab or a carriage return for a formula. Text of
this kind is written with an apostrophe before it (numbers are left as they are) and read without.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv

from biopsy.core.errors import FileFormatError
from biopsy.core.files import replace_atomic
from biopsy.core.loaders import read_bytes

MAX_CSV_BYTES = 2**28  # 256 MiB, also once unpacked: 2 million rows of 120 characters
MAX_CELLS = 50_000_000  # an empty cell takes one byte in a file and eight or more in memory
MAX_COLUMNS = 2_000  # of a million columns one row fills the memory
_DELIMITERS = ",;\t"
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what has apostrophes before it gets one more, and keeps them
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
    frame = frame[frame.notna().any(axis=1)].reset_index(drop=True)
    return unmask_formulas(frame) if b"'" in content else frame


def write_csv(path: Path | str, table: pd.DataFrame) -> None:
    """Write a table as csv, whole or not at all; `read_csv_table` reads the same text."""
    has_returns = any("\r" in _join(table[name]) for name in _text_columns(table))
    quoting = csv.QUOTE_NONNUMERIC if has_returns else csv.QUOTE_MINIMAL  # which quotes no carriage return
    masked = _map_text(table, _mask)
    with replace_atomic(path) as partial:
        masked.to_csv(partial, index=False, lineterminator="\n", encoding="utf-8", quoting=quoting)


def unmask_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table that was read from a csv as it was when `write_csv` wrote it."""
    return _map_text(table, _unmask)


def _mask(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and _FORMULA.match(cell) and not re.fullmatch(_NUMBER, cell)
    return f"'{cell}" if is_formula else cell


def _unmask(cell: Any) -> Any:
    is_masked = isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell)
    return cell[1:] if is_masked else cell


def _map_text(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """Return a table with a function applied to names of columns and cells that may be formulas."""
    changed = {
        name: table[name].map(change, na_action="ignore")
        for name in _text_columns(table)
        if re.search("\0" + _FORMULA.pattern, _join(table[name]))
    }
    return table.assign(**changed).rename(columns=change)


def _text_columns(table: pd.DataFrame) -> list[str]:
    return table.select_dtypes(["object", "string"]).columns.tolist()


def _join(cells: pd.Series) -> str:
    """Return all cells in one text, a NUL before each: looked through at once a hundred times as fast."""
    return "\0" + "\0".join(map(str, cells.tolist()))


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
