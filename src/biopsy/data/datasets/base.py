"""What a layout is, what it makes of an archive, and how the pixels behind its rows are read."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, Protocol

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError
from biopsy.core.plugins import Registry
from biopsy.data.archives import Archive, Entry
from biopsy.slide_io.images import IMAGE_SUFFIXES, decode

SUBSET_BY_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Folders that name a dataset's official subset."""

POSITIVE_BY_NEGATIVE = {
    "0": "1",
    "neg": "pos",
    "negative": "positive",
    "benign": "malignant",
    "normal": "tumour",
    "non_idc": "idc",
}
"""Pairs of class names whose positive one goes without saying."""

Skipped = dict[str, str]

COLUMNS = ["patch_id", "patient_id", "slide_id", "site_id", "x", "y", "class_name", "source"]
"""That every listing's table has."""

_SIDE = re.compile(
    r"(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?:[ _-]?(?:set|data|images|patches|split))?"
)


def find_subset(folder: str) -> str | None:
    """Return the subset that a folder's name stands for, None where it is none.

    Example:
        >>> find_subset("Train_Set"), find_subset("validation"), find_subset("tests")
        ('train', 'validation', None)
    """
    match = _SIDE.fullmatch(folder.lower())
    return SUBSET_BY_FOLDER[match[1]] if match else None


class Pixels(Protocol):
    """The pixels of a listing's rows."""

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Yield uint8 ``(height, width, 3)`` RGB, or why there is none, row by row; from any thread."""


class ImageFiles:
    """One image file a row."""

    def __init__(self, archive: Archive, entries: Sequence[Entry]) -> None:
        self._archive = archive
        self._entries = entries

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Decode one file after the other."""
        for row in rows:
            try:
                yield decode(self._archive.read(self._entries[row]))
            except DataError as error:
                yield error


@dataclass(frozen=True)
class RemoteFile:
    """One file at a fixed address.

    Attributes:
        url: Where it is.
        size_bytes: Its length as published, or None where no source states it.
        checksum: ``"sha256:<hex>"`` or ``"md5:<hex>"``, or None where no source states one.
        unpacked_bytes: Room its content takes, for a ``.gz`` that is unpacked and then removed; else None.
    """

    url: str
    size_bytes: int | None = None
    checksum: str | None = None
    unpacked_bytes: int | None = None

    @property
    def name(self) -> str:
        """The file's name as published."""
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def final_name(self) -> str:
        """The name under which it ends up: without ``.gz`` if it is unpacked."""
        return self.name.removesuffix(".gz") if self.unpacked_bytes is not None else self.name


@dataclass(frozen=True)
class KaggleData:
    """A data set or competition on Kaggle, downloaded and unpacked by kagglehub.

    Attributes:
        handle: Kaggle's name for it.
        kind: Which of Kaggle's two kinds it is; a competition asks for credentials and accepted rules.
        needed_bytes: Room for the archive and its unpacked files together, about.
    """

    handle: str
    kind: Literal["dataset", "competition"]
    needed_bytes: int

    @property
    def folder(self) -> str:
        """The folder it is put in."""
        return PurePosixPath(self.handle).name

    @property
    def page(self) -> str:
        """Its page on Kaggle, where licence and rules are."""
        return f"https://www.kaggle.com/{self.kind}s/{self.handle}"


@dataclass(frozen=True)
class Source:
    """Everything that is downloaded together, and what is said before."""

    name: str
    title: str
    licence: str
    credentials: str
    files: tuple[RemoteFile, ...] = ()
    kaggle: KaggleData | None = None


@dataclass
class Listing:
    """What a layout found in an archive, before any pixel is decoded."""

    table: pd.DataFrame
    """One row a patch: `COLUMNS`, and where the dataset has them ``official_subset`` (train, validation,
    test) and ``row`` (its place in the dataset's own list)."""
    pixels: Pixels
    """In the order of ``table``."""
    class_names: list[str]
    positive_class: str | None
    mpp: float | None
    skipped: list[Skipped] = field(default_factory=list)
    """Files that should have been patches: ``source`` and ``reason``."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was left out on purpose: ``duplicates``, ``unlabelled``, ``other_files``."""


@dataclass(frozen=True)
class Dataset:
    """All that is known of a data set: how it is laid out in folders and files, and how it is fetched."""

    name: str
    title: str
    looks_for: str
    """What it is recognised by, in words."""
    recognise: Callable[[Archive], bool]
    list_patches: Callable[[Archive], Listing]
    expected: dict[str, int]
    """Counts of the whole dataset; empty for a layout of no particular one."""
    mpp: float | None
    citation: str
    licence: str
    needs_mpp: bool = False
    """Whether the user must state the um/px, which the data set is known not to have."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names under which several of its classes may be asked for together, by ``--positive``."""
    files: tuple[RemoteFile, ...] = ()
    kaggle: KaggleData | None = None
    credentials: str = "none"
    """Which credentials its download asks for."""
    takes_any: bool = False
    """Whether it recognises what others may recognise better: it is tried after them."""

    @property
    def source(self) -> Source | None:
        """What is downloaded, None where it cannot be."""
        if not self.files and self.kaggle is None:
            return None
        licence = f"{self.licence}; cite {self.citation}"
        return Source(self.name, self.title, licence, self.credentials, self.files, self.kaggle)


DATASETS: Registry[Dataset] = Registry("biopsy.datasets", "biopsy.data.datasets")


def register_dataset(dataset: Dataset) -> Dataset:
    """Make a data set known under its name."""
    DATASETS.add(dataset.name, dataset, dataset.recognise)
    return dataset


def is_image(entry: Entry) -> bool:
    """Return whether an entry's name is that of an image."""
    return entry.name.lower().endswith(IMAGE_SUFFIXES)


def drop_copies(
    archive: Archive, keyed: Iterable[tuple[str, Entry]]
) -> tuple[list[tuple[str, Entry]], int, list[Skipped]]:
    """Keep one of each group of entries that stand for the same patch.

    Args:
        keyed: Entries under the name that says which patch they are.

    Returns:
        ``(key, entry)`` in order of key, the number of identical copies left out, and the copies that are
        *not* identical, which are named: nobody can say which of them is right.
    """
    kept: dict[str, Entry] = {}
    n_copies, skipped = 0, []
    for key, entry in keyed:
        first = kept.setdefault(key, entry)
        if first is entry:
            continue
        if archive.same(first, entry):
            n_copies += 1
        else:
            skipped.append(
                {"source": entry.name, "reason": f"differs from {first.name}, the same patch by name"}
            )
    return sorted(kept.items()), n_copies, skipped


def refuse_empty(skipped: Sequence[Skipped]) -> DataError:
    """Return the error for a source of which nothing can be read, naming the first reason."""
    first = skipped[0] if skipped else Skipped(source="no image", reason="was found")
    return DataError(f"no patch can be read: {len(skipped):,} skipped, {first['source']} {first['reason']}")


def find_positive(class_names: Sequence[str]) -> str | None:
    """Return the positive one of two class names where that goes without saying."""
    spelled = {name.lower().replace("tumor", "tumour").replace("-", "_"): name for name in class_names}
    for negative, positive in POSITIVE_BY_NEGATIVE.items():
        if spelled.keys() == {negative, positive}:
            return spelled[positive]
    return None
