"""Guarded reading of csv and Parquet files, and writing of csv without spreadsheet formulas.

Spreadsheets interpret cells that start with ``= + - @``, a tab or a carriage return as formulas. Such text
(not numbers) is written with a leading apostrophe, which is removed on reading.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from biopsy.core.errors import FileFormatError
from biopsy.core.files import replace_atomic
from biopsy.core.loaders import decode_text, open_regular, read_bytes, refusing

MAX_CSV_BYTES = 2**28  # 256 MiB uncompressed: 2 million rows of 120 characters
MAX_CELLS = 50_000_000  # an empty cell has one byte in a file and eight or more in memory
MAX_COLUMNS = 2_000
MAX_TABLE_BYTES = 2**30  # uncompressed size of a Parquet file

Kind = Literal["text", "integer", "number", "bool"]

_DELIMITERS = ",;\t"
_OTHER_FORMATS = {
    b"PK\x03\x04": "an Excel workbook or a zip",
    b"PAR1": "Parquet",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
}
_SEPARATOR = re.compile(rb"(\xef\xbb\xbf)?sep=(.)\r?\n")  # first line of a csv for Excel
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # existing apostrophes are kept
_INTEGER = r"[+-]?(?:0|[1-9][0-9]{0,17})"  # 64 bits; leading zeros are names
_NUMBER = r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"


def read_csv_table(
    path: Path | str, *, aliases: Mapping[str, str] | None = None, required: Sequence[str] = ()
) -> pd.DataFrame:
    """Read a csv file, every cell as text.

    Only empty cells are missing (``NA`` is text); empty rows are dropped. The delimiter is the most frequent
    of comma, semicolon and tab in the heading. Gzipped files are supported, addresses are not.

    Args:
        path: The file, UTF-8 with or without a byte order mark.
        aliases: Column names in the result by heading, whatever its letter case, spaces, dashes and
            underscores.

    Raises:
        FileFormatError: If it is missing, too large, not UTF-8, not a table, lacks a column, or two columns
            have the same name, also by ``aliases``.
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
    """Read the content of a csv file as `read_csv_table` does; ``path`` names it in errors."""
    if separator := _SEPARATOR.match(content):
        content = content[separator.end() :]
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
    maybe_blank = frame.iloc[:, 0].fillna(" ").str.isspace()
    is_blank = frame[maybe_blank].apply(
        lambda row: all(pd.isna(cell) or cell.isspace() for cell in row), axis=1
    )
    frame = frame.drop(index=frame.index[maybe_blank][is_blank.to_numpy(bool)]).reset_index(drop=True)
    return unmask_formulas(frame) if b"'" in content else frame


def write_csv(path: Path | str, table: pd.DataFrame) -> None:
    """Write a table as csv atomically, for `read_csv_table`."""
    has_returns = any("\r" in _join(table[name]) for name in _text_columns(table))
    quoting = (
        csv.QUOTE_NONNUMERIC if has_returns else csv.QUOTE_MINIMAL
    )  # which does not quote carriage returns
    masked = _map_text(table, _mask)
    with replace_atomic(path) as partial:
        masked.to_csv(partial, index=False, lineterminator="\n", encoding="utf-8", quoting=quoting)


