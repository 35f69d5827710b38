"""Guarded reading of HDF5 files, without links and external storage."""

import contextlib
import io
import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import h5py

from biopsy.core.errors import DataError, FileFormatError
from biopsy.core.loaders import open_regular

MAX_RATIO = 1032  # largest compression ratio of deflate
MAX_CHUNK_BYTES = 2**26  # 64 MiB, the memory of the smallest read
_HEAP_HEADER, _HEAP_OBJECT = 16, struct.Struct("<H6xQ")
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_LZF,
}


@contextlib.contextmanager
def open_hdf5(path: Path | str, content: io.BytesIO | None = None) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; use `find_node` and `find_dataset` on it.

    Args:
        path: The file, or the name of ``content`` in errors.
        content: Content of a file in an archive.

    Raises:
        FileFormatError: If it is not an HDF5 file or damaged, also if detected within the block.
    """
    if content is None:
        open_regular(path).close()
    try:
        with h5py.File(path if content is None else content, "r") as file:
            yield file
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileFormatError(
            path, "syntax", f"is no HDF5 file, or was cut short: save or download it again ({reason})"
        ) from None


def check_heaps(path: Path | str, content: io.BytesIO | None = None) -> None:
    """Refuse texts stored so that libhdf5 would walk them for ever; call it before any text is read.

    Each collection of texts is a chain of objects whose sizes lead to the next; one of size 0, or of a size
    that leads back, has no end (HDF5 file format, "Global Heap").

    Raises:
        FileFormatError: If there is one, or the file's sizes are not of 64 bits, as h5py writes them.
    """
    if content is not None:
        return _check_heaps(content.getvalue(), path)
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                _check_heaps(mapped, path)


def _check_heaps(content: bytes | mmap.mmap, path: Path | str) -> None:
    old = content[8:9] < b"\2"
    if content[:8] != b"\x89HDF\r\n\x1a\n" or content[13 if old else 9 :][:2] != b"\x08\x08":
        raise FileFormatError(
            path, "syntax", "is no HDF5 file of 64-bit sizes, or was cut short: save or download it again"
        )
    start = -1
    while (start := content.find(b"GCOL\1", start + 1)) >= 0:
        place = start + _HEAP_HEADER
        end = min(len(content), start + int.from_bytes(content[start + 8 : place], "little"))
        while place + _HEAP_OBJECT.size <= end:
            index, n_bytes = _HEAP_OBJECT.unpack_from(content, place)
            step = n_bytes if index == 0 else _HEAP_OBJECT.size + (n_bytes + 7 & -8)
            if not 0 < step <= end - place:
                raise FileFormatError(
                    path, "syntax", "holds damaged texts, or was cut short: save or download it again"
                )
            place += step


def find_group(group: h5py.Group, name: str, path: Path | str) -> h5py.Group:
    """Return the group of a name, refused where it is an array; see `find_node`."""
    node = find_node(group, name, path)
    if not isinstance(node, h5py.Group):
        raise FileFormatError(path, "value", f"holds {name!r} as an array where a group is expected")
    return node


def find_node(group: h5py.Group, name: str, path: Path | str) -> h5py.Group | h5py.Dataset:
    """Return the group or dataset of a name, such as ``a/b``; ``path`` names the file in errors.

    Raises:
        FileFormatError: If it is missing or a link.
    """
    node: h5py.Group | h5py.Dataset = group
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise FileFormatError(
                path, "columns", f"names {name!r}, which it does not hold: it was cut short or changed"
            )
        if not isinstance(link, h5py.HardLink):
            raise FileFormatError(
                path, "value", f"holds {name!r} as a link to elsewhere: links are not followed"
            )
        node = node[part]
    return node


def find_dataset(group: h5py.Group, name: str, path: Path | str) -> h5py.Dataset:
    """Return the dataset of a name.

    Raises:
        FileFormatError: If it is not a dataset, stored externally, or larger than its stored data allow.
    """
    dataset = find_node(group, name, path)
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise FileFormatError(
            path, "value", f"holds {name!r} as a group, or empty, where an array is expected"
        )
    if dataset.is_virtual or dataset.external:
        raise FileFormatError(
            path, "value", f"holds the values of {name!r} in another file: links are not followed"
        )
    settings = dataset.id.get_create_plist()
    filters = {settings.get_filter(number)[0] for number in range(settings.get_nfilters())}
    n_bytes, n_stored = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size()
    ratio = MAX_RATIO if filters & {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF} else 1
    if n_bytes > ratio * n_stored:
        raise FileFormatError(
            path, "too-large", f"declares {n_bytes:,} bytes in {name!r} and holds {n_stored:,} of them"
        )
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if filters - _FILTERS or (filters and chunk > MAX_CHUNK_BYTES):
        raise FileFormatError(
            path,
            "value",
            f"holds {name!r} packed by filters {sorted(filters)} in chunks of {chunk:,} bytes, where deflate "
            f"or lzf and at most {MAX_CHUNK_BYTES:,} are read",
        )
    return dataset
