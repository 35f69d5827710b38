"""Protocols that divide patients, slides or sites among subsets or folds, and the input of every protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from biopsy.core.errors import SplitError, suggest
from biopsy.core.seeds import make_rng
from biopsy.core.text import plural
from biopsy.data.packs import Pack, Unit

SUBSETS = ("train", "validation", "test")
Cases = Path | str | Sequence[Path | str]
NO_TEST = "no-test"
"""Protocol whose test subset is empty."""
ALWAYS_TRAIN = -1
"""Fold number of patches that train in every fold."""
# Number of random assignments compared; fewer for very many groups, which are balanced by chance.
N_DRAWS = 20_000
MAX_ASSIGNED = 2_000_000
FRACTIONS = (0.70, 0.15, 0.15)  # of groups in train, validation and test
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
        n_groups: Number of pseudo-slides.
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
    n_groups: int


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
    return subsets, {"fractions": list(FRACTIONS), **_balance_note(request)} | named_note(request)


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
        return np.where(is_validation, "validation", "train").astype("<U10"), named_note(request)
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
    return subsets, named_note(request)


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


def check_known(names: Sequence[str], group_ids: np.ndarray, unit: str) -> None:
    """Refuse names that are not among ``group_ids``."""
    options = set(group_ids.tolist())
    for name in names:
        if name not in options and unit == "patch":
            raise SplitError(
                f"no patch is called {name!r}: this split is by patch; to split by patient, prepare the pack "
                "with --patients",
                "patient",
            )
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


def named_note(request: Request) -> dict[str, object]:
    return {"test_named": list(request.test_ids), "val_named": list(request.val_ids)}
