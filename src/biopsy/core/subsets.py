"""Names of the subsets of a split: as users write them, and as files and tables store them."""

from biopsy.core.errors import SplitError

_STORED = {"train": "train", "validation": "val", "test": "test"}
_NAMES = {stored: name for name, stored in _STORED.items()}


def stored_side(subset: str) -> str:
    """Return the stored name of the test or validation subset.

    Raises:
        SplitError: If the subset is neither.

    Example:
        >>> stored_side("validation")
        'val'
    """
    if subset not in ("test", "validation"):
        raise SplitError(f"subset={subset!r} is unknown: expected 'test' or 'validation'")
    return _STORED[subset]


def subset_name(side: str) -> str:
    """Return the name of a stored subset as users write it.

    Example:
        >>> subset_name("val")
        'validation'
    """
    return _NAMES.get(side, side)
