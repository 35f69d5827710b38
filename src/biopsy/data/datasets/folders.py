"""Any tree of class folders: ``[split/]<class>/.../<image>``, below any number of folders that hold it all.

Folders named train, training, val, valid, validation, test or testing at the top give a patch its own side;
every other top folder is a class. The patch's id is its path from there on; who is who comes with
``--patients``: a csv, or a pattern for the path.
"""

import pandas as pd

from biopsy.data.archives import Archive
from biopsy.data.datasets.base import (
    SIDE_BY_FOLDER,
    ImageFiles,
    Layout,
    Listing,
    Skipped,
    drop_copies,
    find_positive,
    is_image,
)


def recognise(archive: Archive) -> bool:
    """Say whether at least half of the images lie in class folders."""
    paths = _strip_common([entry.name.split("/") for entry in archive.entries if is_image(entry)])
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
        side, class_name = _split_path(key.split("/"))
        rows.append((key if twice else stem, None, None, None, pd.NA, pd.NA, class_name, entry.name, side))
    columns = ["patch_id", "patient_id", "slide_id", "site_id", "x", "y", "class_name", "source", "own_side"]
    table = pd.DataFrame(rows, columns=columns)
    if table["own_side"].isna().all():
        table = table.drop(columns="own_side")
    class_names = sorted(set(table["class_name"]), key=_natural)
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
    """Cut the folders that hold everything, as long as they are no side and leave a class folder."""
    while paths and all(len(path) > 2 for path in paths):
        first = paths[0][0]
        if first.lower() in SIDE_BY_FOLDER or any(path[0] != first for path in paths):
            break
        paths = [path[1:] for path in paths]
    return paths


def _split_path(path: list[str]) -> tuple[str | None, str | None]:
    """Give a path's own side and class, None where it has none."""
    folders = path[:-1]
    side = SIDE_BY_FOLDER.get(folders[0].lower()) if folders else None
    if side is not None:
        folders = folders[1:]
    return side, folders[0] if folders else None


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value and before words."""
    number = name.lstrip("0") if name.isdecimal() else ""
    return (not name.isdecimal(), len(number), number or name)


LAYOUT = Layout(
    name="folders",
    title="Class folders, with or without split folders",
    looks_for="images in [train|val|test/]<class>/",
    recognise=recognise,
    list_patches=list_patches,
    expected={},
    mpp=None,
    citation="",
    licence="that of your data",
)
