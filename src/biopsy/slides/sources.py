"""Listing of slides from files, folders, csv files and packs."""

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np

from biopsy.core.errors import DataError, SlideError, UserFileError
from biopsy.core.files import file_state
from biopsy.core.loaders import open_regular
from biopsy.core.storage import identify, list_files, parse_url, show_url, stage
from biopsy.core.tables import read_csv_table
from biopsy.core.text import normalize_name
from biopsy.data.pack_files import DOCUMENT as PACK_DOCUMENT
from biopsy.data.packs import Pack, is_pack
from biopsy.slide_io.backends import SLIDE_SUFFIXES, list_slide_files
from biopsy.slide_io.mosaic import check_extent, paste, stitch
from biopsy.slide_io.tissue import THUMBNAIL_PX
from biopsy.slides.grids import PatchGrid
from biopsy.slides.outputs import MAP

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20
_SEVERAL_FILES = (".mrxs", ".dcm", ".csv")
_RESERVED = ("status.csv",)  # file in the output folder
_MAX_NAME_BYTES = 120  # limit of most file systems: 255, encrypted: 143


@dataclass(frozen=True)
class Source:
    """One slide to be mapped.

    Attributes:
        name: Name of its output folder.
        mpp: Pixel size in µm given by the user.
        pack: The pack of a slide that is reassembled.
        index: Its rows in the pack.
        url: Address of a remote slide, which is copied to this machine while it is mapped.
    """

    name: str
    path: Path
    mpp: float | None = None
    pack: Pack | None = None
    index: np.ndarray | None = None
    url: str | None = None

    @property
    def address(self) -> str:
        """The path, or the URL, as it is shown."""
        return str(self.path) if self.url is None else show_url(self.url)

    def fingerprint(self) -> str:
        """Return a hash of the content of a pack, or of the size and three megabytes of a file.

        Only start, middle and end of a slide file are read, for speed. Of a remote file nothing is read: its
        address, size and version are hashed.
        """
        if self.url is not None:
            return identify(self.url)
        if self.pack is not None:
            return hashlib.sha256(f"{self.pack.info.content_sha256} {self.name}".encode()).hexdigest()
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def version(self) -> tuple[int, int] | None:
        """Return size and modification time of a slide file; None of a missing one, a pack or a URL.

        Without its inode: the inode number may change on network file systems while the slide is mapped.
        """
        state = file_state(self.path) if self.pack is None and self.url is None else None
        return None if state is None else state[1:]


def list_sources(paths: Sequence[Path], mpp: float | None) -> list[Source]:
    """Return the slides of files, folders, csv files (columns ``slide[,mpp]``) and packs.

    Duplicates are listed once. Slides of the same name are distinguished by a prefix (folder) or suffix (file
    suffix or number).

    Raises:
        DataError: If a path does not exist, a folder has no slides, or a csv cannot be read.
    """
    sources = [source for path in paths for source in _expand(Path(path), mpp)]
    return _make_unique(list({(os.path.abspath(s.path), s.mpp, s.name): s for s in sources}.values()))


def _make_unique(sources: list[Source]) -> list[Source]:
    """Return the sources with unique names, ignoring case."""
    by_name: dict[str, list[Source]] = {}
    for source in sources:
        by_name.setdefault(source.name.casefold(), []).append(source)
    taken: set[str] = set()
    renamed = []
    for source in sources:
        same_name = by_name[source.name.casefold()]
        folder, ending = source.path.parent.name, source.path.suffix[1:]
        names = [source.name] if len(same_name) == 1 else []
        if len({other.path.parent.name for other in same_name}) == len(same_name):
            names.append(f"{folder}_{source.name}")
        names += [f"{source.name}_{ending}", f"{folder}_{source.name}_{ending}"]
        numbered = (f"{source.name}_{number}" for number in range(1, len(sources) + 1))
        name = next(name for name in map(_clean, chain(names, numbered)) if name.casefold() not in taken)
        taken.add(name.casefold())
        renamed.append(replace(source, name=name))
    return renamed