def unmask_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the apostrophes of `write_csv`."""
    return _map_text(table, _unmask)


def _mask(cell: Any) -> Any:
    is_formula = isinstance(cell, str) and _FORMULA.match(cell) and not re.fullmatch(_NUMBER, cell)
    return f"'{cell}" if is_formula else cell


def _unmask(cell: Any) -> Any:
    is_masked = isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell)
    return cell[1:] if is_masked else cell


def _map_text(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """Apply a function to column names and cells that may be formulas."""
    changed = {
        name: table[name].map(change, na_action="ignore")
        for name in _text_columns(table)
        if re.search("\0" + _FORMULA.pattern, _join(table[name]))
    }
    return table.assign(**changed).rename(columns=change)


def _text_columns(table: pd.DataFrame) -> list[str]:
    return table.select_dtypes(["object", "string"]).columns.tolist()


def _join(cells: pd.Series) -> str:
    """Return all cells in one text separated by NUL, for a fast search."""
    return "\0" + "\0".join(map(str, cells.tolist()))


def infer_numbers(column: pd.Series) -> pd.Series:
    """Return a text column as numbers if every cell is a number, else unchanged.

    Cells such as ``007`` or integers beyond 64 bits are text.
    """
    cells = column.dropna()
    if cells.empty or not cells.str.fullmatch(_NUMBER).all():
        return column
    if cells.str.fullmatch(_INTEGER).all():
        return pd.to_numeric(column).astype("Int64" if column.isna().any() else "int64")
    if cells.str.fullmatch("[+-]?[0-9]+").all():
        return column
    values = pd.to_numeric(column).astype("float64")
    return values if values.abs().max() < float("inf") else column


def read_table(path: Path, texts: Collection[str]) -> pd.DataFrame:
    """Read a csv or Parquet file; csv columns of numbers become numbers, except ``texts`` (lower case)."""
    if path.suffix.lower() in (".parquet", ".pq"):
        return read_parquet_table(path)[0]
    table = read_csv_table(path)
    return table.apply(lambda column: column if str(column.name).lower() in texts else infer_numbers(column))


def find_column(table: pd.DataFrame, names: Iterable[str]) -> str | None:
    """Return the first column of a table that has one of the names, in any letter case; None without one."""
    lower = {str(name).lower(): str(name) for name in table.columns}
    return next((lower[name] for name in names if name in lower), None)


def read_parquet_table(
    path: Path | str, columns: Mapping[str, Kind] | None = None
) -> tuple[pd.DataFrame, dict[bytes, bytes]]:
    """Read a Parquet file of plain columns, and the metadata of its schema.

    Args:
        columns: Required columns and their kinds; values may be null.

    Raises:
        FileFormatError: If it is not a Parquet file, lacks a column, has one of another kind or of nested
            type, or is too large when uncompressed.
    """
    with open_regular(path) as file, refusing(path, "Parquet"):
        reader = pq.ParquetFile(file)
        schema = reader.schema_arrow
        _check_columns(path, schema, columns or {})
        metadata = reader.metadata
        _check_size(path, metadata.num_rows * len(schema) * 8)
        _check_size(path, sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)))
        texts = [field.name for field in schema if _is_text(field.type)]
        # dictionaries limit the memory of repeated texts to their size in the file
        packed = pq.ParquetFile(file, read_dictionary=texts).read()
        _check_size(path, sum(_count_bytes(packed[name]) for name in texts))
        return packed.cast(schema).to_pandas(), schema.metadata or {}


def read_parquet_metadata(path: Path | str) -> dict[bytes, bytes]:
    """Return the metadata of a Parquet file's schema; see `read_parquet_table`."""
    with open_regular(path) as file, refusing(path, "Parquet"):
        return pq.read_schema(file).metadata or {}


def _check_columns(path: Path | str, schema: pa.Schema, columns: Mapping[str, Kind]) -> None:
    names = schema.names
    if len(names) > MAX_COLUMNS or len(set(names)) < len(names):
        raise FileFormatError(path, "columns", f"has {len(names):,} columns, {len(set(names)):,} by name")
    missing = [name for name in columns if name not in names]
    if missing:
        raise FileFormatError(path, "columns", f"has no column {', '.join(missing)}")
    for field in schema:
        kind = columns.get(field.name)
        if pa.types.is_nested(field.type) or (kind and not _is_kind(field.type, kind)):
            expected = kind or "plain values"
            raise FileFormatError(path, "columns", f"holds {field.type} in {field.name}, expected {expected}")


def _is_kind(type: pa.DataType, kind: Kind) -> bool:
    if pa.types.is_null(type):
        return True
    if kind == "text":
        return _is_text(type)
    if kind == "bool":
        return pa.types.is_boolean(type)
    return pa.types.is_integer(type) or (kind == "number" and pa.types.is_floating(type))


def _is_text(type: pa.DataType) -> bool:
    return pa.types.is_string(type) or pa.types.is_large_string(type)


def _count_bytes(column: pa.ChunkedArray) -> int:
    """Return the number of bytes of a dictionary column as plain text."""
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(length.cast(pa.int64())).as_py() or 0 for length in lengths)


def _check_size(path: Path | str, n_bytes: int) -> None:
    if n_bytes > MAX_TABLE_BYTES:
        raise FileFormatError(
            path, "too-large", f"unpacks to {n_bytes:,} bytes where at most {MAX_TABLE_BYTES:,} are read"
        )


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
    """Return the delimiter and the names in the first row, after checks of the content."""
    for signature, name in _OTHER_FORMATS.items():
        if content.startswith(signature):
            raise FileFormatError(path, "format", f"is {name}, not a csv: save it as csv in UTF-8")
    if b"\0" in content:
        raise FileFormatError(path, "encoding", "holds NUL bytes: save it as csv in UTF-8")
    text = decode_text(content, path)
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
    by_letters = {_letters(alias): name for alias, name in aliases.items()}
    for number, written in enumerate(header):
        name = written.strip() or f"Unnamed: {number}"
        name = by_letters.get(_letters(name), name)
        if name in names:
            first = header[names.index(name)].strip()
            raise FileFormatError(
                path,
                "duplicate",
                f"has the columns {first!r} and {written.strip()!r}, which are one: keep one",
            )
        names.append(name)
    return names


def _letters(heading: str) -> str:
    return re.sub(r"[\s_-]", "", heading.lower())
