"""How patches are divided into subsets or folds: one function a protocol, published methods included."""

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
from biopsy.core.text import list_unmatched, normalize_id
from biopsy.data.packs import Pack, Unit

SUBSETS = ("train", "validation", "test")
Cases = Path | str | Sequence[Path | str]


def follow_recipe(request: "Request") -> "Plan":
    """The split a recipe's authors used, by the method its ``[as_published.split]`` table names."""
    if not request.recipe:
        raise SplitError(
            "as-published follows a recipe's own split: name the recipe, such as --recipe cancernet-2020"
        )
    method = str(request.recipe.get("method"))
    if method not in PUBLISHED_METHODS:
        raise SplitError(
            f"the recipe asks for the split method {method!r}; {suggest(method, PUBLISHED_METHODS)}"
        )
    subsets, parameters = PUBLISHED_METHODS[method](request)
    return subsets, {"recipe": dict(request.recipe), **parameters}


def shuffle_paths(request: "Request") -> "Plan":
    """Shuffle the sorted paths with ``random``: train first, then test; the front of train validates."""
    seed, train, validation = _read(request.recipe, "shuffled-paths", seed=int, train=float, validation=float)
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

    A recursive glob gives paths in order of the folders; ours sorts them. Patches beyond the first ``count``,
    and those that undersampling does not draw, are in no subset. With ``test_is_validation`` no patch is on
    the subset "validation": what tests also validates, as was published.
    """
    count, share, seed = _read(request.recipe, "first-files", count=int, test=float, seed=int)
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
    """First 70, next 20 and last 10 % of the rows of Kaggle's csv, one row dropped at each border."""
    table = request.pack.table
    if "row" not in table.columns or table["row"].isna().any():
        raise SplitError(
            f"{request.pack.path.name} does not keep the rows of Kaggle's train_labels.csv; prepare it again"
        )
    rows = table["row"].to_numpy(np.int64)
    n_rows = int(rows.max()) + 1
    first, second = int(n_rows * 0.7), int(n_rows * 0.9)
    subsets = np.select([rows < first, rows < second], ["train", "validation"], "test")
    subsets[(rows == first) | (rows == second)] = ""
    return subsets, {"n_rows": n_rows, "dropped_rows": [first, second]}


