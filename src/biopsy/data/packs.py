"""Packs: decoded patches with their labels, patients, slides and coordinates.

A pack is a folder of ``pack.json`` (metadata), ``patches.npy`` (pixels, memory-mapped), ``patches.parquet``
(one row per patch), ``splits/`` and ``audit.json``. Opening a pack verifies file sizes and the hashes of
``pack.json`` and of the table; `Pack.verify` also hashes the pixels.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from biopsy.core.errors import DataError, FileFormatError, PackError, raising
from biopsy.core.files import create_directory, file_state, read_json, sha256_file
from biopsy.core.loaders import map_array, validate
from biopsy.core.results import SKIPPED, Output, Table, name_skipped, number
from biopsy.core.tables import Kind, read_parquet_table
from biopsy.core.text import class_title
from biopsy.data.building import ImageSource, list_source, read_arrays, read_dataset, read_image_table
from biopsy.data.pack_files import (
    COLUMNS,
    DOCUMENT,
    FORMAT,
    PIXELS,
    TABLE,
    PackInfo,
    content_sha256,
)
from biopsy.data.packing import write_listing

PACKS = Path("packs")
"""Default folder of packs."""

_INTEGER = ("x", "y", "target", "width", "height")
_KINDS: dict[str, Kind] = {name: "integer" if name in _INTEGER else "text" for name in COLUMNS}
_REMEDY = "restore the file, or make the pack again with `biopsy prepare`"

Unit = Literal["patient", "slide", "patch"]

_COUNTS = {"padded": "padded to a square", "duplicates": "identical copies left out"}


class Pack(Output):
    """Labelled patches, read from a pack folder.

    Attributes:
        path: The folder.
        info: Content of ``pack.json``.
        patches: uint8 ``(n_patches, patch_px, patch_px, 3)`` RGB, memory-mapped read-only. Patches smaller
            than ``patch_px`` are padded at the right and bottom with their edge pixels.
        table: One row per patch, in the order of ``patches``; columns `COLUMNS` and any joined ones. ``x, y``
            are in pixels at the pack's mpp, ``width, height`` are the size without padding.
        tree: Folder of the original files that `prepare` exported with the pack, and their numbers by subset
            and class; None without one.
    """

    tree: tuple[Path, Mapping[str, Mapping[str, int]]] | None = None

    def __init__(
        self, path: Path, info: PackInfo, patches: np.ndarray, table: pd.DataFrame, state: object = None
    ) -> None:
        self.path = path
        self.info = info
        self.patches = patches
        self.table = table
        self._state = state

    @classmethod
    def open(cls, path: "Path | str | Pack") -> "Pack":
        """Open a pack and verify its files.

        Raises:
            PackError: If it is not a pack, of a newer format, truncated, or inconsistent.
        """
        if isinstance(path, Pack):
            return path
        path = Path(path)
        info = _read_info(path)
        for name, size in info.files.items():
            result = (path / name).stat().st_size if (path / name).exists() else None
            if result != size:
                fault = "is missing" if result is None else f"has {result:,} bytes instead of {size:,}"
                raise PackError(
                    f"{path / name} {fault}: the pack is damaged, make it again with `biopsy prepare`",
                    "truncated",
                )
        state = _file_state(path)
        with raising(PackError):
            if info.table_sha256 and sha256_file(path / TABLE) != info.table_sha256:
                raise FileFormatError(path / TABLE, "altered", f"was changed since it was written; {_REMEDY}")
            patches = map_array(path / PIXELS, dtype=np.uint8, ndim=4)
            table, _ = read_parquet_table(path / TABLE, _KINDS)
        _check_parts(path, info, patches, table)
        return cls(path, info, patches, table.astype({"x": "Int64", "y": "Int64"}), state)

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray | Sequence[np.ndarray],
        labels: ArrayLike,
        patients: ArrayLike | None = None,
        *,
        class_names: Sequence[str] | None = None,
        positive_class: str | None = None,
        mpp: float | None = None,
        columns: Mapping[str, ArrayLike] | pd.DataFrame | None = None,
        out: Path | str | None = None,
    ) -> "Pack":
        """Make a pack of arrays.

        Args:
            images: uint8 RGB ``(n, height, width, 3)``, or a list of images of several sizes.
            labels: The class of each image: an index into ``class_names``, or a name.
            patients: The patient of each image, required for splits by patient.
            class_names: Names by index (default: the sorted values of ``labels``).
            positive_class: The positive class of two (default: the second).
            mpp: Pixel size in µm.
            columns: Further metadata: ``slide_id``, ``site_id``, ``patch_id``, ``x``, ``y`` (in pixels), and
                columns for subgroups.
            out: Output folder (default: ``packs/arrays-<hash>.pack``). An existing identical pack is opened.

        Raises:
            DataError: If lengths do not match, or images are not uint8 RGB.
        """
        source = read_arrays(images, labels, patients, columns)
        return _write_source(source, class_names, positive_class, mpp, out)

    @classmethod
    def from_table(
        cls,
        path: Path | str,
        *,
        class_names: Sequence[str] | None = None,
        positive_class: str | None = None,
        mpp: float | None = None,
        root: Path | str | None = None,
        out: Path | str | None = None,
    ) -> "Pack":
        """Make a pack of the image files listed in a csv or Parquet table.

        Args:
            path: With a column of paths (``path``, ``image``, ``file``, ...), one of classes (``label``,
                ``target``, ``class``, ...) and if possible ``patient_id``, ``slide_id``, ``x``, ``y``; other
                columns become subgroups.
            root: Folder to which paths are relative (default: that of the table).
            class_names: As in `from_arrays`.
            positive_class: As in `from_arrays`.
            mpp: Pixel size in µm.
            out: As in `from_arrays`.

        Raises:
            DataError: If columns are not recognised, labels are unknown, or no file can be read. Unreadable
                files are in ``info.skipped``.
        """
        return _write_source(read_image_table(path, root), class_names, positive_class, mpp, out)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        patients: ArrayLike | str | None = None,
        *,
        labels: ArrayLike | None = None,
        class_names: Sequence[str] | None = None,
        positive_class: str | None = None,
        mpp: float | None = None,
        columns: Mapping[str, ArrayLike] | pd.DataFrame | None = None,
        out: Path | str | None = None,
    ) -> "Pack":
        """Make a pack of a torch or Hugging Face data set.

        Args:
            dataset: Its items are ``(image, label)``, ``(image, label, patient)`` or mappings with ``image``
                and ``label``; images are PIL, uint8 arrays, or tensors ``(3, height, width)``, without random
                transforms.
            patients: The patient of each item, or the name of a column (default: from the items).
            labels: The class of each item (default: from the items).
            class_names: As in `from_arrays` (default: those of the data set, if any).
            positive_class: As in `from_arrays`.
            mpp: Pixel size in µm.
            columns: As in `from_arrays`.
            out: As in `from_arrays`.

        Raises:
            DataError: If it is a stream or a dictionary of splits, or its items have another form.
        """
        source = read_dataset(dataset, patients, labels, columns)
        return _write_source(source, class_names, positive_class, mpp, out)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def original_classes(self) -> pd.Series:
        """The class of each patch by name, before ``--positive`` joined classes."""
        class_names = pd.Series(self.target).map(dict(enumerate(self.class_names)))
        return self.table.get("original_class", class_names)

    @property
    def has_official_subsets(self) -> bool:
        """Whether the data set assigns some of its patches to subsets."""
        return "official_subset" in self.table and bool(self.table["official_subset"].notna().any())

    def __repr__(self) -> str:
        counts = self.info.counts
        return f"<Pack {self.path.name}: {counts['patches']:,} patches of {counts['patients']:,} patients>"

    def blocks(self) -> list[str | Table]:
        info = self.info
        mpp = "unknown" if info.mpp is None else f"{info.mpp:g}"
        positive = (
            "no positive class"
            if info.positive_class is None
            else f"positive: {class_title(info.positive_class)}"
        )
        blocks: list[str | Table] = [
            f"{self.path}: {info.dataset}, {info.patch_px} px at {mpp} um/px, {positive}"
        ]
        for name, value in info.counts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{class_title(key)} {n:,}" for key, n in value.items()) or "none"
            blocks.append(f"  {_COUNTS.get(name, name.replace('_', ' '))}: {number(value)}")
        if self.tree is not None:
            folder, counts = self.tree
            rows = [[subset, *map(number, n.values())] for subset, n in counts.items()]
            blocks.append(f"{folder}: original files, class folders numbered in the order of the classes")
            blocks.append(Table(["subset", *map(class_title, counts["training"])], rows))
        return blocks

    def to_json(self) -> dict[str, object]:
        tree = {} if self.tree is None else {"tree": self.tree[1]}
        return {"path": self.path, **self.info.model_dump(), **tree}

    def problems(self) -> list[str]:
        return name_skipped(self.info.skipped, self.path / "pack.json")

    @property
    def exit_code(self) -> int:
        return SKIPPED if self.info.skipped else 0

    def pixels(self, row: int) -> np.ndarray:
        """Return the pixels of a patch without padding, uint8 ``(height, width, 3)``."""
        width, height = self.sizes[row]
        return np.asarray(self.patches[row, :height, :width])

    def pixels_by_id(self) -> Callable[[str], np.ndarray]:
        """Return a function from a patch id to its `pixels`."""
        rows = {patch_id: row for row, patch_id in enumerate(self.table["patch_id"])}
        return lambda patch_id: self.pixels(rows[patch_id])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of ``target``."""
        return self.info.class_names

    @property
    def positive_index(self) -> int | None:
        """Index of the positive class, None for more than two classes."""
        return None if self.info.positive_class is None else self.class_names.index(self.info.positive_class)

    @cached_property
    def target(self) -> np.ndarray:
        """Index into `class_names`, int64 ``(n_patches,)``."""
        return self.table["target"].to_numpy(np.int64)

    @cached_property
    def sizes(self) -> np.ndarray:
        """True ``(width, height)`` of each patch in pixels, int64 ``(n_patches, 2)``."""
        return self.table[["width", "height"]].to_numpy(np.int64)

    @cached_property
    def unit(self) -> Unit:
        """Grouping unit: patients if any has an id, else slides, else patches; see `group_by_unit`."""
        for unit, column in (("patient", "patient_id"), ("slide", "slide_id")):
            if self.table[column].notna().any():
                return unit  # type: ignore[return-value]
        return "patch"

    @cached_property
    def group_ids(self) -> np.ndarray:
        """The id of each patch's `unit`, as strings ``(n_patches,)``."""
        return group_by_unit(self.table, self.unit)

    def rows_of(self, patch_ids: Sequence[str] | pd.Series) -> np.ndarray:
        """Return the rows of patches by their ids, int64 ``(n,)``, in the given order."""
        requested = pd.Index(patch_ids).astype(str)
        rows = pd.Index(self.table["patch_id"].astype(str)).get_indexer(requested)
        if (rows < 0).any():
            raise PackError(
                f"{self.path} has no patch {requested[rows < 0][0]!r}: use the pack they are from", "patch"
            )
        return rows

    def verify(self) -> None:
        """Verify the content hash.

        Raises:
            PackError: If pixels, labels or ids were altered.
        """
        result = content_sha256(self.patches, self.table)
        if result != self.info.content_sha256:
            raise PackError(
                f"{self.path} was altered: its content hash is {result[:12]} instead of "
                f"{self.info.content_sha256[:12]}; make it again with `biopsy prepare`",
                "altered",
            )

    def require_unchanged(self) -> None:
        """Check that the files are unchanged since the pack was opened; fast enough for every batch.

        If modification times changed, contents are compared once.

        Raises:
            PackError: If a file is missing or its content has changed.
        """
        state = _file_state(self.path)
        if state == self._state:
            return
        try:
            reopened = Pack.open(self.path)
            if reopened.info.content_sha256 != self.info.content_sha256:
                raise PackError(f"its content hash is now {reopened.info.content_sha256[:12]}")
            reopened.verify()
        except PackError as error:
            raise PackError(f"{self.path} was changed while it was in use: {error}", "altered") from None
        self._state = state


