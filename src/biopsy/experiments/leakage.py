"""Leakage experiment: a recipe with and without patches of the tested slide in training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np

from biopsy.core.errors import RunError, SplitError
from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.data.protocols import LEAK_PROTOCOLS
from biopsy.data.protocols.groups import divide_groups
from biopsy.data.protocols.leakage import count_rarer_class
from biopsy.data.splits import Split, find_split, with_subsets
from biopsy.data.splits import split as make_split
from biopsy.recipes import Recipe


def make_leak_splits(
    pack: Pack, test_id: str, val_id: str, seed: int = 0, *, placebo_id: str | None = None
) -> dict[str, Split]:
    """Return splits that differ only in the leakage of one patient, and the placebo.

    Within a design (a random half of ``test_id`` is tested, or a spatially blocked one), all splits test the
    same patches, validate on all patches of ``val_id`` and train on equally many patches of each class; see
    `biopsy.data.protocols.leakage.make_leak_condition`. All random draws follow ``seed``.

    * ``leak-apart`` trains on all other patients except that of the placebo.
    * ``leak-with`` trains on the other half of ``test_id``, in place of as many patches of the others.
    * ``leak-placebo`` trains on as many patches of another patient with both classes, in place of the same
      patches: the gain from one more patient, without leakage.
    * ``leak-blocked-with`` and ``leak-blocked-placebo``: the same with halves in which no training patch
      touches a tested one.

    Args:
        pack: The pack, with patient or slide ids.
        test_id: The tested patient (slide, without patient ids).
        val_id: The patient used for validation.
        placebo_id: The patient of the placebo (default: the one with most patches of its rarer class).

    Returns:
        Protocol to split, named ``<protocol>-<test_id>-s<seed>``. Without another patient with both classes
        there is no placebo; without coordinates there are no blocked halves.

    Raises:
        SplitError: If a patient is unknown, the tested one has one class only, or the others have too few
            patches of a class to be replaced.
    """
    has_positions = pack.table.loc[pack.group_ids == test_id, ["x", "y"]].notna().all(axis=None)
    splits: dict[str, Split] = {}
    for protocol in LEAK_PROTOCOLS:
        if "blocked" in protocol and not has_positions:
            continue
        if protocol.endswith("placebo") and not splits["leak-apart"].parameters["placebo"]:
            continue
        splits[protocol] = make_split(
            pack,
            protocol=protocol,
            name=f"{protocol}-{_slug(test_id)}-s{seed}",
            seed=seed,
            test_patients=(test_id,) if placebo_id is None else (test_id, placebo_id),
            val_patients=(val_id,),
            save=False,
        )
    return splits


def matched(first_split: Split, second_split: Split, pack: Pack, seed: int = 0) -> tuple[Split, Split]:
    """Reduce the training subset of the larger of two splits to the size of the smaller.

    Class proportions are kept. Removed patches are drawn with ``seed`` and are in no subset; validation and
    test are unchanged.

    Returns:
        The two in the same order; the reduced one is named ``<name>-matched-s<seed>``.

    Raises:
        SplitError: If a split has folds, or belongs to another pack.
    """
    for split in (first_split, second_split):
        if split.n_folds:
            raise SplitError(
                f"split {split.name!r} has folds: only splits with subsets can be matched", "folds"
            )
    sizes = [int((split.subsets(pack) == "train").sum()) for split in (first_split, second_split)]
    first, second = (_trim(split, pack, min(sizes), seed) for split in (first_split, second_split))
    return first, second


def _trim(split: Split, pack: Pack, n_train: int, seed: int) -> Split:
    subsets = split.subsets(pack)
    ids = pack.table["patch_id"].to_numpy(str)
    train = np.flatnonzero(subsets == "train")
    if len(train) == n_train:
        return split
    train = make_rng(seed, "matched").permutation(train[np.argsort(ids[train])])
    target = pack.target[train]
    rank = np.empty(len(train))  # rank of each patch within its class, 0 to 1: the lowest are kept
    for class_index in np.unique(target):
        member = target == class_index
        rank[member] = (np.arange(member.sum()) + 0.5) / member.sum()
    subsets[train[np.argsort(rank, kind="stable")[n_train:]]] = ""
    note = {"matched": {"from": split.name, "train_patches": n_train, "seed": seed}}
    return with_subsets(split, pack, subsets, name=f"{split.name}-matched-s{seed}", note=note)


def _slug(group_id: str) -> str:
    """Return an id as part of the name of a split; changed ids get a few digits of their hash."""
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", group_id)
    return slug if slug == group_id else f"{slug}-{sha256(group_id.encode()).hexdigest()[:6]}"


PUBLISHED, APART = "published", "apart"

MIN_PATCHES = 50  # per class and slide: metrics of half of fewer patches are too noisy
VAL_SHARE = 0.15  # of the training subset, if the official validation subset is tested
N_LEAKING = 3  # slides whose leakage is measured by default


@dataclass(frozen=True)
class Condition:
    """A condition of a comparison: a split whose results are compared with those of others.

    Attributes:
        kind: ``published``, ``apart``, or a protocol of the leakage experiment.
        tested: The only tested patient or slide, "" for a whole subset.
        place: Its index among those tested in turn; None for a whole subset.
    """

    kind: str
    split: Split
    tested: str = ""
    place: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The conditions of one recipe that do not depend on the seed.

    Attributes:
        conditions: As published, then split by patient; all train on the same number of patches.
        missing: Kind of a missing condition to the reason.
    """

    conditions: tuple[Condition, ...]
    missing: dict[str, str]


