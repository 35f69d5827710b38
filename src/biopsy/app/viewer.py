"""The page on which slides, maps and patches are looked at and corrected (`view`)."""

import getpass
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired
from urllib.parse import quote

import numpy as np
import pandas as pd
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, FiniteFloat
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from biopsy.app.annotations import (
    Annotation,
    Annotations,
    Verdict,
    combine,
    label_sheet,
    now,
    to_features,
)
from biopsy.app.pictures import TILE_PX, count_levels, encode_jpeg, read_tile
from biopsy.app.scenes import Labels, Patches, Scene, Sheet, ViewerContent, open_sources
from biopsy.app.web import Guard, name_errors
from biopsy.core.errors import DataError, SlideError
from biopsy.core.tables import write_csv
from biopsy.core.text import class_title, file_name
from biopsy.models.classifier import Classifier
from biopsy.plotting.style import BASELINE, CLASS_COLOURS, PROBABILITY_MAP
from biopsy.training.runs import Run

STATIC = Path(__file__).parent / "static"
COLOUR_MAPS = (PROBABILITY_MAP, "viridis", "magma", "coolwarm")
PAGE_SIZE = 200  # patches of a sheet in one answer
_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]", "testserver"})


def make_viewer(
    paths: Path | str | Sequence[Path | str],
    *,
    model: Run | Classifier | Path | str | None = None,
    mpp: float | None = None,
    annotations: Path | str | None = None,
    who: str | None = None,
    queue: Path | str | None = None,
) -> FastAPI:
    """Return the page as an ASGI application; the parameters are those of `view`."""
    inputs = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not inputs:
        raise DataError("nothing to look at was named: give a slide, map, run, folder or pack")
    content = open_sources(inputs, model=model, mpp=mpp)
    first = inputs[0].resolve()
    file = (
        Path(annotations) if annotations is not None else first.with_name(f"{first.name}.annotations.jsonl")
    )
    viewer = _Viewer(content, Annotations(file), who or _account(), _read_queue(queue, content))
    app = FastAPI(title="biopsy view", docs_url=None, redoc_url=None, openapi_url=None)
    name_errors(app)
    viewer.add_routes(app)
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_middleware(Guard, hosts=_HOSTS)
    return app


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "reviewer"


class NewAnnotation(BaseModel):
    """What the page sends when something is annotated."""

    place: str = Field(max_length=40)
    """Key of the slide or sheet."""
    patch: int | None = Field(None, ge=0)
    """Row of the patch on the slide or sheet."""
    region: str | None = Field(None, max_length=80, pattern="^region-[A-Za-z0-9-]+$")
    polygon: list[tuple[FiniteFloat, FiniteFloat]] | None = Field(None, min_length=3, max_length=5000)
    verdict: Verdict | None = None
    label: str | None = Field(None, max_length=200)
    """A class, instead of a verdict."""
    who: str | None = Field(None, max_length=100)


class _Target(TypedDict):
    """What is annotated; see `Annotation`."""

    target: str
    patch_id: NotRequired[str | None]
    slide: str | None
    polygon: list[tuple[float, float]] | None
    shown: str | None


class _Place(TypedDict):
    """Key of a slide, and position and side of a patch on it."""

    key: str
    box: list[int]