def refuse_own_data(out: Path, sources: Sequence[Source]) -> None:
    """Refuse an output folder that overlaps with files or folders of the slides.

    MIRAX slides (``x.mrxs``) have a data folder ``x``, DICOM slides a folder of levels.
    """
    slide_of = {data: source.path for source in sources for data in _list_data(source)}
    parents = {folder: path for data, path in slide_of.items() for folder in data.parents}
    for source in sources:
        target = (out / source.name).resolve()
        mirax = target.with_name(f"{target.name}.mrxs")
        slide = parents.get(target) or (mirax if mirax.exists() else None)
        slide = slide or next(
            (slide_of[item] for item in (target, *target.parents) if item in slide_of), None
        )
        if slide is not None:
            raise UserFileError(
                out / source.name,
                "input",
                f"would be the output folder of {source.path}, and has data of {slide}: choose another --out",
            )


def _list_data(source: Source) -> list[Path]:
    """Return the resolved files and folders of a slide."""
    path = Path(os.path.realpath(source.path))  # does not fail for cyclic links
    data_folder = {".mrxs": path.with_suffix(""), ".dcm": path.parent}.get(path.suffix.lower())
    return [path] if data_folder is None or source.pack is not None else [path, data_folder]


def _expand(path: Path, mpp: float | None) -> Iterator[Source]:
    if (url := parse_url(path)) is not None:
        yield from _expand_url(url, mpp)
    elif os.path.isdir(path) and is_pack(path):
        pack = Pack.open(path)
        for name, index in list_slides(pack).items():
            yield Source(_clean(name), path, mpp, pack, index)
    elif path.suffix.lower() == ".csv":
        yield from _read_csv(path, mpp)
    elif os.path.isdir(path):
        result = list_slide_files(path)
        if not result:
            raise DataError(f"{path} has no slides: expected files with suffix {' '.join(SLIDE_SUFFIXES)}")
        for file in result:
            yield Source(_clean(file.stem), file, mpp)
        if below := [folder.name for folder in sorted(path.iterdir()) if _holds_slides(folder)]:
            logger.warning("slides in folders of %s are not read: name %s too", path, ", ".join(below))
    elif os.path.exists(path) or os.path.islink(path):
        yield Source(_clean(path.stem), path, mpp)
    else:
        raise DataError(f"{path} does not exist: expected slides, folders, csv files or packs")


def _holds_slides(folder: Path) -> bool:
    """Return whether a folder holds slides, other than levels of a DICOM slide or maps of this package."""
    if not folder.is_dir() or (folder / MAP).exists():
        return False
    with contextlib.suppress(OSError):
        return any(file.suffix.lower() != ".dcm" for file in list_slide_files(folder))
    return False


def _expand_url(url: str, mpp: float | None) -> Iterator[Source]:
    """Return the slides that a user names by a URL: a file, a folder of files, or a pack, which is copied."""
    names = list_files(url)
    if PACK_DOCUMENT in names:
        yield from _expand(stage(url), mpp)
        return
    slides = [name for name in sorted(names) if "/" not in name and name.lower().endswith(SLIDE_SUFFIXES)]
    for place in [url] if "" in names else [f"{url.rstrip('/')}/{name}" for name in slides]:
        path = Path(place.partition("?")[0])
        if path.suffix.lower() in _SEVERAL_FILES:
            raise DataError(f"{path.name} is one of several files of a slide: copy them to this machine")
        yield Source(_clean(path.stem), path, mpp, url=place)
    if not slides and "" not in names:
        raise DataError(
            f"{show_url(url)} holds no slide: files ending in {' '.join(SLIDE_SUFFIXES)} are looked for"
        )


def _read_csv(path: Path, mpp: float | None) -> Iterator[Source]:
    table = read_csv_table(path, aliases={"slide": "slide", "mpp": "mpp"}, required=["slide"]).fillna("")
    table = table.map(str.strip)
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise DataError(f"{path} has no slides: it has a heading and no rows")
    for row in table.to_dict("records"):
        name, stated = row["slide"], row.get("mpp", "")
        if not name:
            raise DataError(f"{path} has a row without a slide: {', '.join(filter(None, row.values()))}")
        file = path.parent / name
        if "\\" in name and not os.path.exists(file):
            file = path.parent / PureWindowsPath(name).as_posix()
        yield Source(_clean(file.stem), file, _read_mpp(path, stated) if stated else mpp)


