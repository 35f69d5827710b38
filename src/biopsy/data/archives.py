"""Common interface to zips and folders: entries by relative name, read on demand, nothing extracted.

A zip is memory-mapped: a stored entry is a slice of the map, a deflated entry is inflated by the thread that
reads it. Names are normalised (`biopsy.core.text`) and never become paths.

Zips with names that lead out of the archive or with overlapping entries (zip bombs) are refused. Entries
larger than `MAX_ENTRY_BYTES`, or with a compression ratio above `MAX_INFLATION`, are not read.
"""

import contextlib
import hashlib
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

from biopsy.core.errors import ArchiveError, DataError
from biopsy.core.files import load_json
from biopsy.core.text import normalize_path
from biopsy.data.pack_files import DOCUMENT
from biopsy.slide_io.images import IMAGE_SUFFIXES

MAX_ENTRY_BYTES = 2**29
"""Largest size of an entry in bytes, unpacked."""

MAX_INFLATION = 100
"""Largest compression ratio of an entry of more than `_FREE_BYTES`."""

SYNTHETIC = "SYNTHETIC.txt"
"""Name of a file that marks an archive of synthetic patches, which reports state."""

_OUTPUTS = {
    "run.json": "a run",
    "study.json": "a study",
    "pretraining.json": "a pre-training",
    "bundle.json": "an exported bundle",
    "classifier.json": "a classifier",
    "comparison.json": "a comparison",
    "explain.json": "explanations of patches",
}
"""Outputs of this package by the file that marks them. Their pictures are no patches."""

_FREE_BYTES = 2**24

_PIXEL_SUFFIXES = (*IMAGE_SUFFIXES, ".h5", ".hdf5", ".geojson")  # GeoJSON: annotations of slides

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # APPNOTE 4.3.7: signature ... name length, extra length
# What macOS, Windows and network storage leave in folders, in lower case.
_JUNK = (
    *("__macosx", "icon", "network trash folder", "temporary items"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information"),
    *("@eadir", "@recycle", "#recycle", "lost+found"),
)
_LEADS_OUT = re.compile(r"^[\\/]|^[^\\/]*:|(?:^|[\\/])\.\.(?:[\\/]|$)|\0")
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_ENCRYPTED = 0x1  # bit 0 of the general purpose flags
_UTF8 = 0x800  # bit 11
_RELEASE_BYTES = 2**26
_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)


class Entry(NamedTuple):
    """A file of an archive. The last four fields locate it in a zip; in a folder, ``offset`` is its index."""

    name: str
    """Relative, with forward slashes, normalised by `normalize_path`."""
    size: int
    """Bytes, unpacked."""
    crc: int = 0
    offset: int = 0
    packed_size: int = 0
    method: int = 0


class Archive(Protocol):
    """A zip or a folder.

    Attributes:
        entries: Files in order of name, without hidden files and metadata files of macOS and Windows.
        images: The entries with the suffix of an image.
        unread: Zips inside a folder, which are not read.
    """

    path: Path
    entries: list[Entry]
    images: list[Entry]
    unread: list[str]

    def read(self, entry: Entry) -> bytes | memoryview:
        """Return the bytes of an entry, or raise a DataError with the reason only."""

    def same(self, first: Entry, second: Entry) -> bool:
        """Return whether two entries hold the same bytes."""

    def fingerprint(self) -> str:
        """Hash names, sizes and checksums (folder: modification times) of all entries."""