class _Viewer:
    """The addresses of the page."""

    def __init__(
        self, content: ViewerContent, annotations: Annotations, who: str, queue: list[dict[str, object]]
    ) -> None:
        self.content, self.annotations, self.who, self.queue = content, annotations, who, queue

    def add_routes(self, app: FastAPI) -> None:
        handlers: dict[str, Callable[..., Any]] = {
            "/": self.index,
            "/report": self.report,
            "/api/state": self.state,
            "/api/slides/{key}": self.slide,
            "/api/slides/{key}/tiles/{level}/{column}_{row}.jpg": self.tile,
            "/api/slides/{key}/thumbnail.jpg": self.thumbnail,
            "/api/slides/{key}/layer": self.layer,
            "/api/slides/{key}/regions": self.regions,
            "/api/slides/{key}/patch": self.patch,
            "/api/slides/{key}/explain/{index}": self.explain_on_slide,
            "/api/sheets/{key}": self.sheet,
            "/api/sheets/{key}/patches/{row}.jpg": self.sheet_image,
            "/api/sheets/{key}/patches/{row}": self.sheet_patch,
            "/api/sheets/{key}/explain/{row}": self.explain_on_sheet,
            "/api/sheets/{key}/nearest/{row}": self.nearest,
            "/api/annotations": self.list_annotations,
            "/api/export/{key}.geojson": self.export_geojson,
            "/api/export/{key}.csv": self.export_labels,
        }
        for path, handler in handlers.items():
            app.add_api_route(path, handler, methods=["GET"], response_model=None)
        app.add_api_route("/api/annotations", self.annotate, methods=["POST"], response_model=None)

    # --- the page
    def index(self) -> Response:
        return FileResponse(STATIC / "index.html", headers={"content-security-policy": _POLICY})

    def report(self) -> Response:
        if self.content.report is None:
            raise HTTPException(404, "there is no report beside what is shown: `biopsy report RUN` writes it")
        return FileResponse(self.content.report, headers={"content-security-policy": "sandbox allow-popups"})

    def state(self) -> dict[str, object]:
        content = self.content
        return {
            "title": content.title,
            "slides": [
                {
                    "key": entry.key,
                    "name": entry.name,
                    "sheet": entry.sheet,
                    "positive": entry.positive,
                    "warning": entry.warning,
                    **entry.facts,
                }
                for entry in content.entries.values()
            ],
            "sheets": [{"key": sheet.key, "name": sheet.name} for sheet in content.sheets.values()],
            "report": content.report is not None,
            "explains": content.classifier is not None,
            "who": self.who,
            "writable": self.annotations.is_writable,
            "annotations": str(self.annotations.path),
            "notes": content.notes,
            "queue": self.queue,
            "tile_px": TILE_PX,
            "colour_maps": _colour_maps(),
        }

    # --- slides
    def slide(self, key: str) -> dict[str, object]:
        scene = self.content.scene(key)
        document = {
            "key": key,
            "name": self.content.entries[key].name,
            "width": scene.picture.width,
            "height": scene.picture.height,
            "mpp": scene.mpp,
            "levels": count_levels(scene.picture),
            "notes": scene.notes,
            "labels": _describe_labels(scene.labels),
            "grid": None,
        }
        if scene.grid is not None:
            rows, columns = scene.grid.shape
            cell = scene.grid.stride_px * scene.grid.scale
            document["grid"] = {
                "rows": rows,
                "columns": columns,
                "cell": cell,
                "left": scene.grid.origin_px[0] * scene.grid.scale,
                "top": scene.grid.origin_px[1] * scene.grid.scale,
                "predicted": scene.slide_map is not None and bool(np.isfinite(scene.slide_map.probs).any()),
                "annotated": scene.patches.target is not None,
            }
        return document

    def tile(self, key: str, level: int, column: int, row: int) -> Response:
        try:
            return _jpeg(read_tile(self.content.scene(key).picture, level, column, row))
        except (SlideError, OSError):  # OpenSlide reads no more after an error
            self.content.close(key)
            raise

    def thumbnail(self, key: str) -> Response:
        return _jpeg(self.content.scene(key).picture.overview)

    def layer(self, key: str) -> Response:
        scene = self.content.scene(key)
        if scene.grid is None:
            raise HTTPException(404, "this slide has no map")
        return Response(scene.layer(), media_type="application/octet-stream")

    def regions(self, key: str) -> list[dict[str, object]]:
        return self.content.scene(key).regions

    def patch(self, key: str, x: float, y: float) -> dict[str, object]:
        scene = self.content.scene(key)
        index = scene.patch_at(x, y)
        if index is None:
            raise HTTPException(404, "no patch lies here")
        grid = scene.grid
        assert grid is not None and scene.labels is not None
        left, top, side = _corner(scene, index)
        return {
            "place": key,
            "patch": index,
            "slide": self.content.entries[key].name,
            "x": int(grid.x[index]),
            "y": int(grid.y[index]),
            "box": [left, top, side],
            "target": self._target_on_slide(key, scene, index),
            **_describe_patch(scene.labels, scene.patches, index, self.content.classifier),
        }

    def explain_on_slide(self, key: str, index: int) -> dict[str, object]:
        scene = self.content.scene(key)
        if scene.grid is None or not 0 <= index < len(scene.grid):
            raise HTTPException(404, "there is no such patch")
        rows, sheet = scene.patches.rows, self.content.entries[key].sheet
        if rows is not None and sheet is not None:
            return self.explain_on_sheet(sheet, int(rows[index]))
        left, top, side = _corner(scene, index)
        px = scene.grid.patch_px
        pixels = scene.picture.read(round(left), round(top), round(side), round(side), 1)
        if pixels is None:
            raise HTTPException(404, "the patch cannot be read")
        if pixels.shape[0] != px:
            import cv2

            pixels = cv2.resize(pixels, (px, px), interpolation=cv2.INTER_AREA)
        return self._explain(pixels)

    # --- sheets
    def sheet(
        self,
        key: str,
        offset: int = Query(0, ge=0),
        sort: str = "",
        descending: bool = False,
        column: str = "",
        value: str = "",
    ) -> dict[str, object]:
        sheet = self.content.sheet(key)
        frame = sheet.frame
        if column:
            frame = _filter(frame, column, value)
        if sort and sort not in frame:
            raise DataError(f"the sheet has no column {sort!r}; it has {', '.join(frame)}")
        rank = frame[sort] if sort else sheet.rank_subsets(frame)
        frame = frame.loc[rank.sort_values(ascending=not descending, kind="stable").index]
        chosen = frame.iloc[offset : offset + PAGE_SIZE]
        return {
            "total": len(frame),
            "columns": [str(name) for name in frame.columns if name != "row"],
            "values": {
                str(name): sorted(sheet.frame[name].dropna().astype(str).unique())
                for name in frame.columns
                if sheet.frame[name].nunique() <= 40
            },
            "patches": [_row(sheet, record) for record in chosen.to_dict("records")],
            "labels": _describe_labels(sheet.labels),
            "patch_px": sheet.pack.info.patch_px,
        }

    def sheet_patch(self, key: str, row: int) -> dict[str, object]:
        sheet = self.content.sheet(key)
        _require_row(sheet, row)
        record = sheet.frame.iloc[row]
        return {
            "place": key,
            "patch": row,
            "target": str(record["patch_id"]),
            "columns": {name: _plain(value) for name, value in record.items() if name != "row"},
            "on_slide": self._find_on_slide(sheet, row),
            **_describe_patch(sheet.labels, sheet.patches, row, self.content.classifier),
        }

    def sheet_image(self, key: str, row: int) -> Response:
        sheet = self.content.sheet(key)
        _require_row(sheet, row)
        return _jpeg(sheet.pixels(row))

    def explain_on_sheet(self, key: str, row: int) -> dict[str, object]:
        sheet = self.content.sheet(key)
        _require_row(sheet, row)
        nearest = f"api/sheets/{key}/nearest/{row}" if sheet.run is not None else None
        return self._explain(sheet.pixels(row)) | {"nearest": nearest}

    def nearest(self, key: str, row: int) -> list[dict[str, object]]:
        sheet = self.content.sheet(key)
        _require_row(sheet, row)
        if sheet.classifier is None:
            raise HTTPException(404, "only for a run it is known which patches were trained on")
        from biopsy.app.explaining import find_nearest

        return find_nearest(sheet, row)

    def _explain(self, pixels: np.ndarray) -> dict[str, object]:
        if self.content.classifier is None:
            raise HTTPException(404, "no model was named that could explain: pass --model")
        from biopsy.app.explaining import explain_patch

        return explain_patch(self.content.classifier, pixels)

    # --- annotations
    def list_annotations(self) -> dict[str, object]:
        """Return the annotations of each target, for the page to draw."""
        result = []
        for target, records in self.annotations.current().items():
            label, reason = combine(records)
            last = records[-1]
            result.append(
                {
                    "target": target,
                    "slide": last.slide,
                    "region": last.is_region,
                    "polygon": last.polygon,
                    "verdict": last.verdict,
                    "label": label,
                    "reason": reason,
                    "disagree": reason.startswith("reviewers disagree"),
                    "who": [record.who for record in records],
                }
            )
        return {"annotations": result}

    def annotate(self, new: NewAnnotation, request: Request) -> dict[str, object]:
        if (new.verdict is None) == (new.label is None):
            raise DataError("give a verdict (right, wrong, unsure, removed) or a label (a class)")
        self.annotations.add(self._make_annotation(new))
        return self.list_annotations()

    def _make_annotation(self, new: NewAnnotation) -> Annotation:
        target, labels = self._look_up(new)
        shown = target["shown"]
        if new.label is not None and (labels is None or new.label not in labels.names):
            raise DataError(
                f"{new.label!r} is no class here; known: {', '.join(labels.names if labels else [])}"
            )
        verdict: Verdict = new.verdict or ("right" if new.label == shown else "wrong")
        label = new.label
        if label is None and verdict == "right":
            label = shown
        elif label is None and verdict == "wrong" and labels is not None and len(labels.names) == 2 and shown:
            label = labels.names[1 - labels.names.index(shown)]
        who = (new.who or self.who).strip() or self.who
        return Annotation(**target, verdict=verdict, label=label, who=who, when=now())

    def _look_up(self, new: NewAnnotation) -> tuple[_Target, Labels | None]:
        """Return what is annotated and the class that is shown there."""
        if new.place in self.content.sheets:
            sheet = self.content.sheet(new.place)
            if new.patch is None:
                raise DataError("on a sheet only patches can be annotated")
            _require_row(sheet, new.patch)
            shown = _shown(sheet.labels, sheet.patches, new.patch)
            patch_id = str(sheet.pack.table["patch_id"].iloc[new.patch])
            place = self._find_on_slide(sheet, new.patch)
            slide = None if place is None else self.content.entries[place["key"]].name
            polygon = None if place is None else _square(*place["box"])
            return (
                {
                    "target": patch_id,
                    "patch_id": patch_id,
                    "slide": slide,
                    "polygon": polygon,
                    "shown": shown,
                },
                sheet.labels,
            )
        scene, name = self.content.scene(new.place), self.content.entries[new.place].name
        if new.patch is None:
            if new.region is None or (new.polygon is None and new.verdict != "removed"):
                raise DataError("give a patch, or the id and polygon of a region")
            shown = _majority(scene, new.polygon) if new.polygon else None
            return (
                {"target": new.region, "slide": name, "polygon": new.polygon, "shown": shown},
                scene.labels,
            )
        if scene.grid is None or scene.labels is None or new.patch >= len(scene.grid):
            raise DataError("there is no such patch")
        ids = scene.patches.ids
        return (
            {
                "target": self._target_on_slide(new.place, scene, new.patch),
                "patch_id": None if ids is None else str(ids[new.patch]),
                "slide": name,
                "polygon": _square(*_corner(scene, new.patch)),
                "shown": _shown(scene.labels, scene.patches, new.patch),
            },
            scene.labels,
        )

    def _target_on_slide(self, key: str, scene: Scene, index: int) -> str:
        if scene.patches.ids is not None:
            return str(scene.patches.ids[index])
        assert scene.grid is not None
        return f"{self.content.entries[key].name}@{int(scene.grid.x[index])},{int(scene.grid.y[index])}"

    def _find_on_slide(self, sheet: Sheet, row: int) -> _Place | None:
        """Return where a patch of a sheet lies among the slides of the page."""
        record = sheet.pack.table.iloc[row]
        if record[["x", "y"]].isna().any():
            return None
        names = {str(record["slide_id"]), str(record["patient_id"])}
        for entry in self.content.entries.values():
            if entry.sheet == sheet.key and entry.name in names:
                side = sheet.pack.info.patch_px
                return {"key": entry.key, "box": [int(record["x"]), int(record["y"]), side]}
        return None

    # --- exports
    def export_geojson(self, key: str) -> Response:
        scene, name = self.content.scene(key), self.content.entries[key].name
        names = scene.labels.names if scene.labels else []
        features = list(to_features(self.annotations.current(), name, names, scene.corner))
        document = {"type": "FeatureCollection", "features": features}
        return JSONResponse(
            document, headers=_attachment(f"{name}.geojson"), media_type="application/geo+json"
        )

    def export_labels(self, key: str) -> Response:
        import tempfile

        sheet = self.content.sheet(key)
        slides = [
            (entry.name, rows)
            for entry in self.content.entries.values()
            if entry.sheet == key and (rows := self.content.scene(entry.key).patches.rows) is not None
        ]
        table = label_sheet(sheet.pack, slides, self.annotations.current())
        with tempfile.TemporaryDirectory() as folder:
            write_csv(Path(folder) / "labels.csv", table)
            content = (Path(folder) / "labels.csv").read_bytes()
        return Response(content, media_type="text/csv", headers=_attachment(f"{sheet.name}.labels.csv"))


