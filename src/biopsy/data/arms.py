"""Two splits to compare: what differs between them, and that nothing else does.

A leak is measured by training twice, once with patches of the tested slide among the training patches and
once without, on as many patches, and testing both on the same ones.
"""

import re
from hashlib import sha256

import numpy as np

from biopsy.core.errors import SplitError
from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.data.splits import Split, make_split, with_sides


def make_leak_splits(pack: Pack, test_id: str, val_id: str, seed: int = 0) -> tuple[Split, Split]:
    """Make the two splits between which only the leak of one slide differs.

    Both test the same half of ``test_id`` (drawn once per slide, class by class, whatever the seed) and
    validate on all of ``val_id``. The first trains on everybody else. The second trains on the other half of
    ``test_id`` too, in place of as many patches of everybody else, drawn with ``seed``. Both train on the
    same number of patches of each class.

    Args:
        pack: The patches; they name patients or slides.
        test_id: The patient (slide, where no patients are named) that is tested.
        val_id: The one that validates.
        seed: Of the patches that give way.

    Returns:
        ``(apart, with_leak)``, named ``leak-apart-<test_id>-s<seed>`` and ``leak-with-<test_id>-s<seed>``,
        of the protocols ``leak-apart`` and ``leak-with``; keep them with `save_split`.

    Raises:
        SplitError: If a patient is not known, the tested one has one class only, or the others have too few
            patches of a class to give way.
    """
    apart, with_leak = (
        make_split(
            pack,
            protocol=protocol,
            name=f"{protocol}-{_spell(test_id)}-s{seed}",
            seed=seed,
            test_patients=(test_id,),
            val_patients=(val_id,),
        )
        for protocol in ("leak-apart", "leak-with")
    )
    return apart, with_leak


def matched(one: Split, other: Split, pack: Pack, seed: int = 0) -> tuple[Split, Split]:
    """Trim the training side of the larger of two splits to the number of patches of the smaller.

    The classes keep their shares. What is left out is drawn with ``seed`` and is on no side; validation and
    test stay as they are.

    Args:
        one: A split with sides.
        other: Another split of the same pack.
        pack: Their pack.
        seed: Of the draw.

    Returns:
        The two in the same order; the trimmed one is called ``<name>-matched-s<seed>``.

    Raises:
        SplitError: If one has folds, or is not the pack's.
    """
    for split in (one, other):
        if split.n_folds:
            raise SplitError(f"split {split.name!r} has folds: only splits with sides can be matched")
    sizes = [int((split.sides(pack) == "train").sum()) for split in (one, other)]
    first, second = (_trim(split, pack, min(sizes), seed) for split in (one, other))
    return first, second


def _trim(split: Split, pack: Pack, n_train: int, seed: int) -> Split:
    sides = split.sides(pack)
    ids = pack.table["patch_id"].to_numpy(str)
    train = np.flatnonzero(sides == "train")
    if len(train) == n_train:
        return split
    train = make_rng(seed, "matched").permutation(train[np.argsort(ids[train])])
    target = pack.target[train]
    place = np.empty(len(train))  # of each patch within its class, from 0 to 1: the lowest are kept
    for class_index in np.unique(target):
        member = target == class_index
        place[member] = (np.arange(member.sum()) + 0.5) / member.sum()
    sides[train[np.argsort(place, kind="stable")[n_train:]]] = ""
    note = {"matched": {"from": split.name, "train_patches": n_train, "seed": seed}}
    return with_sides(split, pack, sides, name=f"{split.name}-matched-s{seed}", note=note)


def _spell(group_id: str) -> str:
    """Give an id as part of a split's name; ids that only then look alike stay apart by a few digits."""
    spelled = re.sub(r"[^A-Za-z0-9._-]", "-", group_id)
    return spelled if spelled == group_id else f"{spelled}-{sha256(group_id.encode()).hexdigest()[:6]}"
