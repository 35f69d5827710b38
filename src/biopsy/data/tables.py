"""Tables a user brings: who is who, and what else is known of a patch, a patient or a slide."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from biopsy.core.errors import DataError
from biopsy.core.files import sha256_file
from biopsy.core.tables import infer_numbers, read_csv_table
from biopsy.core.text import find_lookalikes, list_unmatched, normalize_id, normalize_name
from biopsy.data.packs import COLUMNS
from biopsy.slide_io.images import IMAGE_SUFFIXES

_log = logging.getLogger(__name__)

JOIN_KEYS = ("patch_id", "patient_id", "slide_id")
ID_COLUMNS = ("patient_id", "slide_id", "site_id")
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

_PATCH_KEYS = ("patch_id", "id", "source")
_PERSON_COLUMNS = {
    "patient_id": "patient_id",
    "patient": "patient_id",
    "slide_id": "slide_id",
    "slide": "slide_id",
    "wsi": "slide_id",
    "site_id": "site_id",
    "site": "site_id",
}
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)


def normalize_cells(cells: pd.Series, spell: Callable[[str], str] = normalize_name) -> pd.Series:
    """Return cells of text in one spelling, blank ones as missing."""
    spelt = [(spell(cell) or None) if isinstance(cell, str) else None for cell in cells]
    return pd.Series(spelt, index=cells.index, name=cells.name, dtype=object)


def read_patch_table(path: Path | str, aliases: dict[str, str] | None = None) -> pd.DataFrame:
    """Read a csv about patches, patients or slides: text in one spelling, keys as the pack has them.

    Args:
        path: The file.
        aliases: Headings in lower case, and what their columns are called; those of keys are known.

    Raises:
        FileFormatError: If it is no csv, or two columns are one.
    """
    keys = {name: name for name in (*_PATCH_KEYS, *ID_COLUMNS)}
    rows = read_csv_table(path, aliases=keys | (aliases or {}))
    for name in rows.columns:
        rows[name] = normalize_cells(rows[name], normalize_id if name in ID_COLUMNS else normalize_name)
    for name in {"patch_id", "id"} & set(rows.columns):
        rows[name] = rows[name].str.replace(_SUFFIX, "", regex=True)
    return rows


def describe_file(path: Path | str) -> dict[str, str]:
    """Return a file's name and hash, for the record."""
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


def add_people(table: pd.DataFrame, people: str | Path) -> tuple[pd.DataFrame, dict[str, object]]:
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
    result, record = _look_up_people(table, people) if is_csv else _match_people(table, str(people))
    completed = {}
    for column in result:
        given, own = result[column], table[column]
        if given.isna().all():
            raise DataError(f"--patients {people} gives none of the {len(table):,} patches a {column}")
        differing = given.notna() & own.notna() & (given != own)
        if differing.any():
            first = table["patch_id"][differing].iloc[0]
            _log.warning(
                "--patients %s gives %s patches another %s than the source, %s for %s of %s first",
                *(
                    people,
                    f"{differing.sum():,}",
                    column,
                    given[differing].iloc[0],
                    own[differing].iloc[0],
                    first,
                ),
            )
        completed[column] = given.where(given.notna(), own)
        record[f"without_{column}"] = int(completed[column].isna().sum())
    return table.assign(**completed), record


