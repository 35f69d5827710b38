"""Leakage experiment: a recipe with and without patches of the tested slide in training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import pandas as pd

from biopsy.core.errors import RunError, SplitError
from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.data.protocols import LEAK_PROTOCOLS, divide_groups
from biopsy.data.splits import Split, find_split, make_split, with_subsets
from biopsy.recipes import Recipe


def make_leak_splits(
    pack: Pack, test_id: str, val_id: str, seed: int = 0, *, placebo_id: str | None = None
) -> dict[str, Split]:
    """Make the splits between which only the leak of one slide differs, and its placebo.

    Per design (a random half of ``test_id`` is tested, or a spatially blocked one) all test the same patches,
    validate on all of ``val_id`` and train on as many patches of each class; see
    `biopsy.data.protocols.draw_leak`. Every draw follows ``seed``, the tested half too.

    * ``leak-apart`` trains on everybody else but the patient of the placebo.
    * ``leak-with`` trains on the other half of ``test_id``, in place of as many patches of the others.
    * ``leak-placebo`` trains on as many patches of another patient with both classes, in place of the same
      patches: what is gained by one more such patient, without a leak.
    * ``leak-blocked-with`` and ``leak-blocked-placebo``: the same with a half of which no patch that trains
      touches a tested one.

    Args:
        pack: The patches; they name patients or slides.
        test_id: The patient (slide, where no patients are named) that is tested.
        val_id: The one that validates.
        placebo_id: Who gives the placebo; by default the one of both classes with most patches of its rarer
            class.

    Returns:
        Protocol to split, named ``<protocol>-<test_id>-s<seed>``; keep them with `save_split`. Placebos are
        missing where no other patient has both classes, blocked halves where patches have no coordinates.

    Raises:
        SplitError: If a patient is not known, the tested one has one class only, or the others have too few
            patches of a class to give way.
    """
    is_known = pack.table.loc[pack.group_ids == test_id, ["x", "y"]].notna().all(axis=None)
    made: dict[str, Split] = {}
    for protocol in LEAK_PROTOCOLS:
        if "blocked" in protocol and not is_known:
            continue
        if protocol.endswith("placebo") and not made["leak-apart"].parameters["placebo"]:
            continue
        made[protocol] = make_split(
            pack,
            protocol=protocol,
            name=f"{protocol}-{_spell(test_id)}-s{seed}",
            seed=seed,
            test_patients=(test_id,) if placebo_id is None else (test_id, placebo_id),
            val_patients=(val_id,),
        )
    return made


def matched(one: Split, other: Split, pack: Pack, seed: int = 0) -> tuple[Split, Split]:
    """Trim the training subset of the larger of two splits to the number of patches of the smaller.

    The classes keep their shares. What is left out is drawn with ``seed`` and is in no subset; validation and
    test stay as they are.

    Returns:
        The two in the same order; the trimmed one is called ``<name>-matched-s<seed>``.

    Raises:
        SplitError: If one has folds, or is not the pack's.
    """
    for split in (one, other):
        if split.n_folds:
            raise SplitError(f"split {split.name!r} has folds: only splits with subsets can be matched")
    sizes = [int((split.subsets(pack) == "train").sum()) for split in (one, other)]
    first, second = (_trim(split, pack, min(sizes), seed) for split in (one, other))
    return first, second


def _trim(split: Split, pack: Pack, n_train: int, seed: int) -> Split:
    subsets = split.subsets(pack)
    ids = pack.table["patch_id"].to_numpy(str)
    train = np.flatnonzero(subsets == "train")
    if len(train) == n_train:
        return split
    train = make_rng(seed, "matched").permutation(train[np.argsort(ids[train])])
    target = pack.target[train]
    place = np.empty(len(train))  # of each patch within its class, from 0 to 1: the lowest are kept
    for class_index in np.unique(target):
        member = target == class_index
        place[member] = (np.arange(member.sum()) + 0.5) / member.sum()
    subsets[train[np.argsort(place, kind="stable")[n_train:]]] = ""
    note = {"matched": {"from": split.name, "train_patches": n_train, "seed": seed}}
    return with_subsets(split, pack, subsets, name=f"{split.name}-matched-s{seed}", note=note)


def _spell(group_id: str) -> str:
    """Return an id as part of a split's name; ids that only then look alike stay apart by a few digits."""
    spelled = re.sub(r"[^A-Za-z0-9._-]", "-", group_id)
    return spelled if spelled == group_id else f"{spelled}-{sha256(group_id.encode()).hexdigest()[:6]}"


PUBLISHED, APART = "published", "apart"

MIN_PATCHES = 50  # of each class: fewer in a slide and half of them rank nothing
VAL_SHARE = 0.15  # of the training subset, where a data set's own validation subset is tested
N_LEAKING = 3  # slides whose leak is measured where none are named


