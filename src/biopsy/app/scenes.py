"""What can be looked at: slides with their maps, slides put together from packs, sheets of patches.

`open_sources` turns the paths that a user names into `Entry` records, one a slide, which open their `Scene`
when it is first looked at, and `Sheet` records, one a pack.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely

from biopsy.app.pictures import BlankPicture, Picture, SlidePicture, StitchedPicture
from biopsy.core.errors import DataError, RunError, SlideError
from biopsy.core.tables import read_csv_table
from biopsy.core.text import class_title
from biopsy.data.packs import Pack, is_pack
from biopsy.data.predictions import decide
from biopsy.evaluation.neighbours import count_neighbours, rank_label_issues
from biopsy.models.classifier import Classifier
from biopsy.slide_io.reader import open_slide
from biopsy.slides.grids import PatchGrid
from biopsy.slides.maps import SlideMap, find_regions
from biopsy.slides.outputs import MAP, SlideSummary, read_summary, warn_of_areas
from biopsy.slides.sources import Source, list_sources, stitch_slide
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run

if TYPE_CHECKING:
    from biopsy.evaluation.errors.nearest_training_patches import TrainingReference

logger = logging.getLogger(__name__)

CHECK_S = 3.0  # for opening every slide before the page starts
MAX_OPEN = 12  # slides that are kept open
_STATUS = "status.csv"


@dataclass(frozen=True)
class Labels:
    """The classes of a slide or pack.

    Attributes:
        positive: Index of the positive class; None for more than two.
        threshold: Probability of the positive class from which a patch is predicted positive.
    """

    names: list[str]
    positive: int | None
    threshold: float | None

    def decide(self, probs: np.ndarray) -> np.ndarray:
        """Return the predicted class of each patch, -1 where there is no probability."""
        pred = decide(np.nan_to_num(probs), self.positive, self.threshold)
        return np.where(np.isnan(probs).any(axis=1), -1, pred)


@dataclass(frozen=True)
class Patches:
    """Labels and predictions of patches, one per row; None for unknown ones.

    Attributes:
        probs: Probability of each class ``(n, n_classes)``, NaN where a patch was not predicted.
        abstained: bool ``(n,)``.
        ood: 1 where a patch is out-of-distribution, 0 where not, NaN where it was not checked, ``(n,)``.
        target: Annotated class ``(n,)``.
        ids: Of the patches in their pack.
        rows: Of the patches in their pack.
    """

    probs: np.ndarray | None = None
    abstained: np.ndarray | None = None
    ood: np.ndarray | None = None
    target: np.ndarray | None = None
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Scene:
    """An open slide.

    Attributes:
        mpp: Micrometres per pixel of level 0.
        grid: Where its patches lie; None for a slide without a map.
        slide_map: The map that was read or made of predictions.
        notes: What a reader must know, such as that the slide's file is missing.
        corner: Where what was scanned begins at level 0: QuPath counts from there.
    """

    picture: Picture
    mpp: float
    grid: PatchGrid | None = None
    patches: Patches = Patches()
    labels: Labels | None = None
    slide_map: SlideMap | None = None
    notes: tuple[str, ...] = ()
    corner: tuple[int, int] = (0, 0)

    @cached_property
    def regions(self) -> list[dict[str, object]]:
        """Regions of the map: class, rings at level 0, area, mean probability, out-of-distribution share."""
        if self.slide_map is None:
            return []
        regions = find_regions(self.slide_map)
        ood_shares = self._share_out_of_distribution([region.polygon for region in regions])
        return [
            {
                "class": region.class_name,
                "rings": [
                    np.asarray(ring.coords).round(1).tolist()
                    for ring in (region.polygon.exterior, *region.polygon.interiors)
                ],
                "area_mm2": region.area_mm2,
                "mean_prob": None if np.isnan(region.mean_prob) else region.mean_prob,
                "ood_share": None if np.isnan(ood_share) else ood_share,
            }
            for region, ood_share in zip(regions, ood_shares.tolist(), strict=True)
        ]

    def _share_out_of_distribution(self, polygons: Sequence[shapely.Polygon]) -> np.ndarray:
        """Return the out-of-distribution share of the checked patches in each polygon, NaN without any."""
        grid, ood = self.grid, self.patches.ood
        if grid is None or ood is None or not polygons:
            return np.full(len(polygons), np.nan)
        checked = np.flatnonzero(~np.isnan(ood))
        centres = [(places[checked] + grid.patch_px / 2) * grid.scale for places in (grid.x_px, grid.y_px)]
        which, inside = shapely.STRtree(shapely.points(*centres)).query(polygons, predicate="intersects")
        n_checked = np.bincount(which, minlength=len(polygons))
        n_ood = np.bincount(which, ood[checked][inside] == 1, minlength=len(polygons))
        return np.where(n_checked > 0, n_ood / np.maximum(n_checked, 1), np.nan)

    def layer(self) -> bytes:
        """Return the cells for the browser: a float32 plane for each class, then a byte of flags a cell.

        Bits of the flags: 1 a patch lies here, 2 abstained, 4 out-of-distribution, 8 the annotated class is
        known, and the class itself from bit 4.
        """
        grid, patches = self.grid, self.patches
        assert grid is not None and self.labels is not None
        rows, columns = grid.shape
        if self.slide_map is not None:
            probs = np.moveaxis(self.slide_map.cells(), 2, 0).astype("<f4")
        else:
            probs = np.full((len(self.labels.names), rows, columns), np.nan, "<f4")
        flags = np.zeros((rows, columns), np.uint8)
        target = (
            None if patches.target is None else 8 | (np.clip(patches.target, 0, 15).astype(np.uint8) << 4)
        )
        for dy in range(grid.steps):
            for dx in range(grid.steps):
                cells = grid.row + dy, grid.column + dx
                flags[cells] |= 1
                if patches.ood is not None:
                    flags[cells] |= 4 * (patches.ood == 1).astype(np.uint8)
                if target is not None:
                    flags[cells] |= target
        if self.slide_map is not None:
            flags |= 2 * self.slide_map.cells_abstained().astype(np.uint8)
        return probs.tobytes() + flags.tobytes()

    def patch_at(self, x: float, y: float) -> int | None:
        """Return the patch that covers a place at level 0, the nearest by its centre, None without one."""
        if self.grid is None:
            return None
        side = self.grid.patch_px * self.grid.scale
        left, top = self.grid.x_px * self.grid.scale, self.grid.y_px * self.grid.scale
        inside = np.flatnonzero((left <= x) & (x < left + side) & (top <= y) & (y < top + side))
        if not len(inside):
            return None
        distance = (left[inside] + side / 2 - x) ** 2 + (top[inside] + side / 2 - y) ** 2
        return int(inside[distance.argmin()])


@dataclass
class Entry:
    """A slide of the list.

    Attributes:
        key: Identifier in URLs.
        name: Shown in the list.
        facts: What the list shows and sorts by: ``positive_mm2``, ``abstained_share``, ``ood_share``,
            ``n_patches``, ``n_errors``; None where unknown.
        positive: What ``positive_mm2`` is the area of, such as "predicted tumour".
        warning: Why the area is not to be relied on, if so.
        sheet: Key of the sheet its patches are on.
    """

    key: str
    name: str
    open: Callable[[], Scene]
    facts: dict[str, float | None] = field(default_factory=dict)
    positive: str = ""
    sheet: str | None = None
    warning: str | None = None


@dataclass
class Sheet:
    """The patches of a pack, with the predictions of a run where there is one."""

    key: str
    name: str
    pack: Pack
    labels: Labels
    patches: Patches
    run: Run | None = None
    classifier: Classifier | None = None

    def pixels(self, row: int) -> np.ndarray:
        """Return a patch as it was cut, uint8 ``(h, w, 3)``."""
        return self.pack.pixels(row).copy()

    @cached_property
    def training_reference(self) -> "TrainingReference":
        """The training patches of the run, that patches are compared with: some seconds the first time."""
        assert self.run is not None and self.classifier is not None
        from biopsy.evaluation.errors.nearest_training_patches import TrainingReference
        from biopsy.models.engine import Engine

        return TrainingReference.from_run(self.run, self.pack, self.classifier, engine=Engine("auto"))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per patch: the pack's columns, ``label, pred, prob, error, abstained, subset, doubt``."""
        pack, names = self.pack, np.array([*self.labels.names, None], object)
        frame = pack.table.drop(columns=["sha256"], errors="ignore").assign(label=names[pack.target])
        probs = self.patches.probs
        if probs is not None:
            pred = self.labels.decide(probs)
            shown = probs.max(axis=1) if self.labels.positive is None else probs[:, self.labels.positive]
            frame = frame.assign(prob=shown, pred=names[pred], error=(pred != pack.target) & (pred >= 0))
        if self.patches.abstained is not None:
            frame["abstained"] = self.patches.abstained
        if self.run is not None:
            frame["subset"] = self.run.subsets(pack)
        counts = count_neighbours(pack.table, pack.target, len(pack.class_names))
        voices = np.full((len(pack), len(pack.class_names)), np.nan) if probs is None else probs
        if np.isfinite(counts).any() or probs is not None:
            frame["doubt"] = rank_label_issues(counts, pack.target, voices)["doubt"].to_numpy()
        return frame.assign(row=np.arange(len(pack)))

    def rank_subsets(self, frame: pd.DataFrame) -> pd.Series:
        """Return the rank of each row: evaluated patches, others with a prediction, those without one."""
        if self.run is None:
            return pd.Series(0, frame.index)
        return frame["prob"].isna() * 2 + (frame["subset"] != self.run.evaluated_subset)


