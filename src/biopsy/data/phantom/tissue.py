"""How much stain lies at every point of a region of one slide: stroma, tumour, glands, fat, cells, artefacts.

A region is drawn with a margin and cropped, and everything random is looked up by position, so regions that
touch fit together. Amounts are in units of an average stain; optics belong to ``looks``.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from biopsy.data.phantom.anatomy import Anatomy, fat_share
from biopsy.data.phantom.looks import INKS, Look, transmit
from biopsy.data.phantom.noise import Field, Floats, Jitter
from biopsy.data.phantom.stamps import fill_outlines, stamp_nuclei
from biopsy.seeds import make_rng

_MARGIN_UM = 24.0


class Weave:
    """The random fields and point sets of one slide, made once and read for every region."""

    def __init__(self, anatomy: Anatomy) -> None:
        rng = make_rng(anatomy.seed, "phantom", anatomy.patient, "weave")
        habit = anatomy.habit
        self.fibres = Field(rng, 8.0, 4.0), Field(rng, 3.2, 4.5), Field(rng, 30.0, 2.5)
        self.cracks = Field(rng, 5.5, 9.0)
        self.nests = Field(rng, habit.nest_um), Field(rng, habit.nest_um / 3)
        self.cords = Field(rng, habit.cord_um, 3.5), Field(rng, habit.cord_um / 2)
        self.edge = Field(rng, 45.0)
        self.wave = Field(rng, 28.0)
        self.grain = Field(rng, 4.0)
        self.patchy = Field(rng, 30.0)
        self.fat_cells = Jitter(rng, habit.fat_cell_um, 0.7)
        self.fibroblasts = Jitter(rng, 19.0, 1.0)
        self.lymphocytes = Jitter(rng, 6.6, 0.8)
        self.tumour_cells = Jitter(rng, habit.nucleus_gap_um, 0.75)


@dataclass
class Region:
    """Stain amounts on a grid: ``h``, ``e``, ``blood`` are (H, W), ``ink`` (H, W) is its share of full ink."""

    x_um: Floats
    y_um: Floats
    um: float
    h: Floats
    e: Floats
    blood: Floats
    ink: Floats

    @property
    def origin_um(self) -> tuple[float, float]:
        """Position of the first pixel's corner."""
        return float(self.x_um[0, 0]) - self.um / 2, float(self.y_um[0, 0]) - self.um / 2

    def pick(self, values: Floats, x_um: Floats, y_um: Floats) -> Floats:
        """Give a grid's values at points; points outside get the border's."""
        left, top = self.origin_um
        column = np.clip(((x_um - left) / self.um).astype(np.int64), 0, values.shape[1] - 1)
        row = np.clip(((y_um - top) / self.um).astype(np.int64), 0, values.shape[0] - 1)
        return values[row, column]


def light_region(
    anatomy: Anatomy, weave: Weave, look: Look, x_um: float, y_um: float, shape: tuple[int, int], um: float
) -> Floats:
    """Give the light that passes a region, ``(height, width, 3)`` in [0, 1], at ``um`` micrometres per pixel."""
    margin = int(np.ceil(_MARGIN_UM / um))
    columns = x_um + (np.arange(-margin, shape[1] + margin, dtype=np.float32) + 0.5) * um
    rows = y_um + (np.arange(-margin, shape[0] + margin, dtype=np.float32) + 0.5) * um
    x, y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    if anatomy.read("tissue", x[::8, ::8], y[::8, ::8]).max() < -60:
        return np.ones((*shape, 3), np.float32)
    region = _draw(anatomy, weave, x, y, um)
    crop = np.s_[margin : margin + shape[0], margin : margin + shape[1]]
    amounts = cv2.merge([region.h[crop], region.e[crop], region.blood[crop]])
    density = cv2.transform(amounts, look.stains.T)
    if look.ink is not None:
        density += region.ink[crop][..., None] * np.array(INKS[look.ink], np.float32)
    return transmit(density)


