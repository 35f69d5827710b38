"""Protocols that divide patches into subsets or folds, published splits included; one function each."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, SplitError, suggest
from biopsy.core.loaders import read_bytes
from biopsy.core.seeds import make_rng
from biopsy.core.tables import read_csv_table
from biopsy.core.text import list_unmatched, normalize_id, plural
from biopsy.data.packs import Pack, Unit
from biopsy.data.pseudo_slides import (
    MIN_CLASS_SHARE,
    N_PSEUDO_SLIDES,
    cluster_appearance,
    describe_appearance,
    have_all_classes,
)

SUBSETS = ("train", "validation", "test")
Cases = Path | str | Sequence[Path | str]


def follow_recipe(request: "Request") -> "Plan":
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


def shuffle_paths(request: "Request") -> "Plan":
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


def take_first_files(request: "Request") -> "Plan":
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


def cut_rows(request: "Request") -> "Plan":
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


def _sort_paths(request: "Request") -> np.ndarray:
    """Return the rows of the pack in order of their paths in the archive."""
    return np.argsort(request.pack.table["source"].to_numpy(str), kind="stable")


PUBLISHED_METHODS: dict[str, Callable[["Request"], "Plan"]] = {
    "shuffled-paths": shuffle_paths,
    "first-files": take_first_files,
    "kaggle-rows": cut_rows,
}


logger = logging.getLogger(__name__)

NO_TEST = "no-test"
"""Protocol whose test subset is empty."""

PSEUDO_SLIDE = "pseudo_slide"
"""Further column of a split: the pseudo-slide of each patch."""

ALWAYS_TRAIN = -1
"""Fold number of patches that train in every fold."""

# Number of random assignments compared; fewer for very many groups, which are balanced by chance.
N_DRAWS = 20_000
MAX_ASSIGNED = 2_000_000
FRACTIONS = (0.70, 0.15, 0.15)  # of groups in train, validation and test
N_LINES = 16  # random lines through a slide, of which the one that divides it best is used

Plan = tuple[np.ndarray, dict[str, object]]


@dataclass(frozen=True)
class Request:
    """Input of a protocol.

    Attributes:
        group_ids: The group of each patch, ``(n_patches,)``.
        seed: Seed of random assignments.
        test_ids: Test groups (sites for ``site``, sites or official subsets for ``pseudo-slides``); for
            ``leave-one-out``, one fold each.
        val_ids: Validation groups (sites for ``site``).
        cases: A csv with ``case_id,split``, or the published lists.
        recipe: The ``[as_published.split]`` table of a recipe.
    """

    pack: Pack
    unit: Unit
    group_ids: np.ndarray
    seed: int
    n_folds: int
    test_ids: tuple[str, ...]
    val_ids: tuple[str, ...]
    cases: Cases | None
    recipe: Mapping[str, object] | None
    n_groups: int = N_PSEUDO_SLIDES


def divide_groups(
    group_ids: np.ndarray, target: np.ndarray, shares: Sequence[float], *, seed: int, unit: str = "patient"
) -> np.ndarray:
    """Divide groups into parts of given fractions, stratified by class.

    Of 20,000 random assignments with the right number of groups per part (2,000,000 / groups, if fewer), the
    one is chosen that minimises the sum, over parts and classes, of (observed - expected)² / expected, where
    observed is the part's fraction of the *groups with patches of the class*. Ties are resolved by the same
    sum over patches.

    Args:
        shares: Fractions of groups, each above 0; normalised to sum to 1.

    Returns:
        The part of each patch, int64 ``(n_patches,)``.
    """
    names, codes = np.unique(np.asarray(group_ids, dtype=str), return_inverse=True)
    fractions = np.asarray(shares, dtype=float) / np.sum(shares)
    if len(names) < len(fractions):
        raise SplitError(
            f"{len(names)} {plural(unit)} are too few for {len(fractions)} subsets or folds: "
            "one would be empty",
            "too-few",
        )
    counts = np.zeros((len(names), int(target.max()) + 1))
    np.add.at(counts, (codes, target), 1)
    counts = counts[:, counts.sum(axis=0) > 0]
    parts = np.repeat(np.arange(len(fractions)), _apportion(len(names), fractions))
    n_draws = max(1, min(N_DRAWS, MAX_ASSIGNED // len(names)))
    draws = make_rng(seed, "split").permuted(np.tile(parts, (n_draws, 1)), axis=1)
    patch_discrepancy, group_discrepancy = np.zeros((2, n_draws))
    for part, share in enumerate(fractions):
        in_part = (draws == part).astype(np.float64)
        for discrepancy, table in ((patch_discrepancy, counts), (group_discrepancy, counts > 0)):
            observed = in_part @ table / table.sum(axis=0)
            discrepancy += ((observed - share) ** 2).sum(axis=1) / share
    return draws[np.lexsort((patch_discrepancy, group_discrepancy.round(9)))[0]][codes]


def _apportion(n_groups: int, shares: np.ndarray) -> np.ndarray:
    """Round fractions to numbers of groups by the largest remainder method, each at least 1."""
    exact = n_groups * shares
    sizes = np.floor(exact + 1e-9).astype(int)
    largest_last = np.argsort((exact - sizes).round(9), kind="stable")
    sizes[largest_last[len(sizes) - (n_groups - sizes.sum()) :]] += 1
    while (sizes == 0).any():
        sizes[np.argmax(sizes)] -= 1
        sizes[np.argmin(sizes)] += 1
    return sizes


def split_by_patient(request: Request) -> Plan:
    """Assign groups to subsets: named groups as requested, the others by `divide_groups`."""
    check_known(request.test_ids + request.val_ids, request.group_ids, request.unit)
    both = sorted(set(request.test_ids) & set(request.val_ids))
    if both:
        raise SplitError(
            f"{request.unit} {both[0]} is named both for validation and for test; name it for one of them",
            "overlap",
        )
    subsets = np.full(len(request.group_ids), "", dtype="<U10")
    subsets[np.isin(request.group_ids, request.val_ids)] = "validation"
    subsets[np.isin(request.group_ids, request.test_ids)] = "test"
    named_ids = {"validation": request.val_ids, "test": request.test_ids}
    _divide_rest(request, subsets, [subset for subset in SUBSETS if not named_ids.get(subset)])
    return subsets, {"fractions": list(FRACTIONS), **_balance_note(request)} | _named_note(request)


def _divide_rest(request: Request, subsets: np.ndarray, names: Sequence[str]) -> None:
    """Divide the groups that are in no subset among some by `divide_groups`, in place."""
    rest = subsets == ""
    parts = divide_groups(
        request.group_ids[rest],
        request.pack.target[rest],
        [FRACTIONS[SUBSETS.index(name)] for name in names],
        seed=request.seed,
        unit=request.unit if rest.all() else f"remaining {request.unit}",
    )
    subsets[rest] = np.array(names)[parts]


def split_without_test(request: Request) -> Plan:
    """Let every group train but those that validate: named ones, or 15/85 of all by `divide_groups`."""
    if request.test_ids:
        raise SplitError(
            f"protocol no-test has no test subset, but {request.unit} {request.test_ids[0]} is named for "
            "one; use the protocol 'patients'",
            "value",
        )
    check_known(request.val_ids, request.group_ids, request.unit)
    if request.val_ids:
        is_validation = np.isin(request.group_ids, request.val_ids)
        return np.where(is_validation, "validation", "train").astype("<U10"), _named_note(request)
    subsets = np.full(len(request.group_ids), "", dtype="<U10")
    _divide_rest(request, subsets, SUBSETS[:2])
    return subsets, _balance_note(request)


def split_into_folds(request: Request) -> Plan:
    """Assign groups to folds by `divide_groups`."""
    if request.n_folds < 3:
        raise SplitError(
            f"{request.n_folds} folds are too few: 3 or more are needed (test, validation, train)", "too-few"
        )
    folds = divide_groups(
        request.group_ids,
        request.pack.target,
        [1.0] * request.n_folds,
        seed=request.seed,
        unit=request.unit,
    )
    return folds, {"n_folds": request.n_folds, **_balance_note(request)}


def leave_one_out(request: Request) -> Plan:
    """Make one fold for each named group in that order (default: all groups, sorted)."""
    check_known(request.test_ids, request.group_ids, request.unit)
    order = list(dict.fromkeys(request.test_ids)) or sorted(set(request.group_ids.tolist()))
    if len(order) < 2:
        raise SplitError(
            f"leave-one-out needs 2 or more {plural(request.unit)} (test and validation); got {order}",
            "too-few",
        )
    return _index_ids(request.group_ids, order), {"order": order}


def leave_one_site_out(request: Request) -> Plan:
    """Make one fold for each site, or subsets by site if test sites are named."""
    sites = request.pack.table["site_id"]
    if sites.isna().any():
        raise SplitError(
            f"{int(sites.isna().sum()):,} of {len(sites):,} patches have no site_id; add it with "
            "`biopsy prepare --join CSV` and a site_id column",
            "missing",
        )
    site_ids = sites.to_numpy(str)
    if request.test_ids:
        return _subsets_by_site(request, site_ids)
    order = sorted(set(site_ids.tolist()))
    if len(order) < 3:
        raise SplitError(
            f"{len(order)} sites ({', '.join(order)}) are too few: 3 or more are needed for folds; "
            "name the test site, and patients of the other sites are used for validation",
            "too-few",
        )
    return _index_ids(site_ids, order), {"order": order}


def _subsets_by_site(request: Request, site_ids: np.ndarray) -> Plan:
    check_known(request.test_ids + request.val_ids, site_ids, "site")
    subsets = np.full(len(site_ids), "train" if request.val_ids else "", dtype="<U10")
    subsets[np.isin(site_ids, request.val_ids)] = "validation"
    subsets[np.isin(site_ids, request.test_ids)] = "test"
    if not request.val_ids:
        _divide_rest(request, subsets, SUBSETS[:2])
    return subsets, _named_note(request)


def split_by_pseudo_slide(request: Request) -> Plan:
    """Assign clusters of patches alike in colour and texture to subsets, where no patient or slide is named.

    Validation (and, if no test is named, test) groups are drawn by `divide_groups` from those with enough
    patches of each class. Named official subsets or sites are tested; official validation and test subsets
    that are not named are left out.
    """
    pack = request.pack
    if request.unit != "patch":
        raise SplitError(
            f"{pack.path.name} names {plural(request.unit)}, which pseudo-slides only stand in for; use the "
            "protocol 'patients' or 'folds'",
            "unit",
        )
    if request.val_ids:
        raise SplitError(
            "the protocol pseudo-slides draws the validation subset itself; omit --val-patients, or use the "
            "protocol 'site'",
            "patient",
        )
    is_tested, is_left_out = _named_subsets(request)
    subsets = np.select([is_tested, is_left_out], ["test", ""], "train").astype("<U10")
    rows = np.flatnonzero(subsets == "train")
    rows = rows[np.argsort(pack.table["patch_id"].to_numpy(str)[rows])]
    if not len(rows):
        raise SplitError(
            "all patches are tested and none are left for pseudo-slides; name fewer for test", "too-few"
        )
    groups = cluster_appearance(describe_appearance(pack, rows), request.n_groups, seed=request.seed)
    counts = pd.crosstab(groups, pack.target[rows]).to_numpy()
    eligible = have_all_classes(counts)
    names = SUBSETS[:2] if is_tested.any() else SUBSETS
    fractions = np.array(FRACTIONS[: len(names)])
    held_back = fractions[1:] / fractions.sum() * request.n_groups / max(1, eligible.sum())
    if eligible.sum() < len(names) or held_back.sum() >= 1:
        raise SplitError(
            f"{eligible.sum()} of {request.n_groups} pseudo-slides have {MIN_CLASS_SHARE:.0%} or more of an "
            f"even share of each class, which are too few for {len(names)} subsets: classes differ in colour "
            "and texture; use another --n-groups",
            "too-few",
        )
    may_hold_back = eligible[groups]
    parts = divide_groups(
        groups[may_hold_back],
        pack.target[rows[may_hold_back]],
        [1 - held_back.sum(), *held_back],
        seed=request.seed,
        unit="pseudo-slide",
    )
    subsets[rows[may_hold_back]] = np.array(names)[parts]
    columns = np.full(len(subsets), "", dtype="<U10")
    columns[rows] = groups.astype(str)
    subset_of = dict(zip(groups.tolist(), subsets[rows].tolist(), strict=True))
    present = np.unique(pack.target[rows])
    return subsets, {
        "fractions": fractions.tolist(),
        "method": f"k-means of colour and texture, then the best balanced of {N_DRAWS:,} random assignments",
        "n_groups": request.n_groups,
        "pseudo_slides": [
            {
                "pseudo_slide": str(group),
                "subset": subset_of[group],
                "per_class": {pack.class_names[index]: int(n) for index, n in zip(present, row, strict=True)},
            }
            for group, row in enumerate(counts)
        ],
        "left_out": {"patches": int(is_left_out.sum())},
        PSEUDO_SLIDE: columns,
        **_named_note(request),
    }


def _named_subsets(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of patches in a named official subset or site, and in other held-out official subsets."""
    table = request.pack.table
    official, sites = (
        table[name].fillna("").to_numpy(str) if name in table else np.full(len(table), "")
        for name in ("official_subset", "site_id")
    )
    names = np.concatenate([official, sites])
    check_known(request.test_ids, names[names != ""], "official subset or site")
    is_tested = np.isin(official, request.test_ids) | np.isin(sites, request.test_ids)
    is_held_out = np.isin(official, SUBSETS[1:]) & ~is_tested
    return is_tested, is_held_out if request.test_ids else np.zeros(len(table), bool)


