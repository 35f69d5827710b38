"""Any tree of class folders: ``[split/]<class>/.../<image>``, below any number of folders that hold it all.

Folders named train, val or test at the top (or training, validation, test_set and the like) give a patch its
official subset; every other top folder is a class. Refused are trees whose classes stand a level lower, below
folders of patients or folds, or below a folder beside such subsets that is none. The patch's id is its path
from there on; who is who comes with ``--patients``: a csv, or a pattern for the path.
"""

import logging
from collections import Counter
from collections.abc import Iterable

import pandas as pd

from biopsy.core.errors import DataError
from biopsy.data.archives import Archive
from biopsy.data.datasets.base import (
    COLUMNS,
    POSITIVE_BY_NEGATIVE,
    SUBSET_BY_FOLDER,
    Dataset,
    ImageFiles,
    Listing,
    Skipped,
    drop_copies,
    find_positive,
    find_subset,
    is_image,
    register_dataset,
)

_log = logging.getLogger(__name__)

MANY_CLASSES = 20
_PAIRS = [
    *POSITIVE_BY_NEGATIVE.items(),
    ("non_tumour", "tumour"),
    ("negative", "positive"),
    ("healthy", "cancer"),
]


def recognise(archive: Archive) -> bool:
    """Return whether at least half of the images lie in class folders.

    Raises:
        DataError: If the classes likely stand a level lower; ``--dataset folders`` takes the tree as it is.
    """
    paths = _strip_common([entry.name.split("/") for entry in archive.entries if is_image(entry)])
    below = _list_below(paths)
    second = set().union(*below.values())
    if _are_classes(second) and not _are_classes(set(below)):
        raise DataError(
            f"{archive.path}: below {_name_some(below)} lie {' and '.join(sorted(second))}, likely the "
            "classes: sort images into <class>/<patient>/ and name patients by --patients, or say --dataset "
            "folders if the upper folders are the classes"
        )
    if unknown := _find_unknown_subsets(paths):
        raise DataError(
            f"{archive.path}: {_name_some(unknown)} holds class folders as train, val and test do: rename it "
            "to one of these, or say --dataset folders if it is a class"
        )
    return bool(paths) and 2 * sum(_split_path(path)[1] is not None for path in paths) >= len(paths)


def list_patches(archive: Archive) -> Listing:
    """List the patches by the folders they lie in."""
    images = [entry for entry in archive.entries if is_image(entry)]
    paths = _strip_common([entry.name.split("/") for entry in images])
    skipped: list[Skipped] = []
    keyed = []
    for path, entry in zip(paths, images, strict=True):
        if _split_path(path)[1] is None:
            skipped.append({"source": entry.name, "reason": "lies in no class folder"})
        else:
            keyed.append(("/".join(path), entry))
    kept, n_copies, differing = drop_copies(archive, keyed)
    stems = pd.Series([key.rpartition(".")[0] for key, _ in kept], dtype=str)
    rows = []
    for stem, twice, (key, entry) in zip(stems, stems.duplicated(keep=False), kept, strict=True):
        subset, class_name = _split_path(key.split("/"))
        rows.append((key if twice else stem, None, None, None, pd.NA, pd.NA, class_name, entry.name, subset))
    table = pd.DataFrame(rows, columns=[*COLUMNS, "official_subset"])
    if table["official_subset"].isna().all():
        table = table.drop(columns="official_subset")
    class_names = sorted(set(table["class_name"]), key=_natural)
    _warn_of_levels([key.split("/") for key, _ in kept])
    return Listing(
        table=table,
        pixels=ImageFiles(archive, [entry for _, entry in kept]),
        class_names=class_names,
        positive_class=find_positive(class_names),
        mpp=None,
        skipped=skipped + differing,
        counts={"duplicates": n_copies, "other_files": len(archive.entries) - len(images)},
    )


def _strip_common(paths: list[list[str]]) -> list[list[str]]:
    """Cut the folders that hold everything, as long as they are no subset and leave a class folder."""
    while paths and all(len(path) > 2 for path in paths):
        first = paths[0][0]
        if find_subset(first) or any(path[0] != first for path in paths):
            break
        paths = [path[1:] for path in paths]
    return paths


def _split_path(path: list[str]) -> tuple[str | None, str | None]:
    """Return a path's official subset and class, None where it has none."""
    folders = path[:-1]
    subset = find_subset(folders[0]) if folders else None
    if subset is not None:
        folders = folders[1:]
    return subset, folders[0] if folders else None


def _list_below(paths: list[list[str]]) -> dict[str, set[str]]:
    """Return the folders directly below each class folder."""
    below: dict[str, set[str]] = {}
    for path in paths:
        subset, class_name = _split_path(path)
        if class_name is not None:
            below.setdefault(class_name, set()).update(path[1 + (subset is not None) : -1][:1])
    return below


def _find_unknown_subsets(paths: list[list[str]]) -> set[str]:
    """Return top folders that are no subset and hold nothing but the classes that the subsets hold."""
    classes = {path[1] for path in paths if len(path) > 2 and find_subset(path[0])}
    below: dict[str, set[str]] = {}
    for path in paths:
        if len(path) > 1 and not find_subset(path[0]):
            below.setdefault(path[0], set()).add(path[1] if len(path) > 2 else "")
    return {top for top, names in below.items() if names <= classes and top not in classes}


def _warn_of_levels(paths: list[list[str]]) -> None:
    """Warn where folders were taken for subsets or classes that may be something else."""
    guessed = {path[0] for path in paths if find_subset(path[0]) and path[0].lower() not in SUBSET_BY_FOLDER}
    if guessed:
        _log.warning("taken for the data set's official subsets: %s", ", ".join(sorted(guessed)))
    below = _list_below(paths)
    if len(below) > MANY_CLASSES:
        _log.warning("%d folders are taken for classes: are they patients? see --patients", len(below))
    holders = Counter(name for names in below.values() for name in names)
    shared = {name for name, n_holders in holders.items() if n_holders > 1}
    is_shared_by_all = all(names & shared for names in below.values())
    if len(shared) > 1 and is_shared_by_all and not _are_classes(set(below)):
        _log.warning(
            "%s are taken for classes; several of them hold the folders %s: if those are the classes, sort "
            "images into <class>/<patient>/",
            *(_name_some(below), _name_some(shared)),
        )


def _name_some(names: Iterable[str]) -> str:
    names = sorted(names, key=_natural)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _are_classes(names: set[str]) -> bool:
    """Return whether folders have the names of two classes that usually stand beside each other."""
    spelt = {name.lower().replace("tumor", "tumour").replace("-", "_").replace(" ", "_") for name in names}
    return any(spelt == set(pair) for pair in _PAIRS)


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value and before words."""
    number = name.lstrip("0") if name.isdecimal() else ""
    return (not name.isdecimal(), len(number), number or name)


register_dataset(
    Dataset(
        name="folders",
        title="Class folders, with or without split folders",
        looks_for="images in [train|val|test/]<class>/",
        recognise=recognise,
        list_patches=list_patches,
        expected={},
        mpp=None,
        citation="",
        licence="that of your data",
        takes_any=True,
    )
)
