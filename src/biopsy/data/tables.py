"""User tables of patients, metadata and corrected labels, and merging of classes."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pandas as pd

from biopsy.core.errors import DataError, FileFormatError, UserFileError, suggest
from biopsy.core.files import sha256_file
from biopsy.core.tables import infer_numbers, read_csv_table
from biopsy.core.text import find_lookalikes, list_unmatched, normalize_id, normalize_name, normalize_path
from biopsy.data.pack_files import COLUMNS
from biopsy.slide_io.images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)


JOIN_KEYS = ("patch_id", "patient_id", "slide_id")
ID_COLUMNS = ("patient_id", "slide_id", "site_id")
RESERVED = {
    *COLUMNS,
    "class_name",
    "original_class",
    "official_subset",
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
# What stands for no patient in some tables, and what spreadsheets write for errors and rounded numbers.
_NO_ID = re.compile(
    r"<?n/?a>?|nan|none|null|nil|unknown|missing|undefined|not available|[?.-]+|-1|"
    r"#(n/a|ref!|name\?|value!|div/0!|num!|null!)|#{2,}|\d([.,]\d+)?e\+?\d+",
    re.IGNORECASE,
)
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)


def normalize_cells(cells: pd.Series, spell: Callable[[str], str] = normalize_name) -> pd.Series:
    """Return normalised text cells, blank cells as missing."""
    spelt = [(spell(cell) or None) if isinstance(cell, str) else None for cell in cells]
    return pd.Series(spelt, index=cells.index, name=cells.name, dtype=object)


def read_patch_table(path: Path | str, aliases: dict[str, str] | None = None) -> pd.DataFrame:
    """Read a csv of patches, patients or slides, with normalised text and the pack's key columns.

    Args:
        aliases: Column names by heading in lower case, besides those of the keys.
    """
    keys = {name: name for name in (*_PATCH_KEYS, *ID_COLUMNS)}
    rows = read_csv_table(path, aliases=keys | (aliases or {}))
    for name in rows.columns:
        spell = (
            normalize_id if name in ID_COLUMNS else normalize_path if name in _PATCH_KEYS else normalize_name
        )
        rows[name] = normalize_cells(rows[name], spell)
    for name in {"patch_id", "id"} & set(rows.columns):
        rows[name] = rows[name].str.replace(_SUFFIX, "", regex=True)
    return rows


def describe_file(path: Path | str) -> dict[str, str]:
    """Return name and hash of a file, for ``pack.json``."""
    return {"file": Path(path).name, "sha256": sha256_file(path)}


def _find_key(path: Path | str, rows: pd.DataFrame, keys: Sequence[str], values: Sequence[str] = ()) -> str:
    """Return the first key column of a table, without empty or repeated values; checks for ``values`` too."""
    key = next((name for name in keys if name in rows), None)
    if key is None or (values and not any(name in rows and name != key for name in values)):
        more = f" and one of {', '.join(values)}" if values else ""
        raise DataError(
            f"{path} has the columns {', '.join(rows.columns)}; one of {', '.join(keys)}{more} is needed"
        )
    empty, twice = rows[key].isna(), rows[key][rows[key].duplicated()]
    if empty.any():
        row = int(empty.to_numpy().argmax())
        raise DataError(f"{path}: column {key} is empty (NaN) in {empty.sum():,} rows, first in row {row}")
    if len(twice):
        raise DataError(f"{path}: column {key} has {len(twice):,} repeated values, {twice.iloc[0]} first")
    return key


def join_patients(table: pd.DataFrame, patients: str | Path) -> tuple[pd.DataFrame, dict[str, object]]:
    """Fill ``patient_id``, ``slide_id`` and ``site_id`` from a csv or from a pattern for the path.

    Args:
        patients: A csv with a column patch_id, id, source or slide_id and at least one of patient_id,
            slide_id (or wsi) and site_id; or a regular expression searched in ``source``, with groups named
            patient, slide or site (or a first group, the patient).

    Returns:
        The table, and the record for ``pack.json``.

    Raises:
        DataError: If the csv or pattern matches no row of the table.
    """
    is_csv = Path(patients).is_file() or str(patients).lower().endswith((".csv", ".csv.gz"))
    result, record = _look_up_patients(table, patients) if is_csv else _match_patients(table, str(patients))
    completed = {}
    for column in result:
        added, existing = result[column], table[column]
        if added.isna().all():
            raise DataError(f"--patients {patients} has no {column} for any of the {len(table):,} patches")
        differing = added.notna() & existing.notna() & (added != existing)
        if differing.any():
            first = table["patch_id"][differing].iloc[0]
            logger.warning(
                "--patients %s changes for %s patches the %s of the source, %s for %s of %s first",
                *(
                    patients,
                    f"{differing.sum():,}",
                    column,
                    added[differing].iloc[0],
                    existing[differing].iloc[0],
                    first,
                ),
            )
        completed[column] = added.where(added.notna(), existing)
        record[f"without_{column}"] = int(completed[column].isna().sum())
    return table.assign(**completed), record


def check_ids(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Check ids for contradictions, likely misspellings and missing values.

    Returns:
        The table, with missing patients filled in from other patches of the same slide, and the numbers of
        patches filled in (``by_slide``) and still without a patient (``without``), if some have one.

    Raises:
        DataError: If one slide has several patients, or the patients are the classes.
    """
    if (table["patient_id"] == table["class_name"]).all():
        raise DataError(
            "the patient of every patch is its class: correct --patients, which may match the class folder"
        )
    doubtful = [name for name in table["patient_id"].dropna().unique() if _NO_ID.fullmatch(name)]
    if doubtful:
        logger.warning(
            "patient_id %s: taken for a patient each; leave the cells empty if the patient is unknown, and "
            "restore ids that a spreadsheet rounded or could not compute",
            ", ".join(map(repr, doubtful[:3])) + (" ..." if len(doubtful) > 3 else ""),
        )
    for column in (*ID_COLUMNS, "class_name"):
        for lookalikes in find_lookalikes(table[column].dropna().unique())[:3]:
            logger.warning(
                "%s %s differ only by letter case, zeros, dashes, spaces or the form of a number: "
                "correct the spelling if they are the same",
                *(column, " and ".join(map(repr, lookalikes))),
            )
    complete = table["slide_id"].notna() & table["patient_id"].notna()
    patients = table[complete].groupby("slide_id", sort=False)["patient_id"].agg(["nunique", "unique"])
    contradictory = patients[patients["nunique"] > 1]
    if len(contradictory):
        raise DataError(
            f"{len(contradictory):,} slides have several patients, such as slide {contradictory.index[0]!r} "
            f"of {' and '.join(map(repr, contradictory['unique'].iloc[0][:2]))}: correct it, or use a "
            "separate slide id for each patient"
        )
    missing = table["patient_id"].isna()
    if missing.all() or not missing.any():
        return table, {}
    slide_patient = table["slide_id"].map({slide: ids[0] for slide, ids in patients["unique"].items()})
    patient_id = table["patient_id"].where(~missing, slide_patient)
    counts = {
        "by_slide": int((missing & patient_id.notna()).sum()),
        "without": int(patient_id.isna().sum()),
    }
    if counts["without"]:
        first = table["patch_id"][patient_id.isna()].head(3)
        logger.warning(
            "%s of %s patches have no patient, %s first: `split` excludes them, or makes each its own group",
            *(f"{counts['without']:,}", f"{len(table):,}", ", ".join(first)),
        )
    return table.assign(patient_id=patient_id), counts