def _attachment(name: str) -> dict[str, str]:
    return {"content-disposition": f"attachment; filename*=UTF-8''{quote(file_name(name))}"}


def _jpeg(image: np.ndarray) -> Response:
    return Response(
        encode_jpeg(image), media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"}
    )


def _colour_maps() -> dict[str, list[list[int]]]:
    import matplotlib

    steps = np.linspace(0, 1, 256)
    return {
        name: (matplotlib.colormaps[name](steps)[:, :3] * 255).round().astype(int).tolist()
        for name in COLOUR_MAPS
    }


def _describe_labels(labels: Labels | None) -> dict[str, object] | None:
    if labels is None:
        return None
    colours = [CLASS_COLOURS[index % len(CLASS_COLOURS)] for index in range(len(labels.names))]
    return {
        "names": labels.names,
        "titles": [class_title(name) for name in labels.names],
        "positive": labels.positive,
        "threshold": labels.threshold,
        "colours": colours,
        "abstained_colour": BASELINE,
    }


def _describe_patch(
    labels: Labels, patches: Patches, index: int, classifier: Classifier | None
) -> dict[str, object]:
    """Return probabilities, decision, prediction set and label of one patch."""
    document: dict[str, object] = {
        "probs": None,
        "pred": None,
        "threshold": labels.threshold,
        "set": None,
        "abstained": None if patches.abstained is None else bool(patches.abstained[index]),
        "ood": None if patches.ood is None or np.isnan(patches.ood[index]) else bool(patches.ood[index]),
        "label": None if patches.target is None else labels.names[int(patches.target[index])],
        "patch_id": None if patches.ids is None else str(patches.ids[index]),
        "shown": _shown(labels, patches, index),
    }
    if patches.probs is not None and np.isfinite(patches.probs[index]).all():
        probs = patches.probs[index]
        document["probs"] = dict(zip(labels.names, map(float, probs), strict=True))
        document["pred"] = labels.names[int(labels.decide(probs[None])[0])]
        if classifier is not None and classifier.info.class_names == labels.names:
            sets = classifier.prediction_sets(probs[None].astype(float))
            document["set"] = sets and sets[0]
    return document


