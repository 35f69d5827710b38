"""PatchCamelyon as published: six HDF5 files and, optionally, three tables of slides.

``camelyonpatch_level_2_split_<train|valid|test>_<x|y>.h5`` are pixels and labels of one subset each; subsets
may be missing. ``..._meta.csv`` has the slide of each patch (``wsi``); its ``coord_x`` and ``coord_y`` are
stored under these names, because they are not in patch pixels.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from biopsy.core.errors import ArchiveError, DataError
from biopsy.core.hdf5 import find_dataset, open_hdf5
from biopsy.core.tables import infer_numbers, read_csv_table
from biopsy.core.text import normalize_id
from biopsy.data.archives import Archive, Entry, FolderArchive
from biopsy.data.datasets.base import (
    SUBSET_BY_FOLDER,
    Dataset,
    Listing,
    RemoteFile,
    Skipped,
    make_table,
    register_dataset,
)
from biopsy.data.pack_files import MAX_PATCH_PX
from biopsy.data.tables import normalize_cells

CLASS_NAMES = ["normal", "tumour"]
MAX_PATCHES = 2**20  # per file; the largest published file has 2**18
MPP = 0.972  # level 2 of Camelyon16's scans at 0.243 micrometres a pixel
SPLITS = ("train", "valid", "test")

_NAME = re.compile(r"camelyonpatch_level_2_split_(?P<split>train|valid|test)_(?P<part>x\.h5|y\.h5|meta\.csv)")
_META_COLUMNS = ("coord_x", "coord_y", "tumor_patch", "center_tumor_patch")


class H5Patches:
    """Concatenated rows of the ``x`` arrays of several HDF5 files.

    A file is open only while a run of rows is read, since the HDF5 library is single-threaded.
    """

    def __init__(self, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> None:
        self._paths = paths
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Yield each row, or the error; consecutive rows are read at once."""
        parts = np.array([self._find_part(row) for row in rows])
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(parts) != 0)) + 1
        for run in np.split(np.asarray(rows), breaks):
            part = self._find_part(run[0])
            first = run[0] - self._starts[part]
            try:
                with _open_array(self._paths[part], "x") as array:
                    block = array[first : first + len(run)]
            except DataError as error:
                yield from [error] * len(run)
            else:
                yield from block

    def _find_part(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1


def recognise(archive: Archive) -> bool:
    """Return whether an archive has one of the published files."""
    return any(
        entry.name.endswith((".h5", ".h5.gz")) and "camelyonpatch_level_2" in entry.name
        for entry in archive.entries
    )


def list_patches(archive: Archive) -> Listing:
    """List the patches of every subset with both pixels and labels."""
    files = _find_files(archive)
    assert isinstance(archive, FolderArchive)
    tables, paths, shapes, skipped = [], [], [], []
    for split in sorted(SPLITS):
        x, y = files.get((split, "x.h5")), files.get((split, "y.h5"))
        if x is None or y is None:
            if single := x or y:
                lacking = "labels (..._y.h5)" if y is None else "pixels (..._x.h5)"
                skipped.append(Skipped(source=single.name, reason=f"has no {lacking}"))
            continue
        paths.append(archive.path_of(x))
        shapes.append(_read_shape(paths[-1]))
        labels = _read_labels(archive.path_of(y), n_patches=shapes[-1][0])
        tables.append(_make_table(archive, split, x, labels, files.get((split, "meta.csv"))))
    if not tables:
        raise ArchiveError(f"{archive.path} holds no subset of PCam with both its _x.h5 and its _y.h5")
    return Listing(
        table=pd.concat(tables, ignore_index=True),
        pixels=H5Patches(paths, shapes),
        class_names=CLASS_NAMES,
        positive_class="tumour",
        mpp=MPP,
        skipped=skipped,
        counts={"duplicates": 0, "other_files": len(archive.entries) - len(files)},
    )


def _find_files(archive: Archive) -> dict[tuple[str, str], Entry]:
    if not isinstance(archive, FolderArchive):
        raise ArchiveError(
            f"{archive.path} holds PCam's h5 files inside a zip: unpack it and give the folder"
        )
    packed = [entry.name for entry in archive.entries if entry.name.endswith(".h5.gz")]
    files: dict[tuple[str, str], Entry] = {}
    for entry in archive.entries:
        match = _NAME.fullmatch(entry.name.rpartition("/")[2])
        if match is None:
            continue
        key = (match["split"], match["part"])
        if key in files:
            raise ArchiveError(f"{archive.path} holds {match[0]} twice: {files[key].name} and {entry.name}")
        files[key] = entry
    unpacked = {entry.name for entry in files.values()}
    waiting = [name for name in packed if name.removesuffix(".gz") not in unpacked]
    if waiting:
        raise ArchiveError(f"{archive.path}: {', '.join(waiting)} must be unpacked first (gunzip)")
    return files


@contextlib.contextmanager
def _open_array(path: Path, key: str) -> Iterator[h5py.Dataset]:
    with open_hdf5(path) as file:
        yield find_dataset(file, key, path)


def _read_shape(path: Path) -> tuple[int, ...]:
    with _open_array(path, "x") as array:
        if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
            content = f"{array.dtype} {array.shape}"
            raise ArchiveError(f"{path} holds {content}; expected uint8 (n, height, width, 3)")
        if len(array) > MAX_PATCHES or max(array.shape[1:3]) > MAX_PATCH_PX:
            raise ArchiveError(
                f"{path} holds patches of shape {array.shape}; at most {MAX_PATCHES:,} of "
                f"{MAX_PATCH_PX:,} px are supported"
            )
        return tuple(array.shape)


def _read_labels(path: Path, n_patches: int) -> np.ndarray:
    with _open_array(path, "y") as array:
        if array.size != n_patches or array.dtype.kind not in "biu":
            raise ArchiveError(f"{path} holds {array.dtype} {array.shape} for {n_patches:,} patches")
        labels = array[:].reshape(-1)
    if not np.isin(labels, (0, 1)).all():
        raise ArchiveError(f"{path} holds the labels {np.unique(labels)[:5].tolist()}; 0 and 1 are expected")
    return labels.astype(np.int64)


def _make_table(
    archive: FolderArchive, split: str, x: Entry, labels: np.ndarray, meta: Entry | None
) -> pd.DataFrame:
    table = make_table(
        patch_id=[f"{split}_{row:06d}" for row in range(len(labels))],
        class_name=np.array(CLASS_NAMES, dtype=object)[labels],
        source=[f"{x.name}#{row}" for row in range(len(labels))],
        official_subset=SUBSET_BY_FOLDER[split],
    )
    if meta is not None:
        rows = read_csv_table(archive.path_of(meta), required=("wsi",))
        if len(rows) != len(table):
            raise ArchiveError(
                f"{archive.path_of(meta)} has {len(rows):,} rows; expected {len(table):,}, one per patch"
            )
        table["slide_id"] = normalize_cells(rows["wsi"], normalize_id)
        more = [name for name in _META_COLUMNS if name in rows.columns]
        table = table.assign(**{name: infer_numbers(rows[name]) for name in more})
    return table


_ADDRESS = "https://zenodo.org/records/2546921/files/camelyonpatch_level_2_split_{part}?download=1"
_IMAGE_BYTES = 96 * 96 * 3
_HDF5_BYTES = 1 << 16  # upper bound of the headers of an uncompressed HDF5 file
_COUNTS = {"train": 262_144, "valid": 32_768, "test": 32_768}

# Sizes and SHA-256: TensorFlow Datasets, patch_camelyon/checksums.tsv, from these Zenodo files; also in
# torchvision's prototype PCAM.
_PACKED = {
    "train_x": (6_421_353_462, "d619e741468a7ab35c7e4a75e6821b7e7e6c9411705d45708f2a0efc8960656c"),
    "train_y": (21_378, "b74126d2c01b20d3661f9b46765d29cf4e4fba6faba29c8e0d09d406331ab75a"),
    "valid_x": (805_965_320, "f82ee1670d027b4ec388048d9eabc2186b77c009655dae76d624c0ecb053ccb2"),
    "valid_y": (3_038, "ce1ae30f08feb468447971cfd0472e7becd0ad96d877c64120c72571439ae48c"),
    "test_x": (800_875_929, "79174c2201ad521602a5888be8f36ee10875f37403dd3f2086caf2182ef87245"),
    "test_y": (3_040, "0a522005fccc8bbd04c5a117bfaf81d8da2676f03a29d7499f71d0a0bd6068ef"),
}
# MD5 of the csv files: github.com/basveeling/pcam issue 4. The README has them with validation and
# test exchanged (issues 1 and 4; torchvision pull request 6644).
_META = {
    "train": "md5:5a3dd671e465cfd74b5b822125e65b0a",
    "valid": "md5:67589e00a4a37ec317f2d1932c7502ca",
    "test": "md5:3455fd69135b66734e1008f3af684566",
}


def _packed_file(part: str, size_bytes: int, sha256: str) -> RemoteFile:
    split, _, kind = part.partition("_")
    unpacked_bytes = _COUNTS[split] * (_IMAGE_BYTES if kind == "x" else 1) + _HDF5_BYTES
    url = _ADDRESS.format(part=f"{part}.h5.gz")
    return RemoteFile(url, size_bytes, f"sha256:{sha256}", unpacked_bytes)


_FILES = (
    *(_packed_file(part, *published) for part, published in _PACKED.items()),
    *(RemoteFile(_ADDRESS.format(part=f"{part}_meta.csv"), checksum=md5) for part, md5 in _META.items()),
)

register_dataset(
    Dataset(
        name="pcam",
        title="PatchCamelyon (PCam), the published HDF5 files",
        looks_for="camelyonpatch_level_2_split_<train|valid|test>_<x|y>.h5",
        recognise=recognise,
        list_patches=list_patches,
        expected={"patches": 327_680, "train": 262_144, "validation": 32_768, "test": 32_768},
        mpp=MPP,
        citation="Veeling et al. 2018 (MICCAI), from Camelyon16 (Ehteshami Bejnordi et al. 2017, JAMA)",
        licence="CC0 1.0",
        files=_FILES,
    )
)
