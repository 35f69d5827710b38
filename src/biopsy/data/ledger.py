"""The ledger: how many times a test side has been looked at.

One JSON line an opening in the pack's ``ledger.jsonl``, appended under a lock. For a pack that cannot be
written the ledger is kept with the run, marked as such: it then knows of that run's openings only.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from biopsy.data.packs import Pack

FILE = "ledger.jsonl"

logger = logging.getLogger(__name__)


def record_opening(pack: Pack, run_dir: Path | str, entry: Mapping[str, Any]) -> Path:
    """Note that a side of a pack was looked at.

    Args:
        pack: The pack.
        run_dir: The run's folder, which keeps the note where the pack cannot be written.
        entry: ``run, recipe, seed, split, fold, side`` and ``command``; time, hash of the pack and
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


def read_openings(pack: Pack, run_dir: Path | str | None = None) -> list[dict[str, Any]]:
    """Give what a pack's ledger holds, and a run's own where one is named."""
    folders = [pack.path] if run_dir is None else [pack.path, Path(run_dir)]
    return [entry for folder in folders for entry in _read(folder / FILE)]


def count_openings(
    pack: Pack,
    *,
    split: str,
    fold: int | None = None,
    side: str = "test",
    run_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Count how often a side was looked at, and for how many runs.

    Args:
        pack: The pack.
        split: Name of the split.
        fold: The fold that was tested; None for a split without folds.
        side: The side.
        run_dir: A run whose own ledger counts as well.

    Returns:
        ``times``, ``runs``, and ``kept_with``: ``"run"`` where the pack could not be written at some time, so
        that the count may be too low, else ``"pack"``.
    """
    wanted = {"split": split, "fold": fold, "side": side}
    entries = [
        entry
        for entry in read_openings(pack, run_dir)
        if all(entry.get(key) == value for key, value in wanted.items())
    ]
    return {
        "times": len(entries),
        "runs": len({entry.get("run") for entry in entries}),
        "kept_with": "run" if any(entry["kept_with"] == "run" for entry in entries) else "pack",
    }


def _append(path: Path, line: Mapping[str, Any]) -> Path:
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is read-only")
    with FileLock(path.with_name(f".{path.name}.lock")), open(path, "ab+") as file:
        text = json.dumps(line, default=str) + "\n"
        file.write(("" if _ends_whole(path) else "\n").encode() + text.encode())
        file.flush()
        os.fsync(file.fileno())
    return path


def _ends_whole(path: Path) -> bool:
    """Say whether the last line was written to its end; one that was not must not swallow the next."""
    content = path.read_bytes()
    return not content or content.endswith(b"\n")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            entry["kept_with"]
        except (json.JSONDecodeError, KeyError, TypeError):
            logger.warning("%s: line %d was not written to its end and is not counted", path, number)
        else:
            entries.append(entry)
    return entries