def _shown(labels: Labels, patches: Patches, index: int) -> str | None:
    """Return the class that a reviewer calls right or wrong: the predicted one, else the annotated one."""
    if patches.probs is not None and np.isfinite(patches.probs[index]).all():
        return labels.names[int(labels.decide(patches.probs[index][None])[0])]
    return None if patches.target is None else labels.names[int(patches.target[index])]


def _majority(scene: Scene, polygon: list[tuple[float, float]]) -> str | None:
    """Return the class that most patches in a region are shown as."""
    import shapely

    if scene.grid is None or scene.labels is None:
        return None
    half = scene.grid.patch_px * scene.grid.scale / 2
    area = shapely.make_valid(shapely.Polygon(polygon))
    inside = np.flatnonzero(shapely.contains_xy(area, scene.grid.x + half, scene.grid.y + half))
    shown = pd.Series(
        [_shown(scene.labels, scene.patches, int(index)) for index in inside], dtype=object
    ).dropna()
    return None if shown.empty else str(shown.mode().iloc[0])


def _corner(scene: Scene, index: int) -> tuple[float, float, float]:
    """Return left and upper edge and side of a patch, at level 0."""
    grid = scene.grid
    assert grid is not None
    return (
        float(grid.x_px[index] * grid.scale),
        float(grid.y_px[index] * grid.scale),
        float(grid.patch_px * grid.scale),
    )