class ZipArchive:
    """A zip, read through a memory map. See `Archive`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread: list[str] = []
        self.entries = _list_zip(path)
        self.images = _find_images(self.entries)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read_bytes = 0

    def read(self, entry: Entry) -> bytes | memoryview:
        """Return the bytes of an entry, verified by the checksum in the zip."""
        packed = self._slice(entry)
        data = packed if entry.method == _STORED else _inflate(packed, entry)
        if zlib.crc32(data) != entry.crc:
            raise DataError("does not match its checksum in the zip: the zip is damaged")
        return data

    def _slice(self, entry: Entry) -> memoryview:
        self._release_pages(entry.packed_size)
        if not 0 <= entry.offset <= len(self._map) - _LOCAL_HEADER.size:
            raise DataError("lies beyond the end of the zip: the zip is damaged")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(self._map, entry.offset)
        start = entry.offset + _LOCAL_HEADER.size + name_length + extra_length
        packed = memoryview(self._map)[start : start + entry.packed_size]
        if signature != b"PK\x03\x04" or len(packed) != entry.packed_size:
            raise DataError("is not at the position in the zip's directory: the zip is damaged")
        if entry.size > MAX_ENTRY_BYTES:
            raise DataError(f"unpacks to {entry.size:,} bytes; at most {MAX_ENTRY_BYTES:,} are read")
        if entry.size > max(_FREE_BYTES, MAX_INFLATION * entry.packed_size):
            raise DataError(
                f"unpacks to {entry.size:,} bytes from {entry.packed_size:,}, a compression ratio above "
                f"{MAX_INFLATION}: it is not read"
            )
        return packed

    def same(self, first: Entry, second: Entry) -> bool:
        """Compare size and checksum."""
        return (first.size, first.crc) == (second.size, second.crc)

    def fingerprint(self) -> str:
        """Hash the directory of the zip."""
        return _hash_rows((entry.name, entry.size, entry.crc) for entry in self.entries)

    def _release_pages(self, n_bytes: int) -> None:
        """Release mapped pages regularly, so that reading a large zip does not use its size in memory."""
        self._read_bytes += n_bytes
        if self._read_bytes > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read_bytes = 0
            self._map.madvise(mmap.MADV_DONTNEED)


class FolderArchive:
    """A folder and its subfolders. See `Archive`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outputs: list[str] = []
        self._files = sorted(
            _walk(path, "", self.outputs), key=lambda file: (normalize_path(file[0]), file[0])
        )
        entries = [
            Entry(normalize_path(name), size, offset=index)
            for index, (name, size, _) in enumerate(self._files)
        ]
        self.entries = [entry for entry in entries if not entry.name.lower().endswith(".zip")]
        self.images = _find_images(self.entries)
        self.zips = [entry for entry in entries if entry.name.lower().endswith(".zip")]
        self.unread = [entry.name for entry in self.zips]

    def path_of(self, entry: Entry) -> Path:
        """Return the path of an entry, whose file name may be in another normalisation."""
        return self.path / self._files[entry.offset][0]

    def read(self, entry: Entry) -> bytes | memoryview:
        if entry.size > MAX_ENTRY_BYTES:
            raise DataError(f"has {entry.size:,} bytes; at most {MAX_ENTRY_BYTES:,} are read")
        try:
            file = os.open(f"{self.path}{os.sep}{self._files[entry.offset][0]}", _READ_ONLY)
            try:  # three system calls, where Path.read_bytes makes eight
                content = os.read(file, entry.size + 1)
                while len(content) < entry.size and (rest := os.read(file, entry.size + 1 - len(content))):
                    content += rest  # some network file systems return less than was requested
            finally:
                os.close(file)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from None
        if len(content) != entry.size:
            raise DataError(f"no longer has the {entry.size:,} bytes it had when the folder was listed")
        return content

    def same(self, first: Entry, second: Entry) -> bool:
        """Compare size, then bytes."""
        return first.size == second.size and self.read(first) == self.read(second)

    def fingerprint(self) -> str:
        """Hash names, sizes and modification times."""
        return _hash_rows((entry.name, entry.size, self._files[entry.offset][2]) for entry in self.entries)


def open_archive(path: Path | str) -> Archive:
    """Open a zip, a folder, or the only zip in a folder without images.

    Raises:
        ArchiveError: If there is nothing to read, it is an output of this package, or the zip is empty,
            truncated, encrypted, or has names that lead out of it.
    """
    path = Path(path)
    if path.is_dir():
        _refuse_output(path)
        folder = FolderArchive(path)
        if any(entry.name.lower().endswith(_PIXEL_SUFFIXES) for entry in folder.entries):
            return folder
        if len(folder.unread) == 1:
            return ZipArchive(folder.path_of(folder.zips[0]))
        if folder.unread:
            raise ArchiveError(
                f"{path} holds {len(folder.unread)} zips ({', '.join(folder.unread[:3])}): name one"
            )
        left_out = f" but those of {folder.outputs[0]}" if folder.outputs else ""
        raise ArchiveError(
            f"{path} holds no images{left_out}, no .h5 files, no slides with .geojson and no zip"
        )
    if not path.exists():
        raise ArchiveError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ArchiveError(f"{path} is empty (0 bytes): the download is incomplete")
    return ZipArchive(path)


def _refuse_output(path: Path) -> None:
    """Refuse a folder that is an output of this package, or the figures of a run."""
    try:
        output = _name_output(path, os.listdir(path))
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror}") from None
    parent = path.resolve().parent
    if output is None and path.resolve().name == "figures" and (parent / "run.json").is_file():
        output = f"a folder of the run {parent.name}"
    if output is not None:
        raise ArchiveError(
            f"{path} is {output}, whose pictures are no patches: name the folder or zip with the patches"
        )


def _name_output(folder: Path, names: Collection[str]) -> str | None:
    """Return what a folder is, if it is an output of this package."""
    for name, output in _OUTPUTS.items():
        if name not in names:
            continue
        with contextlib.suppress(DataError, KeyError, TypeError):
            if str(load_json(folder / name)["format"]).startswith("biopsy-"):
                return output
    return None