def _read_mpp(path: Path, text: str) -> float:
    """Parse an mpp, with decimal point or comma."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path} has the mpp {text!r}, which is not a number")
    return value


def _clean(name: str) -> str:
    """Return the name of a slide as a valid folder name."""
    allowed = (char if char.isalnum() or char in "-_.% " else "_" for char in normalize_name(name))
    cleaned = "".join(allowed).strip(" .") or "slide"
    cleaned = f"{cleaned}_" if cleaned.casefold() in _RESERVED else cleaned
    if len(cleaned.encode()) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        cleaned = cleaned.encode()[: _MAX_NAME_BYTES - 9].decode(errors="ignore").rstrip(" .") + f"-{digest}"
    return cleaned


def list_slides(pack: Pack) -> dict[str, np.ndarray]:
    """Return the rows of every slide of a pack with coordinates."""
    table = pack.table
    column = "slide_id" if table["slide_id"].notna().any() else "patient_id"
    has_coordinates = table[["x", "y", column]].notna().all(axis=1).to_numpy()
    if not has_coordinates.any():
        raise SlideError(f"{pack.path} has no coordinates, so slides cannot be reassembled")
    names = table[column].astype("string")
    return {
        str(name): np.flatnonzero(has_coordinates & (names == name).fillna(False).to_numpy())
        for name in sorted(names[has_coordinates].unique())
    }


def stitch_slide(
    pack: Pack, name: str, index: np.ndarray, *, mpp: float | None = None
) -> tuple[PatchGrid, np.ndarray]:
    """Reassemble one slide.

    Args:
        name: Id of the slide, or of the patient without slide ids.
        index: Its rows in the pack.
        mpp: Pixel size in µm if the pack does not record it.

    Returns:
        The grid of its patches, whose level 0 has the resolution of the pack, and the picture, uint8
        ``(H, W, 3)``.

    Raises:
        SlideError: If the patches are not on a grid or too far apart, or the mpp is unknown.
    """
    mpp = pack.info.mpp or mpp
    if mpp is None:
        raise SlideError(f"{pack.path} does not record its pixel size: pass --mpp (um/px)")
    rows, patch_px = pack.table.iloc[index], pack.info.patch_px
    x, y = (rows[axis].to_numpy(np.int64) for axis in "xy")
    stride_px = _find_stride(x, y, patch_px, name)
    try:
        check_extent(np.append(x, 0), np.append(y, 0), stride_px)  # pictures include the corner of the slide
    except DataError as error:
        raise SlideError(f"slide {name}: {error}") from None
    width, height = int(x.max()) + patch_px, int(y.max()) + patch_px
    scale = min(1.0, THUMBNAIL_PX / max(width, height))
    patches = map(pack.pixels, index)
    origin = int(x.min()), int(y.min())
    grid = PatchGrid(
        (x - origin[0]) // stride_px,
        (y - origin[1]) // stride_px,
        patch_px,
        stride_px,
        1.0,
        mpp,
        width,
        height,
        origin,
    )
    image = stitch(patches, x, y, patch_px=patch_px, scale=scale)
    picture = np.full((round(height * scale), round(width * scale), 3), 255, np.uint8)
    left, top = round(origin[0] * scale), round(origin[1] * scale)
    paste(picture, image, left, top)
    return grid, picture


def _find_stride(x: np.ndarray, y: np.ndarray, patch_px: int, name: str) -> int:
    """Return the stride of the patches: the greatest common divisor of patch size and distances."""
    distances = np.concatenate([x - x.min(), y - y.min(), [patch_px]])
    stride_px = int(np.gcd.reduce(distances))
    if stride_px < patch_px / 16:
        raise SlideError(
            f"the patches of slide {name} are not on a grid: the greatest common divisor "
            f"of their distances is {stride_px} px"
        )
    return stride_px
