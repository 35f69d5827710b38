"""Lists of which case is on which side, as authors publish them."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from biopsy.core.errors import SplitError
from biopsy.data.leakage import SIDES

Cases = Path | str | Sequence[Path | str]

# Spellings of a side in lists made by others.
SIDE_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"} | {
    "test": "test",
    "testing": "test",
}


def read_cases(cases: Cases) -> dict[str, str]:
    """Read which case is on which side.

    Args:
        cases: A csv with the columns ``case_id`` and ``split``; a folder that holds ``cases_train.txt``,
            ``cases_val.txt`` and ``cases_test.txt`` with one id a line; or those three files.

    Returns:
        The side of each case.

    Raises:
        SplitError: If a list is missing, a side is unknown, or a case stands on two sides.
    """
    if isinstance(cases, str | Path) and not Path(cases).is_dir():
        pairs = _read_case_table(Path(cases))
    else:
        paths = [Path(cases)] if isinstance(cases, str | Path) else [Path(path) for path in cases]
        pairs = [pair for side in SIDES for pair in _read_case_list(paths, side)]
    side_of: dict[str, str] = {}
    for case, side in pairs:
        if side_of.setdefault(case, side) != side:
            raise SplitError(
                f"case {case} is listed in {side_of[case]} and in {side}; it must be in one of them"
            )
    if not side_of:
        raise SplitError(f"{cases} lists no cases")
    return side_of


def _read_case_table(path: Path) -> list[tuple[str, str]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise SplitError(f"the list of cases {path} cannot be read: {error}") from None
    if not {"case_id", "split"} <= set(table.columns):
        raise SplitError(
            f"{path} has the columns {list(table.columns)}; a list of cases needs case_id and split"
        )
    pairs = []
    for case, word in zip(table["case_id"].str.strip(), table["split"].str.strip().str.lower(), strict=True):
        if not case or word not in SIDE_WORDS:
            raise SplitError(f"{path}: case {case!r} has the split {word!r}; use train, val or test")
        pairs.append((case, SIDE_WORDS[word]))
    return pairs


def _read_case_list(paths: list[Path], side: str) -> list[tuple[str, str]]:
    name = f"cases_{side}.txt"
    candidates = [path / name if path.is_dir() else path for path in paths]
    for path in candidates:
        if path.name == name and path.is_file():
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return [(line.strip(), side) for line in lines if line.strip()]
    raise SplitError(
        f"{name} was not found in {', '.join(map(str, paths))}; all three published lists are needed"
    )