@dataclass
class ViewerContent:
    """Everything that one page shows.

    Attributes:
        classifier: Explains a patch; None where no model was named.
        notes: What could not be shown.
    """

    title: str
    entries: dict[str, Entry]
    sheets: dict[str, Sheet]
    classifier: Classifier | None = None
    report: Path | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._scenes: OrderedDict[str, Scene] = OrderedDict()
        self._lock = threading.Lock()

    def scene(self, key: str) -> Scene:
        """Return an open slide.

        Raises:
            SlideError: If there is none of this key, or it cannot be opened.
        """
        if key not in self.entries:
            raise SlideError(f"there is no slide {key!r} on this page")
        with self._lock:
            if key not in self._scenes:
                self._scenes[key] = self.entries[key].open()
            self._scenes.move_to_end(key)
            while len(self._scenes) > MAX_OPEN:  # one in use is closed later
                self._scenes.popitem(last=False)
            return self._scenes[key]

    def close(self, key: str) -> None:
        """Have a slide opened anew when it is next looked at."""
        with self._lock:
            self._scenes.pop(key, None)

    def sheet(self, key: str) -> Sheet:
        """Return a sheet.

        Raises:
            DataError: If there is none of this key.
        """
        if key not in self.sheets:
            raise DataError(f"there is no sheet {key!r} on this page")
        return self.sheets[key]


