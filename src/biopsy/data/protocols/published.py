"""Published splits: official subsets, lists of cases, and splits reproduced by the method of a recipe."""

import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, SplitError, suggest
from biopsy.core.loaders import read_bytes
from biopsy.core.seeds import make_rng
from biopsy.core.tables import read_csv_table
from biopsy.core.text import list_unmatched, normalize_id, plural
from biopsy.data.protocols.groups import SUBSETS, Cases, Plan, Request

logger = logging.getLogger(__name__)
MAX_LIST_BYTES = 2**24
# Spellings of the subsets in published lists.
SUBSET_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}


def take_official_subsets(request: Request) -> Plan:
    """Return the official subsets of the data set, or those of the published lists of cases."""
    if request.cases is not None:
        return _subsets_by_case(request, request.cases)
    if not request.pack.has_official_subsets:
        raise SplitError(
            f"{request.pack.path.name} ({request.pack.info.dataset}) has no official subsets; give the "
            "published lists of cases with --cases, or use the protocol 'patients'",
            "missing",
        )
    subsets = request.pack.table["official_subset"].fillna("").to_numpy(str)
    return subsets, {"subsets_from": "the data set's own folders or files"}


def _subsets_by_case(request: Request, cases: Cases) -> Plan:
    if request.unit == "patch":
        raise SplitError(
            f"cases are patients, and {request.pack.path.name} has none; prepare it with --patients",
            "missing",
        )
    subset_of = read_cases(cases)
    groups = sorted(set(request.group_ids.tolist()))
    known_subsets = {group: subset_of[group] for group in groups if group in subset_of}
    if not known_subsets:
        raise SplitError(
            f"none of the {len(groups)} {plural(request.unit)}, such as {groups[0]!r}, is among the "
            f"{len(subset_of)} listed cases, such as {next(iter(subset_of))!r}",
            "patient",
        )
    subsets = pd.Series(request.group_ids).map(known_subsets).fillna("").to_numpy(str)
    missing = [case for case in subset_of if case not in known_subsets]
    unlisted = [group for group in groups if group not in known_subsets]
    if missing:
        logger.warning(
            "%d of %d listed cases are not in %s: %s",
            *(len(missing), len(subset_of), request.pack.path.name, list_unmatched(missing, unlisted)),
        )
    if unlisted:
        logger.warning(
            "%d of %d %s are in no list and left out: %s",
            *(len(unlisted), len(groups), plural(request.unit), list_unmatched(unlisted, missing)),
        )
    listed, present = list(subset_of.values()), list(known_subsets.values())
    return subsets, {
        "subsets_from": "published lists of cases",
        "cases": {
            subset: {"listed": listed.count(subset), "found": present.count(subset)} for subset in SUBSETS
        },
        "left_out": {"patients": len(unlisted), "patches": int((subsets == "").sum())},
    }


def read_cases(cases: Cases) -> dict[str, str]:
    """Read the subset of each case.

    Args:
        cases: A csv with the columns ``case_id`` and ``split``; a folder with ``cases_train.txt``,
            ``cases_val.txt`` and ``cases_test.txt``, one id per line; or those three files.

    Returns:
        The subset of each case.

    Raises:
        SplitError: If a list is missing, a subset is unknown, or a case is in two subsets.
    """
    if isinstance(cases, str | Path) and not Path(cases).is_dir():
        pairs = _read_case_table(Path(cases))
    else:
        paths = [Path(cases)] if isinstance(cases, str | Path) else [Path(path) for path in cases]
        pairs = [pair for subset in SUBSETS for pair in _read_case_list(paths, subset)]
    subset_of: dict[str, str] = {}
    for case, subset in pairs:
        if subset_of.setdefault(case, subset) != subset:
            raise SplitError(
                f"case {case} is listed in {subset_of[case]} and in {subset}; it must be in one of them",
                "overlap",
            )
    if not subset_of:
        raise SplitError(f"{cases} lists no cases", "missing")
    return subset_of


def _read_case_table(path: Path) -> list[tuple[str, str]]:
    columns = ("case_id", "split")
    try:
        table = read_csv_table(path, aliases={name: name for name in columns}, required=columns)
    except DataError as error:
        raise SplitError(f"the list of cases {error}", error.reason) from None
    pairs = []
    for case, word in table[list(columns)].fillna("").itertuples(index=False):
        case, word = normalize_id(case), word.strip().lower()
        if not case or word not in SUBSET_WORDS:
            raise SplitError(
                f"{path}: case {case!r} has the subset {word!r}; use train, validation or test", "name"
            )
        pairs.append((case, SUBSET_WORDS[word]))
    return pairs


