"""Reassembly of slides from packs with coordinates."""

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
    """A slide reassembled from a pack.

    Attributes:
        name: Id of the slide, or of the patient without slide ids.
        index: Its rows in the pack.
        grid: Grid of its patches; level 0 has the resolution of the pack.
        picture: Reassembled picture, uint8 ``(H, W, 3)``.
        target: Annotated class of each patch.
    """

    name: str
    index: np.ndarray
    grid: PatchGrid
    picture: np.ndarray
    target: np.ndarray


def list_slides(pack: Pack) -> dict[str, np.ndarray]:
    """Return the rows of every slide of a pack with coordinates.

    Raises:
        SlideError: If no patch has coordinates.
    """
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


def stitch_slide(pack: Pack, name: str, index: np.ndarray, *, mpp: float | None = None) -> Stitched:
    """Reassemble one slide.

    Args:
        mpp: Pixel size in µm if the pack does not record it.

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
    window = picture[top : top + image.shape[0], left : left + image.shape[1]]
    window[:] = image[: window.shape[0], : window.shape[1]]
    return Stitched(name, index, grid, picture, pack.target[index])


def predict_stitched(
    pack: Pack, index: np.ndarray, classifier: Classifier, *, engine: "Engine"
) -> np.ndarray:
    """Return the logits of a slide's patches, ``(n, n_classes)``."""
    from biopsy.models.inference import predict_classifier

    return predict_classifier(classifier, pack.patches, pack.sizes, index, engine=engine)


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
