"""What a user names as slides: files, folders of them, a csv with an mpp each, packs."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError
from biopsy.data.packs import Pack, is_pack
from biopsy.imaging.backends import SLIDE_SUFFIXES, list_slide_files
from biopsy.slides.stitching import list_slides

_SAMPLE_BYTES = 1 << 20


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
        """
        if self.pack is not None:
            return hashlib.sha256(f"{self.pack.info.content_sha256} {self.name}".encode()).hexdigest()
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(self.path, "rb") as file:
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def list_sources(paths: Sequence[Path], mpp: float | None) -> list[Source]:
    """Give every slide that is named by files, folders, csv files (columns ``slide[,mpp]``) and packs.

    Slides of one name get their folder's name before it.

    Raises:
        DataError: If a path does not exist, a folder holds no slide, or a csv cannot be read.
    """
    sources = [source for path in paths for source in _expand(Path(path), mpp)]
    times = Counter(source.name for source in sources)
    named = [
        source
        if times[source.name] == 1
        else replace(source, name=f"{source.path.parent.name}_{source.name}")
        for source in sources
    ]
    twice = [name for name, n in Counter(source.name for source in named).items() if n > 1]
    if twice:
        raise DataError(f"two slides are called {twice[0]!r}: map them into folders of their own")
    return named


def _expand(path: Path, mpp: float | None) -> Iterator[Source]:
    if is_pack(path):
        pack = Pack.open(path)
        for name, index in list_slides(pack).items():
            yield Source(_clean(name), path, mpp, pack, index)
    elif path.suffix.lower() == ".csv":
        yield from _read_csv(path, mpp)
    elif path.is_dir():
        found = list_slide_files(path)
        if not found:
            raise DataError(
                f"{path} holds no slide: files ending in {' '.join(SLIDE_SUFFIXES)} are looked for"
            )
        for file in found:
            yield Source(_clean(file.stem), file, mpp)
    elif path.exists():
        yield Source(_clean(path.stem), path, mpp)
    else:
        raise DataError(f"{path} does not exist: give slides, folders, csv files or packs")


def _read_csv(path: Path, mpp: float | None) -> Iterator[Source]:
    try:
        table = pd.read_csv(path, dtype={"slide": str}, skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a csv: {error}") from None
    if "slide" not in table.columns or table.empty:
        raise DataError(
            f"{path} has the columns {', '.join(table.columns)}; slide[,mpp] and one row are needed"
        )
    stated = pd.to_numeric(table.get("mpp", pd.Series(index=table.index, dtype=float)), errors="coerce")
    if "mpp" in table and (stated.isna() & table["mpp"].notna()).any():
        wrong = table.loc[stated.isna() & table["mpp"].notna(), "mpp"].iloc[0]
        raise DataError(f"{path} states an mpp of {wrong!r}, which is no number")
    for name, own in zip(table["slide"], stated, strict=True):
        file = path.parent / str(name)
        yield Source(_clean(file.stem), file, mpp if pd.isna(own) else float(own))


def _clean(name: str) -> str:
    """Make a slide's name that of a folder: ids come from tables and may hold anything."""
    cleaned = "".join(char if char.isalnum() or char in "-_. " else "_" for char in name).strip(" .")
    return cleaned or "slide"