def open_sources(
    paths: Sequence[Path], *, model: Run | Classifier | Path | str | None = None, mpp: float | None = None
) -> ViewerContent:
    """Find out what the paths name: runs, packs, maps, folders of maps, slides, folders of slides.

    A map is joined with its slide: one that is named too, the one that ``status.csv`` names, or one of that
    name beside the map. The slide's fingerprint in the map's ``summary.json`` must agree.

    Args:
        model: Explains patches; that of a run by default.
        mpp: Micrometres per pixel at level 0, for slides that do not say.

    Raises:
        DataError: If a path does not exist or holds nothing to look at.
        SlideError: If none of several slides can be opened.
    """
    runs = [path for path in paths if (path / "run.json").is_file()]
    maps = {path: result for path in paths if path not in runs and (result := _list_maps(path))}
    packs = [path for path in paths if path not in runs and is_pack(path)]
    slides = [path for path in paths if path not in runs and path not in maps and path not in packs]
    sources = list_sources(slides, mpp) if slides else []
    sources += [source for path in packs for source in _list_stitched(path, mpp)]
    content = ViewerContent(", ".join(path.resolve().name for path in paths), {}, {})
    for run in (Run.open(path) for path in runs):
        _add_run(content, run, mpp)
    used: set[str] = set()
    for path, files in maps.items():
        status_paths = _read_status(path if path.is_dir() else path.parent.parent)
        for file in files:
            source, note = _find_slide(file, sources, status_paths, mpp)
            used |= set() if source is None else {source.name}
            _add_map(content, file, source, note)
    sheets = {path: _add_pack(content, Pack.open(path)) for path in packs}
    for source in sources:
        if source.name not in used:
            _add_source(content, source, sheets.get(source.path))
    _check_slides([entry for entry in content.entries.values() if entry.sheet is None], content.sheets)
    if model is not None:
        content.classifier = open_classifier(model)
    return content


