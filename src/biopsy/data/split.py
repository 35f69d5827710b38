"""Splits by name: the sides of a pack's patients, with recipes known by their names."""

from collections.abc import Sequence
from pathlib import Path

from biopsy.data.official_splits import Cases
from biopsy.data.packs import Pack, Unit
from biopsy.data.splits import Split, UnknownPatients, make_split, save_split
from biopsy.recipes import load_recipe


def split(
    pack: Pack | Path | str,
    *,
    protocol: str,
    name: str | None = None,
    seed: int = 0,
    recipe: str | Path | None = None,
    cases: Cases | None = None,
    test_patients: Sequence[str] = (),
    val_patients: Sequence[str] = (),
    folds: int = 5,
    unit: Unit | None = None,
    unknown_patients: UnknownPatients = "leave-out",
) -> Split:
    """Divide a pack's patients into train, validation and test subsets, or folds, and store the split.

    Args:
        pack: Pack to split.
        protocol: ``official``, ``patients``, ``folds``, ``leave-one-out``, ``site``, ``kaggle-rows``,
            ``as-published``, or one of a leakage experiment: ``leak-apart``, ``leak-with``,
            ``leak-placebo``, ``leak-blocked-with`` or ``leak-blocked-placebo``.
        name: Name of the split in the pack (default: the protocol).
        seed: Random seed; the order of patches has no influence.
        recipe: For ``as-published``: the recipe whose published split is made.
        cases: For ``official``: lists of cases, a csv with columns ``case_id,split`` or a folder of
            ``cases_train.txt``, ``cases_val.txt`` and ``cases_test.txt``.
        test_patients: Ids of test patients; for ``leave-one-out``, each in turn; for ``leak-...``, the one
            of which half is tested, and optionally the one that gives the placebo.
        val_patients: Ids of validation patients.
        folds: Number of folds.
        unit: Unit kept within one subset (default: the pack's own).
        unknown_patients: Patches without a patient, in a pack where others have one: left out, or each a
            unit of its own.

    Raises:
        SplitError: If these patients cannot be divided so, or one would stand on two sides.
        RecipeError: If no recipe has that name.
    """
    pack = Pack.open(pack)
    split = make_split(
        pack,
        protocol=protocol,
        name=name,
        seed=seed,
        recipe=None if recipe is None else load_recipe(recipe).as_published.split,
        cases=cases,
        test_patients=tuple(test_patients),
        val_patients=tuple(val_patients),
        n_folds=folds,
        unit=unit,
        unknown_patients=unknown_patients,
    )
    save_split(pack, split)
    return split