def join_columns(table: pd.DataFrame, path: Path | str) -> tuple[pd.DataFrame, dict[str, object]]:
    """Join the columns of a csv by ``patch_id``, else ``patient_id``, else ``slide_id``.

    A column ``site`` or ``site_id`` also fills ``site_id`` if the data set has none. Empty cells are null.

    Returns:
        The table, and the record for ``pack.json`` with the numbers of unmatched patches and rows.

    Raises:
        DataError: If there is no key, a key is empty or repeated, a column exists already, or no row matches.
    """
    rows = read_patch_table(path)
    key = _find_key(path, rows, JOIN_KEYS)
    rows = rows.set_index(key)
    fills_site = table["site_id"].isna().all() and "site_id" in rows.columns
    taken = sorted((RESERVED - ({"site_id"} if fills_site else set())) & set(rows.columns))
    if taken:
        raise DataError(
            f"{path}: the pack has columns named {', '.join(taken)} already; rename them in the csv"
        )
    _check_matches(path, rows.index, table[key])
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
        is_text = pd.api.types.is_string_dtype(cells) or cells.dtype == object
        if is_text and cells.dropna().astype(str).str.fullmatch(r"[+-]?\d+,\d+").any():
            logger.warning("%s: column %s has decimal commas and is read as text; write points", path, name)
        joined[name] = cells.astype(float) if cells.dtype == "Int64" else cells
    return table.assign(**joined.to_dict("series")), record


def _check_matches(path: Path | str, keys: pd.Index, ids: pd.Series) -> None:
    """Warn of rows without a patch; refuse a table without any match."""
    if not len(keys):
        raise DataError(f"{path} has no rows below its heading")
    unmatched = keys[~keys.isin(ids)]
    examples = list_unmatched(unmatched, ids.dropna().unique())
    if len(unmatched) == len(keys):
        raise DataError(f"{path}: no {ids.name} matches the data set, such as {ids.iloc[0]!r}: {examples}")
    if len(unmatched):
        logger.warning(
            "%s: %s of %s rows match no patch of the data set: %s",
            *(path, f"{len(unmatched):,}", f"{len(keys):,}", examples),
        )


