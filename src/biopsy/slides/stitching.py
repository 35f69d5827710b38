"""Patches that know their coordinates become slides again, with what a classifier says of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from biopsy.core.errors import DataError, SlideError
from biopsy.data.packs import Pack
from biopsy.models.classifier import Classifier
from biopsy.slide_io.mosaic import check_extent, stitch
from biopsy.slide_io.tissue import THUMBNAIL_PX
from biopsy.slides.grids import PatchGrid

if TYPE_CHECKING:
    from biopsy.models.engine import Engine


@dataclass(frozen=True)
class Stitched:
    """A slide put together from a pack.

    Attributes:
        name: The slide's id, or the patient's where slides have none.
        index: Its rows in the pack.
        grid: Where its patches lie; level 0 is the pack's own resolution.
        picture: The slide as far as there are patches, uint8 ``(H, W, 3)``.
        target: Annotated class of each patch.
    """

    name: str
    index: np.ndarray
    grid: PatchGrid
    picture: np.ndarray
    target: np.ndarray


def list_slides(pack: Pack) -> dict[str, np.ndarray]:
    """Return the rows of every slide of a pack whose patches know where they lay.

    Raises:
        SlideError: If no patch does.
    """
    table = pack.table
    column = "slide_id" if table["slide_id"].notna().any() else "patient_id"
    placed = table[["x", "y", column]].notna().all(axis=1).to_numpy()
    if not placed.any():
        raise SlideError(f"{pack.path} names no coordinates of its patches: no slide can be put together")
    names = table[column].astype("string")
    return {
        str(name): np.flatnonzero(placed & (names == name).fillna(False).to_numpy())
        for name in sorted(names[placed].unique())
    }


def stitch_slide(pack: Pack, name: str, index: np.ndarray, *, mpp: float | None = None) -> Stitched:
    """Put one slide together.

    Args:
        mpp: Micrometres per pixel, where the pack does not say.

    Raises:
        SlideError: If the patches lie on no grid or far apart, or nobody knows their mpp.
    """
    mpp = pack.info.mpp or mpp
    if mpp is None:
        raise SlideError(f"{pack.path} does not say at how many um/px its patches were cut: pass --mpp")
    rows, patch_px = pack.table.iloc[index], pack.info.patch_px
    x, y = (rows[axis].to_numpy(np.int64) for axis in "xy")
    stride_px = _find_stride(x, y, patch_px, name)
    try:
        check_extent(np.append(x, 0), np.append(y, 0), stride_px)  # the slide's corner is in its pictures
    except DataError as error:
        raise SlideError(f"slide {name}: {error}") from None
    width, height = int(x.max()) + patch_px, int(y.max()) + patch_px
    scale = min(1.0, THUMBNAIL_PX / max(width, height))
    sizes = pack.sizes[index]
    patches = (pack.patches[row][: size[1], : size[0]] for row, size in zip(index, sizes, strict=True))
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
    room = picture[top : top + image.shape[0], left : left + image.shape[1]]
    room[:] = image[: room.shape[0], : room.shape[1]]
    return Stitched(name, index, grid, picture, pack.target[index])


def predict_stitched(
    pack: Pack, index: np.ndarray, classifier: Classifier, *, engine: "Engine"
) -> np.ndarray:
    """Return the logits of a slide's patches, ``(n, n_classes)``."""
    from biopsy.models.inference import predict_classifier

    return predict_classifier(classifier, pack.patches, pack.sizes, index, engine=engine)


def _find_stride(x: np.ndarray, y: np.ndarray, patch_px: int, name: str) -> int:
    """Return the step of the grid on which patches lie: the largest divisor of a patch and all distances."""
    distances = np.concatenate([x - x.min(), y - y.min(), [patch_px]])
    stride_px = int(np.gcd.reduce(distances))
    if stride_px < patch_px / 16:
        raise SlideError(
            f"the patches of slide {name} lie on no grid: their distances have only {stride_px} px in common"
        )
    return stride_px