def compare_splits(pack: Pack, recipe: Recipe, apart: Split | None) -> Comparison:
    """Return the conditions as published and split by patient, with equal numbers of training patches.

    Args:
        recipe: The recipe, for its ``as_published.split``; if it undersamples, training subsets are
            undersampled before they are matched.
        apart: The split by patient, each fold of which is a condition; None without one.

    Raises:
        RunError: If neither is available.
    """
    conditions, missing = [], {}
    try:
        published = make_split(pack, protocol="as-published", recipe=recipe.as_published.split, save=False)
        conditions.append(Condition(PUBLISHED, published))
    except SplitError as error:
        missing[PUBLISHED] = str(error)
    if apart is None:
        missing[APART] = _no_ids(pack)
    else:
        conditions += [Condition(APART, *_take_fold(pack, apart, fold)) for fold in range(apart.n_folds)]
        conditions += [] if apart.n_folds else [Condition(APART, apart)]
    if not conditions:
        raise RunError(f"{recipe.name} cannot be reproduced on {pack.path.name}: {missing[PUBLISHED]}")
    if recipe.train.sampling == "undersample":
        conditions = [
            replace(condition, split=_undersample(pack, condition.split)) for condition in conditions
        ]
    smallest = min(
        (condition.split for condition in conditions), key=lambda split: count_subset(pack, split, "train")
    )
    conditions = [
        replace(condition, split=matched(condition.split, smallest, pack)[0]) for condition in conditions
    ]
    return Comparison(tuple(conditions), missing)


def choose_apart(pack: Pack, name: str | None, test_ids: Sequence[str]) -> Split | None:
    """Return the split without patient overlap: the named one, the official one, or leave-one-out.

    If the official subsets lack a test subset, the official validation subset is tested, and 15 % of the
    training subset is used for validation.

    Args:
        name: A split of the pack, or a protocol.
        test_ids: Patients that are left out in turn, without official subsets.

    Returns:
        The split; None without official subsets and without patient or slide ids.

    Raises:
        SplitError: If there is no such split.
        RunError: If its subsets share patients.
    """
    if name is not None:
        split = find_split(pack, name)
        if split.may_overlap:
            raise RunError(f"subsets of split {name!r} share patients: choose one without patient overlap")
        return split
    if pack.has_official_subsets:
        official = find_split(pack, "official")
        return official if count_subset(pack, official, "test") else _test_on_validation(pack, official)
    if pack.unit == "patch":
        return None
    if test_ids:
        return make_split(pack, protocol="leave-one-out", test_patients=test_ids, save=False)
    return find_split(pack, "patients")


