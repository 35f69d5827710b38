"""Amount of stain at every point of a region of one slide: stroma, tumour, glands, fat, cells, artefacts.

A region is drawn with a margin and cropped, and everything random is looked up by position, so regions that
touch fit together. Amounts are in units of an average stain; optics belong to ``looks``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from biopsy.phantom.anatomy import Anatomy
from biopsy.phantom.cells import draw_fat, fill_outlines, place_nuclei, stamp_nuclei
from biopsy.phantom.noise import Floats
from biopsy.phantom.patients import INKS, Look, transmit
from biopsy.phantom.region import Region, Weave, ramp

_MARGIN_UM = 24.0  # beyond the longest nucleus
_NO_TISSUE_UM = -60.0  # this far outside the outline not even its roughest edge is met


def light_region(
    anatomy: Anatomy, weave: Weave, look: Look, x_um: float, y_um: float, shape: tuple[int, int], um: float
) -> Floats:
    """Return the light that passes a region, ``(height, width, 3)`` in [0, 1], at ``um`` micrometres/px."""
    x, y, margin = _grid(x_um, y_um, shape, um)
    if anatomy.read("tissue", x[::8, ::8], y[::8, ::8]).max() < _NO_TISSUE_UM:
        return np.ones((*shape, 3), np.float32)
    region = Region.make(anatomy, weave, x, y, um)
    amounts = _draw(anatomy, weave, region)
    crop = np.s_[margin : margin + shape[0], margin : margin + shape[1]]
    layers = cv2.merge([amounts.h[crop], amounts.e[crop], amounts.blood[crop]])
    density: Floats = np.asarray(cv2.transform(layers, look.stains.T), np.float32)
    if look.ink is not None:
        density = density + _ink(region)[crop][..., None] * np.array(INKS[look.ink], np.float32)
    return transmit(density)


def nest_region(
    anatomy: Anatomy, weave: Weave, x_um: float, y_um: float, shape: tuple[int, int], um: float
) -> Floats:
    """Return how much of each place tumour cells fill, ``(height, width)`` in [0, 1]."""
    x, y, margin = _grid(x_um, y_um, shape, um)
    region = Region.make(anatomy, weave, x, y, um)
    organs = _draw_organs(anatomy, region)
    nests = _grow_tumour(anatomy, weave, region).epithelium * _free_of_organs(organs)
    return np.asarray(nests[margin : margin + shape[0], margin : margin + shape[1]], np.float32)


def _grid(x_um: float, y_um: float, shape: tuple[int, int], um: float) -> tuple[Floats, Floats, int]:
    """Return the places of a region's pixels with a margin around it, and the margin's width."""
    margin = int(np.ceil(_MARGIN_UM / um))
    columns = x_um + (np.arange(-margin, shape[1] + margin) + 0.5) * um
    rows = y_um + (np.arange(-margin, shape[0] + margin) + 0.5) * um
    x, y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    return x, y, margin


@dataclass
class _Amounts:
    """Haematoxylin, eosin and red blood on a region's grid."""

    h: Floats
    e: Floats
    blood: Floats

    def replace(self, mask: Floats, h: Floats | float, e: Floats | float) -> None:
        """Replace haematoxylin and eosin where the mask is 1, in part where it is below 1."""
        self.h = self.h + mask * (h - self.h)
        self.e = self.e + mask * (e - self.e)


class _Tumour(NamedTuple):
    epithelium: Floats
    hollow: Floats
    cleft: Floats


class _Organs(NamedTuple):
    bed: Floats
    gland: Floats
    hollow: Floats
    wall: Floats
    blood: Floats
    nuclei: Floats


