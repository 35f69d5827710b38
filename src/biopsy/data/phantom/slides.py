"""One patient's slide as pixels: the picture, its tumour region and its tissue at one pixel size."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from biopsy.core.seeds import derive, make_rng
from biopsy.data.phantom.anatomy import Anatomy, plan_slide
from biopsy.data.phantom.looks import Look, draw_look, scan
from biopsy.data.phantom.noise import Floats
from biopsy.data.phantom.regions import Weave
from biopsy.data.phantom.tissue import light_region, nest_region

MPP = 4.0  # IDC's patches: 40x scans (about .25 um/px) reduced 16 times
_FINEST_DRAWN = 2.0  # nuclei need about 4 px; a coarser picture is drawn this fine and averaged
_TILE_PX = 200  # a slide is painted in tiles of this grid, whatever part is asked for
_RIM_PX = 4  # how far the scanner's blur reaches


@dataclass(frozen=True)
class PhantomSlide:
    """A slide at ``mpp``: ``image`` (H, W, 3) uint8 RGB, ``tumour`` and ``tissue`` (H, W) boolean.

    ``tumour`` is the region an annotator would outline: one connected piece that holds stroma, fat and
    lymphocytes between the nests. ``anatomy`` and ``look`` say how the slide came to be.
    """

    patient: str
    mpp: float
    image: NDArray[np.uint8]
    tumour: NDArray[np.bool_]
    tissue: NDArray[np.bool_]
    anatomy: Anatomy
    look: Look


class SlidePainter:
    """Draws any part of a planned slide at any pixel size, without holding the rest."""

    def __init__(self, anatomy: Anatomy, look: Look) -> None:
        self.anatomy = anatomy
        self.look = look

    @cached_property
    def _weave(self) -> Weave:
        return Weave(self.anatomy)

    def size_px(self, mpp: float) -> tuple[int, int]:
        """Give the slide's width and height in pixels of ``mpp`` micrometres."""
        return round(self.anatomy.width_um / mpp), round(self.anatomy.height_um / mpp)

    def paint(self, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float) -> NDArray[np.uint8]:
        """Give a rectangle as RGB, ``(height, width, 3)``; pixels are counted from the slide's corner."""
        image = np.empty((height_px, width_px, 3), np.uint8)
        for top in range(y_px // _TILE_PX * _TILE_PX, y_px + height_px, _TILE_PX):
            for left in range(x_px // _TILE_PX * _TILE_PX, x_px + width_px, _TILE_PX):
                tile = self._tile(left, top, mpp)
                rows = slice(max(y_px - top, 0), min(y_px + height_px - top, _TILE_PX))
                columns = slice(max(x_px - left, 0), min(x_px + width_px - left, _TILE_PX))
                row, column = top + rows.start - y_px, left + columns.start - x_px
                part = tile[rows, columns]
                image[row : row + part.shape[0], column : column + part.shape[1]] = part
        return image

    def mask(
        self, name: str, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float
    ) -> NDArray[np.bool_]:
        """Give where ``"tumour"`` or ``"tissue"`` is, ``(height, width)``."""
        x, y = self._grid(x_px, y_px, width_px, height_px, mpp)
        return self.anatomy.read(name, x, y) > 0

    def nests(self, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float) -> NDArray[np.bool_]:
        """Give which pixels are mostly tumour cells, ``(height, width)``; of the region much is stroma."""
        corner_um, shape = (mpp * x_px, mpp * y_px), (height_px, width_px)
        return nest_region(self.anatomy, self._weave, *corner_um, shape, mpp) >= 0.5

    def _tile(self, left_px: int, top_px: int, mpp: float) -> NDArray[np.uint8]:
        finer = max(1, round(mpp / _FINEST_DRAWN))
        size_px = _TILE_PX + 2 * _RIM_PX
        corner_um = (mpp * (left_px - _RIM_PX), mpp * (top_px - _RIM_PX))
        shape = (finer * size_px, finer * size_px)
        light = light_region(self.anatomy, self._weave, self.look, *corner_um, shape, mpp / finer)
        if finer > 1:
            light = np.asarray(
                cv2.resize(light, (size_px, size_px), interpolation=cv2.INTER_AREA), np.float32
            )
        seed = derive(self.anatomy.seed, "phantom", self.anatomy.patient, "scan", left_px, top_px, mpp)
        return scan(light, self.look, seed)[_RIM_PX:-_RIM_PX, _RIM_PX:-_RIM_PX]

    @staticmethod
    def _grid(x_px: int, y_px: int, width_px: int, height_px: int, mpp: float) -> tuple[Floats, Floats]:
        columns = ((np.arange(x_px, x_px + width_px) + 0.5) * mpp).astype(np.float32)
        rows = ((np.arange(y_px, y_px + height_px) + 0.5) * mpp).astype(np.float32)
        x, y = np.meshgrid(columns, rows)
        return x, y


def plan_painter(
    seed: int, patient: str, *, tissue_mm2: float, tumour_frac: float | None = None
) -> SlidePainter:
    """Plan a slide without drawing it; without ``tumour_frac`` the share is drawn from the patient's name."""
    if tumour_frac is None:
        tumour_frac = float(make_rng(seed, "phantom", patient, "share").beta(1.4, 3.2))
    anatomy = plan_slide(seed, patient, tissue_mm2=tissue_mm2, tumour_frac=tumour_frac)
    return SlidePainter(anatomy, draw_look(seed, patient))


def make_slide(
    seed: int, patient: str, *, mpp: float = MPP, tissue_mm2: float = 20.0, tumour_frac: float | None = None
) -> PhantomSlide:
    """Draw a whole slide.

    Args:
        seed: The cohort's seed.
        patient: The patient's name; seed and name decide everything, with the same library versions.
        mpp: Micrometres per pixel. The same tissue is drawn at any ``mpp``.
        tissue_mm2: Area of tissue; 20 mm2 are about 500 patches of 200 um.
        tumour_frac: Share of the tissue inside the tumour region, in [0, 1); None draws one.

    Example:
        >>> slide = make_slide(0, "90001", tissue_mm2=1.0, tumour_frac=0.3)
        >>> slide.image.shape[:2] == slide.tumour.shape
        True
    """
    if mpp <= 0 or tissue_mm2 <= 0 or not (tumour_frac is None or 0 <= tumour_frac < 1):
        raise ValueError(
            f"a phantom slide needs mpp > 0, tissue_mm2 > 0 and tumour_frac in [0, 1); "
            f"got {mpp!r}, {tissue_mm2!r}, {tumour_frac!r}"
        )
    painter = plan_painter(seed, patient, tissue_mm2=tissue_mm2, tumour_frac=tumour_frac)
    whole = (0, 0, *painter.size_px(mpp), mpp)
    return PhantomSlide(
        patient=patient,
        mpp=mpp,
        image=painter.paint(*whole),
        tumour=painter.mask("tumour", *whole),
        tissue=painter.mask("tissue", *whole),
        anatomy=painter.anatomy,
        look=painter.look,
    )
