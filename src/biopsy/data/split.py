"""Splits by name: the sides of a pack's patients, with recipes known by their names."""

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
    test_patients: tuple[str, ...] = (),
    val_patients: tuple[str, ...] = (),
    folds: int = 5,
    unit: Unit | None = None,
    unknown_patients: UnknownPatients = "leave-out",
) -> Split:
    """Divide a pack's patients into sides or folds, and keep the split in the pack.

    Args:
        pack: The pack, or its path.
        protocol: ``official``, ``patients``, ``folds``, ``leave-one-out``, ``site``, ``kaggle-rows``,
            ``as-published``, or an arm of a leakage experiment (``leak-apart``, ``leak-with``,
            ``leak-placebo``, ``leak-blocked-with``, ``leak-blocked-placebo``).
        name: What to call it; the protocol's name by default.
        seed: Same seed and same patients give the same sides, whatever the order of patches.
        recipe: For ``as-published``: the recipe whose publication is followed.
        cases: For ``official``: a csv of ``case_id, split``, or the published ``cases_*.txt``.
        test_patients: Patients that are tested; for ``leave-one-out``, each in turn; for ``leak-...``
            the one of which half is tested, and if wanted the one that gives the placebo.
        val_patients: Patients that validate.
        folds: Number of folds.
        unit: What is kept apart; the pack's own unit by default.
        unknown_patients: Patches without a patient where others have one: ``leave-out``, or each ``alone``.

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
        test_patients=test_patients,
        val_patients=val_patients,
        n_folds=folds,
        unit=unit,
        unknown_patients=unknown_patients,
    )
    save_split(pack, split)
    return split
