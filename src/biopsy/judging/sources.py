"""Patches for a classifier to be explained on, from a pack or from image files."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from biopsy.core.errors import DataError
from biopsy.core.seeds import make_rng
from biopsy.data.archives import open_archive
from biopsy.data.packs import Pack, is_pack, pad
from biopsy.imaging.decode import IMAGE_SUFFIXES, decode, read_header
from biopsy.learning.classifiers import Classifier

MOST_LABELLED = 2_000  # patches of a pack among which examples are sought


@dataclass(frozen=True)
class Patches:
    """Patches in memory.

    Attributes:
        patch_ids: One each; of an image its path inside the folder or zip.
        pixels: uint8 ``(n, H, W, 3)``, padded at the right and bottom.
        sizes: True ``(width, height)``, ``(n, 2)``.
        target: Index of the true class, ``(n,)``; None where it is not known.
    """

    patch_ids: list[str]
    pixels: np.ndarray
    sizes: np.ndarray
    target: np.ndarray | None


def gather_patches(
    classifier: Classifier, data: Path | str, named: Sequence[str], n_unlabelled: int
) -> Patches:
    """Read the patches that are named, or those among which examples are to be sought.

    Args:
        classifier: Whose size and resolution they must have.
        data: A pack, a folder or zip of images, or an image.
        named: Ids; where there are any, only these are read.
        n_unlabelled: How many images are read, in order, where none is named: nothing says which are
            mistaken.

    Raises:
        DataError: If a named patch is not there, or an image cannot be read or is too large.
    """
    path = Path(data)
    if is_pack(path):
        return _read_pack(classifier, Pack.open(path), named)
    readers = _list_images(path)
    names = _check_named(path, named, list(readers)) or list(readers)[:n_unlabelled]
    if not names:
        raise DataError(f"{path} holds no image to explain")
    load = partial(_load, patch_px=classifier.info.patch_px)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda name: load(name, readers[name]), names))
    sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
    pixels = np.stack([pad(image, classifier.info.patch_px) for image in images])
    return Patches(names, pixels, sizes, None)


def _read_pack(classifier: Classifier, pack: Pack, named: Sequence[str]) -> Patches:
    classifier.check_pack(pack)
    ids = pack.table["patch_id"].astype(str).tolist()
    row_of = {name: row for row, name in enumerate(ids)}
    rows = np.array([row_of[name] for name in _check_named(pack.path, named, ids)], dtype=int)
    if not named:
        n = min(len(pack), MOST_LABELLED)
        rows = np.sort(make_rng(0, "examples of a pack").choice(len(pack), n, replace=False))
    known = pack.class_names == classifier.info.class_names
    target = pack.target[rows] if known else None
    return Patches([ids[row] for row in rows], pack.patches[rows], pack.sizes[rows], target)


def _check_named(place: Path, named: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in named:
        if name not in known:
            raise DataError(f"{place} has no patch {name!r}; its ids are such as {next(iter(known), '')!r}")
    return list(dict.fromkeys(named))


def _list_images(path: Path) -> dict[str, Callable[[], bytes | memoryview]]:
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        return {path.name: path.read_bytes}
    if not path.exists():
        raise DataError(f"{path} does not exist: give a pack, a folder or zip of images, or an image")
    archive = open_archive(path)
    entries = [entry for entry in archive.entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    return {entry.name: partial(archive.read, entry) for entry in entries}


def _load(name: str, read: Callable[[], bytes | memoryview], *, patch_px: int) -> np.ndarray:
    try:
        data = read()
        header = read_header(data)
        if max(header.width, header.height) <= patch_px:
            return decode(data)
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    raise DataError(
        f"{name} is {header.width}x{header.height} px, the classifier takes patches of "
        f"{patch_px}x{patch_px}: cut it into patches of that size"
    )
