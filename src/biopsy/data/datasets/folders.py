"""Generic tree of class folders: ``[split/]<class>/.../<image>``, in any number of common parent folders.

Top folders named train, val or test (or training, validation, test_set and the like) are official subsets;
other top folders are classes. Trees whose classes are a level lower, inside folders of patients or folds, are
refused. The id of a patch is its path in the tree; patients are given by ``--patients``.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable

import pandas as pd

from biopsy.core.errors import DataError
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    POSITIVE_BY_NEGATIVE,
    SUBSET_BY_FOLDER,
    Dataset,
    ImageFiles,
    Listing,
    find_positive,
    find_subset,
    list_images,
    make_table,
    register_dataset,
)

logger = logging.getLogger(__name__)

MANY_CLASSES = 20
_PAIRS = [
    *POSITIVE_BY_NEGATIVE.items(),
    ("non_tumour", "tumour"),
    ("negative", "positive"),
    ("healthy", "cancer"),
]
# Names of patients, slides, folds, dates and magnifications: P01, case 3, fold_1, 14-4659, TCGA-A2-A0T2,
# 8863, A123, 2019-01-03, 40X.
_GROUP = re.compile(
    r"(?:p|pt|pat|patient|case|subj|subject|sub|slide|wsi|sample|specimen|donor|person|fold|split|part|"
    r"batch|site|cent(?:er|re)|hospital|lab|scanner|train|test|val)[ _.-]*\d+[a-z]?|"
    r"tcga-\w\w-\w+.*|sob_[bm]_.*|\d+-\d+|\d{4}-\d\d-\d\d|\d{3,}|[a-z]{1,4}[ _.-]?\d{3,}|\d+x|x\d+",
    re.IGNORECASE,
)
_MASKS = {
    "mask",
    "masks",
    "label",
    "labels",
    "annotation",
    "annotations",
    "gt",
    "ground_truth",
    "overlay",
    "overlays",
}


def recognise(archive: Archive) -> bool:
    """Return whether at least half of the images are in class folders.

    Raises:
        DataError: If the classes are likely a level lower; ``--dataset folders`` overrides the check.
    """
    paths = _strip_common([entry.name.split("/") for entry in archive.images])
    below = _list_below(paths)
    lower = next(filter(_are_classes, _list_levels(paths)), set())
    if lower and not _are_classes(set(below)):
        raise DataError(
            f"{archive.path}: {_name_some(below)} contain {' and '.join(sorted(lower))}, likely the "
            "classes: sort images into <class>/<patient>/ and set --patients, or set --dataset folders if "
            "the upper folders are the classes"
        )
    if len(below) > 1 and all(map(_GROUP.fullmatch, below)):
        raise DataError(
            f"{archive.path}: {_name_some(below)} look like patients, slides, folds or magnifications, "
            "not classes: sort images into <class>/<patient>/ and set --patients, or set --dataset "
            "folders if they are the classes"
        )
    if unknown := _find_unknown_subsets(paths):
        raise DataError(
            f"{archive.path}: {_name_some(unknown)} has class folders like train, val and test, or holds "
            "folders of these names: rename it to one of these, remove it if it is a copy, or set --dataset "
            "folders if it is a class"
        )
    return bool(paths) and 2 * sum(_split_path(path)[1] is not None for path in paths) >= len(paths)


def list_patches(archive: Archive) -> Listing:
    """List the patches by their class folders."""
    images = archive.images
    paths = dict(zip(images, _strip_common([entry.name.split("/") for entry in images]), strict=True))

    def identify(entry: Entry) -> str:
        if _split_path(paths[entry])[1] is None:
            raise DataError("is in no class folder")
        return "/".join(paths[entry])

    unique, skipped, counts = list_images(archive, identify)
    stems = pd.Series([key.rpartition(".")[0] for key, _ in unique], dtype=str)
    parts = _join_cases([_split_path(paths[entry]) for _, entry in unique])
    table = make_table(
        patch_id=stems.where(~stems.duplicated(keep=False), [key for key, _ in unique]),
        class_name=[class_name for _, class_name in parts],
        source=[entry.name for _, entry in unique],
        official_subset=[subset for subset, _ in parts],
    )
    if table["official_subset"].isna().all():
        table = table.drop(columns="official_subset")
    class_names = sorted(set(table["class_name"]), key=_natural_key)
    _warn_of_levels([paths[entry] for _, entry in unique])
    return Listing(
        table=table,
        pixels=ImageFiles(archive, [entry for _, entry in unique]),
        class_names=class_names,
        positive_class=find_positive(class_names),
        mpp=None,
        skipped=skipped,
        counts=counts,
    )


def _strip_common(paths: list[list[str]]) -> list[list[str]]:
    """Remove common parent folders, unless they are subsets or class folders."""
    while paths and all(len(path) > 2 for path in paths):
        first = paths[0][0]
        if find_subset(first) or any(path[0] != first for path in paths):
            break
        paths = [path[1:] for path in paths]
    return paths


def _split_path(path: list[str]) -> tuple[str | None, str | None]:
    """Return the official subset and class of a path, None if missing."""
    folders = path[:-1]
    subset = find_subset(folders[0]) if folders else None
    if subset is not None:
        folders = folders[1:]
    return subset, folders[0] if folders else None


def _join_cases(parts: list[tuple[str | None, str | None]]) -> list[tuple[str | None, str]]:
    """Return subsets and classes, of classes that differ only by letter case the most frequent."""
    spellings = Counter(str(name) for _, name in parts)
    common = {name.casefold(): name for name, _ in reversed(spellings.most_common())}
    joined = [name for name in spellings if common[name.casefold()] != name]
    if joined:
        logger.warning(
            "class folders that differ only by letter case are one class: %s",
            ", ".join(f"{name} and {common[name.casefold()]}" for name in joined),
        )
    return [(subset, common[str(name).casefold()]) for subset, name in parts]


def _list_below(paths: list[list[str]]) -> dict[str, set[str]]:
    """Return the subfolders of each class folder."""
    below: dict[str, set[str]] = {}
    for path in paths:
        subset, class_name = _split_path(path)
        if class_name is not None:
            below.setdefault(class_name, set()).update(path[1 + (subset is not None) : -1][:1])
    return below


def _list_levels(paths: list[list[str]]) -> list[set[str]]:
    """Return the names of the folders at each level below the class folders."""
    levels: list[set[str]] = []
    for path in paths:
        folders = path[1 + (_split_path(path)[0] is not None) : -1]
        levels += [set() for _ in folders[len(levels) :]]
        for names, name in zip(levels, folders, strict=False):
            names.add(name)
    return levels


def _find_unknown_subsets(paths: list[list[str]]) -> set[str]:
    """Return top folders that are not subsets and contain only the classes of the subsets, or subsets."""
    classes = {path[1] for path in paths if len(path) > 2 and find_subset(path[0])}
    below: dict[str, set[str]] = {}
    for path in paths:
        if len(path) > 1 and not find_subset(path[0]):
            below.setdefault(path[0], set()).add(path[1] if len(path) > 2 else "")
    return {
        top
        for top, names in below.items()
        if (names <= classes and top not in classes) or (classes and all(map(find_subset, names)))
    }


def _warn_of_levels(paths: list[list[str]]) -> None:
    """Warn of folders that may have been mistaken for subsets or classes."""
    guessed = {path[0] for path in paths if find_subset(path[0]) and path[0].lower() not in SUBSET_BY_FOLDER}
    if guessed:
        logger.warning("folders interpreted as official subsets: %s", ", ".join(sorted(guessed)))
    below = _list_below(paths)
    seconds = set().union(*below.values())
    if any(find_subset(name) for name in seconds):
        logger.warning(
            "folders below the classes (%s) may be subsets; they are not used: put them above the classes",
            _name_some(name for name in seconds if find_subset(name)),
        )
    if masks := {name for name in seconds if name.lower() in _MASKS}:
        logger.warning(
            "the images in %s are taken as patches; if they are masks, remove them", _name_some(masks)
        )
    if len(below) > MANY_CLASSES:
        logger.warning(
            "%d folders are interpreted as classes; if they are patients, see --patients", len(below)
        )
    holders = Counter(name for names in below.values() for name in names)
    shared = {name for name, n_holders in holders.items() if n_holders > 1}
    is_shared_by_all = all(names & shared for names in below.values())
    if len(shared) > 1 and is_shared_by_all and not _are_classes(set(below)):
        logger.warning(
            "%s are interpreted as classes; several contain the folders %s: if those are the classes, sort "
            "images into <class>/<patient>/",
            *(_name_some(below), _name_some(shared)),
        )


def _name_some(names: Iterable[str]) -> str:
    names = sorted(names, key=_natural_key)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _are_classes(names: set[str]) -> bool:
    """Return whether two folder names are a common pair of class names."""
    spelt = {name.lower().replace("tumor", "tumour").replace("-", "_").replace(" ", "_") for name in names}
    return any(spelt == set(pair) for pair in _PAIRS)


def _natural_key(name: str) -> tuple[bool, int, str]:
    """Return a sort key: numbers by value, before words."""
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