def _draw(anatomy: Anatomy, weave: Weave, region: Region) -> _Amounts:
    habit, grain, fibre = anatomy.habit, region.grain, region.fibre
    amounts = _stroma(anatomy, weave, region)
    tumour = _grow_tumour(anatomy, weave, region)
    organs = _draw_organs(anatomy, region)
    free = _free_of_organs(organs)
    epithelium = tumour.epithelium * free
    occupied = np.maximum(np.maximum(organs.gland, organs.bed), 0.85 * epithelium)
    fat, fat_wall = draw_fat(anatomy, weave, region, occupied)

    amounts.replace(organs.bed, 0.16 + 0.05 * grain, 0.42 + 0.1 * fibre)
    amounts.replace(epithelium, habit.cytoplasm_h * (1 + 0.2 * grain), habit.cytoplasm_e * (1 + 0.15 * grain))
    dead = epithelium * ramp(2.5 * (region.patchy + region.maps["grade"] - 3.2 + habit.necrosis))
    amounts.replace(dead, 0.12 + 0.1 * grain, 1.05 + 0.25 * grain)
    amounts.replace(organs.gland, 0.3 + 0.05 * grain, 0.55 + 0.08 * grain)
    amounts.replace(organs.wall, 0.08, 0.85 + 0.1 * fibre)
    empty = np.maximum(np.maximum(tumour.hollow, tumour.cleft) * free, organs.hollow)
    amounts.replace(empty, 0.0, 0.03)
    amounts.blood = organs.blood * (0.75 + 0.2 * grain)

    living = epithelium * (1 - 0.85 * dead)
    nuclei = np.concatenate(
        [place_nuclei(anatomy, weave, region, living, organs.gland, organs.bed), organs.nuclei]
    )
    stained = stamp_nuclei(region.shape, region.origin_um, region.um, nuclei)
    amounts.h += stained * (1 + 0.12 * grain) * (1 - empty)
    amounts.e *= 1 - 0.35 * np.minimum(stained, 1)

    _bleed(habit.bleeding, amounts, region)
    inside = ramp(region.depth / 8 + 0.5)
    keep = inside * (1 - fat)
    wall = inside * fat_wall
    amounts.h = np.clip(amounts.h * keep + 0.1 * wall, 0, None)
    amounts.e = np.clip(amounts.e * keep + (0.4 + 0.1 * grain) * wall, 0, None)
    amounts.blood *= keep
    if habit.debris > 0:
        _soil(habit.debris, amounts, region, wall, inside)
    return amounts


def _free_of_organs(organs: _Organs) -> Floats:
    """Return where tumour may grow: not in what was there before."""
    return np.asarray(1 - np.maximum(organs.gland, 0.8 * organs.bed), np.float32)


def _stroma(anatomy: Anatomy, weave: Weave, region: Region) -> _Amounts:
    """Collagen: eosin in wavy fibres, bluish where ground substance swells it, cracked where it is loose."""
    habit, maps, fibre = anatomy.habit, region.maps, region.fibre
    mucoid = ramp(0.4 * (maps["tint"] - 1.6 + 2 * habit.mucoid)) + 0.3 * habit.desmoplasia * region.tumour
    texture = 1 + habit.fibre * (fibre + 0.5 * region.grain)
    e = habit.stroma_e * (1 + 0.13 * maps["tint"]) * texture * (1 - 0.45 * mucoid)
    h = 0.05 + 0.03 * fibre + 0.22 * mucoid * (1 + 0.2 * fibre)
    loose = weave.cracks.at(region.along, region.across) + 0.5 * maps["grade"] - 3.0 + 1.5 * habit.cracks
    uncracked = 1 - 0.93 * ramp(2.2 * loose - 0.5 * region.tumour)
    return _Amounts(np.clip(h, 0.01, None) * uncracked, np.clip(e, 0.05, None) * uncracked, np.zeros_like(e))


