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
from biopsy.data.pack_files import Origin
from biopsy.slide_io.images import decode

SUBSET_BY_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
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


class RowPixels:
    """Pixels returned by a function of the row, one row at a time; thread-safe if the function is."""

    def __init__(self, get: Callable[[int], np.ndarray]) -> None:
        self._get = get

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Yield each image, or the error."""
        for row in rows:
            try:
                yield self._get(row)
            except DataError as error:
                yield error


class ImageFiles(RowPixels):
    """One image file of an archive per row."""

    def __init__(self, archive: Archive, entries: Sequence[Entry]) -> None:
        super().__init__(lambda row: decode(archive.read(entries[row])))


@dataclass(frozen=True)
class RemoteFile:
    """One file at a fixed address.

    Attributes:
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
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def final_name(self) -> str:
        """Final file name, without ``.gz`` if it is unpacked."""
        return self.name.removesuffix(".gz") if self.unpacked_bytes is not None else self.name


@dataclass(frozen=True)
class KaggleData:
    """A data set or competition on Kaggle, downloaded and unpacked by kagglehub.

    Attributes:
        kind: Competitions need credentials and accepted rules.
        needed_bytes: Approximate size of the archive and its unpacked files together.
    """

    handle: str
    kind: Literal["dataset", "competition"]
    needed_bytes: int

    @property
    def folder(self) -> str:
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
    origin: Origin = field(default_factory=Origin)
    """Provenance, for ``pack.json``; of slides that were cut also parameters, areas and exclusions."""


@dataclass(frozen=True, kw_only=True)
class Dataset(Source):
    """Description of a data set: layout, metadata and download."""

    looks_for: str
    """Description of the layout by which it is recognised."""
    recognise: Callable[[Archive], bool]
    list_patches: Callable[..., Listing]
    """Returns the patches of an archive; with ``cuts_slides``, of an archive and a `Cutting`."""
    expected: dict[str, int]
    """Counts of the complete data set; empty for generic layouts."""
    mpp: float | None
    needs_mpp: bool = False
    """Whether the user must give the pixel size, which the data set does not record."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Named groups of classes for ``--positive``."""
    cuts_slides: bool = False
    """Whether it is slides that are cut into patches."""
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


def mostly(archive: Archive, is_named: Callable[[Entry], object]) -> bool:
    """Return whether an archive has images, and at least half of them have the names of a data set."""
    n_named, n_images = 0, len(archive.images)
    for n_seen, entry in enumerate(archive.images, start=1):
        n_named += bool(is_named(entry))
        if 2 * n_named >= n_images:
            return True
        if 2 * (n_seen - n_named) > n_images:
            return False
    return False


def list_images(
    archive: Archive, identify: Callable[[Entry], str], images: Iterable[Entry] | None = None
) -> tuple[list[tuple[str, Entry]], list[Skipped], dict[str, int]]:
    """List the images of an archive, without copies of the same patch.

    Args:
        identify: Returns what identifies the patch of an image, or raises a DataError with the reason why it
            is not usable.
        images: Images to list (default: all).

    Returns:
        Identities and entries, sorted; the images that are not usable, or differ from another image of the
        same patch; and the counts of a `Listing`.
    """
    entries: dict[str, Entry] = {}
    n_copies, skipped, differing = 0, list[Skipped](), list[Skipped]()
    for entry in archive.images if images is None else images:
        try:
            first = entries.setdefault(identify(entry), entry)
        except DataError as error:
            skipped.append({"source": entry.name, "reason": str(error)})
            continue
        if first is entry:
            continue
        if archive.same(first, entry):
            n_copies += 1
        else:
            differing.append(
                {"source": entry.name, "reason": f"differs from {first.name}, the same patch by name"}
            )
    counts = {"duplicates": n_copies, "other_files": len(archive.entries) - len(archive.images)}
    return sorted(entries.items()), skipped + differing, counts


def make_table(**columns: object) -> pd.DataFrame:
    """Return the table of a `Listing`; columns of `COLUMNS` that are not given are null."""
    return pd.DataFrame(dict.fromkeys(COLUMNS) | columns)


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
        if len(class_names) == 2 and spelled.keys() == {negative, positive}:
            return spelled[positive]
    return None