def _test_on_validation(pack: Pack, official: Split) -> Split:
    """Return the official split with its validation subset as test, and a part of training as validation."""
    subsets = official.subsets(pack)
    train = subsets == "train"
    subsets[subsets == "validation"] = "test"
    groups = pack.group_ids[train]
    parts = divide_groups(groups, pack.target[train], (1 - VAL_SHARE, VAL_SHARE), seed=0, unit=pack.unit)
    subsets[np.flatnonzero(train)[parts == 1]] = "validation"
    note = {
        "tested": "the data set's own validation subset",
        "validated": f"{VAL_SHARE:.0%} of its training subset",
    }
    return with_subsets(official, pack, subsets, name="official-val-tested", note=note)


def choose_leaking(pack: Pack) -> list[str]:
    """Return the patients or slides whose leakage is measured: the three with most of their rarer class.

    Those with fewer than 50 patches of a class are left out.
    """
    if pack.unit == "patch":
        return []
    rarer = count_rarer_class(pack.group_ids, pack.target)
    rarer = rarer[rarer >= MIN_PATCHES].sort_values(ascending=False, kind="stable")
    return sorted(str(name) for name in rarer.index[:N_LEAKING])


def list_leaks(pack: Pack, test_ids: Sequence[str], seed: int) -> list[Condition]:
    """Return the conditions of `make_leak_splits` for each tested patient.

    The next patient is used for validation; with three or more, the one after that is the placebo.

    Raises:
        SplitError: If a patient is unknown, or has one class only.
    """
    conditions = []
    for index, test_id in enumerate(test_ids):
        val_id, placebo = (test_ids[(index + step) % len(test_ids)] for step in (1, 2))
        splits = make_leak_splits(
            pack, test_id, val_id, seed, placebo_id=placebo if len(test_ids) > 2 else None
        )
        conditions += [Condition(protocol, split, test_id, index) for protocol, split in splits.items()]
    return conditions


def why_no_leak(pack: Pack, test_ids: Sequence[str]) -> str | None:
    """Return why leakage cannot be measured; None if it can."""
    if pack.unit == "patch":
        return _no_ids(pack)
    if len(test_ids) < 2:
        return (
            f"not measurable: fewer than two {pack.unit}s with {MIN_PATCHES} patches of each class, one to "
            "test and one to validate; name them with --test-patients"
        )
    return None


def count_subset(pack: Pack, split: Split, subset: str) -> int:
    """Return the number of patches in a subset; "validation" is "test" if that is used for validation."""
    if subset == "validation" and split.test_is_validation:
        subset = "test"
    return int((split.subsets(pack) == subset).sum())


def _no_ids(pack: Pack) -> str:
    return f"not measurable: {pack.path.name} has neither patient nor slide ids"


def _take_fold(pack: Pack, split: Split, fold: int) -> tuple[Split, str, int]:
    """Return a fold as a split with subsets, the tested patient, and the fold."""
    subsets = split.subsets(pack, fold)
    tested = np.unique(pack.group_ids[subsets == "test"])
    taken = with_subsets(split, pack, subsets, name=f"{split.name}-{fold}", note={"fold": fold})
    return taken, str(tested[0]) if len(tested) == 1 else f"fold {fold}", fold


def _undersample(pack: Pack, split: Split) -> Split:
    """Undersample the training patches to the rarest class."""
    subsets = split.subsets(pack)
    train = np.flatnonzero(subsets == "train")
    per_class = np.bincount(pack.target[train], minlength=len(pack.class_names))
    if (per_class == per_class.min()).all():
        return split
    rows = make_rng(split.seed, "undersample").permutation(train)
    for class_index in range(len(per_class)):
        subsets[rows[pack.target[rows] == class_index][per_class.min() :]] = ""
    return with_subsets(
        split, pack, subsets, name=f"{split.name}-undersampled", note={"undersampled": ["train"]}
    )
