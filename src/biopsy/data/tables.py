"""Tables a user brings: who is who, and what else is known of a patch, a patient or a slide."""

import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd

from biopsy.core.errors import DataError
from biopsy.core.files import sha256_file
from biopsy.core.tables import unmask_formulas
from biopsy.data.packs import COLUMNS
from biopsy.slide_io.images import IMAGE_SUFFIXES

_log = logging.getLogger(__name__)

JOIN_KEYS = ("patch_id", "patient_id", "slide_id")
RESERVED = {
    *COLUMNS,
    "class_name",
    "original_class",
    "own_side",
    "row",
    "label_share",
    "label_before",
    "label_by",
    "label_at",
}

_PERSON_KEYS = ("patch_id", "id", "source", "slide_id")
_PERSON_COLUMNS = {
    "patient_id": "patient_id",
    "patient": "patient_id",
    "slide_id": "slide_id",
    "slide": "slide_id",
    "wsi": "slide_id",
    "site_id": "site_id",
    "site": "site_id",
}


def read_csv(path: Path | str, text_columns: tuple[str, ...] | None = None) -> pd.DataFrame:
    """Read a csv file, ids as text.

    Args:
        path: The file, plain or gzipped.
        text_columns: The columns that are text whatever they look like; None for all.

    Raises:
        DataError: If the file is missing, empty or no csv.
    """
    try:
        dtype: Any = str if text_columns is None else dict.fromkeys(text_columns, str)
        rows = pd.read_csv(path, dtype=dtype, low_memory=False)
        return unmask_formulas(rows.rename(columns=lambda name: str(name).strip()))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, EOFError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"{path} cannot be read as csv: {str(error).splitlines()[0]}") from None


def describe_file(path: Path | str) -> dict[str, str]:
    """Give a file's name and hash, for the record."""
    return {"file": Path(path).name, "sha256": sha256_file(path)}


def check_keys(path: Path | str, keys: pd.Series) -> None:
    """Refuse a key column with empty or repeated values."""
    if keys.isna().any():
        row = int(keys.isna().to_numpy().argmax())
        raise DataError(
            f"{path}: column {keys.name} is empty (NaN) in {keys.isna().sum():,} rows, first in row {row}"
        )
    twice = keys[keys.duplicated()]
    if len(twice):
        raise DataError(
            f"{path}: column {keys.name} names {len(twice):,} more than once, {twice.iloc[0]} first"
        )


def add_people(table: pd.DataFrame, people: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Fill ``patient_id``, ``slide_id`` and ``site_id`` from a csv or from a pattern for the path.

    Args:
        table: A listing's table.
        people: A csv with a column patch_id, id, source or slide_id and at least one of patient_id, slide_id
            (or wsi) and site_id; or a regular expression searched in ``source``, whose groups named patient,
            slide or site (or whose first group, the patient) are the ids.

    Returns:
        The table, and what was read for the record.

    Raises:
        DataError: If the csv or pattern names nobody of the table.
    """
    is_csv = Path(people).is_file() or str(people).lower().endswith((".csv", ".csv.gz"))
    found, record = _look_up_people(table, people) if is_csv else _match_people(table, str(people))
    for column in found:
        n_missing = int(found[column].isna().sum())
        if n_missing == len(table):
            raise DataError(f"--patients {people} gives none of the {len(table):,} patches a {column}")
        if n_missing:
            _log.warning(
                "%s gives %s of %s patches no %s", people, f"{n_missing:,}", f"{len(table):,}", column
            )
        record[f"without_{column}"] = n_missing
    return table.assign(**{column: found[column] for column in found}), record


def join_columns(table: pd.DataFrame, path: Path | str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add the columns of a csv, matched by ``patch_id``, else ``patient_id``, else ``slide_id``.

    A column ``site`` or ``site_id`` also fills ``site_id`` where the dataset has none. Empty cells stay null.

    Returns:
        The table, and what was joined for the record, with patches and rows that found no partner counted.

    Raises:
        DataError: If there is no key, one is empty or repeated, a column exists already, or nothing matches.
    """
    rows = read_csv(path, JOIN_KEYS)
    key = next((name for name in JOIN_KEYS if name in rows.columns), None)
    if key is None:
        raise DataError(
            f"{path} has the columns {list(rows.columns)}; one of {', '.join(JOIN_KEYS)} is needed"
        )
    check_keys(path, rows[key])
    rows = rows.set_index(key)
    fills_site = table["site_id"].isna().all() and "site_id" in rows.columns
    taken = sorted((RESERVED - ({"site_id"} if fills_site else set())) & set(rows.columns))
    if taken:
        raise DataError(
            f"{path}: the pack has columns named {', '.join(taken)} already; rename them in the csv"
        )
    known = table[key].isin(rows.index)
    if not known.any():
        raise DataError(f"{path}: no {key} is one of the dataset's, such as {table[key].iloc[0]!r}")
    joined = rows.reindex(table[key]).set_axis(table.index)
    if "site" in joined and table["site_id"].isna().all():
        joined["site_id"] = joined["site"].astype("string")
    record = {
        **describe_file(path),
        "key": key,
        "columns": [str(name) for name in rows.columns],
        "patches_without_row": int((~known).sum()),
        "rows_without_patch": int((~rows.index.isin(table[key])).sum()),
    }
    return table.assign(**{str(name): joined[name] for name in joined}), record


def _look_up_people(table: pd.DataFrame, path: Path | str) -> tuple[pd.DataFrame, dict[str, Any]]:
    rows = read_csv(path).rename(columns=str.lower)
    key = next((name for name in _PERSON_KEYS if name in rows.columns), None)
    values = {
        name: column for name, column in _PERSON_COLUMNS.items() if name in rows.columns and name != key
    }
    if key is None or not values:
        raise DataError(
            f"{path} has the columns {list(rows.columns)}; one of {', '.join(_PERSON_KEYS)} "
            "and one of patient_id, slide_id (or wsi), site_id are needed"
        )
    if key in ("patch_id", "id"):
        suffixes = "|".join(map(re.escape, IMAGE_SUFFIXES))
        rows[key] = rows[key].str.replace(rf"(?i)({suffixes})$", "", regex=True)
    check_keys(path, rows[key])
    people = rows.set_index(key)[list(values)].rename(columns=values)
    column = "patch_id" if key == "id" else key
    return people.reindex(table[column]).set_axis(table.index), {**describe_file(path), "key": key}


def _match_people(table: pd.DataFrame, pattern: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--patients {pattern!r} is neither a csv file nor a pattern: {error}") from None
    named = {name: _PERSON_COLUMNS[name] for name in expression.groupindex if name in _PERSON_COLUMNS}
    if not expression.groups or (expression.groupindex and not named):
        raise DataError(
            f"--patients {pattern!r} needs a group for the patient, such as '(?P<patient>[0-9]+)_'"
        )
    groups = {column: expression.groupindex[name] for name, column in named.items()} or {"patient_id": 1}
    matches = [expression.search(source) for source in table["source"]]
    found = {column: [match and match[group] for match in matches] for column, group in groups.items()}
    return pd.DataFrame(found, index=table.index), {"pattern": pattern}
