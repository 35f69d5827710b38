"""Annotations of patches and regions by reviewers: an append-only file, exported for QuPath and ``prepare``.

The file is appended to and never rewritten: each line is one JSON record, written at once and synced, so that
a crash loses at most the line being written. Several people, and several processes, may write to one file.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import shapely
from matplotlib.colors import to_rgb
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from biopsy.core.errors import DataError, UserFileError
from biopsy.core.loaders import parse_json, read_text
from biopsy.data.packs import Pack
from biopsy.plotting.style import BASELINE, CLASS_COLOURS

Verdict = Literal["right", "wrong", "unsure", "removed"]
MAX_BYTES = 2**28
UNSURE = "unsure*"  # QuPath, and `prepare`, ignore classes that end so
COLUMNS = ("patch_id", "label", "suggested", "decision", "who", "when", "reason")

Point = tuple[FiniteFloat, FiniteFloat]


class Annotation(BaseModel):
    """One line of the file.

    ``target`` names what is annotated: a patch of a pack by its ``patch_id``, a patch of a slide by
    ``SLIDE@x,y``, a region by an id of its own. ``polygon`` is in pixels of level 0; ``shown`` is the class
    that the reviewer saw, ``label`` the class it is by their verdict, None where they named none.
    """

    model_config = ConfigDict(extra="ignore")

    target: str = Field(min_length=1, max_length=400)
    slide: str | None = Field(None, max_length=400)
    patch_id: str | None = Field(None, max_length=400)
    polygon: list[Point] | None = Field(None, min_length=3, max_length=5000)
    verdict: Verdict
    shown: str | None = Field(None, max_length=200)
    label: str | None = Field(None, max_length=200)
    who: str = Field(min_length=1, max_length=100)
    when: str = Field(max_length=40)

    @property
    def is_region(self) -> bool:
        """Whether it is a region that was drawn, not a patch."""
        return self.target.startswith("region-")


class Annotations:
    """The file of annotations, read as far as it has been written.

    Args:
        path: The file; it is made when the first annotation is added.

    Raises:
        UserFileError: If there is a file that holds something else.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._records: list[Annotation] = []
        self._offset = 0
        self.refresh()

    def refresh(self) -> list[Annotation]:
        """Read lines added since the last call, by any process; return all, oldest first."""
        with self._lock:
            self._read_on()
            return list(self._records)

    def _read_on(self) -> None:
        if not self.path.exists() or self.path.stat().st_size <= self._offset:
            return
        content = read_text(self.path, max_bytes=MAX_BYTES).encode()[self._offset :]
        end = content.rfind(b"\n") + 1  # an incomplete last line is not read
        for line in content[:end].splitlines():
            if not line.strip():
                continue
            try:
                self._records.append(Annotation.model_validate(parse_json(line, self.path)))
            except (DataError, ValidationError):
                if not self._records:
                    raise UserFileError(
                        self.path, "foreign", "holds no annotations: name another file with --annotations"
                    ) from None
        self._offset += end

    @property
    def is_writable(self) -> bool:
        target = self.path if self.path.exists() else self.path.parent
        return os.access(target, os.W_OK)

    def add(self, annotation: Annotation) -> None:
        """Append a line; it is on the disk when this returns.

        Raises:
            UserFileError: If the file cannot be written.
        """
        line = json.dumps(annotation.model_dump(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                try:
                    size = os.fstat(descriptor).st_size
                    if size and os.pread(descriptor, 1, size - 1) != b"\n":
                        line = b"\n" + line  # after an incomplete line
                    os.write(descriptor, line)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise UserFileError(
                    self.path,
                    "read-only",
                    f"cannot be written ({error.strerror}): name a file with --annotations",
                ) from None
            self._read_on()

    def current(self) -> dict[str, list[Annotation]]:
        """Return the latest annotation of each target by each reviewer, without removed ones."""
        latest: dict[tuple[str, str], Annotation] = {}
        for record in self.refresh():
            latest.pop((record.target, record.who), None)  # ordered by the latest annotation
            latest[record.target, record.who] = record
        by_target: dict[str, list[Annotation]] = {}
        for record in latest.values():
            if record.verdict != "removed":
                by_target.setdefault(record.target, []).append(record)
        return by_target


def now() -> str:
    """Return the time as annotations record it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def combine(records: list[Annotation]) -> tuple[str | None, str]:
    """Return the class that reviewers agree on, None where they do not or are unsure, and the reason."""
    labels = {None if record.verdict == "unsure" else record.label for record in records}
    if len(labels) > 1:
        parts = ", ".join(f"{record.who}: {record.label or record.verdict}" for record in records)
        return None, f"reviewers disagree ({parts})"
    label = labels.pop()
    record = records[-1]
    if label is None and record.verdict == "wrong":
        return None, "wrong, but no class was named"
    return label, f"{record.verdict}; shown as {record.shown}" if record.shown else record.verdict


def label_sheet(
    pack: Pack, slides: Iterable[tuple[str, np.ndarray]], by_target: dict[str, list[Annotation]]
) -> pd.DataFrame:
    """Return the sheet that ``prepare --labels`` reads: one row per annotated patch of a pack.

    Regions give their class to every patch whose centre lies in them; a verdict on the patch itself comes
    before that. Patches on which reviewers disagree or are unsure have no decision.

    Args:
        slides: Name of each slide and its rows of the pack.
        by_target: As `Annotations.current` returns it.
    """
    ids = pack.table["patch_id"].to_numpy(str)
    by_patch: dict[str, list[Annotation]] = {}
    rows_of = {name: rows for name, rows in slides}
    for records in by_target.values():
        for record in records:
            if record.is_region and record.slide in rows_of:
                for row in _rows_inside(pack, rows_of[record.slide], record):
                    by_patch.setdefault(ids[row], []).append(record)
    patch_ids = set(ids)
    by_patch |= {
        target: [record for record in records if not record.is_region]
        for target, records in by_target.items()
        if target in patch_ids
    }
    label_of = dict(zip(ids, pack.original_classes, strict=True))
    rows = []
    for patch_id, records in by_patch.items():
        label, reason = combine(records)
        rows.append(
            (
                patch_id,
                label_of[patch_id],
                label,
                label,
                ", ".join(dict.fromkeys(record.who for record in records)),
                max(record.when for record in records),
                reason,
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows_inside(pack: Pack, rows: np.ndarray, record: Annotation) -> np.ndarray:
    table = pack.table.iloc[rows]
    half = pack.info.patch_px / 2
    centre = table[["x", "y"]].to_numpy(float) + half
    assert record.polygon is not None
    area = shapely.make_valid(shapely.Polygon(record.polygon))
    return rows[shapely.contains_xy(area, centre[:, 0], centre[:, 1])]


def to_features(
    by_target: dict[str, list[Annotation]], slide: str, class_names: list[str], corner: tuple[int, int]
) -> Iterator[dict[str, object]]:
    """Return the annotations of a slide as features that QuPath opens, each with its class.

    Args:
        by_target: As `Annotations.current` returns it.
        class_names: In order, which fixes their colours.
        corner: Where what was scanned begins at level 0: QuPath counts from there.
    """
    for target, records in by_target.items():
        records = [record for record in records if record.slide == slide and record.polygon]
        if not records:
            continue
        label, reason = combine(records)
        polygon = shapely.Polygon(records[-1].polygon)
        if not polygon.is_valid:
            polygon = max(_polygons(shapely.make_valid(polygon)), key=lambda part: part.area, default=polygon)
        points = np.asarray(polygon.exterior.coords) - corner
        colour = (
            CLASS_COLOURS[class_names.index(label) % len(CLASS_COLOURS)] if label in class_names else BASELINE
        )
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [points.round(3).tolist()]},
            "properties": {
                "objectType": "annotation",
                "name": target,
                "classification": {
                    "name": label or UNSURE,
                    "color": [round(255 * value) for value in to_rgb(colour)],
                },
                "isLocked": False,
                "metadata": {
                    "who": ", ".join(record.who for record in records),
                    "when": records[-1].when,
                    "verdict": reason,
                },
            },
        }


def _polygons(area: Any) -> list[Any]:
    return [part for part in getattr(area, "geoms", [area]) if part.geom_type == "Polygon"]