def _check_slides(entries: Sequence[Entry], sheets: Mapping[str, Sheet]) -> None:
    """Warn of slides and maps that cannot be opened; refuse where none can and there is no sheet either.

    After `CHECK_S` seconds only until one has been opened: the page names the others when they are looked at.
    """
    deadline, n_opened, errors = time.monotonic() + CHECK_S, 0, list[tuple[str, OSError | DataError]]()
    for entry in entries:
        if n_opened and time.monotonic() > deadline:
            break
        try:
            entry.open()
        except (OSError, DataError) as error:
            errors.append((entry.name, error))
        else:
            n_opened += 1
    if errors and not n_opened and not sheets:
        if len(errors) == 1:
            raise errors[0][1]
        raise SlideError(f"none of {len(errors)} slides can be opened; {errors[0][1]}")
    for name, reason in errors:
        logger.warning("slide %s of the list cannot be opened: %s", name, reason)


def _list_stitched(pack: Path, mpp: float | None) -> list[Source]:
    """Return the slides that can be put together from a pack: none where its patches have no coordinates."""
    try:
        return list_sources([pack], mpp)
    except SlideError:
        return []


def _list_maps(path: Path) -> list[Path]:
    """Return the maps that a path names: itself, the one in a slide's folder, those in a folder of them."""
    if path.suffix == ".parquet":
        return [path]
    if not path.is_dir() or is_pack(path):
        return []
    return [path / MAP] if (path / MAP).is_file() else sorted(path.glob(f"*/{MAP}"))


def _read_status(folder: Path) -> dict[str, str]:
    try:
        table = read_csv_table(folder / _STATUS, required=["slide", "source"])
    except DataError:
        return {}
    return dict(zip(table["slide"], table["source"], strict=True))


def _find_slide(
    file: Path, sources: Iterable[Source], paths: dict[str, str], mpp: float | None
) -> tuple[Source | None, str | None]:
    """Return the slide of a map, or a note that says why it is shown without."""
    name = file.parent.name
    summary = _read_summary(file)
    request = summary.get("request", {})
    fingerprint, stated = request.get("slide"), request.get("mpp")
    mpp = stated if isinstance(stated, int | float) and stated else mpp
    path_candidates = [Path(paths[name])] if name in paths else []
    file_name = str(summary.get("source") or "")
    if file_name == Path(file_name).name:
        path_candidates += [
            folder / file_name for folder in (file.parent, file.parent.parent, file.parent.parent.parent)
        ]
    candidates = [source for source in sources if source.name == name]
    for path in path_candidates:
        try:
            candidates += [source for source in list_sources([path], mpp) if source.name == name]
        except DataError:
            continue
    for source in candidates:
        try:
            if fingerprint is None or source.fingerprint() == fingerprint:
                return source, None
        except (OSError, DataError):
            continue
    if candidates:
        return None, f"{candidates[0].path} is not the slide that this map was made of: its content differs"
    return None, "the slide's file was not found: name it beside the map to see it"