def _draw(anatomy: Anatomy, weave: Weave, x: Floats, y: Floats, um: float) -> Region:
    habit = anatomy.habit
    maps = anatomy.read_all(anatomy.maps, x, y)
    rough = weave.edge.at(x, y)
    depth = maps["tissue"] + 14 * rough + 4 * weave.patchy.at(x, y)
    tumour = _ramp((maps["tumour"] + 18 * rough) / 30 + 0.3)
    along, across = _fibre_axes(anatomy, maps, x, y)
    across = across + 5.0 * weave.wave.at(x, y)
    fibre = sum(w * f.at(along, across) for w, f in zip((0.55, 0.4, 0.35), weave.fibres, strict=True))
    grain = weave.grain.at(x, y)

    e, h = _stroma(habit_of=anatomy, weave=weave, maps=maps, tumour=tumour, fibre=fibre, grain=grain, axes=(along, across))
    region = Region(x, y, um, h, e, np.zeros_like(e), np.zeros_like(e))
    epithelium, hollow, margin = _tumour_shape(anatomy, weave, maps, tumour, x, y, along, across)
    bed, gland, gland_hollow, wall, bloody, gland_nuclei = _organs(anatomy, region)
    outside_glands = 1 - np.maximum(gland, 0.8 * bed)
    epithelium *= outside_glands
    hollow *= outside_glands

    fat, fat_wall = _fat(anatomy, weave, region, maps, np.maximum(np.maximum(gland, bed), 0.85 * epithelium))
    _lay(region, bed, h=0.16 + 0.05 * grain, e=0.42 + 0.1 * fibre)
    _lay(region, epithelium, h=habit.cytoplasm_h * (1 + 0.2 * grain), e=habit.cytoplasm_e * (1 + 0.15 * grain))
    dead = epithelium * _ramp(2.5 * (weave.patchy.at(x, y) + maps["grade"] - 3.2 + habit.necrosis))
    _lay(region, dead, h=0.12 + 0.1 * grain, e=1.05 + 0.25 * grain)
    _lay(region, gland, h=0.3 + 0.05 * grain, e=0.55 + 0.08 * grain)
    _lay(region, wall, h=0.08 + 0.0 * grain, e=0.85 + 0.1 * fibre)
    empty = np.maximum(hollow, margin * outside_glands)
    _lay(region, empty, h=np.float32(0.0) * grain, e=0.02 + 0.0 * grain)
    _lay(region, gland_hollow, h=0.0 * grain, e=0.03 + 0.0 * grain)
    region.blood = np.maximum(region.blood, bloody * (0.75 + 0.2 * grain))

    solid = 1 - np.maximum(empty, gland_hollow)
    nuclei = _nuclei(anatomy, weave, region, maps, tumour, epithelium * (1 - 0.85 * dead), gland, bed, fibre)
    stained = stamp_nuclei(x.shape, region.origin_um, um, np.concatenate([nuclei, gland_nuclei]))
    region.h += stained * (1 + 0.12 * grain) * solid
    region.e *= 1 - 0.35 * np.minimum(stained, 1)

    _bleed(habit.bleeding, region, maps, grain, weave)
    inside = _ramp(depth / 8 + 0.5)
    keep = inside * (1 - fat)
    region.h = np.clip(region.h * keep + fat_wall * inside * 0.1, 0, None)
    region.e = np.clip(region.e * keep + fat_wall * inside * (0.4 + 0.1 * grain), 0, None)
    region.blood *= keep
    region.ink = inside * _ramp(1.2 - depth / 12 + 0.8 * rough) * (maps["tint"] > 0.2) * (0.7 + 0.4 * grain)
    if habit.debris > 0:
        _soil(habit.debris, region, maps, grain, fat, fat_wall, inside)
    return region


def _ramp(level: Floats) -> Floats:
    return np.clip(level, 0, 1)


def _lay(region: Region, mask: Floats, *, h: Floats, e: Floats) -> None:
    """Replace stain where a mask covers it."""
    region.h += mask * (h - region.h)
    region.e += mask * (e - region.e)


