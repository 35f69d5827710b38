"""One way to read a zip and a folder: entries by relative name, their bytes on demand, nothing extracted.

A zip is mapped into memory; a stored entry is a slice of the map, a deflated one is inflated where it is
asked for, which may be any thread. Names are normalised (`biopsy.core.text`) and never become paths.

A zip is refused whose names lead out of it or whose entries overlap (a way to make small zips unpack to
everything), and an entry is not read that is larger than `MAX_ENTRY_BYTES`, or that unpacks to over
`MAX_INFLATION` times its size where that is much.
"""

import hashlib
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

from biopsy.core.errors import ArchiveError, DataError
from biopsy.core.text import normalize_name
from biopsy.slide_io.images import IMAGE_SUFFIXES

MAX_ENTRY_BYTES = 2**29
"""The largest entry that is read into memory; images and tables are far below it."""

MAX_INFLATION = 100
"""How many times its packed size an entry of over `_FREE_BYTES` may have; images are compressed already."""

SYNTHETIC = "SYNTHETIC.txt"
"""A file of this name says that the patches beside it are synthetic; reports then say so."""

_FREE_BYTES = 2**24

_PIXEL_SUFFIXES = (*IMAGE_SUFFIXES, ".h5", ".hdf5", ".geojson")  # the last lie beside slides

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # APPNOTE 4.3.7: signature ... name length, extra length
_JUNK = re.compile(r"(?:^|/)(?:\.(?!/)|(?:__MACOSX|Thumbs\.db|desktop\.ini)(?:/|$))")
_LEADS_OUT = re.compile(r"^[\\/]|^[^\\/]*:|(?:^|[\\/])\.\.(?:[\\/]|$)|\0")
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_ENCRYPTED = 0x1  # bit 0 of the general purpose flags
_RELEASE_BYTES = 2**26


class Entry(NamedTuple):
    """A file of an archive. The last four are its place in a zip; a folder counts its files by ``offset``."""

    name: str
    """Relative, with forward slashes, as `normalize_name` spells it."""
    size: int
    """Bytes, unpacked."""
    crc: int = 0
    offset: int = 0
    packed_size: int = 0
    method: int = 0


class Archive(Protocol):
    """A zip or a folder.

    Attributes:
        path: The zip or the folder.
        entries: Its files in order of name, without hidden ones and what macOS and Windows leave behind.
        unread: Zips that lie beside the files of a folder and are not read.
    """

    path: Path
    entries: list[Entry]
    unread: list[str]

    def read(self, entry: Entry) -> bytes | memoryview:
        """Return an entry's bytes; raises DataError with the reason alone."""

    def same(self, one: Entry, other: Entry) -> bool:
        """Return whether two entries hold the same bytes."""

    def fingerprint(self) -> str:
        """Hash names, sizes and checksums (of a folder: times) of all entries, without reading them."""


class ZipArchive:
    """A zip, read through a memory map. See `Archive`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread: list[str] = []
        self.entries = _list_zip(path)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read_bytes = 0

    def read(self, entry: Entry) -> bytes | memoryview:
        """Return an entry's bytes, checked against the zip's checksum."""
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
            raise DataError("is not where the zip's directory says: the zip is damaged")
        if entry.size > MAX_ENTRY_BYTES:
            raise DataError(f"unpacks to {entry.size:,} bytes; at most {MAX_ENTRY_BYTES:,} are read")
        if entry.size > max(_FREE_BYTES, MAX_INFLATION * entry.packed_size):
            raise DataError(
                f"unpacks to {entry.size:,} bytes from {entry.packed_size:,}, over {MAX_INFLATION} times as "
                "many: it is not read"
            )
        return packed

    def same(self, one: Entry, other: Entry) -> bool:
        """Compare size and checksum."""
        return (one.size, one.crc) == (other.size, other.crc)

    def fingerprint(self) -> str:
        """Hash the directory."""
        return _hash_rows((entry.name, entry.size, entry.crc) for entry in self.entries)

    def _release_pages(self, n_bytes: int) -> None:
        """Return pages back now and then: reading a large zip should not take its size in memory."""
        self._read_bytes += n_bytes
        if self._read_bytes > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._read_bytes = 0
            self._map.madvise(mmap.MADV_DONTNEED)


class FolderArchive:
    """A folder and everything below it. See `Archive`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = sorted(_walk(path, ""), key=lambda file: (normalize_name(file[0]), file[0]))
        entries = [
            Entry(normalize_name(name), size, offset=index)
            for index, (name, size, _) in enumerate(self._files)
        ]
        self.entries = [entry for entry in entries if not entry.name.lower().endswith(".zip")]
        self.zips = [entry for entry in entries if entry.name.lower().endswith(".zip")]
        self.unread = [entry.name for entry in self.zips]

    def path_of(self, entry: Entry) -> Path:
        """Return where an entry lies; its name may be spelt differently there."""
        return self.path / self._files[entry.offset][0]

    def read(self, entry: Entry) -> bytes | memoryview:
        """Read a file."""
        if entry.size > MAX_ENTRY_BYTES:
            raise DataError(f"has {entry.size:,} bytes; at most {MAX_ENTRY_BYTES:,} are read")
        try:
            return self.path_of(entry).read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from None

    def same(self, one: Entry, other: Entry) -> bool:
        """Compare size, then bytes."""
        return one.size == other.size and self.read(one) == self.read(other)

    def fingerprint(self) -> str:
        """Hash names, sizes and times of change."""
        return _hash_rows((entry.name, entry.size, self._files[entry.offset][2]) for entry in self.entries)


