"""Base classes of data sets: layout, listing, pixels and downloads."""

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
"""Official subset by folder name."""

POSITIVE_BY_NEGATIVE = {
    "0": "1",
    "neg": "pos",
    "negative": "positive",
    "benign": "malignant",
    "normal": "tumour",
    "non_idc": "idc",
}
"""Positive class name by negative class name."""

Skipped = dict[str, str]

COLUMNS = ["patch_id", "patient_id", "slide_id", "site_id", "x", "y", "class_name", "source"]
"""Columns of every listing."""

_SUBSET_FOLDER = re.compile(
    r"(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?:[ _-]?(?:set|data|images|patches|split))?"
)


def find_subset(folder: str) -> str | None:
    """Return the subset of a folder name, None if it is not a subset.

    Example:
        >>> find_subset("Train_Set"), find_subset("validation"), find_subset("tests")
        ('train', 'validation', None)
    """
    match = _SUBSET_FOLDER.fullmatch(folder.lower())
    return SUBSET_BY_FOLDER[match[1]] if match else None


class Pixels(Protocol):
    """Reader of the pixels of a listing."""

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Yield uint8 ``(height, width, 3)`` RGB, or the error, of each row; thread-safe."""


class ImageFiles:
    """One image file per row."""

    def __init__(self, archive: Archive, entries: Sequence[Entry]) -> None:
        self._archive = archive
        self._entries = entries

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Yield each decoded image, or the error."""
        for row in rows:
            try:
                yield decode(self._archive.read(self._entries[row]))
            except DataError as error:
                yield error


@dataclass(frozen=True)
class RemoteFile:
    """One file at a fixed address.

    Attributes:
        url: Address.
        size_bytes: Published size, or None if unknown.
        checksum: Published ``"sha256:<hex>"`` or ``"md5:<hex>"``, or None if unknown.
        unpacked_bytes: Unpacked size of a ``.gz``, which is deleted once unpacked; else None.
    """

    url: str
    size_bytes: int | None = None
    checksum: str | None = None
    unpacked_bytes: int | None = None

    @property
    def name(self) -> str:
        """Published file name."""
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def final_name(self) -> str:
        """Final file name, without ``.gz`` if it is unpacked."""
        return self.name.removesuffix(".gz") if self.unpacked_bytes is not None else self.name


@dataclass(frozen=True)
class KaggleData:
    """A data set or competition on Kaggle, downloaded and unpacked by kagglehub.

    Attributes:
        handle: Kaggle handle.
        kind: Competitions need credentials and accepted rules.
        needed_bytes: Approximate size of the archive and its unpacked files together.
    """

    handle: str
    kind: Literal["dataset", "competition"]
    needed_bytes: int

    @property
    def folder(self) -> str:
        """Name of the output folder."""
        return PurePosixPath(self.handle).name

    @property
    def page(self) -> str:
        """Address of its page, with licence and rules."""
        return f"https://www.kaggle.com/{self.kind}s/{self.handle}"


@dataclass(frozen=True)
class Source:
    """Files that are downloaded together, with title, licence and credentials."""

    name: str
    title: str
    licence: str
    credentials: str = "none"
    """Credentials required for the download."""
    files: tuple[RemoteFile, ...] = ()
    kaggle: KaggleData | None = None
    citation: str = ""

    @property
    def terms(self) -> str:
        """Licence and citation."""
        return f"{self.licence}; cite {self.citation}" if self.citation else self.licence


@dataclass
class Listing:
    """Patches of an archive, before decoding."""

    table: pd.DataFrame
    """One row per patch: `COLUMNS`, and if known ``official_subset`` (train, validation, test) and ``row``
    (index in the data set's list)."""
    pixels: Pixels
    """In the order of ``table``."""
    class_names: list[str]
    positive_class: str | None
    mpp: float | None
    skipped: list[Skipped] = field(default_factory=list)
    """Unusable patch files: ``source`` and ``reason``."""
    counts: dict[str, int] = field(default_factory=dict)
    """Excluded files: ``duplicates``, ``unlabelled``, ``other_files``."""


@dataclass(frozen=True, kw_only=True)
class Dataset(Source):
    """Description of a data set: layout, metadata and download."""

    looks_for: str
    """Description of the layout by which it is recognised."""
    recognise: Callable[[Archive], bool]
    list_patches: Callable[[Archive], Listing]
    expected: dict[str, int]
    """Counts of the complete data set; empty for generic layouts."""
    mpp: float | None
    needs_mpp: bool = False
    """Whether the user must give the pixel size, which the data set does not record."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Named groups of classes for ``--positive``."""
    takes_any: bool = False
    """Whether the layout is generic, and so tried after the others."""

    @property
    def is_downloadable(self) -> bool:
        """Whether it can be downloaded."""
        return bool(self.files) or self.kaggle is not None


DATASETS: Registry[Dataset] = Registry("biopsy.datasets", "biopsy.data.datasets")


def register_dataset(dataset: Dataset) -> Dataset:
    """Register a data set under its name."""
    DATASETS.add(dataset.name, dataset, dataset.recognise)
    return dataset


def is_image(entry: Entry) -> bool:
    """Return whether an entry has the suffix of an image."""
    return entry.name.lower().endswith(IMAGE_SUFFIXES)


def drop_copies(
    archive: Archive, keyed: Iterable[tuple[str, Entry]]
) -> tuple[list[tuple[str, Entry]], int, list[Skipped]]:
    """Drop duplicates of patches that are in several files.

    Args:
        keyed: Patch ids and entries.

    Returns:
        ``(key, entry)`` sorted by key, the number of identical copies dropped, and entries that differ from
        the first one of the same key.
    """
    entries: dict[str, Entry] = {}
    n_copies, skipped = 0, []
    for key, entry in keyed:
        first = entries.setdefault(key, entry)
        if first is entry:
            continue
        if archive.same(first, entry):
            n_copies += 1
        else:
            skipped.append(
                {"source": entry.name, "reason": f"differs from {first.name}, the same patch by name"}
            )
    return sorted(entries.items()), n_copies, skipped


def refuse_empty(skipped: Sequence[Skipped]) -> DataError:
    """Return the error for a source without readable patches, with the first reason."""
    first = skipped[0] if skipped else Skipped(source="no image", reason="was found")
    return DataError(
        f"no patch can be read: {len(skipped):,} skipped, the first is {first['source']}: {first['reason']}"
    )


def find_positive(class_names: Sequence[str]) -> str | None:
    """Return the positive one of two class names if it is in `POSITIVE_BY_NEGATIVE`."""
    spelled = {name.lower().replace("tumor", "tumour").replace("-", "_"): name for name in class_names}
    for negative, positive in POSITIVE_BY_NEGATIVE.items():
        if spelled.keys() == {negative, positive}:
            return spelled[positive]
    return None