def _grow_tumour(anatomy: Anatomy, weave: Weave, region: Region) -> _Tumour:
    """Nests and cords: where a patient's mixture of two random fields is high."""
    habit, maps, tumour = anatomy.habit, region.maps, region.tumour
    if tumour.max() <= 0:
        return _Tumour(*np.zeros((3, *region.shape), np.float32))
    fine = weave.cords[1].at(region.x_um, region.y_um)
    nests = weave.nests[0].at(region.x_um, region.y_um) + 0.4 * weave.nests[1].at(region.x_um, region.y_um)
    cords = weave.cords[0].at(region.along, region.across) + 0.35 * fine
    mix = ramp(1.5 * (maps["tint"] * 0.6 + 2 * habit.cords - 1) + 0.5)
    threshold = 1.1 - 2.1 * habit.fill - 0.4 * maps["grade"]
    height = nests + mix * (cords - nests) - threshold
    opens = 2.3 - 0.9 * habit.tubules + 0.5 * mix + np.maximum(-threshold, 0)
    hollow = ramp(4 * (0.7 * height + 0.6 * fine - opens)) * (habit.tubules > 0)
    shrinks = ramp(maps["cells"] + 2 * habit.cleft) * (habit.cleft > 0)
    cleft = ramp(0.5 - 9 * np.abs(height + 0.1)) * shrinks
    return _Tumour(ramp(3 * height + 0.5) * tumour, hollow * tumour, cleft * tumour)


def _draw_organs(anatomy: Anatomy, region: Region) -> _Organs:
    """Fill the outlines of glands and vessels, and gather the nuclei that line them."""
    left, top, width, height = region.box_um
    near = anatomy.glands_within(left, top, left + width, top + height)

    def fill(outlines: list[Floats], levels: list[float] | None = None) -> Floats:
        return fill_outlines(region.shape, region.origin_um, region.um, outlines, levels)

    beds, glands, vessels = ([g for g in near if g.kind == kind] for kind in ("bed", "gland", "vessel"))
    bed = fill([g.outlines[0] for g in beds], [g.content for g in beds])
    return _Organs(
        bed=np.asarray(cv2.GaussianBlur(bed, (0, 0), 7.0 / region.um), np.float32) if beds else bed,
        gland=fill([outline for g in glands for outline in g.outlines]),
        hollow=fill([hollow for g in glands + vessels for hollow in g.hollows]),
        wall=fill([g.outlines[0] for g in vessels]),
        blood=fill([hollow for g in vessels if g.content > 0 for hollow in g.hollows]),
        nuclei=np.concatenate([np.zeros((0, 6), np.float32), *(g.nuclei for g in near)]),
    )


def _bleed(bleeding: float, amounts: _Amounts, region: Region) -> None:
    """Spill blood in patches where a patient bleeds; single red cells scatter everywhere."""
    if bleeding > 0:
        spill = ramp(2 * (region.maps["blood"] + 0.5 * region.patchy - 3.4 + bleeding))
        amounts.blood = np.maximum(amounts.blood, 0.8 * spill * (1 + 0.25 * region.grain))
        amounts.e *= 1 - 0.6 * spill
    specks = ramp(3 * (region.grain - 3.0)) * ramp(region.maps["blood"])
    amounts.blood = np.maximum(amounts.blood, 0.5 * specks)


def _ink(region: Region) -> Floats:
    """Mark the specimen's margin, here and there."""
    marked = ramp(1.2 - region.depth / 12 + 0.8 * region.rough) * (region.maps["tint"] > 0.2)
    return ramp(region.depth / 8 + 0.5) * marked * (0.7 + 0.4 * region.grain)


def _soil(debris: float, amounts: _Amounts, region: Region, wall: Floats, inside: Floats) -> None:
    """Lay grey dust (mounting medium that dried out) over patches of tissue."""
    where = ramp(2 * (region.maps["blood"] + 1.5 * debris - 1.6)) * inside
    dust = where * (0.25 * ramp(0.5 * region.grain + 0.1) + 0.6 * wall)
    amounts.h += 0.45 * dust
    amounts.e += 0.2 * dust