def group_by_unit(table: pd.DataFrame, unit: str) -> np.ndarray:
    """Return the group of each row of a table of patches, as strings ``(n,)``.

    A patch without a patient is grouped by its slide; without a slide too, it is its own group.
    """
    ids = table[f"{unit}_id"]
    missing = ids.isna().to_numpy()
    if not missing.any():
        return ids.to_numpy(str)
    own_group = f"(no {unit}) patch " + table["patch_id"].astype(str)
    if unit == "patient" and "slide_id" in table:
        own_group = own_group.where(
            table["slide_id"].isna(), "(no patient) slide " + table["slide_id"].astype(str)
        )
    return ids.where(~missing, own_group).to_numpy(str)


def known_groups(table: pd.DataFrame, unit: str) -> pd.Series:
    """Return the patient (slide) of each row of a table of patches; null if unknown or without such ids."""
    column = f"{unit}_id"
    if unit == "patch" or column not in table:
        return pd.Series(None, table.index, dtype=object)
    return table[column]


def _write_source(
    source: ImageSource,
    class_names: Sequence[str] | None,
    positive_class: str | None,
    mpp: float | None,
    out: Path | str | None,
) -> Pack:
    """Write a pack and open it; an existing pack of the same content is opened instead."""
    listing = list_source(source, class_names, positive_class, mpp)
    parent = PACKS if out is None else Path(out).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".biopsy-") as temporary:
        new = Path(temporary) / "new.pack"
        with create_directory(new) as folder:
            write_listing(folder, source.name, listing)
        identity = _identify(Pack.open(new))
        final = PACKS / f"{source.name}-{identity[:12]}.pack" if out is None else Path(out)
        if not final.exists() or (final.is_dir() and not any(final.iterdir())):
            os.replace(new, final)
        elif not is_pack(final):
            raise DataError(f"{final} exists and is not a pack: pass another out=")
        elif _identify(Pack.open(final)) != identity:
            raise PackError(f"{final} is a pack of other patches: pass another out=, or remove it", "exists")
    return Pack.open(final)