def take_official_subsets(request: Request) -> Plan:
    """Return the official subsets of the data set, or those of the published lists of cases."""
    if request.cases is not None:
        return _subsets_by_case(request, request.cases)
    table = request.pack.table
    if "official_subset" not in table.columns or table["official_subset"].isna().all():
        raise SplitError(
            f"{request.pack.path.name} ({request.pack.info.dataset}) has no official subsets; give the "
            "published lists of cases with --cases, or use the protocol 'patients'",
            "missing",
        )
    return table["official_subset"].fillna("").to_numpy(str), {
        "subsets_from": "the data set's own folders or files"
    }


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


def make_leak_condition(
    request: Request, *, condition: Literal["apart", "with", "placebo"], blocked: bool
) -> Plan:
    """Make one condition of a leakage experiment; all conditions share test and validation patches.

    The tested half of the test patient is drawn per class, rounded up. With ``blocked``, it is one side of a
    random line through the slide that halves the patches of the rarer class, and patches adjacent to a test
    patch are not leaked. The order of patches has no influence.

    ``apart`` is trained without the test patient and the placebo patient. In ``with``, patches of the other
    half of the test patient, in ``placebo`` patches of the placebo patient replace training patches of the
    other patients, so that all conditions have the same number of training patches per class.

    Raises:
        SplitError: If not exactly one known test and one known validation patient are named, the tested half
            has one class only, coordinates are missing, too few patches can be replaced, or there is no
            patient for the placebo.
    """
    is_tested, is_validation, placebo_id = _resolve_leak_patients(request)
    rng = make_rng(request.seed, "leak", request.test_ids[0], "blocked" if blocked else "random")
    table, target = request.pack.table, request.pack.target
    order = np.argsort(table["patch_id"].to_numpy(str))
    rows = order[is_tested[order]]
    coordinates = table[["x", "y"]].astype("Float64").to_numpy(float, na_value=np.nan)
    test = np.zeros(len(target), bool)
    test[rows] = (
        _halve_by_line(coordinates[rows], target[rows], rng) if blocked else _draw_half(target[rows], rng)
    )
    if len(np.unique(target[test])) < 2:
        class_name = request.pack.class_names[np.bincount(target[is_tested]).argmax()]
        raise SplitError(
            f"{request.unit} {request.test_ids[0]} has {class_name} patches only: name one with both classes",
            "classes",
        )
    remaining = is_tested & ~test
    adjacent = _find_adjacent(coordinates, remaining, test, request.pack.info.patch_px)
    is_placebo = request.group_ids == placebo_id
    base = ~is_tested & ~is_validation & ~is_placebo
    leaked, placebo, replaced = np.zeros((3, len(target)), bool)
    for class_index, name in enumerate(request.pack.class_names):
        in_class = order[target[order] == class_index]
        may_leak = in_class[(remaining & ~adjacent if blocked else remaining)[in_class]]
        in_placebo, in_base = in_class[is_placebo[in_class]], in_class[base[in_class]]
        n_leaked = min(len(may_leak), len(in_placebo)) if placebo_id else len(may_leak)
        if n_leaked > len(in_base):
            raise SplitError(
                f"{n_leaked:,} {name} patches of {request.test_ids[0]} would replace {len(in_base):,} of the "
                f"other {plural(request.unit)}, which are too few; name another test {request.unit}",
                "too-few",
            )
        leaked[rng.choice(may_leak, n_leaked, replace=False)] = True
        replaced[rng.choice(in_base, n_leaked, replace=False)] = True
        if placebo_id:
            placebo[rng.choice(in_placebo, n_leaked, replace=False)] = True
    if condition == "placebo" and not placebo_id:
        raise SplitError(
            f"no {request.unit} but the tested and the validating one has patches of both classes: there is "
            "no placebo, compare with leak-apart",
            "classes",
        )
    train = (
        base if condition == "apart" else (base & ~replaced) | (leaked if condition == "with" else placebo)
    )
    subsets = np.select([test, is_validation, train], ["test", "validation", "train"], "").astype("<U10")
    has_coordinates = leaked.any() and np.isfinite(coordinates[is_tested]).all()
    note: dict[str, object] = {
        "placebo": placebo_id,
        "touching": float(adjacent[leaked].mean()) if has_coordinates else None,  # of the leaked patches
        "half": "blocked" if blocked else "random",
    }
    if condition == "with":
        note["leaked"] = int(leaked.sum())
    return subsets, _named_note(request) | note


