"""Files of a pack: their names, columns, metadata and hashes, and padding of patches to one size."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Final, Literal, Required

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from typing_extensions import TypedDict

from biopsy.core.files import sha256_file, write_json
from biopsy.core.version import __version__

FORMAT: Final = "biopsy-pack/1"
PIXELS, TABLE, DOCUMENT = "patches.npy", "patches.parquet", "pack.json"

# Columns covered by the content hash, with the pixels; splits, audit, ledger and joined columns may change.
IDENTITY_COLUMNS = ("patch_id", "patient_id", "slide_id", "site_id", "x", "y", "target", "width", "height")
COLUMNS = (*IDENTITY_COLUMNS, "sha256", "source")
MAX_PATCH_PX = 4096  # larger images are cut into patches


class PackCounts(TypedDict, total=False):
    """Counts of a pack; preparation adds numbers of excluded files, by reason."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    patches: Required[int]
    patients: Required[int]
    slides: Required[int]
    per_class: Required[dict[str, int]]
    skipped: int
    padded: int


class Origin(TypedDict, total=False):
    """Provenance of a pack: source, date, version and user files."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    source: str
    made: str
    version: str
    request: dict[str, object]
    """Source and options; the same request opens the pack again."""
    synthetic: bool
    annotations: dict[str, object]
    patients: dict[str, object]
    patients_missing: dict[str, int]
    labels: dict[str, object]
    join: dict[str, object]


def describe_origin(source: str) -> Origin:
    """Return the provenance of a pack made now."""
    return Origin(source=source, made=datetime.now(UTC).isoformat(timespec="seconds"), version=__version__)


class PackInfo(BaseModel):
    """Content of ``pack.json``."""

    model_config = ConfigDict(extra="allow")

    format: Literal["biopsy-pack/1"] = FORMAT
    dataset: str
    """Name of the layout it was read from, such as ``"idc"``."""
    class_names: list[str] = Field(min_length=1)
    positive_class: str | None
    """The positive class; None for more than two classes."""
    mpp: float | None = Field(gt=0, allow_inf_nan=False)
    """Pixel size in µm; None if unknown."""
    patch_px: PositiveInt = Field(le=MAX_PATCH_PX)
    counts: PackCounts
    origin: Origin
    skipped: list[dict[str, str]] = []
    """Unreadable input: ``source`` and ``reason``."""
    files: dict[str, int]
    """Size in bytes of the pixel and table files, verified when the pack is opened."""
    content_sha256: str
    table_sha256: str = ""
    """Hash of the table's file; empty in packs of the first versions."""

    @property
    def is_synthetic(self) -> bool:
        return bool(self.origin.get("synthetic"))


def content_sha256(patches: np.ndarray, table: pd.DataFrame) -> str:
    """Hash pixels, target and ids of every patch; padding is included if it does not repeat the edge."""
    hashes = []
    for padded, width, height in zip(patches, table["width"], table["height"], strict=True):
        patch = padded[:height, :width]
        hashes.append(patch_sha256(patch if np.array_equal(pad(patch, len(padded)), padded) else padded))
    return table_sha256(table.assign(sha256=hashes))


def table_sha256(table: pd.DataFrame) -> str:
    """Return the `content_sha256` of a table with the hashes of its patches in ``sha256``."""
    return hash_columns(table, (*IDENTITY_COLUMNS, "sha256"))


def hash_columns(table: pd.DataFrame, names: Iterable[str]) -> str:
    """Hash the values of columns as text; nulls as empty strings."""
    digest = hashlib.sha256()
    for name in names:
        texts = pa.array(table[name], from_pandas=True).cast(pa.string()).fill_null("")
        lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype("<i4")
        for part in (name.encode(), lengths.tobytes(), "".join(texts.to_pylist()).encode()):
            digest.update(part)
    return digest.hexdigest()


def patch_sha256(patch: np.ndarray) -> str:
    """Hash width, height and pixels of a patch without padding."""
    height, width = patch.shape[:2]
    digest = _start_hash(width, height).copy()
    digest.update(np.ascontiguousarray(patch).data)
    return digest.hexdigest()


@cache
def _start_hash(width: int, height: int) -> "hashlib._Hash":
    """Return a cached hash object per size: creating one takes a lock in OpenSSL, copying does not."""
    return hashlib.sha256(f"{width}x{height}:".encode())


def pad(patch: np.ndarray, patch_px: int, out: np.ndarray | None = None) -> np.ndarray:
    """Pad a patch to ``patch_px`` by repeating its right and bottom edge.

    Args:
        out: Output array, uint8 ``(patch_px, patch_px, 3)`` (default: a new array).
    """
    height, width = patch.shape[:2]
    if out is None:
        if height == width == patch_px:
            return patch
        out = np.empty((patch_px, patch_px, 3), np.uint8)
    out[:height, :width] = patch
    if width < patch_px:
        out[:height, width:] = patch[:, -1:]
    if height < patch_px:
        out[height:] = out[height - 1]
    return out


def finish_pack(
    folder: Path,
    table: pd.DataFrame,
    *,
    dataset: str,
    class_names: list[str],
    positive_class: str | None,
    mpp: float | None,
    patch_px: int,
    counts: Mapping[str, int] | None = None,
    origin: Origin | None = None,
    skipped: Sequence[dict[str, str]] = (),
) -> None:
    """Write the table and ``pack.json`` of a pack whose pixels are in ``folder``.

    Args:
        table: One row per patch with the columns `COLUMNS`, in the order of the pixels.
        counts: Further counts, besides patches, patients, slides and classes.
    """
    table.to_parquet(folder / TABLE, index=False)
    per_class = np.bincount(table["target"].to_numpy(np.int64), minlength=len(class_names))
    info = PackInfo(
        dataset=dataset,
        class_names=class_names,
        positive_class=positive_class,
        mpp=mpp,
        patch_px=patch_px,
        counts=PackCounts(
            patches=len(table),
            patients=int(table["patient_id"].nunique()),
            slides=int(table["slide_id"].nunique()),
            per_class=dict(zip(class_names, per_class.tolist(), strict=True)),
            **(counts or {}),  # type: ignore[typeddict-item]
        ),
        origin=origin or {},
        skipped=list(skipped),
        files={name: (folder / name).stat().st_size for name in (PIXELS, TABLE)},
        content_sha256=table_sha256(table),
        table_sha256=sha256_file(folder / TABLE),
    )
    write_json(folder / DOCUMENT, info.model_dump(mode="json"))