def _identify(pack: Pack) -> str:
    """Return a hash of the pixels, labels and metadata of a pack."""
    info = pack.info
    description = [info.content_sha256, info.class_names, info.positive_class, info.mpp]
    table = pack.table.astype("string").to_csv(index=False)
    return hashlib.sha256(f"{json.dumps(description)}\n{table}".encode()).hexdigest()


def is_pack(path: Path | str) -> bool:
    return (Path(path) / DOCUMENT).is_file()


def _read_info(path: Path) -> PackInfo:
    if not is_pack(path):
        raise PackError(
            f"{path} is not a pack (it has no {DOCUMENT}): make one with `biopsy prepare SOURCE --out PACK`",
            "missing",
        )
    with raising(PackError):
        document = read_json(path / DOCUMENT, format=FORMAT, remedy=_REMEDY, may_lack_hash=True)
        info = validate(path / DOCUMENT, PackInfo, document)
    names, positive = info.class_names, info.positive_class
    if len(set(names)) < len(names) or (positive is not None and positive not in names):
        raise PackError(
            f"{path / DOCUMENT} has the classes {names}, positive {positive!r}: it was changed; {_REMEDY}",
            "value",
        )
    return info


def _file_state(path: Path) -> object:
    return [file_state(path / name) for name in (DOCUMENT, PIXELS, TABLE)]


def _check_parts(path: Path, info: PackInfo, patches: np.ndarray, table: pd.DataFrame) -> None:
    """Check that pixels, table and metadata agree."""
    shape = (info.patch_px, info.patch_px, 3)
    needed = ["patch_id", "sha256", "target", "width", "height"]
    faults = {
        f"has {len(patches):,} patches and {len(table):,} rows": len(table) != len(patches),
        f"has patches of {patches.shape[1:]} instead of {shape}": patches.shape[1:] != shape,
        "lacks ids, hashes, targets or sizes": bool(table[needed].isna().any(axis=None)),
        "has repeated patch ids": bool(table["patch_id"].duplicated().any()),
        "has unknown targets": not table["target"].between(0, len(info.class_names) - 1).all(),
        "has sizes larger than its patches": not (
            table[["width", "height"]].ge(1) & table[["width", "height"]].le(info.patch_px)
        ).all(axis=None),
    }
    if fault := next((fault for fault, is_so in faults.items() if is_so), None):
        raise PackError(f"{path} {fault}: the pack is damaged, {_REMEDY}", "value")