def check_ids(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Look for ids that contradict each other, are misspelt or missing.

    Returns:
        The table, in which patches without a patient on a slide of one patient are that patient's, and how
        many those are (``by_slide``) and how many patches remain without a patient (``without``), where some
        have one.

    Raises:
        DataError: If one slide has several patients.
    """
    for column in (*ID_COLUMNS, "class_name"):
        for alike in find_lookalikes(table[column].dropna().unique())[:3]:
            _log.warning(
                "%s %s differ by letter case or zeros alone: if they are one, correct the spelling",
                *(column, " and ".join(map(repr, alike))),
            )
    known = table["slide_id"].notna() & table["patient_id"].notna()
    patients = table[known].groupby("slide_id", sort=False)["patient_id"].agg(["nunique", "unique"])
    torn = patients[patients["nunique"] > 1]
    if len(torn):
        raise DataError(
            f"{len(torn):,} slides have several patients, such as slide {torn.index[0]!r} of "
            f"{' and '.join(map(repr, torn['unique'].iloc[0][:2]))}: correct it, or give each patient's "
            "slides ids of their own"
        )
    missing = table["patient_id"].isna()
    if missing.all() or not missing.any():
        return table, {}
    of_slide = table["slide_id"].map({slide: ids[0] for slide, ids in patients["unique"].items()})
    patient_id = table["patient_id"].where(~missing, of_slide)
    counts = {
        "by_slide": int((missing & patient_id.notna()).sum()),
        "without": int(patient_id.isna().sum()),
    }
    if counts["without"]:
        first = table["patch_id"][patient_id.isna()].head(3)
        _log.warning(
            "%s of %s patches have no patient, %s first: `split` leaves them out, or counts each alone",
            *(f"{counts['without']:,}", f"{len(table):,}", ", ".join(first)),
        )
    return table.assign(patient_id=patient_id), counts


def join_columns(table: pd.DataFrame, path: Path | str) -> tuple[pd.DataFrame, dict[str, object]]:
    """Add the columns of a csv, matched by ``patch_id``, else ``patient_id``, else ``slide_id``.

    A column ``site`` or ``site_id`` also fills ``site_id`` where the dataset has none. Empty cells stay null.

    Returns:
        The table, and what was joined for the record, with patches and rows that found no partner counted.

    Raises:
        DataError: If there is no key, one is empty or repeated, a column exists already, or nothing matches.
    """
    rows = read_patch_table(path)
    key = next((name for name in JOIN_KEYS if name in rows.columns), None)
    if key is None:
        raise DataError(
            f"{path} has the columns {', '.join(rows.columns)}; one of {', '.join(JOIN_KEYS)} is needed"
        )
    check_keys(path, rows[key])
    rows = rows.set_index(key)
    fills_site = table["site_id"].isna().all() and "site_id" in rows.columns
    taken = sorted((RESERVED - ({"site_id"} if fills_site else set())) & set(rows.columns))
    if taken:
        raise DataError(
            f"{path}: the pack has columns named {', '.join(taken)} already; rename them in the csv"
        )
    _say_unmatched(path, rows.index, table[key])
    joined = rows.reindex(table[key]).set_axis(table.index)
    if "site" in joined and table["site_id"].isna().all():
        joined["site_id"] = joined["site"]
    record = {
        **describe_file(path),
        "key": key,
        "columns": [str(name) for name in rows.columns],
        "patches_without_row": int((~table[key].isin(rows.index)).sum()),
        "rows_without_patch": int((~rows.index.isin(table[key])).sum()),
    }
    for name in joined.columns.difference(["site", "site_id"]):
        cells = infer_numbers(joined[name])
        joined[name] = cells.astype(float) if cells.dtype == "Int64" else cells
    return table.assign(**joined.to_dict("series")), record


def _say_unmatched(path: Path | str, keys: pd.Index, known: pd.Series) -> None:
    """Warn of rows that no patch is of; refuse a table of which none is."""
    unmatched = keys[~keys.isin(known)]
    named = list_unmatched(unmatched, known.dropna().unique())
    if len(unmatched) == len(keys):
        raise DataError(
            f"{path}: no {known.name} is one of the dataset's, such as {known.iloc[0]!r}: {named}"
        )
    if len(unmatched):
        _log.warning(
            "%s: %s of %s rows are of no patch in the dataset: %s",
            *(path, f"{len(unmatched):,}", f"{len(keys):,}", named),
        )


def _look_up_people(table: pd.DataFrame, path: Path | str) -> tuple[pd.DataFrame, dict[str, object]]:
    rows = read_patch_table(path, _PERSON_COLUMNS)
    key = next((name for name in (*_PATCH_KEYS, "slide_id") if name in rows.columns), None)
    values = [name for name in ID_COLUMNS if name in rows.columns and name != key]
    if key is None or not values:
        raise DataError(
            f"{path} has the columns {', '.join(rows.columns)}; one of {', '.join(_PATCH_KEYS)}, slide_id "
            "and one of patient_id, slide_id (or wsi), site_id are needed"
        )
    check_keys(path, rows[key])
    people = rows.set_index(key)[values]
    known = table["patch_id" if key == "id" else key]
    _say_unmatched(path, people.index, known)
    return people.reindex(known).set_axis(table.index), {**describe_file(path), "key": key}


def _match_people(table: pd.DataFrame, pattern: str) -> tuple[pd.DataFrame, dict[str, object]]:
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
    result = pd.DataFrame(
        {column: [match and match[group] for match in matches] for column, group in groups.items()},
        index=table.index,
        dtype=object,
    )
    return result.apply(normalize_cells, spell=normalize_id), {"pattern": pattern}