def _read_summary(file: Path) -> SlideSummary:
    try:
        return read_summary(file.parent)
    except (OSError, DataError):
        return {}


def _add_map(content: ViewerContent, file: Path, source: Source | None, note: str | None) -> None:
    summary = _read_summary(file)
    positive, checked = summary.get("positive"), summary.get("out_of_distribution")
    facts = {
        "n_patches": summary.get("n_patches"),
        "positive_mm2": positive and positive["area_mm2"],
        "abstained_share": summary.get("abstained_share"),
        "ood_share": checked and checked["share"],
    }
    name = file.parent.name if summary else file.stem
    positive_class = positive and positive["class_name"]
    predicted = f"predicted {class_title(positive_class)}" if positive_class else ""
    key, opener = _key(file, name), partial(_open_map, file, source, note)
    warning = checked and warn_of_areas(checked["share"], checked["quantile"])
    content.entries[key] = Entry(key, name, opener, facts, predicted, warning=warning)


def _open_map(file: Path, source: Source | None, note: str | None) -> Scene:
    slide_map = SlideMap.from_parquet(file)
    grid, notes, patches = slide_map.grid, (note,) if note else (), Patches()
    picture: Picture = BlankPicture(grid.width, grid.height)
    if source is not None:
        try:
            scene = _open_source(source)
        except (OSError, DataError) as error:
            notes = (str(error),)
        else:
            picture, patches = scene.picture, scene.patches
            if (picture.width, picture.height) != (grid.width, grid.height):
                raise SlideError(
                    f"{source.path} has {picture.width} x {picture.height} pixels, the map {file} is of a "
                    f"slide of {grid.width} x {grid.height}: it is a map of another slide"
                )
    target = patches.target if patches.target is not None and len(patches.target) == len(slide_map) else None
    shown = replace(
        patches, probs=slide_map.probs, abstained=slide_map.abstained, ood=slide_map.ood, target=target
    )
    labels = Labels(slide_map.class_names, slide_map.positive_index, slide_map.threshold)
    return Scene(picture, grid.slide_mpp, grid, shown, labels, slide_map, notes, grid.corner)


def _open_source(source: Source) -> Scene:
    """Open a slide by itself: a file, or patches of a pack with their annotated classes."""
    if source.pack is None:
        slide = open_slide(source.path, mpp=source.mpp)
        return Scene(SlidePicture(slide), slide.mpp, corner=slide.corner)
    pack, index = source.pack, source.index
    assert index is not None
    grid, overview = stitch_slide(pack, source.name, index, mpp=source.mpp)
    patches = Patches(target=pack.target[index], ids=pack.table["patch_id"].to_numpy(str)[index], rows=index)
    labels = Labels(pack.class_names, pack.positive_index, None)
    return Scene(StitchedPicture(pack, index, grid, overview), grid.slide_mpp, grid, patches, labels)


def _add_source(content: ViewerContent, source: Source, sheet: Sheet | None) -> None:
    facts, annotated = {"n_patches": None if source.index is None else float(len(source.index))}, ""
    if sheet is not None:
        annotated = f"annotated {class_title(sheet.pack.info.positive_class or '')}"
        facts["positive_mm2"] = _area_mm2(sheet.pack.target[source.index], sheet, source)
    key = _key(source.path, source.name)
    sheet_key = sheet.key if sheet else None
    opener = partial(_open_source, source)
    content.entries[key] = Entry(key, source.name, opener, facts, annotated, sheet_key)


