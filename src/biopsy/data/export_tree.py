"""Export of original image files into a folder tree sorted by subset and class, as read by Keras."""

import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from biopsy.core.errors import DataError, SplitError
from biopsy.core.files import create_directory
from biopsy.data.archives import Archive, Entry, open_archive
from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.slide_io.images import IMAGE_SUFFIXES

__all__ = ["FOLDER_BY_SUBSET", "check_exportable", "count_tree", "export_tree"]

logger = logging.getLogger(__name__)

FOLDER_BY_SUBSET = {"train": "training", "validation": "validation", "test": "testing"}
"""Folder names of the CancerNet tutorial."""

TreeCounts = dict[str, dict[str, int]]


def check_exportable(source: Path | str, folder: Path | str) -> None:
    """Check that a source can be exported as a tree, before anything is decoded."""
    _require_empty(folder)
    archive = open_archive(source)
    if not archive.images:
        raise _refuse_arrays(archive)


def export_tree(
    pack: Pack,
    source: Path | str,
    folder: Path | str,
    split: Split,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> TreeCounts:
    """Write ``training|validation|testing/<class>/<file>``, each file unchanged.

    Class folders are the class indices of the pack, so that Keras, which sorts folders by name, numbers
    classes alike. Files keep their names; files of the same name are named by their path with ``__`` for
    ``/``. Patches in no subset are left out. If the test subset is also used for validation, its patches are
    in both folders.

    Returns:
        Number of files by subset folder and class folder.

    Raises:
        DataError: If the source does not match the pack, has no image files, or the disk is full.
        SplitError: If the split has folds or belongs to another pack.
    """
    folder = Path(folder)
    if split.n_folds:
        raise SplitError(f"split {split.name!r} has folds: use a split with subsets", "folds")
    _require_empty(folder)
    archive = open_archive(source)
    if not pack.table["source"].str.lower().str.endswith(IMAGE_SUFFIXES).all():
        raise _refuse_arrays(archive)
    entries = {entry.name: entry for entry in archive.entries}
    rows_of = {subset: np.flatnonzero(split.subsets(pack) == subset) for subset in FOLDER_BY_SUBSET}
    if split.test_is_validation:
        rows_of["validation"] = rows_of["test"]
    names = name_files(pack.table["source"].tolist())
    digits = len(str(len(pack.class_names) - 1))
    classes = [f"{target:0{digits}d}" for target in range(len(pack.class_names))]
    n_files, done = sum(map(len, rows_of.values())), 0
    try:
        with create_directory(folder) as tree:
            for subset, rows in rows_of.items():
                for name in classes:
                    (tree / FOLDER_BY_SUBSET[subset] / name).mkdir(parents=True)
                for row in rows:
                    class_folder = tree / FOLDER_BY_SUBSET[subset] / classes[pack.target[row]]
                    original = _read(archive, entries, pack.table["source"].iloc[row], pack)
                    (class_folder / names[row]).write_bytes(original)
                    done += 1
                    if on_progress is not None and (done % 256 == 0 or done == n_files):
                        on_progress(done, n_files)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise DataError(f"{folder} cannot be written: {reason or error}; no files were left there") from None
    if split.overlap:
        logger.warning("patients are in more than one subset of %s and so in several folders", split.name)
    n_left_out = int((split.subsets(pack) == "").sum())
    if n_left_out:
        logger.info("%s patches are in no subset of %s and were left out", f"{n_left_out:,}", split.name)
    return count_tree(folder)


def count_tree(folder: Path | str) -> TreeCounts:
    """Count the files of a tree by subset and class, ordered as `FOLDER_BY_SUBSET` and the classes."""
    return {
        subset: {
            class_folder.name: sum(1 for _ in class_folder.iterdir())
            for class_folder in sorted((Path(folder) / subset).iterdir())
        }
        for subset in FOLDER_BY_SUBSET.values()
    }


def name_files(sources: list[str]) -> list[str]:
    """Return the file name of every source; files of the same name are named by their path."""
    plain = [PurePosixPath(source).name for source in sources]
    seen: dict[str, int] = {}
    for name in plain:
        seen[name.lower()] = seen.get(name.lower(), 0) + 1  # some file systems ignore case
    repeated = [seen[name.lower()] > 1 for name in plain]
    names = [
        source.replace("/", "__") if twice else name
        for source, name, twice in zip(sources, plain, repeated, strict=True)
    ]
    if any(repeated):
        logger.info("%s files share a name and are named by their whole path", f"{sum(repeated):,}")
    if len({name.lower() for name in names}) < len(names):
        raise DataError("two patches would have the same file name: rename the files")
    return names


def _read(archive: Archive, entries: Mapping[str, Entry], source: str, pack: Pack) -> bytes | memoryview:
    if source not in entries:
        raise DataError(
            f"{archive.path} does not hold {source}: {pack.path.name} was made from another source"
        )
    try:
        return archive.read(entries[source])
    except DataError as error:
        raise DataError(f"{archive.path}: {source} {error}") from None


def _require_empty(folder: Path | str) -> None:
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists already: choose another --export-tree, or remove it")


def _refuse_arrays(archive: Archive) -> DataError:
    return DataError(f"{archive.path} has HDF5 arrays: there are no image files to export")
