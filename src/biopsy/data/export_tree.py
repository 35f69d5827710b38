"""A pack's patches as the folder tree Keras scripts read: original bytes and names, sorted by a split."""

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

_log = logging.getLogger(__name__)

FOLDER_BY_SUBSET = {"train": "training", "validation": "validation", "test": "testing"}
"""As CancerNet's post names them."""

TreeCounts = dict[str, dict[str, int]]


def check_exportable(source: Path | str, folder: Path | str) -> None:
    """Refuse, before anything is decoded, what could not become a tree.

    Raises:
        DataError: If the folder holds something already, or the source's pixels lie in HDF5 arrays.
    """
    _check_free(folder)
    archive = open_archive(source)
    if not any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in archive.entries):
        raise _refuse_arrays(archive)


def export_tree(
    pack: Pack,
    source: Path | str,
    folder: Path | str,
    split: Split,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> TreeCounts:
    """Write ``training|validation|testing/<class>/<file>``, each file byte for byte as it is in the source.

    A class's folder is its number, the pack's ``target``, so that what sorts folders by name (Keras does)
    numbers classes as the pack does. A file keeps its name; where two would have the same, each is named by
    its whole path with ``__`` for ``/``. Patches in no subset are left out. Where the test subset validates
    too, its patches are in both folders.

    Args:
        pack: The patches, made from ``source``.
        source: The archive or folder the pack was made from.
        folder: The tree; it appears when it is whole.
        on_progress: Called with the files written and the files in all.

    Returns:
        Files by folder of the subset and folder of the class.

    Raises:
        DataError: If the source is not the pack's, holds arrays and no files, or the disk is full.
        SplitError: If the split has folds or is not the pack's.
    """
    folder = Path(folder)
    if split.n_folds:
        raise SplitError(
            f"split {split.name!r} has folds: a tree has one testing/; name a split with subsets"
        )
    _check_free(folder)
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
                    place = tree / FOLDER_BY_SUBSET[subset] / classes[pack.target[row]]
                    original = _read(archive, entries, pack.table["source"].iloc[row], pack)
                    (place / names[row]).write_bytes(original)
                    done += 1
                    if on_progress is not None and (done % 256 == 0 or done == n_files):
                        on_progress(done, n_files)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise DataError(f"{folder} cannot be written: {reason or error}; nothing was left there") from None
    if split.overlap:
        _log.warning("patients stand in more than one subset of %s, so also in several folders", split.name)
    n_left_out = int((split.subsets(pack) == "").sum())
    if n_left_out:
        _log.info("%s patches are in no subset of %s and were left out", f"{n_left_out:,}", split.name)
    return count_tree(folder)


def count_tree(folder: Path | str) -> TreeCounts:
    """Count the files of a tree by subset and class, ordered as `FOLDER_BY_SUBSET` and the classes."""
    return {
        subset: {
            place.name: sum(1 for _ in place.iterdir()) for place in sorted((Path(folder) / subset).iterdir())
        }
        for subset in FOLDER_BY_SUBSET.values()
    }


def name_files(sources: list[str]) -> list[str]:
    """Return every source its file name, or its path in one word where several have that name.

    Raises:
        DataError: If two would still have the same name.
    """
    plain = [PurePosixPath(source).name for source in sources]
    seen: dict[str, int] = {}
    for name in plain:
        seen[name.lower()] = seen.get(name.lower(), 0) + 1  # some disks take a.png and A.png for one file
    repeated = [seen[name.lower()] > 1 for name in plain]
    names = [
        source.replace("/", "__") if twice else name
        for source, name, twice in zip(sources, plain, repeated, strict=True)
    ]
    if any(repeated):
        _log.info("%s files share a name and are named by their whole path", f"{sum(repeated):,}")
    if len({name.lower() for name in names}) < len(names):
        raise DataError("two patches would have one file name even by their whole paths: rename the files")
    return names


def _read(archive: Archive, entries: Mapping[str, Entry], source: str, pack: Pack) -> bytes | memoryview:
    if source not in entries:
        raise DataError(f"{archive.path} does not hold {source}: {pack.path.name} is of another source")
    try:
        return archive.read(entries[source])
    except DataError as error:
        raise DataError(f"{archive.path}: {source} {error}") from None


def _check_free(folder: Path | str) -> None:
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists already: choose another --export-tree, or remove it")


def _refuse_arrays(archive: Archive) -> DataError:
    return DataError(
        f"{archive.path} keeps its pixels in HDF5 arrays: there are no original files to export a tree of"
    )
