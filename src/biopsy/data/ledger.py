"""The ledger: how many times a test subset has been looked at.

One JSON line an opening in the pack's ``ledger.jsonl``, appended under a lock. For a pack that cannot be
written the ledger is kept with the run, marked as such: it then knows of that run's openings only.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypedDict

from filelock import FileLock
from pydantic import BaseModel

from biopsy.core.errors import FileFormatError
from biopsy.core.loaders import open_regular, parse_json, read_bytes, validate
from biopsy.data.packs import Pack

FILE = "ledger.jsonl"
MAX_BYTES = 2**26  # 64 MiB, some 200,000 openings

logger = logging.getLogger(__name__)


class _Opening(BaseModel):
    """What a line of the ledger must hold to be counted."""

    run: str
    split: str
    fold: int | None
    subset: str
    kept_with: Literal["pack", "run"]


class OpeningCount(TypedDict):
    """How often a subset was looked at.

    ``kept_with`` is ``run`` where the pack could not be written at some time, so that the count may be too
    low; each of the ``unreadable`` lines may be an opening.
    """

    times: int
    runs: int
    kept_with: Literal["pack", "run"]
    unreadable: int


def record_opening(pack: Pack, run_dir: Path | str, entry: Mapping[str, object]) -> Path:
    """Note that a subset of a pack was looked at.

    Args:
        run_dir: The run's folder, which keeps the note where the pack cannot be written.
        entry: ``run, recipe, seed, split, fold, subset`` and ``command``; time, hash of the pack and
            place of the ledger are added.

    Returns:
        The ledger the note went to.
    """
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}
    line |= {"pack_sha256": pack.info.content_sha256, "kept_with": "pack"}
    try:
        return _append(pack.path / FILE, line)
    except OSError as error:
        logger.warning("%s cannot be written (%s): its ledger is kept with the run", pack.path.name, error)
        return _append(Path(run_dir) / FILE, line | {"kept_with": "run"})


def count_openings(
    pack: Pack,
    *,
    split: str,
    fold: int | None = None,
    subset: str = "test",
    run_dir: Path | str | None = None,
) -> OpeningCount:
    """Count how often a subset was looked at, and for how many runs.

    Args:
        fold: The fold that was tested; None for a split without folds.
        run_dir: A run whose own ledger counts as well.
    """
    every, n_unreadable = _read_all(pack, run_dir)
    entries = [entry for entry in every if (entry.split, entry.fold, entry.subset) == (split, fold, subset)]
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
        file.write(("" if _ends_whole(path) else "\n").encode() + text.encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def _ends_whole(path: Path) -> bool:
    """Return whether the last line was written to its end; one that was not must not swallow the next."""
    content = path.read_bytes()
    return not content or content.endswith(b"\n")


def _read_all(pack: Pack, run_dir: Path | str | None) -> tuple[list[_Opening], int]:
    """Return the entries of the pack's ledger and the run's, and how many lines cannot be read."""
    entries: list[_Opening] = []
    n_unreadable = 0
    for path in [folder / FILE for folder in (pack.path, *([Path(run_dir)] if run_dir else []))]:
        lines = read_bytes(path, max_bytes=MAX_BYTES).splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(validate(path, _Opening, parse_json(line, path)))
            except FileFormatError as error:
                n_unreadable += 1
                logger.warning("line %d of the ledger is not counted: %s", number, error)
    return entries, n_unreadable
