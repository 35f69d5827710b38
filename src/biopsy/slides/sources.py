"""What a user names as slides: files, folders of them, a csv with an mpp each, packs."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np

from biopsy.core.errors import DataError, UserFileError
from biopsy.core.loaders import open_regular
from biopsy.core.tables import read_csv_table
from biopsy.core.text import normalize_name
from biopsy.data.packs import Pack, is_pack
from biopsy.slide_io.backends import SLIDE_SUFFIXES, list_slide_files
from biopsy.slides.stitching import list_slides

_SAMPLE_BYTES = 1 << 20
_TAKEN = ("status.csv",)  # lies beside the folders
_MAX_NAME_BYTES = 120  # most file systems take 255, encrypted ones 143


@dataclass(frozen=True)
class Source:
    """One slide to be mapped.

    Attributes:
        name: Names its folder among the outputs.
        path: The slide's file, or the pack it is in.
        mpp: Micrometres per pixel as the user states it.
        pack: The pack, for a slide that is put together from one.
        index: Its rows in the pack.
    """

    name: str
    path: Path
    mpp: float | None = None
    pack: Pack | None = None
    index: np.ndarray | None = None

    def fingerprint(self) -> str:
        """Hash what is mapped: of a pack its content, of a file its size and three megabytes of it.

        Start, middle and end of a file are read, not the gigabytes between: a slide is not edited in place.

        Raises:
            FileFormatError: If there is no regular file.
        """
        if self.pack is not None:
            return hashlib.sha256(f"{self.pack.info.content_sha256} {self.name}".encode()).hexdigest()
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def list_sources(paths: Sequence[Path], mpp: float | None) -> list[Source]:
    """Return every slide that is named by files, folders, csv files (columns ``slide[,mpp]``) and packs.

    A slide that is named twice is listed once. Slides of one name get their folder's name before it, or else
    their file's ending or a number after it.

    Raises:
        DataError: If a path does not exist, a folder holds no slide, or a csv cannot be read.
    """
    sources = [source for path in paths for source in _expand(Path(path), mpp)]
    return _tell_apart(list({(os.path.abspath(s.path), s.mpp, s.name): s for s in sources}.values()))


def _tell_apart(sources: list[Source]) -> list[Source]:
    """Return every source a name of its own, also where upper and lower case are one."""
    twins: dict[str, list[Source]] = {}
    for source in sources:
        twins.setdefault(source.name.casefold(), []).append(source)
    taken: set[str] = set()
    named = []
    for source in sources:
        alike = twins[source.name.casefold()]
        folder, ending = source.path.parent.name, source.path.suffix[1:]
        names = [source.name] if len(alike) == 1 else []
        if len({twin.path.parent.name for twin in alike}) == len(alike):
            names.append(f"{folder}_{source.name}")
        names += [f"{source.name}_{ending}", f"{folder}_{source.name}_{ending}"]
        numbered = (f"{source.name}_{number}" for number in range(1, len(sources) + 1))
        name = next(name for name in map(_clean, chain(names, numbered)) if name.casefold() not in taken)
        taken.add(name.casefold())
        named.append(replace(source, name=name))
    return named


def refuse_own_data(out: Path, sources: Sequence[Source]) -> None:
    """Refuse a folder for maps in which a slide's folder would be, hold or lie in what a slide is read from.

    A MIRAX slide ``x.mrxs`` keeps its pixels in a folder ``x`` beside it, DICOM its levels in one folder.

    Raises:
        UserFileError: Naming the folder and the slide.
    """
    read_from = {data: source.path for source in sources for data in _list_data(source)}
    above = {folder: path for data, path in read_from.items() for folder in data.parents}
    for source in sources:
        place = (out / source.name).resolve()
        mirax = place.with_name(f"{place.name}.mrxs")
        slide = above.get(place) or (mirax if mirax.exists() else None)
        slide = slide or next(
            (read_from[item] for item in (place, *place.parents) if item in read_from), None
        )
        if slide is not None:
            raise UserFileError(
                out / source.name,
                "input",
                f"would hold the map of {source.path}, and {slide} is kept there: name another --out, "
                "a folder that holds no slides",
            )


def _list_data(source: Source) -> list[Path]:
    """Name the files and folders that a slide is read from, resolved."""
    path = Path(os.path.realpath(source.path))  # which takes links that lead to themselves
    beside = {".mrxs": path.with_suffix(""), ".dcm": path.parent}.get(path.suffix.lower())
    return [path] if beside is None or source.pack is not None else [path, beside]


def _expand(path: Path, mpp: float | None) -> Iterator[Source]:
    if os.path.isdir(path) and is_pack(path):
        pack = Pack.open(path)
        for name, index in list_slides(pack).items():
            yield Source(_clean(name), path, mpp, pack, index)
    elif path.suffix.lower() == ".csv":
        yield from _read_csv(path, mpp)
    elif os.path.isdir(path):
        result = list_slide_files(path)
        if not result:
            raise DataError(
                f"{path} holds no slide: files ending in {' '.join(SLIDE_SUFFIXES)} are looked for"
            )
        for file in result:
            yield Source(_clean(file.stem), file, mpp)
    elif os.path.exists(path) or os.path.islink(path):
        yield Source(_clean(path.stem), path, mpp)
    else:
        raise DataError(f"{path} does not exist: give slides, folders, csv files or packs")


def _read_csv(path: Path, mpp: float | None) -> Iterator[Source]:
    table = read_csv_table(path, aliases={"slide": "slide", "mpp": "mpp"}, required=["slide"]).fillna("")
    table = table.map(str.strip)
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise DataError(f"{path} names no slide: it has a heading and no rows")
    for row in table.to_dict("records"):
        name, stated = row["slide"], row.get("mpp", "")
        if not name:
            raise DataError(f"{path} has a row without a slide: {', '.join(filter(None, row.values()))}")
        file = path.parent / name
        if "\\" in name and not os.path.exists(file):
            file = path.parent / PureWindowsPath(name).as_posix()
        yield Source(_clean(file.stem), file, _read_mpp(path, stated) if stated else mpp)


def _read_mpp(path: Path, text: str) -> float:
    """Return a stated mpp as a number; spreadsheets of some languages write a decimal comma."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path} states an mpp of {text!r}, which is no number")
    return value


def _clean(name: str) -> str:
    """Return a slide's name as that of a folder: ids come from tables and may hold anything."""
    allowed = (char if char.isalnum() or char in "-_.% " else "_" for char in normalize_name(name))
    cleaned = "".join(allowed).strip(" .") or "slide"
    cleaned = f"{cleaned}_" if cleaned.casefold() in _TAKEN else cleaned
    if len(cleaned.encode()) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        cleaned = cleaned.encode()[: _MAX_NAME_BYTES - 9].decode(errors="ignore").rstrip(" .") + f"-{digest}"
    return cleaned