def open_archive(path: Path | str) -> Archive:
    """Open a zip, a folder, or the one zip that lies in a folder without any pixels of its own.

    Raises:
        ArchiveError: If there is nothing to read, or the zip is empty, cut short, encrypted, or has names
            that lead out of it.
    """
    path = Path(path)
    if path.is_dir():
        folder = FolderArchive(path)
        if any(entry.name.lower().endswith(_PIXEL_SUFFIXES) for entry in folder.entries):
            return folder
        if len(folder.unread) == 1:
            return ZipArchive(folder.path_of(folder.zips[0]))
        if folder.unread:
            raise ArchiveError(
                f"{path} holds {len(folder.unread)} zips ({', '.join(folder.unread[:3])}): name one"
            )
        raise ArchiveError(f"{path} holds no images, no .h5 files, no slides with .geojson and no zip")
    if not path.exists():
        raise ArchiveError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ArchiveError(f"{path} is empty (0 bytes): the download was cut short")
    return ZipArchive(path)


def is_junk(name: str) -> bool:
    """Return whether a name is hidden or left behind by macOS or Windows."""
    if "/." in name or name.startswith(".") or "__MACOSX" in name or name.endswith((".db", ".ini")):
        return _JUNK.search(name) is not None  # asked of the few names for which it can be true
    return False


def _list_zip(path: Path) -> list[Entry]:
    entries, n_encrypted = [], 0
    infos = _read_directory(path)
    _refuse_overlap(path, infos)
    while infos:  # taken off one by one: a zip of half a million files is not held in memory twice
        info = infos.pop()
        name = info.orig_filename
        if (".." in name or ":" in name or "\0" in name or name[:1] in "/\\") and _LEADS_OUT.search(name):
            raise ArchiveError(f"{path} holds {name!r}, a name that leads out of it: not read")
        name = normalize_name(name)
        if not name.endswith("/") and not is_junk(name):
            n_encrypted += info.flag_bits & _ENCRYPTED
            place = (info.header_offset, info.compress_size, info.compress_type)
            entries.append(Entry(name, info.file_size, info.CRC, *place))
    if not entries:
        raise ArchiveError(f"{path} is a zip without files")
    if n_encrypted:
        raise ArchiveError(
            f"{path} is encrypted ({n_encrypted:,} of {len(entries):,} files): "
            "unpack it with its password and give the folder"
        )
    return sorted(entries)


def _refuse_overlap(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    places = sorted((info.header_offset, info.compress_size, info.orig_filename) for info in infos)
    for (start, n_bytes, name), (following, _, other) in pairwise(places):
        if start + _LOCAL_HEADER.size + n_bytes > following:
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
            f"{path} has names that are not the UTF-8 they are said to be: pack it again"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
        if start == b"PK\x03\x04":
            raise ArchiveError(f"{path} is cut short or damaged ({error}): download it again") from None
        raise ArchiveError(f"{path} is neither a zip nor a folder: unpack it and give the folder") from None
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror}") from None


def _inflate(packed: memoryview, entry: Entry) -> bytes:
    """Unpack an entry."""
    if entry.method != _DEFLATED:
        raise DataError(f"is compressed by method {entry.method}; stored and deflated entries are read")
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
    except zlib.error:
        raise DataError("cannot be inflated: the zip is damaged") from None
    if len(data) != entry.size:
        raise DataError(f"does not unpack to the {entry.size:,} bytes the zip's directory says")
    return data


def _walk(
    folder: Path, prefix: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, int, int]]:
    """Yield files below a folder, sizes and times of change; links that lead back up are not followed."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    try:
        items = list(os.scandir(folder))
    except OSError as error:
        raise ArchiveError(f"{folder} cannot be read: {error.strerror}") from None
    for item in items:
        if is_junk(item.name):
            continue
        name = prefix + item.name
        if item.is_dir():
            yield from _walk(folder / item.name, name + "/", above | {here})
        elif item.is_file():
            status = item.stat()
            yield name, status.st_size, status.st_mtime_ns
        elif item.is_symlink():  # one that leads nowhere is named when it is read
            yield name, 0, 0


def _hash_rows(rows: Iterator[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update("\0".join(map(str, row)).encode())
    return digest.hexdigest()
