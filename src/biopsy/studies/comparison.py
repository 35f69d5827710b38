"""Arms of a comparison: a recipe as published, with patients apart, and with and without one slide's leak."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from biopsy.core.errors import RunError, SplitError
from biopsy.core.seeds import make_rng
from biopsy.data.arms import make_leak_splits, matched
from biopsy.data.packs import Pack
from biopsy.data.protocols import divide_groups
from biopsy.data.splits import Split, find_split, make_split, with_sides
from biopsy.learning.recipes import Recipe

PUBLISHED, APART, LEAK_WITH, LEAK_APART = "published", "apart", "leak-with", "leak-apart"

MIN_PATCHES = 50  # of each class: fewer in a slide and half of them rank nothing
VAL_SHARE = 0.15  # of the training side, where a data set's own validation side is tested
N_LEAKING = 3  # slides whose leak is measured where none are named


@dataclass(frozen=True)
class Arm:
    """What trains and what is tested in some runs of a comparison.

    Attributes:
        kind: ``published``, ``apart``, ``leak-with`` or ``leak-apart``.
        split: With sides.
        tested: The patient or slide that is tested alone, "" where a whole side is.
        place: Its place among those that are tested, None for a whole side.
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
        pack: The patches.
        recipe: Its ``as_published.split`` is followed; where it undersamples, so do the training sides before
            they are made equal.
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
    smallest = min((arm.split for arm in arms), key=lambda split: count_side(pack, split, "train"))
    arms = [_replace(arm, matched(arm.split, smallest, pack)[0]) for arm in arms]
    return Comparison(tuple(arms), missing)


def choose_apart(pack: Pack, name: str | None, test_ids: Sequence[str]) -> Split | None:
    """Give the split that keeps patients apart: the named one, the data set's own, or by who is tested.

    Where the data set's own sides lack a test side, its validation side is tested, and 15 % of its training
    side validates.

    Args:
        pack: The patches.
        name: A split of the pack, or a protocol.
        test_ids: Patients that are left out in turn, where the data set has no sides of its own.

    Returns:
        The split; None where patches name neither patients nor slides and the data set has no own sides.

    Raises:
        SplitError: If there is no such split.
        RunError: If patients stand on two sides of it.
    """
    if name is not None:
        split = find_split(pack, name)
        if split.may_overlap:
            raise RunError(f"patients stand on two sides of split {name!r}: name one that keeps them apart")
        return split
    if "own_side" in pack.table.columns and pack.table["own_side"].notna().any():
        official = find_split(pack, "official")
        return official if count_side(pack, official, "test") else _test_on_validation(pack, official)
    if pack.unit == "patch":
        return None
    if test_ids:
        return make_split(pack, protocol="leave-one-out", test_patients=test_ids)
    return find_split(pack, "patients")


def _test_on_validation(pack: Pack, official: Split) -> Split:
    """Test on the data set's own validation side, where it brings no test side, and validate on train's."""
    sides = official.sides(pack)
    train = sides == "train"
    sides[sides == "val"] = "test"
    groups = pack.group_ids[train]
    parts = divide_groups(groups, pack.target[train], (1 - VAL_SHARE, VAL_SHARE), seed=0, unit=pack.unit)
    sides[np.flatnonzero(train)[parts == 1]] = "val"
    note = {
        "tested": "the data set's own validation side",
        "validated": f"{VAL_SHARE:.0%} of its training side",
    }
    return with_sides(official, pack, sides, name="official-val-tested", note=note)


def choose_leaking(pack: Pack) -> list[str]:
    """Give the patients or slides whose leak is measured: the three with most patches of their rarer class.

    Those with fewer than 50 patches of a class are passed over.
    """
    if pack.unit == "patch":
        return []
    counts = pd.crosstab(pack.group_ids, pack.target)
    rarer = counts.min(axis=1) if counts.shape[1] > 1 else counts.iloc[:0, 0]
    rarer = rarer[rarer >= MIN_PATCHES].sort_values(ascending=False, kind="stable")
    return sorted(str(name) for name in rarer.index[:N_LEAKING])


def list_leaks(pack: Pack, test_ids: Sequence[str], seed: int) -> list[Arm]:
    """Give, for each of some patients, the arms without and with its patches among the training patches.

    The next in order validates.

    Raises:
        SplitError: If one of them is not known, or has one class only.
    """
    arms = []
    for place, tested in enumerate(test_ids):
        validates = test_ids[(place + 1) % len(test_ids)]
        pair = make_leak_splits(pack, tested, validates, seed)
        arms += [
            Arm(kind, split, tested, place) for kind, split in zip((LEAK_APART, LEAK_WITH), pair, strict=True)
        ]
    return arms


def why_no_leak(pack: Pack, test_ids: Sequence[str]) -> str | None:
    """Say why the leak cannot be measured; None where it can."""
    if pack.unit == "patch":
        return _say_nobody(pack)
    if len(test_ids) < 2:
        return (
            f"not measurable: fewer than two {pack.unit}s with {MIN_PATCHES} patches of each class, one to "
            "test and one to validate; name them with --test-patients"
        )
    return None


def count_side(pack: Pack, split: Split, side: str) -> int:
    """Count the patches that a split with sides has on a side; "val" is "test" where that validates."""
    if side == "val" and split.val_is_test:
        side = "test"
    return int((split.sides(pack) == side).sum())


def _say_nobody(pack: Pack) -> str:
    return f"not measurable: {pack.path.name} names neither patients nor slides"


def _take_fold(pack: Pack, split: Split, fold: int) -> tuple[Split, str, int]:
    """Give a fold of a split as a split with sides, whom it tests, and the fold."""
    sides = split.sides(pack, fold)
    tested = np.unique(pack.group_ids[sides == "test"])
    taken = with_sides(split, pack, sides, name=f"{split.name}-{fold}", note={"fold": fold})
    return taken, str(tested[0]) if len(tested) == 1 else f"fold {fold}", fold


def _undersample(pack: Pack, split: Split) -> Split:
    """Leave out training patches of the commoner classes, as the recipe does before every training."""
    sides = split.sides(pack)
    train = np.flatnonzero(sides == "train")
    per_class = np.bincount(pack.target[train], minlength=len(pack.class_names))
    if (per_class == per_class.min()).all():
        return split
    rows = make_rng(split.seed, "undersample").permutation(train)
    for class_index in range(len(per_class)):
        sides[rows[pack.target[rows] == class_index][per_class.min() :]] = ""
    return with_sides(split, pack, sides, name=f"{split.name}-undersampled", note={"undersampled": ["train"]})


def _replace(arm: Arm, split: Split) -> Arm:
    return Arm(arm.kind, split, arm.tested, arm.place)
