"""Ledger of evaluations: how often a test subset has been evaluated.

The pack's ``ledger.jsonl`` has one JSON line per evaluation, appended under a lock. For a read-only or remote
pack the ledger is stored with the run, and then lists the evaluations of that run only.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel
from typing_extensions import TypedDict

from biopsy.core.errors import FileFormatError
from biopsy.core.loaders import open_regular, parse_json, read_bytes, validate
from biopsy.core.storage import is_staged
from biopsy.data.packs import Pack

FILE = "ledger.jsonl"
MAX_BYTES = 2**26  # 64 MiB, about 200,000 evaluations

logger = logging.getLogger(__name__)


class _LedgerEntry(BaseModel):
    """Required fields of a line of the ledger."""

    run: str
    split: str
    fold: int | None
    subset: str
    kept_with: Literal["pack", "run"]


class OpeningCount(TypedDict):
    """Number of evaluations of a subset.

    ``kept_with`` is ``run`` if the pack was read-only or remote at some time, so that the count may be too
    low; each of the ``unreadable`` lines may be an evaluation.
    """

    times: int
    runs: int
    kept_with: Literal["pack", "run"]
    unreadable: int


def record_opening(pack: Pack, run_dir: Path | str, entry: Mapping[str, object]) -> Path:
    """Record an evaluation of a subset of a pack.

    Args:
        run_dir: The run's folder, used if the pack is read-only or remote.
        entry: ``run, recipe, seed, split, fold, subset`` and ``command``; time, hash of the pack and
            location of the ledger are added.

    Returns:
        The path of the ledger.
    """
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}
    line |= {"pack_sha256": pack.info.content_sha256, "kept_with": "pack"}
    try:
        if is_staged(pack.path):
            raise PermissionError("it is a temporary copy")
        return _append(pack.path / FILE, line)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): the evaluation is recorded in the run", pack.path.name, error
        )
        return _append(Path(run_dir) / FILE, line | {"kept_with": "run"})


def count_openings(
    pack: Pack,
    *,
    split: str,
    fold: int | None = None,
    subset: str = "test",
    run_dir: Path | str | None = None,
) -> OpeningCount:
    """Count the evaluations of a subset, and the evaluated runs."""
    all_entries, n_unreadable = _read_all(pack, run_dir)
    entries = [
        entry for entry in all_entries if (entry.split, entry.fold, entry.subset) == (split, fold, subset)
    ]
    return OpeningCount(
        times=len(entries),
        runs=len({entry.run for entry in entries}),
        kept_with="run" if any(entry.kept_with == "run" for entry in entries) else "pack",
        unreadable=n_unreadable,
    )


def _append(path: Path, line: Mapping[str, object]) -> Path:
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is read-only")
    if path.exists():
        open_regular(path).close()
    with FileLock(path.with_name(f".{path.name}.lock")), open(path, "ab+") as file:
        text = json.dumps(line, default=str) + "\n"
        file.write(("" if _ends_with_newline(path) else "\n").encode() + text.encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def _ends_with_newline(path: Path) -> bool:
    content = path.read_bytes()
    return not content or content.endswith(b"\n")


def _read_all(pack: Pack, run_dir: Path | str | None) -> tuple[list[_LedgerEntry], int]:
    """Return the entries of the ledgers of pack and run, and the number of unreadable lines."""
    entries: list[_LedgerEntry] = []
    n_unreadable = 0
    for path in [folder / FILE for folder in (pack.path, *([Path(run_dir)] if run_dir else []))]:
        lines = read_bytes(path, max_bytes=MAX_BYTES).splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(validate(path, _LedgerEntry, parse_json(line, path)))
            except FileFormatError as error:
                n_unreadable += 1
                logger.warning("line %d of the ledger is not counted: %s", number, error)
    return entries, n_unreadable