def _resolve_leak_patients(request: Request) -> tuple[np.ndarray, np.ndarray, str]:
    """Return masks of the test and validation patient's patches, and the placebo patient's id."""
    unit, test_ids, validation_ids = request.unit, request.test_ids[:1], request.val_ids
    if unit == "patch":
        raise SplitError(
            f"{request.pack.path.name} has neither patients nor slides, so leakage cannot be measured; "
            "prepare it with --patients",
            "missing",
        )
    check_known(request.test_ids + validation_ids, request.group_ids, unit)
    n_test, n_validation = len(request.test_ids), len(validation_ids)
    if n_test not in (1, 2) or n_validation != 1 or validation_ids[0] in request.test_ids:
        raise SplitError(
            f"leakage experiments need one test {unit} (optionally a second one for the placebo) and one "
            f"validation {unit}; got test {list(request.test_ids)}, validation {list(validation_ids)}",
            "patient",
        )
    is_tested, is_validation = request.group_ids == test_ids[0], request.group_ids == validation_ids[0]
    if len(request.test_ids) == 2:
        return is_tested, is_validation, request.test_ids[1]
    counts = pd.crosstab(request.group_ids, request.pack.target).drop([test_ids[0], validation_ids[0]])
    rarer = counts.min(axis=1) if counts.shape[1] > 1 else counts.iloc[:0, 0]
    has_both = len(rarer) and rarer.max() > 0
    return is_tested, is_validation, str(rarer.idxmax()) if has_both else ""


