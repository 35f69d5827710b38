"""Leakage: one patient on two sides of a split."""

import numpy as np
import pandas as pd

from biopsy.core.errors import SplitError

SIDES = ("train", "val", "test")


def check_no_leakage(group_ids: np.ndarray, sides: np.ndarray, *, unit: str = "patient") -> None:
    """Refuse sides on two of which one patient stands.

    Args:
        group_ids: The patient of each patch, ``(n_patches,)``.
        sides: The side of each patch; ``""`` is on none.
        unit: What a group is, for the message.

    Raises:
        SplitError: Naming the first patient and its sides.

    Example:
        >>> check_no_leakage(np.array(["a", "a", "b"]), np.array(["train", "train", "test"]))
    """
    result = find_overlap(group_ids, sides)
    if result:
        patient, where = next(iter(result.items()))
        more = f" (and {len(result) - 1:,} more {unit}s are on two sides)" if len(result) > 1 else ""
        raise SplitError(f"{unit} {patient} is in {' and '.join(where)}{more}; split by {unit}, not by patch")


def leave_out_siblings(patient_ids: np.ndarray, sides: np.ndarray) -> None:
    """Leave out other slides of the tested patient, then those of the validating one, in place."""
    for side, others in (("test", ("train", "val")), ("val", ("train",))):
        held = np.isin(patient_ids, np.unique(patient_ids[sides == side]))
        sides[held & np.isin(sides, others)] = ""


def find_overlap(group_ids: np.ndarray, sides: np.ndarray) -> dict[str, list[str]]:
    """Return each group that stands on two sides or more, with its sides."""
    codes, names = pd.factorize(np.asarray(group_ids, dtype=str), sort=True)
    on_side = np.stack(
        [np.bincount(codes[sides == side], minlength=len(names)) > 0 for side in SIDES], axis=1
    )
    return {
        str(names[group]): [side for side, result in zip(SIDES, on_side[group], strict=True) if result]
        for group in np.flatnonzero(on_side.sum(axis=1) > 1)
    }