def _read(recipe: Mapping[str, object] | None, method: str, **kinds: Callable[[Any], Any]) -> list[Any]:
    """Return the recipe's values of a method's keys, in order."""
    try:
        return [kind((recipe or {})[key]) for key, kind in kinds.items()]
    except KeyError as error:
        *keys, last = kinds
        raise SplitError(
            f"the split method {method!r} needs {', '.join(keys)} and {last}; {error} is missing"
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

ALWAYS_TRAIN = -1

# Best of this many random assignments; fewer where there are very many groups, which chance balances.
N_DRAWS = 20_000
MAX_ASSIGNED = 2_000_000
N_LINES = 16  # drawn through a slide, of which one blocks half of it

Plan = tuple[np.ndarray, dict[str, object]]


@dataclass(frozen=True)
class Request:
    """What a protocol is asked to divide, and how.

    Attributes:
        pack: The patches.
        unit: What is kept together.
        group_ids: The id of each patch's ``unit``, ``(n_patches,)``.
        seed: Seed of random assignments.
        fractions: Shares of the groups for train, val and test.
        n_folds: Number of folds.
        test_ids: Groups (sites for ``site``) named for testing, or for being left out in turn.
        val_ids: Groups (sites for ``site``) named for validation.
        cases: A csv with ``case_id,split``, or the published lists.
        recipe: The ``[as_published.split]`` table of a recipe.
    """

    pack: Pack
    unit: Unit
    group_ids: np.ndarray
    seed: int
    fractions: tuple[float, float, float]
    n_folds: int
    test_ids: tuple[str, ...]
    val_ids: tuple[str, ...]
    cases: Cases | None
    recipe: Mapping[str, object] | None


def divide_groups(
    group_ids: np.ndarray, target: np.ndarray, shares: Sequence[float], *, seed: int, unit: str = "patient"
) -> np.ndarray:
    """Divide groups, not patches, into parts of the given shares with classes balanced.

    Of 20,000 random assignments that give each part its number of groups, those are taken whose parts hold
    shares of the *groups that carry each class* closest to those wanted: least sum, over parts and classes,
    of (share found - share wanted)² / share wanted. Intervals need such groups, not patches. Among equals the
    same sum over shares of each class's patches decides. (With more than 100 groups, 2,000,000 / groups
    draws.)

    Args:
        group_ids: One id a patch, ``(n_patches,)``.
        target: One class index a patch, ``(n_patches,)``.
        shares: Shares of *groups*, each above 0; they are scaled to sum to 1.
        seed: Same seed and same ids give the same parts, whatever the order of patches.
        unit: What a group is, for messages.

    Returns:
        The part of each patch, int64 ``(n_patches,)``.

    Raises:
        SplitError: If there are fewer groups than parts.
    """
    names, codes = np.unique(np.asarray(group_ids, dtype=str), return_inverse=True)
    wanted = np.asarray(shares, dtype=float) / np.sum(shares)
    if len(names) < len(wanted):
        raise SplitError(
            f"{len(names)} {unit}s are too few for {len(wanted)} subsets or folds: one would be empty"
        )
    counts = np.zeros((len(names), int(target.max()) + 1))
    np.add.at(counts, (codes, target), 1)
    counts = counts[:, counts.sum(axis=0) > 0]
    parts = np.repeat(np.arange(len(wanted)), _apportion(len(names), wanted))
    n_draws = max(1, min(N_DRAWS, MAX_ASSIGNED // len(names)))
    draws = make_rng(seed, "split").permuted(np.tile(parts, (n_draws, 1)), axis=1)
    of_patches, of_groups = np.zeros((2, n_draws))
    for part, share in enumerate(wanted):
        held = (draws == part).astype(np.float64)
        for discrepancy, table in ((of_patches, counts), (of_groups, counts > 0)):
            result = held @ table / table.sum(axis=0)
            discrepancy += ((result - share) ** 2).sum(axis=1) / share
    return draws[np.lexsort((of_patches, of_groups.round(9)))[0]][codes]


def _apportion(n_groups: int, shares: np.ndarray) -> np.ndarray:
    """Round shares to whole numbers of groups, by largest remainder (of equals the last), none to 0."""
    exact = n_groups * shares
    sizes = np.floor(exact + 1e-9).astype(int)
    largest_last = np.argsort((exact - sizes).round(9), kind="stable")
    sizes[largest_last[len(sizes) - (n_groups - sizes.sum()) :]] += 1
    while (sizes == 0).any():
        sizes[np.argmax(sizes)] -= 1
        sizes[np.argmin(sizes)] += 1
    return sizes


def split_by_patient(request: Request) -> Plan:
    """Sides by group: those named where they were put, the others balanced by `divide_groups`."""
    check_known(request.test_ids + request.val_ids, request.group_ids, request.unit)
    both = sorted(set(request.test_ids) & set(request.val_ids))
    if both:
        raise SplitError(
            f"{request.unit} {both[0]} was named both for validation and for test; leave it in one of them"
        )
    subsets = np.full(len(request.group_ids), "", dtype="<U10")
    subsets[np.isin(request.group_ids, request.val_ids)] = "validation"
    subsets[np.isin(request.group_ids, request.test_ids)] = "test"
    named = {"validation": request.val_ids, "test": request.test_ids}
    shares = {
        subset: share
        for subset, share in zip(SUBSETS, request.fractions, strict=True)
        if not named.get(subset)
    }
    rest = subsets == ""
    parts = divide_groups(
        request.group_ids[rest],
        request.pack.target[rest],
        list(shares.values()),
        seed=request.seed,
        unit="remaining " + request.unit if any(named.values()) else request.unit,
    )
    subsets[rest] = np.array(list(shares))[parts]
    return subsets, {"fractions": list(request.fractions), **_balance_note(request)} | _named_note(request)


def split_into_folds(request: Request) -> Plan:
    """Folds by group, balanced by `divide_groups`."""
    if request.n_folds < 3:
        raise SplitError(
            f"{request.n_folds} folds are too few: one tests, one validates and the others train"
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
    """One fold for each group named, in that order; for every group, in order of ids, where none is."""
    check_known(request.test_ids, request.group_ids, request.unit)
    order = list(dict.fromkeys(request.test_ids)) or sorted(set(request.group_ids.tolist()))
    if len(order) < 2:
        raise SplitError(
            f"leave-one-out needs 2 or more {request.unit}s, one to test and one to validate; got {order}"
        )
    return _number(request.group_ids, order), {"order": order}


def leave_one_site_out(request: Request) -> Plan:
    """One fold for each site; subsets by site where test sites are named."""
    sites = request.pack.table["site_id"]
    if sites.isna().any():
        raise SplitError(
            f"{int(sites.isna().sum()):,} of {len(sites):,} patches have no site_id; add it with "
            "`biopsy prepare --join CSV` and a site_id column"
        )
    site_ids = sites.to_numpy(str)
    if request.test_ids:
        return _subsets_by_site(request, site_ids)
    order = sorted(set(site_ids.tolist()))
    if len(order) < 3:
        raise SplitError(
            f"{len(order)} sites ({', '.join(order)}) are too few to test on one, validate on another "
            "and train on the rest; name the site to test on, then patients of the other sites validate"
        )
    return _number(site_ids, order), {"order": order}


def _subsets_by_site(request: Request, site_ids: np.ndarray) -> Plan:
    check_known(request.test_ids + request.val_ids, site_ids, "site")
    subsets = np.full(len(site_ids), "train", dtype="<U10")
    subsets[np.isin(site_ids, request.val_ids)] = "validation"
    subsets[np.isin(site_ids, request.test_ids)] = "test"
    if not request.val_ids:
        rest = subsets == "train"
        shares = request.fractions[:2]
        parts = divide_groups(
            request.group_ids[rest],
            request.pack.target[rest],
            shares,
            seed=request.seed,
            unit=f"remaining {request.unit}",
        )
        subsets[rest] = np.array(["train", "validation"])[parts]
    return subsets, _named_note(request)


def take_official_subsets(request: Request) -> Plan:
    """The data set's official subsets: its own folders or files, or the published lists of cases."""
    if request.cases is not None:
        return _subsets_by_case(request, request.cases)
    table = request.pack.table
    if "official_subset" not in table.columns or table["official_subset"].isna().all():
        raise SplitError(
            f"{request.pack.path.name} ({request.pack.info.dataset}) brings no subsets of its own; give the "
            "published lists of cases with --cases, or use the protocol 'patients'"
        )
    return table["official_subset"].fillna("").to_numpy(str), {
        "subsets_from": "the data set's own folders or files"
    }


def _subsets_by_case(request: Request, cases: Cases) -> Plan:
    if request.unit == "patch":
        raise SplitError(
            f"cases are patients; {request.pack.path.name} names none, prepare it with --patients"
        )
    subset_of = read_cases(cases)
    groups = sorted(set(request.group_ids.tolist()))
    result = {group: subset_of[group] for group in groups if group in subset_of}
    if not result:
        raise SplitError(
            f"none of the {len(groups)} {request.unit}s, such as {groups[0]!r}, is among the "
            f"{len(subset_of)} listed cases, such as {next(iter(subset_of))!r}"
        )
    subsets = pd.Series(request.group_ids).map(result).fillna("").to_numpy(str)
    absent = [case for case in subset_of if case not in result]
    unlisted = [group for group in groups if group not in result]
    if absent:
        logger.warning(
            "%d of %d listed cases are not in %s: %s",
            *(len(absent), len(subset_of), request.pack.path.name, list_unmatched(absent, unlisted)),
        )
    if unlisted:
        logger.warning(
            "%d of %d %ss are in no list and left out: %s",
            *(len(unlisted), len(groups), request.unit, list_unmatched(unlisted, absent)),
        )
    listed, present = list(subset_of.values()), list(result.values())
    return subsets, {
        "subsets_from": "published lists of cases",
        "cases": {
            subset: {"listed": listed.count(subset), "found": present.count(subset)} for subset in SUBSETS
        },
        "left_out": {"patients": len(unlisted), "patches": int((subsets == "").sum())},
    }


@dataclass(frozen=True)
class Leak:
    """What the arms of a leakage experiment have in common, as masks of patches ``(n_patches,)``.

    Attributes:
        test: The tested half of one patient.
        val: All of the validating patient.
        leaked: Patches of the other half that train in the arm with the leak.
        placebo: As many of each class of another patient who has both classes, which train in the placebo arm
            and nowhere else; nobody's where no such patient is left.
        base: Everybody else, who trains in the arm without either.
        replaced: As many of ``base`` of each class, which give way to ``leaked`` or to ``placebo``.
        placebo_id: That other patient, "" where there is none.
        touching: Share of ``leaked`` that lies beside a tested patch; None without coordinates.
    """

    test: np.ndarray
    val: np.ndarray
    leaked: np.ndarray
    placebo: np.ndarray
    base: np.ndarray
    replaced: np.ndarray
    placebo_id: str
    touching: float | None


def make_leak_arm(request: Request, *, arm: Literal["apart", "with", "placebo"], blocked: bool) -> Plan:
    """One arm of a leakage experiment; all arms test and validate on the same patches (see `draw_leak`).

    ``apart`` trains on neither the tested patient nor the one of the placebo. In ``with`` the other half of
    the tested patient trains, in ``placebo`` patches of the other patient, in place of the same patches of
    the others: both train on as many patches of each class as ``apart``.
    """
    leak = draw_leak(request, blocked=blocked)
    if arm == "placebo" and not leak.placebo_id:
        raise SplitError(
            f"no {request.unit} but the tested and the validating one has patches of both classes: there is "
            "no placebo, compare with leak-apart"
        )
    train = leak.base.copy()
    if arm != "apart":
        train &= ~leak.replaced
        train |= leak.leaked if arm == "with" else leak.placebo
    subsets = np.select([leak.test, leak.val, train], ["test", "validation", "train"], "").astype("<U10")
    note = {"placebo": leak.placebo_id, "touching": leak.touching, "half": "blocked" if blocked else "random"}
    leaked = {"leaked": int(leak.leaked.sum())} if arm == "with" else {}
    return subsets, _named_note(request) | note | leaked


def draw_leak(request: Request, *, blocked: bool) -> Leak:
    """Draw which patches of one patient are tested, which leak, and what they replace.

    The tested half is drawn class by class (the larger half of an odd number), or, ``blocked``, it is one
    side of a line through the slide with half of the patches of the rarer class on either side; then patches
    beside a tested one do not leak. All draws follow the seed, whatever the order of patches.

    Raises:
        SplitError: If not one known patient each is named to test and to validate, the tested half has one
            class only, patches to be blocked have no coordinates, or too few others can give way.
    """
    whose, validates, placebo_id = _name_leak(request)
    rng = make_rng(request.seed, "leak", request.test_ids[0], "blocked" if blocked else "random")
    table, target = request.pack.table, request.pack.target
    order = np.argsort(table["patch_id"].to_numpy(str))
    rows = order[whose[order]]
    places = table[["x", "y"]].astype("Float64").to_numpy(float, na_value=np.nan)
    test = np.zeros(len(target), bool)
    test[rows] = _cut_by_line(places[rows], target[rows], rng) if blocked else _halve(target[rows], rng)
    if len(np.unique(target[test])) < 2:
        only = request.pack.class_names[np.bincount(target[whose]).argmax()]
        raise SplitError(
            f"{request.unit} {request.test_ids[0]} has {only} patches only: test one of both classes"
        )
    rest = whose & ~test
    beside = _find_beside(places, rest, test, request.pack.info.patch_px)
    others = request.group_ids == placebo_id
    base = ~whose & ~validates & ~others
    leaked, placebo, replaced = np.zeros((3, len(target)), bool)
    for class_index, name in enumerate(request.pack.class_names):
        of_class = order[target[order] == class_index]
        may_leak = of_class[(rest & ~beside if blocked else rest)[of_class]]
        of_other, of_base = of_class[others[of_class]], of_class[base[of_class]]
        n_leaked = min(len(may_leak), len(of_other)) if placebo_id else len(may_leak)
        if n_leaked > len(of_base):
            raise SplitError(
                f"{n_leaked:,} {name} patches of {request.test_ids[0]} would train and the others have "
                f"{len(of_base):,} to give way; test another {request.unit}"
            )
        leaked[rng.choice(may_leak, n_leaked, replace=False)] = True
        replaced[rng.choice(of_base, n_leaked, replace=False)] = True
        if placebo_id:
            placebo[rng.choice(of_other, n_leaked, replace=False)] = True
    known = leaked.any() and np.isfinite(places[whose]).all()
    touching = float(beside[leaked].mean()) if known else None
    return Leak(test, validates, leaked, placebo, base, replaced, placebo_id, touching)


def _name_leak(request: Request) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the patches of the tested and of the validating patient, and who gives the placebo."""
    unit, tested, validating = request.unit, request.test_ids[:1], request.val_ids
    if unit == "patch":
        raise SplitError(
            f"{request.pack.path.name} names neither patients nor slides: a leak between them cannot be "
            "measured; prepare it with --patients"
        )
    check_known(request.test_ids + validating, request.group_ids, unit)
    if not tested or len(request.test_ids) > 2 or len(validating) != 1 or validating[0] in request.test_ids:
        raise SplitError(
            f"the leak is measured on one {unit} while another validates (a second one named to test gives "
            f"the placebo); to test: {list(request.test_ids)}, to validate: {list(validating)}"
        )
    whose, validates = request.group_ids == tested[0], request.group_ids == validating[0]
    if len(request.test_ids) == 2:
        return whose, validates, request.test_ids[1]
    counts = pd.crosstab(request.group_ids, request.pack.target).drop([tested[0], validating[0]])
    rarer = counts.min(axis=1) if counts.shape[1] > 1 else counts.iloc[:0, 0]
    has_both = len(rarer) and rarer.max() > 0
    return whose, validates, str(rarer.idxmax()) if has_both else ""


def _halve(target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark half of the patches of each class, of an odd number the larger half."""
    half = np.zeros(len(target), bool)
    for class_index in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == class_index))
        half[rows[: (len(rows) + 1) // 2]] = True
    return half


def _cut_by_line(places: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark the patches on one side of a line that halves the rarer class; of 16 drawn, the most even one."""
    if not np.isfinite(places).all():
        raise SplitError("patches of the tested slide have no coordinates: half of it cannot be blocked")
    names, counts = np.unique(target, return_counts=True)
    rarer = target == names[counts.argmin()]
    angles = rng.uniform(0, 2 * np.pi, N_LINES)
    along = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ places.T
    marked = along > np.median(along[:, rarer], axis=1, keepdims=True)
    return np.asarray(marked[np.abs(marked.mean(axis=1) - 0.5).argmin()])


def _find_beside(places: np.ndarray, rest: np.ndarray, test: np.ndarray, patch_px: int) -> np.ndarray:
    """Mark the patches of ``rest`` that touch a tested one, at corners too; none without places."""
    beside = np.zeros(len(rest), bool)
    if rest.any() and np.isfinite(places[rest | test]).all():
        from scipy.spatial import KDTree  # slow to import, and no other protocol needs it

        distance, _ = KDTree(places[test]).query(places[rest], p=np.inf)
        beside[rest] = distance <= patch_px
    return beside


def check_known(names: Sequence[str], known: np.ndarray, unit: str) -> None:
    """Refuse names that are not among ``known``.

    Raises:
        SplitError: Naming the nearest that is.
    """
    options = set(known.tolist())
    for name in names:
        if name not in options:
            hint = (
                suggest(name, options) if len(options) < 50 else suggest(name, options).partition("known:")[0]
            )
            raise SplitError(
                f"no {unit} is called {name!r}; {hint or f'the pack has {len(options)} {unit}s'}"
            )


def _number(ids: np.ndarray, order: Sequence[str]) -> np.ndarray:
    """Number ids by their place in ``order``; those not in it are always in training."""
    number = {name: place for place, name in enumerate(order)}
    return pd.Series(ids).map(number).fillna(ALWAYS_TRAIN).to_numpy(np.int64)


def _balance_note(request: Request) -> dict[str, object]:
    return {"method": f"best balanced of {N_DRAWS:,} random assignments of {request.unit}s"}


def _named_note(request: Request) -> dict[str, object]:
    return {"test_named": list(request.test_ids), "val_named": list(request.val_ids)}


MAX_LIST_BYTES = 2**24

# Spellings of a subset in lists made by others.
SUBSET_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}


def read_cases(cases: Cases) -> dict[str, str]:
    """Read which case is in which subset.

    Args:
        cases: A csv with the columns ``case_id`` and ``split``; a folder that holds ``cases_train.txt``,
            ``cases_val.txt`` and ``cases_test.txt`` with one id a line; or those three files.

    Returns:
        The subset of each case.

    Raises:
        SplitError: If a list is missing, a subset is unknown, or a case stands in two subsets.
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
                f"case {case} is listed in {subset_of[case]} and in {subset}; it must be in one of them"
            )
    if not subset_of:
        raise SplitError(f"{cases} lists no cases")
    return subset_of


def _read_case_table(path: Path) -> list[tuple[str, str]]:
    columns = ("case_id", "split")
    try:
        table = read_csv_table(path, aliases={name: name for name in columns}, required=columns)
    except DataError as error:
        raise SplitError(f"the list of cases {error}") from None
    pairs = []
    for case, word in table[list(columns)].fillna("").itertuples(index=False):
        case, word = normalize_id(case), word.strip().lower()
        if not case or word not in SUBSET_WORDS:
            raise SplitError(f"{path}: case {case!r} has the split {word!r}; use train, validation or test")
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
                raise SplitError(f"{path} is not UTF-8: save it as UTF-8") from None
            cases = map(normalize_id, text.splitlines())
            return [(case, subset) for case in cases if case]
    raise SplitError(
        f"{name} was not found in {', '.join(map(str, paths))}; all three published lists are needed"
    )


PROTOCOLS: dict[str, Callable[[Request], Plan]] = {
    "official": take_official_subsets,
    "patients": split_by_patient,
    "folds": split_into_folds,
    "leave-one-out": leave_one_out,
    "site": leave_one_site_out,
    "kaggle-rows": cut_rows,
    "as-published": follow_recipe,
    "leak-apart": partial(make_leak_arm, arm="apart", blocked=False),
    "leak-with": partial(make_leak_arm, arm="with", blocked=False),
    "leak-placebo": partial(make_leak_arm, arm="placebo", blocked=False),
    "leak-blocked-with": partial(make_leak_arm, arm="with", blocked=True),
    "leak-blocked-placebo": partial(make_leak_arm, arm="placebo", blocked=True),
}

LEAK_PROTOCOLS = tuple(name for name in PROTOCOLS if name.startswith("leak-"))

# Splits that repeat what was published, whether or not patients overlap in them.
PUBLISHED = ("as-published", "kaggle-rows")
# All splits in which patients may stand in two subsets: a leak must be made to be measured.
MAY_OVERLAP = (*PUBLISHED, "leak-with", "leak-blocked-with")
