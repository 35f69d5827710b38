"""Lists of which case is on which side, as authors publish them."""

from collections.abc import Sequence
from pathlib import Path

from biopsy.core.errors import DataError, SplitError
from biopsy.core.loaders import read_bytes
from biopsy.core.tables import read_csv_table
from biopsy.core.text import normalize_id
from biopsy.data.leakage import SIDES

Cases = Path | str | Sequence[Path | str]

MAX_LIST_BYTES = 2**24

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
    columns = ("case_id", "split")
    try:
        table = read_csv_table(path, aliases={name: name for name in columns}, required=columns)
    except DataError as error:
        raise SplitError(f"the list of cases {error}") from None
    pairs = []
    for case, word in table[list(columns)].fillna("").itertuples(index=False):
        case, word = normalize_id(case), word.strip().lower()
        if not case or word not in SIDE_WORDS:
            raise SplitError(f"{path}: case {case!r} has the split {word!r}; use train, val or test")
        pairs.append((case, SIDE_WORDS[word]))
    return pairs


def _read_case_list(paths: list[Path], side: str) -> list[tuple[str, str]]:
    name = f"cases_{side}.txt"
    candidates = [path / name if path.is_dir() else path for path in paths]
    for path in candidates:
        if path.name == name and path.is_file():
            try:
                text = read_bytes(path, max_bytes=MAX_LIST_BYTES).decode("utf-8-sig")
            except UnicodeDecodeError:
                raise SplitError(f"{path} is not UTF-8: save it as UTF-8") from None
            cases = map(normalize_id, text.splitlines())
            return [(case, side) for case in cases if case]
    raise SplitError(
        f"{name} was not found in {', '.join(map(str, paths))}; all three published lists are needed"
    )