def _area_mm2(classes: np.ndarray, sheet: Sheet, source: Source) -> float | None:
    """Return the area of the patches of the positive class, None where there is none or no pixel size."""
    mpp = sheet.pack.info.mpp or source.mpp
    if sheet.labels.positive is None or mpp is None:
        return None
    return float((classes == sheet.labels.positive).sum() * (sheet.pack.info.patch_px * mpp / 1000) ** 2)


def _add_pack(content: ViewerContent, pack: Pack) -> Sheet:
    labels = Labels(pack.class_names, pack.positive_index, None)
    patches = Patches(target=pack.target, ids=pack.table["patch_id"].to_numpy(str))
    sheet = Sheet(_key(pack.path, ""), pack.path.name, pack, labels, patches)
    content.sheets[sheet.key] = sheet
    return sheet


def _add_run(content: ViewerContent, run: Run, mpp: float | None) -> None:
    """Add a run's pack with its predictions, the stitched slides and the report beside it."""
    pack = run.open_pack(verify=False)
    classifier = run.classifier
    labels = Labels(pack.class_names, pack.positive_index, classifier.threshold)
    probs, abstained = _read_predictions(run, pack, content.notes)
    patches = Patches(probs, abstained, None, pack.target, pack.table["patch_id"].to_numpy(str))
    sheet = Sheet(_key(run.path, ""), run.path.name, pack, labels, patches, run, classifier)
    content.sheets[sheet.key] = sheet
    content.classifier = classifier
    if (run.path / "report.html").is_file():
        content.report = run.path / "report.html"
    pred = labels.decide(probs)
    for source in _list_stitched(pack.path, mpp):
        index = source.index
        assert index is not None
        called = pred[index]
        n_known = int((called >= 0).sum())
        facts: dict[str, float | None] = {
            "n_patches": float(len(index)),
            "n_errors": float(((called >= 0) & (called != pack.target[index])).sum()) if n_known else None,
            "positive_mm2": _area_mm2(called, sheet, source) if n_known else None,
            "abstained_share": float(abstained[index].sum() / n_known) if n_known else None,
        }
        key = _key(run.path, source.name)
        predicted = f"predicted {class_title(classifier.info.positive_class or '')}"
        opener = partial(_open_predicted, source, sheet)
        content.entries[key] = Entry(key, source.name, opener, facts, predicted, sheet.key)


def _read_predictions(run: Run, pack: Pack, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities ``(n, n_classes)``, NaN without a prediction, and which patches abstained."""
    probs = np.full((len(pack), len(pack.class_names)), np.nan)
    abstained = np.zeros(len(pack), bool)
    for subset in {run.validation_subset, run.evaluated_subset}:
        try:
            frame = run.predictions(subset)[0]
        except RunError as error:
            notes.append(str(error))
            continue
        rows = pack.rows_of(frame["patch_id"])
        probs[rows] = frame[[f"prob_{name}" for name in pack.class_names]].to_numpy(float)
        if "abstained" in frame:
            abstained[rows] = frame["abstained"].fillna(False).to_numpy(bool)
    return probs, abstained


def _open_predicted(source: Source, sheet: Sheet) -> Scene:
    """Open a stitched slide with a run's predictions as its map."""
    scene, index, labels = _open_source(source), source.index, sheet.labels
    probs, abstained = sheet.patches.probs, sheet.patches.abstained
    assert probs is not None and abstained is not None and scene.grid is not None
    slide_map = SlideMap(
        source.name,
        scene.grid,
        probs[index].astype(np.float32),
        abstained[index],
        labels.names,
        None if labels.positive is None else labels.names[labels.positive],
        None if labels.positive is None else labels.threshold,
    )
    patches = replace(scene.patches, probs=slide_map.probs, abstained=slide_map.abstained)
    return replace(scene, patches=patches, labels=labels, slide_map=slide_map)


def _key(path: Path, name: str) -> str:
    return hashlib.sha256(f"{path.resolve()}\0{name}".encode()).hexdigest()[:12]