@dataclass(frozen=True)
class Arm:
    """What trains and what is tested in some runs of a comparison.

    Attributes:
        kind: ``published``, ``apart``, or the protocol of an arm of the leak.
        split: With subsets.
        tested: The patient or slide that is tested alone, "" where a whole subset is.
        place: Its place among those that are tested, None for a whole subset.
    """

    kind: str
    split: Split
    tested: str = ""
    place: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The arms of one recipe that do not depend on the seed, and why others are missing.

    Attributes:
        arms: As published, then patients apart; all train on the same number of patches.
        missing: Kind of arm to the reason it cannot be had.
    """

    arms: tuple[Arm, ...]
    missing: dict[str, str] = field(default_factory=dict)


def compare_splits(pack: Pack, recipe: Recipe, apart: Split | None) -> Comparison:
    """Divide a pack as a recipe's authors did and with patients apart, with as many training patches.

    Args:
        recipe: Its ``as_published.split`` is followed; where it undersamples, so do the training subsets
            before they are made equal.
        apart: The split with patients apart, each fold of which is an arm; None where there is none.

    Raises:
        RunError: If neither can be had.
    """
    arms, missing = [], {}
    try:
        published = make_split(pack, protocol="as-published", recipe=recipe.as_published.split)
        arms.append(Arm(PUBLISHED, published))
    except SplitError as error:
        missing[PUBLISHED] = str(error)
    if apart is None:
        missing[APART] = _say_nobody(pack)
    else:
        arms += [Arm(APART, *_take_fold(pack, apart, fold)) for fold in range(apart.n_folds)]
        arms += [] if apart.n_folds else [Arm(APART, apart)]
    if not arms:
        raise RunError(f"{recipe.name} cannot be reproduced on {pack.path.name}: {missing[PUBLISHED]}")
    if recipe.train.sampling == "undersample":
        arms = [_replace(arm, _undersample(pack, arm.split)) for arm in arms]
    smallest = min((arm.split for arm in arms), key=lambda split: count_subset(pack, split, "train"))
    arms = [_replace(arm, matched(arm.split, smallest, pack)[0]) for arm in arms]
    return Comparison(tuple(arms), missing)


def choose_apart(pack: Pack, name: str | None, test_ids: Sequence[str]) -> Split | None:
    """Return the split that keeps patients apart: the named one, the data set's own, or by who is tested.

    Where the data set's official subsets lack a test subset, its validation subset is tested, and 15 % of
    its training subset validates.

    Args:
        name: A split of the pack, or a protocol.
        test_ids: Patients that are left out in turn, where the data set has no subsets of its own.

    Returns:
        The split; None where patches name neither patients nor slides and the data set has no official
        subsets.

    Raises:
        SplitError: If there is no such split.
        RunError: If patients stand in two subsets of it.
    """
    if name is not None:
        split = find_split(pack, name)
        if split.may_overlap:
            raise RunError(f"patients stand in two subsets of split {name!r}: name one that keeps them apart")
        return split
    if "official_subset" in pack.table.columns and pack.table["official_subset"].notna().any():
        official = find_split(pack, "official")
        return official if count_subset(pack, official, "test") else _test_on_validation(pack, official)
    if pack.unit == "patch":
        return None
    if test_ids:
        return make_split(pack, protocol="leave-one-out", test_patients=test_ids)
    return find_split(pack, "patients")


def _test_on_validation(pack: Pack, official: Split) -> Split:
    """Test on the data set's own validation subset, where it brings no test subset, and validate on
    train's."""
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
    """Return the patients or slides whose leak is measured: the three with most patches of their rarer class.

    Those with fewer than 50 patches of a class are passed over.
    """
    if pack.unit == "patch":
        return []
    counts = pd.crosstab(pack.group_ids, pack.target)
    rarer = counts.min(axis=1) if counts.shape[1] > 1 else counts.iloc[:0, 0]
    rarer = rarer[rarer >= MIN_PATCHES].sort_values(ascending=False, kind="stable")
    return sorted(str(name) for name in rarer.index[:N_LEAKING])


def list_leaks(pack: Pack, test_ids: Sequence[str], seed: int) -> list[Arm]:
    """Return, for each of some patients, the arms of `make_leak_splits`; the next in order validates.

    Where three or more are named, the one after that gives the placebo.

    Raises:
        SplitError: If one of them is not known, or has one class only.
    """
    arms = []
    for place, tested in enumerate(test_ids):
        validates, placebo = (test_ids[(place + step) % len(test_ids)] for step in (1, 2))
        splits = make_leak_splits(
            pack, tested, validates, seed, placebo_id=placebo if len(test_ids) > 2 else None
        )
        arms += [Arm(protocol, split, tested, place) for protocol, split in splits.items()]
    return arms


def why_no_leak(pack: Pack, test_ids: Sequence[str]) -> str | None:
    """Return why the leak cannot be measured; None where it can."""
    if pack.unit == "patch":
        return _say_nobody(pack)
    if len(test_ids) < 2:
        return (
            f"not measurable: fewer than two {pack.unit}s with {MIN_PATCHES} patches of each class, one to "
            "test and one to validate; name them with --test-patients"
        )
    return None


def count_subset(pack: Pack, split: Split, subset: str) -> int:
    """Count the patches that a split with subsets has in a subset; "validation" is "test" where that
    validates."""
    if subset == "validation" and split.test_is_validation:
        subset = "test"
    return int((split.subsets(pack) == subset).sum())


def _say_nobody(pack: Pack) -> str:
    return f"not measurable: {pack.path.name} names neither patients nor slides"


def _take_fold(pack: Pack, split: Split, fold: int) -> tuple[Split, str, int]:
    """Return a fold of a split as a split with subsets, whom it tests, and the fold."""
    subsets = split.subsets(pack, fold)
    tested = np.unique(pack.group_ids[subsets == "test"])
    taken = with_subsets(split, pack, subsets, name=f"{split.name}-{fold}", note={"fold": fold})
    return taken, str(tested[0]) if len(tested) == 1 else f"fold {fold}", fold


def _undersample(pack: Pack, split: Split) -> Split:
    """Leave out training patches of the commoner classes, as the recipe does before every training."""
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


def _replace(arm: Arm, split: Split) -> Arm:
    return Arm(arm.kind, split, arm.tested, arm.place)