def _square(left: float, top: float, side: float) -> list[tuple[float, float]]:
    right, bottom = left + side, top + side
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _filter(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    if column not in frame:
        raise DataError(f"the sheet has no column {column!r}; it has {', '.join(map(str, frame))}")
    cells = frame[column].astype("string").fillna("")
    exact = cells == value
    return frame[exact if exact.any() else cells.str.contains(value, case=False, regex=False)]


def _require_row(sheet: Sheet, row: int) -> None:
    if not 0 <= row < len(sheet.pack):
        raise HTTPException(404, "there is no such patch")


def _row(sheet: Sheet, record: Mapping[str, object]) -> dict[str, object]:
    names = ("row", "patch_id", "label", "pred", "prob", "error", "abstained", "doubt", "patient_id")
    return {name: _plain(record[name]) for name in names if name in record}


def _plain(value: Any) -> Any:
    """Return a cell as JSON has it; what is missing is null."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def _read_queue(path: Path | str | None, content: ViewerContent) -> list[dict[str, object]]:
    """Return the patches that `next` chose, as places on this page; those that are not on it are left out."""
    if path is None:
        return []
    from biopsy.app.queue import read_queue

    key_of = {entry.name: entry.key for entry in content.entries.values()}
    rows = {
        patch_id: (sheet.key, row)
        for sheet in content.sheets.values()
        for row, patch_id in enumerate(sheet.pack.table["patch_id"].astype(str))
    }
    result = []
    for item in read_queue(path).to_dict("records"):
        item = {name: _plain(value) for name, value in item.items()}
        if item["patch_id"] in rows:
            key, row = rows[item["patch_id"]]
            result.append({**item, "place": key, "patch": row, "slide_key": key_of.get(item["slide"])})
        elif item["slide"] in key_of:
            result.append({**item, "place": None, "patch": None, "slide_key": key_of[item["slide"]]})
    if not result:
        content.notes.append(
            f"none of the patches of {path} is on this page: name the pack or slides as well"
        )
    return result