def _draw_half(target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random mask of half of the patches of each class, rounded up."""
    half = np.zeros(len(target), bool)
    for class_index in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == class_index))
        half[rows[: (len(rows) + 1) // 2]] = True
    return half


def _halve_by_line(coordinates: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a mask of the patches on one side of a line that halves the rarer class.

    Of `N_LINES` random lines, the one that divides all patches most evenly is used.
    """
    if not np.isfinite(coordinates).all():
        raise SplitError(
            "patches of the test slide have no coordinates, which a blocked half requires", "missing"
        )
    names, counts = np.unique(target, return_counts=True)
    rarer = target == names[counts.argmin()]
    angles = rng.uniform(0, 2 * np.pi, N_LINES)
    projections = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ coordinates.T
    marked = projections > np.median(projections[:, rarer], axis=1, keepdims=True)
    return np.asarray(marked[np.abs(marked.mean(axis=1) - 0.5).argmin()])


def _find_adjacent(
    coordinates: np.ndarray, remaining: np.ndarray, test: np.ndarray, patch_px: int
) -> np.ndarray:
    """Return a mask of the patches of ``remaining`` adjacent to a test patch, corners included."""
    adjacent = np.zeros(len(remaining), bool)
    if remaining.any() and np.isfinite(coordinates[remaining | test]).all():
        from scipy.spatial import KDTree  # slow import

        distance, _ = KDTree(coordinates[test]).query(coordinates[remaining], p=np.inf)
        adjacent[remaining] = distance <= patch_px
    return adjacent


def check_known(names: Sequence[str], group_ids: np.ndarray, unit: str) -> None:
    """Refuse names that are not among ``group_ids``."""
    options = set(group_ids.tolist())
    for name in names:
        if name not in options:
            hint = (
                suggest(name, options) if len(options) < 50 else suggest(name, options).partition("known:")[0]
            )
            raise SplitError(
                f"no {unit} is called {name!r}; {hint or f'the pack has {len(options)} {plural(unit)}'}",
                "patient",
            )


def _index_ids(ids: np.ndarray, order: Sequence[str]) -> np.ndarray:
    """Return the index of each id in ``order``, `ALWAYS_TRAIN` for others."""
    index_of = {name: index for index, name in enumerate(order)}
    return pd.Series(ids).map(index_of).fillna(ALWAYS_TRAIN).to_numpy(np.int64)


def _balance_note(request: Request) -> dict[str, object]:
    return {"method": f"best balanced of {N_DRAWS:,} random assignments of {plural(request.unit)}"}


def _named_note(request: Request) -> dict[str, object]:
    return {"test_named": list(request.test_ids), "val_named": list(request.val_ids)}


MAX_LIST_BYTES = 2**24

# Spellings of the subsets in published lists.
SUBSET_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
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


PROTOCOLS: dict[str, Callable[[Request], Plan]] = {
    "official": take_official_subsets,
    "patients": split_by_patient,
    NO_TEST: split_without_test,
    "folds": split_into_folds,
    "leave-one-out": leave_one_out,
    "site": leave_one_site_out,
    "pseudo-slides": split_by_pseudo_slide,
    "kaggle-rows": cut_rows,
    "as-published": follow_recipe,
    "leak-apart": partial(make_leak_condition, condition="apart", blocked=False),
    "leak-with": partial(make_leak_condition, condition="with", blocked=False),
    "leak-placebo": partial(make_leak_condition, condition="placebo", blocked=False),
    "leak-blocked-with": partial(make_leak_condition, condition="with", blocked=True),
    "leak-blocked-placebo": partial(make_leak_condition, condition="placebo", blocked=True),
}

LEAK_PROTOCOLS = tuple(name for name in PROTOCOLS if name.startswith("leak-"))

# Splits that reproduce a publication, whether or not patients overlap.
PUBLISHED = ("as-published", "kaggle-rows")
# Splits in which patients may be in two subsets.
MAY_OVERLAP = (*PUBLISHED, "leak-with", "leak-blocked-with")
