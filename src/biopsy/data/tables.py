"""Tables a user brings: who is who, what else is known of a patch, patient or slide, and corrected labels.

Several classes are folded into one here too.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pandas as pd

from biopsy.core.errors import DataError, FileFormatError, UserFileError, suggest
from biopsy.core.files import sha256_file
from biopsy.core.tables import infer_numbers, read_csv_table
from biopsy.core.text import find_lookalikes, list_unmatched, normalize_id, normalize_name
from biopsy.data.packs import COLUMNS
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
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)


def normalize_cells(cells: pd.Series, spell: Callable[[str], str] = normalize_name) -> pd.Series:
    """Return cells of text in one spelling, blank ones as missing."""
    spelt = [(spell(cell) or None) if isinstance(cell, str) else None for cell in cells]
    return pd.Series(spelt, index=cells.index, name=cells.name, dtype=object)


def read_patch_table(path: Path | str, aliases: dict[str, str] | None = None) -> pd.DataFrame:
    """Read a csv about patches, patients or slides: text in one spelling, keys as the pack has them.

    Args:
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
            logger.warning(
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
            logger.warning(
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
        logger.warning(
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
        logger.warning(
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


_HEADINGS = {name: name for name in ("label", "who", "when", "decision", "suggested")}


def relabel(
    table: pd.DataFrame, path: Path | str, class_names: Sequence[str]
) -> tuple[pd.DataFrame, list[str], dict[str, object]]:
    """Override labels by a csv and keep who, when, and what was before.

    Args:
        path: A csv with a column ``patch_id`` or ``source``, a column ``label`` (a class name, or its index
            where no class is called so), and optionally ``who`` and ``when``. A label that is no class yet
            becomes one, with a warning. With a column ``decision``, as in the sheet of ``label-issues``, that
            counts: ``yes`` takes the class in ``suggested``, ``no`` confirms ``label``, a class is itself;
            rows without a decision are as if not there.
        class_names: The classes of the dataset, in order.

    Returns:
        The table with ``class_name`` corrected and columns ``label_before``, ``label_by``, ``label_at`` (null
        for patches the csv does not name), the classes in order, and what was changed for the record.

    Raises:
        DataError: If the csv names unknown patches or likely misspelt classes, lacks a label, or holds no
            decision.
    """
    rows = read_patch_table(path, _HEADINGS)
    key = next((name for name in ("patch_id", "source") if name in rows.columns), None)
    if key is None or "label" not in rows.columns:
        raise DataError(
            f"{path} has the columns {', '.join(rows.columns)}; label and one of patch_id, source are needed"
        )
    check_keys(path, rows[key])
    n_rows = len(rows)
    rows = _take_decisions(path, rows, class_names)
    labels, new_names = _read_classes(path, rows, key, class_names)
    unknown = rows.loc[~rows[key].isin(table[key]), key]
    if len(unknown):
        names = list_unmatched(unknown, table[key])
        raise DataError(f"{path} names {len(unknown):,} patches that are not in the dataset: {names}")
    by_key = rows.assign(label=labels).set_index(key)
    named = table[key].isin(by_key.index)
    new = by_key.reindex(table[key]).set_axis(table.index)
    before = table["class_name"]
    table = table.assign(
        class_name=new["label"].where(named, before),
        label_before=before.where(named, None),
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
        left = set(table["class_name"])
        class_names = [name for name in class_names if name in left] + new_names
    return table, list(class_names), record


def refuse_decided(path: Path) -> None:
    """Refuse to write over a sheet of labels on which a person has decided.

    Raises:
        UserFileError: If ``path`` is a csv with decisions.
    """
    try:
        rows = read_csv_table(path)
    except FileFormatError:
        return
    decided = rows["decision"].notna().sum() if "decision" in rows else 0
    if decided:
        raise UserFileError(
            path, "edited", f"holds {decided:,} decisions already: name another --out, or move it away"
        )


def fold_classes(
    table: pd.DataFrame,
    class_names: Sequence[str],
    positive: str | Sequence[str] | None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> tuple[pd.DataFrame, list[str], str | None]:
    """Name the positive class, folding several into one against all others.

    With two classes, the one named is positive and nothing else changes. With more, the named ones become one
    class (their names joined by ``+``) and the rest ``other``; what they were stays in ``original_class``.

    Args:
        class_names: The classes of the dataset, in order.
        positive: Names of positive classes, as a list or separated by commas, or the name of a group.
        groups: Groups of classes that have a name of their own; every class becomes that of its group.

    Returns:
        The table, its class names in order, and the positive one.

    Raises:
        DataError: If a name is no class, or no class would be left on the other side.
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
            raise DataError(f"--positive {name!r} is no class of this dataset; {suggest(name, class_names)}")
    rest = [name for name in class_names if name not in names]
    if len(class_names) == 1 and list(class_names) == names:  # a set of one class, all of it positive
        return table, names, names[0]
    if not rest or not names:
        raise DataError(
            f"--positive {positive!r} must leave classes on both sides; known: {', '.join(class_names)}"
        )
    if len(class_names) == 2:
        return table, list(class_names), names[0]
    folded, other = "+".join(dict.fromkeys(names)), rest[0] if len(rest) == 1 else "other"
    original = table["class_name"]
    class_name = pd.Series(other, index=table.index, dtype=original.dtype).where(
        ~original.isin(names), folded
    )
    return table.assign(original_class=original, class_name=class_name), [other, folded], folded


def _take_decisions(path: Path | str, rows: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Keep the rows a person has decided on, with that as their label; all rows of a csv of labels."""
    if "decision" not in rows:
        return rows
    rows = rows[rows["decision"].notna()]
    decision = rows["decision"]
    if rows.empty:
        raise DataError(f"{path}: column decision is empty: write yes, no or a class for what you looked at")
    for word, column in (("yes", "suggested"), ("no", "label")):
        meant = (decision.str.lower() == word) & ~decision.isin(class_names)
        if meant.any() and column not in rows:
            raise DataError(f"{path} decides {word!r}, which stands for column {column}, and has none")
        decision = decision.where(~meant, rows[column] if column in rows else decision)
    return rows.assign(label=decision)


def _read_classes(
    path: Path | str, rows: pd.DataFrame, key: str, class_names: Sequence[str]
) -> tuple[pd.Series, list[str]]:
    """Return the class of each row, and those that are new."""
    by_name = {str(index): name for index, name in enumerate(class_names)}
    by_name |= {name: name for name in class_names}
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
            f"{path} has {len(other):,} labels that are no class, {first['label']!r} for {first[key]} first; "
            f"known: {', '.join(class_names)}"
        )
    return classes.fillna(rows["label"]), new_names


def _is_misspelt(name: str, class_names: Sequence[str], new_names: Sequence[str]) -> bool:
    """Return whether a new class is a number, or so much like another that it is likely meant to be that."""
    others = [other for other in (*class_names, *new_names) if other != name]
    close = get_close_matches(name, class_names, n=1, cutoff=0.85)
    same_digits = bool(close) and re.findall("[0-9]+", name) == re.findall("[0-9]+", close[0])
    alike = any(name in group for group in find_lookalikes([name, *others]))
    return name.isdecimal() or same_digits or alike
