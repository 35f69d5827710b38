"""What class a patch is of: corrections by hand, on the record, and several classes folded into one."""

import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pandas as pd

from biopsy.core.errors import DataError, FileFormatError, UserFileError, suggest
from biopsy.core.tables import read_csv_table
from biopsy.core.text import find_lookalikes, list_unmatched
from biopsy.data.tables import check_keys, describe_file, read_patch_table

_log = logging.getLogger(__name__)

_HEADINGS = {name: name for name in ("label", "who", "when", "decision", "suggested")}


def relabel(
    table: pd.DataFrame, path: Path | str, class_names: Sequence[str]
) -> tuple[pd.DataFrame, list[str], dict[str, object]]:
    """Override labels by a csv and keep who, when, and what was before.

    Args:
        table: A listing's table.
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
        _log.warning("%s adds the classes %s", path, ", ".join(new_names))
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
        table: A listing's table.
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
    """Say whether a new class is a number, or so much like another that it is likely meant to be that."""
    others = [other for other in (*class_names, *new_names) if other != name]
    close = get_close_matches(name, class_names, n=1, cutoff=0.85)
    same_digits = bool(close) and re.findall("[0-9]+", name) == re.findall("[0-9]+", close[0])
    alike = any(name in group for group in find_lookalikes([name, *others]))
    return name.isdecimal() or same_digits or alike