def _read_case_list(paths: list[Path], subset: str) -> list[tuple[str, str]]:
    name = f"cases_{'val' if subset == 'validation' else subset}.txt"
    candidates = [path / name if path.is_dir() else path for path in paths]
    for path in candidates:
        if path.name == name and path.is_file():
            try:
                text = read_bytes(path, max_bytes=MAX_LIST_BYTES).decode("utf-8-sig")
            except UnicodeDecodeError:
                raise SplitError(f"{path} is not UTF-8: save it as UTF-8", "encoding") from None
            cases = map(normalize_id, text.splitlines())
            return [(case, subset) for case in cases if case]
    raise SplitError(
        f"{name} was not found in {', '.join(map(str, paths))}; all three published lists are needed",
        "missing",
    )


def follow_recipe(request: Request) -> Plan:
    """Make the published split of a recipe, by the method in its ``[as_published.split]`` table."""
    if not request.recipe:
        raise SplitError(
            "protocol as-published needs a recipe with a published split, such as --recipe cancernet-2020",
            "missing",
        )
    method = str(request.recipe.get("method"))
    if method not in PUBLISHED_METHODS:
        raise SplitError(
            f"unknown split method {method!r} in the recipe; {suggest(method, PUBLISHED_METHODS)}", "name"
        )
    subsets, parameters = PUBLISHED_METHODS[method](request)
    return subsets, {"recipe": dict(request.recipe), **parameters}


def shuffle_paths(request: Request) -> Plan:
    """Shuffle the sorted paths with ``random``: train, then test; validation is the first part of train."""
    seed, train, validation = _read_options(
        request.recipe, "shuffled-paths", seed=int, train=float, validation=float
    )
    order = list(_sort_paths(request))
    random.Random(seed).shuffle(order)
    n_train = int(len(order) * train)
    n_val = int(n_train * validation)
    subsets = np.full(len(order), "test", dtype="<U10")
    subsets[order[:n_train]] = "train"
    subsets[order[:n_val]] = "validation"
    return subsets, {}


def take_first_files(request: Request) -> Plan:
    """Divide the first files of a recursive glob at random, then undersample the subsets the recipe names.

    Paths are sorted, since the order of a glob depends on the file system. Patches beyond the first ``count``
    and those dropped by undersampling are in no subset. With ``test_is_validation`` the validation subset is
    empty: the test subset is also used for validation, as published.
    """
    count, share, seed = _read_options(request.recipe, "first-files", count=int, test=float, seed=int)
    recipe, target = request.recipe or {}, request.pack.target
    rng = make_rng(seed, "first-files")
    taken = rng.permutation(_sort_paths(request)[:count])
    n_test = round(len(taken) * share)
    subsets = np.full(len(target), "", dtype="<U10")
    subsets[taken[:n_test]] = "test"
    subsets[taken[n_test:]] = "train"
    for subset in recipe.get("undersample", ()):  # type: ignore[attr-defined]
        rows = rng.permutation(np.flatnonzero(subsets == subset))
        per_class = np.bincount(target[rows])
        n_rarest = per_class[per_class > 0].min(initial=len(rows))
        for class_index in np.flatnonzero(per_class > n_rarest):
            subsets[rows[target[rows] == class_index][n_rarest:]] = ""
    return subsets, {"taken": len(taken), "test_is_validation": bool(recipe.get("test_is_validation", False))}


def cut_rows(request: Request) -> Plan:
    """Divide the rows of Kaggle's csv in order into 70, 20 and 10 %; one row is dropped at each border."""
    table = request.pack.table
    if "row" not in table.columns or table["row"].isna().any():
        raise SplitError(
            f"{request.pack.path.name} lacks the row numbers of Kaggle's train_labels.csv; prepare it again",
            "missing",
        )
    rows = table["row"].to_numpy(np.int64)
    n_rows = int(rows.max()) + 1
    first, second = int(n_rows * 0.7), int(n_rows * 0.9)
    subsets = np.select([rows < first, rows < second], ["train", "validation"], "test")
    subsets[(rows == first) | (rows == second)] = ""
    return subsets, {"n_rows": n_rows, "dropped_rows": [first, second]}


def _read_options(
    recipe: Mapping[str, object] | None, method: str, **kinds: Callable[[Any], Any]
) -> list[Any]:
    """Return the values of a method's keys in the recipe, in order."""
    try:
        return [kind((recipe or {})[key]) for key, kind in kinds.items()]
    except KeyError as error:
        *keys, last = kinds
        raise SplitError(
            f"the split method {method!r} needs {', '.join(keys)} and {last}; {error} is missing", "missing"
        ) from None


def _sort_paths(request: Request) -> np.ndarray:
    """Return the rows of the pack in order of their paths in the archive."""
    return np.argsort(request.pack.table["source"].to_numpy(str), kind="stable")


PUBLISHED_METHODS: dict[str, Callable[[Request], Plan]] = {
    "shuffled-paths": shuffle_paths,
    "first-files": take_first_files,
    "kaggle-rows": cut_rows,
}