def _fibre_axes(anatomy: Anatomy, maps: dict[str, Floats], x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Give coordinates along and across the collagen, bent by the slow warps."""
    cos, sin = np.float32(np.cos(anatomy.fibre_angle)), np.float32(np.sin(anatomy.fibre_angle))
    bent_x, bent_y = x + maps["warp_x"], y + maps["warp_y"]
    return cos * bent_x + sin * bent_y, cos * bent_y - sin * bent_x


def _stroma(
    *,
    habit_of: Anatomy,
    weave: Weave,
    maps: dict[str, Floats],
    tumour: Floats,
    fibre: Floats,
    grain: Floats,
    axes: tuple[Floats, Floats],
) -> tuple[Floats, Floats]:
    habit = habit_of.habit
    mucoid = _ramp(0.4 * (maps["tint"] - 1.6 + 2 * habit.mucoid)) + 0.3 * habit.desmoplasia * tumour
    e = habit.stroma_e * (1 + 0.13 * maps["tint"]) * (1 + habit.fibre * (fibre + 0.5 * grain)) * (1 - 0.45 * mucoid)
    h = 0.05 + 0.03 * fibre + 0.22 * mucoid * (1 + 0.2 * fibre)
    crack = _ramp(2.2 * (weave.cracks.at(*axes) + 0.5 * maps["grade"] - 3.0 + 1.5 * habit.cracks) - 0.5 * tumour)
    loose = 1 - 0.93 * crack
    return np.clip(e, 0.05, None) * loose, np.clip(h, 0.01, None) * loose


def _tumour_shape(
    anatomy: Anatomy,
    weave: Weave,
    maps: dict[str, Floats],
    tumour: Floats,
    x: Floats,
    y: Floats,
    along: Floats,
    across: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Give the tumour's epithelium, the hollows of its tubules and the clefts round its nests, each in [0, 1]."""
    habit = anatomy.habit
    if tumour.max() <= 0:
        return np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    nests = weave.nests[0].at(x, y) + 0.4 * weave.nests[1].at(x, y)
    cords = weave.cords[0].at(along, across) + 0.35 * weave.cords[1].at(x, y)
    mix = _ramp(1.5 * (maps["tint"] * 0.6 + 2 * habit.cords - 1) + 0.5)
    level = nests + mix * (cords - nests)
    threshold = 1.1 - 2.1 * habit.fill - 0.4 * maps["grade"]
    height = level - threshold
    epithelium = _ramp(3 * height + 0.5) * tumour
    opens = 2.3 - 0.9 * habit.tubules + 0.5 * mix + np.maximum(-threshold, 0)
    bored = 0.7 * height + 0.6 * weave.cords[1].at(x, y)
    hollow = _ramp(4 * (bored - opens)) * tumour * (habit.tubules > 0)
    cleft = _ramp(0.5 - 9 * np.abs(height + 0.1)) * tumour * (habit.cleft > 0) * _ramp(maps["cells"] + 2 * habit.cleft)
    return epithelium, hollow, cleft


def _organs(anatomy: Anatomy, region: Region) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
    """Draw lobule beds, glands, their hollows, vessel walls, blood, and give the nuclei that line them."""
    shape, origin, um = region.h.shape, region.origin_um, region.um
    right, bottom = origin[0] + shape[1] * um, origin[1] + shape[0] * um
    near = anatomy.glands_within(*origin, right, bottom)

    def fill(outlines: list[Floats], level: list[float] | None = None) -> Floats:
        return fill_outlines(shape, origin, um, outlines, level)

    beds = [g for g in near if g.kind == "bed"]
    glands = [g for g in near if g.kind == "gland"]
    vessels = [g for g in near if g.kind == "vessel"]
    bed = fill([g.outline for g in beds], [g.content for g in beds])
    if beds:
        bed = cv2.GaussianBlur(bed, (0, 0), 7.0 / um)
    hollows = [g.hollow for g in glands + vessels]
    bloody = fill([g.hollow for g in vessels if g.content > 0])
    nuclei = np.concatenate([np.zeros((0, 6), np.float32), *(g.nuclei for g in near)])
    gland = fill([g.outline for g in glands])
    return bed, gland, fill(hollows), fill([g.outline for g in vessels]), bloody, nuclei


def _fat(
    anatomy: Anatomy, weave: Weave, region: Region, maps: dict[str, Floats], organs: Floats
) -> tuple[Floats, Floats]:
    """Give the white of fat cells and their thin walls: cells are the nearest-centre areas of a point set."""
    x, y, um = region.x_um, region.y_um, region.um
    share = fat_share(anatomy.habit, maps["fat"], maps["tumour"])
    if share.max() <= 0.01:
        return np.zeros_like(x), np.zeros_like(x)
    left, top = region.origin_um
    pad = 2 * anatomy.habit.fat_cell_um
    points = weave.fat_cells.within(left - pad, top - pad, x.shape[1] * um + 2 * pad, y.shape[0] * um + 2 * pad)
    free = region.pick(organs, points.x_um, points.y_um) < 0.3
    crowd = region.pick(share, points.x_um, points.y_um)
    is_fat = (points.draws[:, 0] < crowd) & free
    size = anatomy.habit.fat_cell_um * (0.3 + 0.5 * points.draws[:, 1])
    lone = np.where(is_fat, np.where(crowd > 0.7, 1e3, 0.45 * size), 0)  # a cell with few neighbours stays round
    # Nearest and second nearest centre, cell by cell: each centre only reaches its neighbourhood.
    first = np.full(x.shape, 1e3, np.float32)
    second = np.full(x.shape, 1e3, np.float32)
    white = np.zeros(x.shape, np.float32)
    reach = 1.25 * anatomy.habit.fat_cell_um
    columns = np.clip((points.x_um[:, None] + (-reach, reach) - left) / um, 0, x.shape[1]).astype(int)
    rows = np.clip((points.y_um[:, None] + (-reach, reach) - top) / um, 0, x.shape[0]).astype(int)
    visible = (columns[:, 0] < columns[:, 1]) & (rows[:, 0] < rows[:, 1])
    for i in np.flatnonzero(visible):
        box = np.s_[rows[i, 0] : rows[i, 1], columns[i, 0] : columns[i, 1]]
        dx2 = (x[0, box[1]] - points.x_um[i]) ** 2
        dy2 = (y[box[0], 0] - points.y_um[i]) ** 2
        away = np.sqrt(dx2 + dy2[:, None]) - 0.55 * size[i]
        nearer = away < first[box]
        np.copyto(second[box], np.where(nearer, first[box], np.minimum(second[box], away)))
        np.copyto(first[box], away, where=nearer)
        np.copyto(white[box], lone[i], where=nearer)
    gap = 0.5 * (second - first)
    cell = _ramp((gap - 1.0) / um + 0.5) * _ramp((white - first) / um + 0.5) * (white > 0)
    wall = (white >= 1e3) * (1 - cell) * (1 - organs)
    return np.maximum(cell, wall), _ramp(1.3 - 0.5 * gap) * wall


def _nuclei(
    anatomy: Anatomy,
    weave: Weave,
    region: Region,
    maps: dict[str, Floats],
    tumour: Floats,
    epithelium: Floats,
    gland: Floats,
    bed: Floats,
    fibre: Floats,
) -> Floats:
    """Give the nuclei of stroma, inflammation and tumour, (n, 6) as in ``glands.Gland``."""
    habit = anatomy.habit
    left, top = region.origin_um
    box = (left, top, region.h.shape[1] * region.um, region.h.shape[0] * region.um)

    p = weave.fibroblasts.within(*box)
    crowd = 0.18 * habit.cellularity * np.exp(0.8 * region.pick(maps["cells"], p.x_um, p.y_um))
    in_tumour = region.pick(tumour, p.x_um, p.y_um)
    crowd *= 1 + 0.6 * in_tumour * habit.desmoplasia + 1.2 * region.pick(bed, p.x_um, p.y_um)
    blocked = np.maximum(epithelium, gland)
    keep = (p.draws[:, 0] < crowd) & (region.pick(blocked, p.x_um, p.y_um) < 0.3)
    x, y, d = p.x_um[keep], p.y_um[keep], p.draws[keep]
    angle = _fibre_direction(anatomy, x, y) + 0.9 * (d[:, 1] - 0.5)
    spindle = [x, y, 2.6 + 4.0 * d[:, 2], 1.1 + 0.9 * d[:, 3], angle, 0.5 + 0.5 * d[:, 4]]

    p = weave.lymphocytes.within(*box)
    margin = np.exp(-((region.pick(maps["tumour"], p.x_um, p.y_um) / 180) ** 2))
    level = region.pick(maps["lymph"], p.x_um, p.y_um) + 0.3 * margin + 0.5 * region.pick(bed, p.x_um, p.y_um)
    chance = np.clip(0.4 * (level - 2.2 + 1.5 * habit.lymphocytes), 0.015 * habit.lymphocytes, 0.75)
    chance *= 1 - 0.9 * region.pick(blocked, p.x_um, p.y_um)
    keep = p.draws[:, 0] < chance
    x, y, d = p.x_um[keep], p.y_um[keep], p.draws[keep]
    round_um = 2.6 + 0.7 * d[:, 1]
    lymph = [x, y, round_um, round_um * (0.85 + 0.15 * d[:, 2]), 6.3 * d[:, 3], 1.05 + 0.35 * d[:, 4]]

    p = weave.tumour_cells.within(*box)
    loose = habit.loose_cells * 0.22 * (region.pick(tumour, p.x_um, p.y_um) > 0.6)
    chance = np.maximum(0.97 * (region.pick(epithelium, p.x_um, p.y_um) > 0.5), loose)
    keep = (p.draws[:, 0] < chance) & (region.pick(gland, p.x_um, p.y_um) < 0.3)
    x, y, d = p.x_um[keep], p.y_um[keep], p.draws[keep]
    normal = (d[:, 1] + d[:, 2] + d[:, 3] - 1.5) * 2.0  # three uniforms: near normal, spread 1, never far out
    long_um = habit.nucleus_um * np.exp(habit.pleomorphism * normal)
    stain = habit.nucleus_stain * np.exp(1.1 * habit.pleomorphism * 2.0 * (d[:, 4] - 0.5))
    tumour_cells = [x, y, long_um, long_um * (0.55 + 0.4 * d[:, 5]), 6.3 * d[:, 6], stain]
    return np.concatenate([np.stack(c, axis=1) for c in (spindle, lymph, tumour_cells)]).astype(np.float32)


def _fibre_direction(anatomy: Anatomy, x: Floats, y: Floats) -> Floats:
    """Give the angle of the line of constant ``across`` through points, by finite differences."""
    if len(x) == 0:
        return x
    step = np.float32(6.0)
    here, right, below = (
        _fibre_axes(anatomy, anatomy.read_all(("warp_x", "warp_y"), a, b), a, b)[1]
        for a, b in ((x[None], y[None]), (x[None] + step, y[None]), (x[None], y[None] + step))
    )
    return np.arctan2(-(right - here), below - here)[0]


def _bleed(bleeding: float, region: Region, maps: dict[str, Floats], grain: Floats, weave: Weave) -> None:
    """Spill blood in patches where a patient bleeds; single cells scatter everywhere."""
    if bleeding > 0:
        spill = _ramp(2 * (maps["blood"] + 0.5 * weave.patchy.at(region.x_um, region.y_um) - 3.4 + bleeding))
        region.blood = np.maximum(region.blood, 0.8 * spill * (1 + 0.25 * grain))
        region.e *= 1 - 0.6 * spill
    specks = _ramp(3 * (grain - 3.0)) * _ramp(maps["blood"])
    region.blood = np.maximum(region.blood, 0.5 * specks)


def _soil(
    debris: float, region: Region, maps: dict[str, Floats], grain: Floats, fat: Floats, wall: Floats, inside: Floats
) -> None:
    """Lay grey-brown dust (mounting medium that dried out) over patches of tissue."""
    where = _ramp(2 * (maps["blood"] + 1.5 * debris - 1.6)) * inside
    dust = where * (_ramp(0.5 * grain + 0.1) * 0.35 + 0.6 * wall)
    region.h += 0.45 * dust
    region.e += 0.2 * dust