def _look_up_patients(table: pd.DataFrame, path: Path | str) -> tuple[pd.DataFrame, dict[str, object]]:
    rows = read_patch_table(path, _PERSON_COLUMNS)
    key = _find_key(path, rows, (*_PATCH_KEYS, "slide_id"), ID_COLUMNS)
    values = [name for name in ID_COLUMNS if name in rows.columns and name != key]
    patients = rows.set_index(key)[values]
    keys = table["patch_id" if key == "id" else key]
    _check_matches(path, patients.index, keys)
    return patients.reindex(keys).set_axis(table.index), {**describe_file(path), "key": key}


def _match_patients(table: pd.DataFrame, pattern: str) -> tuple[pd.DataFrame, dict[str, object]]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(
            f"--patients {pattern!r} is neither a csv file nor a regular expression: {error}"
        ) from None
    columns = {name: _PERSON_COLUMNS[name] for name in expression.groupindex if name in _PERSON_COLUMNS}
    if not expression.groups or (expression.groupindex and not columns):
        raise DataError(
            f"--patients {pattern!r} needs a group for the patient, such as '(?P<patient>[0-9]+)_'"
        )
    groups = {column: expression.groupindex[name] for name, column in columns.items()} or {"patient_id": 1}
    matches = [expression.search(source) for source in table["source"]]
    result = pd.DataFrame(
        {column: [match and match[group] for match in matches] for column, group in groups.items()},
        index=table.index,
        dtype=object,
    )
    return result.apply(normalize_cells, spell=normalize_id), {"pattern": pattern}


_HEADINGS = {name: name for name in ("label", "who", "when", "decision", "suggested")}


def relabel(
    table: pd.DataFrame, path: Path | str, class_names: Sequence[str]
) -> tuple[pd.DataFrame, list[str], dict[str, object]]:
    """Override labels by a csv and record the previous label, who changed it and when.

    Args:
        path: A csv with a column ``patch_id`` or ``source``, a column ``label`` (class name or index), and
            optionally ``who`` and ``when``. Unknown labels become new classes, with a warning. A column
            ``decision``, as in the sheet of ``label-issues``, takes precedence: ``yes`` applies the class in
            ``suggested``, ``no`` confirms ``label``, a class name is applied; other rows are ignored.

    Returns:
        The table with corrected ``class_name`` and columns ``label_before``, ``label_by``, ``label_at`` (null
        for patches not in the csv), the classes in order, and the record for ``pack.json``.

    Raises:
        DataError: If the csv has unknown patches, likely misspelt classes or missing labels, or no decision.
    """
    rows = read_patch_table(path, _HEADINGS)
    key = _find_key(path, rows, ("patch_id", "source"), ("label",))
    n_rows = len(rows)
    rows = _apply_decisions(path, rows, class_names)
    labels, new_names = _read_classes(path, rows, key, class_names)
    unknown = rows.loc[~rows[key].isin(table[key]), key]
    if len(unknown):
        names = list_unmatched(unknown, table[key])
        raise DataError(f"{path} names {len(unknown):,} patches that are not in the dataset: {names}")
    by_key = rows.assign(label=labels).set_index(key)
    is_listed = table[key].isin(by_key.index)
    new = by_key.reindex(table[key]).set_axis(table.index)
    before = table["class_name"]
    table = table.assign(
        class_name=new["label"].where(is_listed, before),
        label_before=before.where(is_listed, None),
        label_by=new["who"] if "who" in new else None,
        label_at=new["when"] if "when" in new else None,
    )
    n_changed = int((table["class_name"] != before).sum())
    record = {
        **describe_file(path),
        "named": len(rows),
        "changed": n_changed,
        "confirmed": len(rows) - n_changed,
        "undecided": n_rows - len(rows),
    }
    if new_names:
        logger.warning("%s adds the classes %s", path, ", ".join(new_names))
        record["new_classes"] = new_names
        remaining = set(table["class_name"])
        class_names = [name for name in class_names if name in remaining] + new_names
    return table, list(class_names), record


def refuse_decided(path: Path) -> None:
    """Refuse to overwrite a sheet of label issues that has decisions."""
    try:
        rows = read_csv_table(path)
    except FileFormatError:
        return
    decided = rows["decision"].notna().sum() if "decision" in rows else 0
    if decided:
        raise UserFileError(
            path, "edited", f"has {decided:,} decisions: choose another --out, or move it away"
        )