def is_junk(name: str) -> bool:
    """Return whether a name is that of a hidden file or a metadata file of macOS or Windows."""
    parent, _, base = name.rpartition("/")
    return _is_junk_part(base) or (parent != "" and _is_junk_folder(parent))


@lru_cache(maxsize=4096)
def _is_junk_folder(path: str) -> bool:
    return any(_is_junk_part(part) for part in path.split("/"))


def _is_junk_part(part: str) -> bool:
    return (part[:1] == "." and part != ".") or part.lower() in _JUNK


def _find_images(entries: list[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]


def _list_zip(path: Path) -> list[Entry]:
    entries, n_encrypted = [], 0
    infos = _read_directory(path)
    _refuse_overlap(path, infos)
    while infos:  # popped one by one to limit memory for zips of half a million files
        info = infos.pop()
        name = _read_name(info)
        if (".." in name or ":" in name or "\0" in name or name[:1] in "/\\") and _LEADS_OUT.search(name):
            raise ArchiveError(f"{path} holds {name!r}, a name that leads out of it: not read")
        name = normalize_path(name)
        if not name.endswith("/") and not is_junk(name):
            n_encrypted += info.flag_bits & _ENCRYPTED
            location = (info.header_offset, info.compress_size, info.compress_type)
            entries.append(Entry(name, info.file_size, info.CRC, *location))
    if not entries:
        raise ArchiveError(f"{path} is a zip without files")
    if all(entry.name.lower().endswith(".zip") for entry in entries):
        raise ArchiveError(f"{path} holds only the zip {entries[0].name}: unpack it, and give what is inside")
    if n_encrypted:
        raise ArchiveError(
            f"{path} is encrypted ({n_encrypted:,} of {len(entries):,} files): "
            "unpack it with its password and give the folder"
        )
    return sorted(entries)


def _read_name(info: zipfile.ZipInfo) -> str:
    """Return the name of an entry; macOS writes UTF-8 without the flag that marks it."""
    name = info.orig_filename
    if not info.flag_bits & _UTF8 and not name.isascii():
        try:
            return name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return name


def _refuse_overlap(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    extents = sorted((info.header_offset, info.compress_size, info.orig_filename) for info in infos)
    for (start, n_bytes, name), (next_start, _, other) in pairwise(extents):
        if start + _LOCAL_HEADER.size + n_bytes > next_start:
            raise ArchiveError(
                f"{path} holds {name!r} and {other!r} in the same bytes: it is damaged or a zip bomb"
            )


def _read_directory(path: Path) -> list[zipfile.ZipInfo]:
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        with zipfile.ZipFile(path) as archive:
            return [info for info in archive.infolist() if not info.filename.endswith("/")]
    except UnicodeDecodeError:
        raise ArchiveError(
            f"{path} has names that are marked as UTF-8 and are not: create the zip again"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
        if start == b"PK\x03\x04":
            raise ArchiveError(f"{path} is truncated or damaged ({error}): download it again") from None
        raise ArchiveError(f"{path} is neither a zip nor a folder: unpack it and give the folder") from None
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror}") from None


def _inflate(packed: memoryview, entry: Entry) -> bytes:
    if entry.method != _DEFLATED:
        raise DataError(f"is compressed by method {entry.method}; stored and deflated entries are read")
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
    except zlib.error:
        raise DataError("cannot be inflated: the zip is damaged") from None
    if len(data) != entry.size:
        raise DataError(f"does not unpack to the {entry.size:,} bytes in the zip's directory")
    return data


def _walk(
    folder: Path, prefix: str, outputs: list[str], ancestors: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and modification time of files below a folder.

    Cyclic links, packs and other outputs of this package are left out; the latter are added to ``outputs``.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    try:
        items = list(os.scandir(folder))
    except OSError as error:
        raise ArchiveError(f"{folder} cannot be read: {error.strerror}") from None
    names = {item.name for item in items}
    if prefix and DOCUMENT in names:
        return
    if prefix and (output := _name_output(folder, names)) is not None:
        outputs.append(f"{output}, {folder}")
        return
    for item in items:
        if is_junk(item.name):
            continue
        name = prefix + item.name
        if item.is_dir():
            yield from _walk(folder / item.name, name + "/", outputs, ancestors | {identity})
        elif item.is_file():
            status = item.stat()
            yield name, status.st_size, status.st_mtime_ns
        elif item.is_symlink():  # a broken link is reported when it is read
            yield name, 0, 0


def _hash_rows(rows: Iterator[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update("\0".join(map(str, row)).encode())
    return digest.hexdigest()