def fold_classes(
    table: pd.DataFrame,
    class_names: Sequence[str],
    positive: str | Sequence[str] | None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> tuple[pd.DataFrame, list[str], str | None]:
    """Set the positive class, merging several classes into one.

    Of two classes, the named one is positive. Of more, the named ones are merged (names joined by ``+``) and
    the others become ``other``; ``original_class`` keeps the original names.

    Args:
        positive: Names of positive classes, as a list or separated by commas, or the name of a group.
        groups: Named groups of classes; with a group name, each class becomes its group.

    Returns:
        The table, its class names in order, and the positive class.

    Raises:
        DataError: If a name is unknown, or no negative class would be left.
    """
    names = (
        [name.strip() for name in positive.split(",")] if isinstance(positive, str) else list(positive or ())
    )
    group_of = {name: group for group, members in (groups or {}).items() for name in members}
    if len(names) == 1 and names[0] in (groups or {}) and set(class_names) <= group_of.keys():
        original = table["class_name"]
        table = table.assign(original_class=original, class_name=original.map(group_of))
        others = [
            group for group in (groups or {}) if group != names[0] and group in set(table["class_name"])
        ]
        return table, [*others, names[0]], names[0]
    for name in names:
        if name not in class_names:
            raise DataError(
                f"--positive {name!r} is not a class of this data set; {suggest(name, class_names)}"
            )
    negative_names = [name for name in class_names if name not in names]
    if len(class_names) == 1 and list(class_names) == names:  # the only class is the positive one
        return table, names, names[0]
    if not negative_names or not names:
        raise DataError(
            f"--positive {positive!r} must leave a negative class; known: {', '.join(class_names)}"
        )
    if len(class_names) == 2:
        return table, list(class_names), names[0]
    folded, other = "+".join(dict.fromkeys(names)), negative_names[0] if len(negative_names) == 1 else "other"
    original = table["class_name"]
    class_name = pd.Series(other, index=table.index, dtype=original.dtype).where(
        ~original.isin(names), folded
    )
    return table.assign(original_class=original, class_name=class_name), [other, folded], folded


def _apply_decisions(path: Path | str, rows: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the rows with a decision, applied to their label; all rows if there is no such column."""
    if "decision" not in rows:
        return rows
    rows = rows[rows["decision"].notna()]
    decision = rows["decision"]
    if rows.empty:
        raise DataError(f"{path}: column decision is empty: enter yes, no or a class for reviewed patches")
    for word, column in (("yes", "suggested"), ("no", "label")):
        is_meant = (decision.str.lower() == word) & ~decision.isin(class_names)
        if is_meant.any() and column not in rows:
            raise DataError(f"{path}: decision {word!r} needs the column {column}, which is missing")
        decision = decision.where(~is_meant, rows[column] if column in rows else decision)
    return rows.assign(label=decision)


def _read_classes(
    path: Path | str, rows: pd.DataFrame, key: str, class_names: Sequence[str]
) -> tuple[pd.Series, list[str]]:
    """Return the class of each row, and the new classes."""
    by_name = {str(index): name for index, name in enumerate(class_names)}
    by_name |= {name: name for name in class_names}
    labels = rows["label"].where(rows["label"].isin(by_name), rows["label"].map(normalize_id, "ignore"))
    rows = rows.assign(label=labels)  # "1.0", as a column of numbers with gaps is written, is 1
    classes = rows["label"].map(by_name)
    other = rows[classes.isna()]
    new_names = sorted(set(other["label"].dropna()))
    alike = [name for name in new_names if _is_misspelt(name, class_names, new_names)]
    if other["label"].isna().any():
        first = other[other["label"].isna()].iloc[0]
        raise DataError(f"{path} has rows without a label, {first[key]} first")
    if alike or (len(other) and "decision" in rows):
        first = other[other["label"].isin(alike or new_names)].iloc[0]
        raise DataError(
            f"{path} has {len(other):,} unknown labels, {first['label']!r} for {first[key]} first; "
            f"known: {', '.join(class_names)}"
        )
    return classes.fillna(rows["label"]), new_names


def _is_misspelt(name: str, class_names: Sequence[str], new_names: Sequence[str]) -> bool:
    """Return whether a new class name is a number or a likely misspelling of another class."""
    others = [other for other in (*class_names, *new_names) if other != name]
    close = get_close_matches(name, class_names, n=1, cutoff=0.85)
    same_digits = bool(close) and re.findall("[0-9]+", name) == re.findall("[0-9]+", close[0])
    alike = any(name in group for group in find_lookalikes([name, *others]))
    return name.isdecimal() or same_digits or alike
