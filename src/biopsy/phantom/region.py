"""A region of a slide while it is drawn: its grid, the slow maps on it, and the texture of the tissue."""

from dataclasses import dataclass

import numpy as np

from biopsy.core.seeds import make_rng
from biopsy.phantom.anatomy import Anatomy
from biopsy.phantom.noise import Field, Floats, Jitter


class Weave:
    """The random fields and point sets of one slide, made once and read for every region."""

    def __init__(self, anatomy: Anatomy) -> None:
        rng = make_rng(anatomy.seed, "phantom", anatomy.patient, "weave")
        habit = anatomy.habit
        self.fibres = Field(rng, 7.0, 4.0), Field(rng, 3.0, 4.5), Field(rng, 26.0, 2.5)
        self.cracks = Field(rng, 5.5, 9.0)
        self.nests = Field(rng, habit.nest_um), Field(rng, habit.nest_um / 3)
        self.cords = Field(rng, habit.cord_um, 3.5), Field(rng, habit.cord_um / 2)
        self.edge = Field(rng, 45.0)
        self.wave = Field(rng, 28.0)
        self.grain = Field(rng, 4.0)
        self.patchy = Field(rng, 30.0)
        self.fat_cells = Jitter(rng, habit.fat_cell_um, 0.7)
        self.fibroblasts = Jitter(rng, 19.0, 1.0)
        self.lymphocytes = Jitter(rng, 6.0, 0.8)
        self.tumour_cells = Jitter(rng, habit.nucleus_gap_um, 0.75)


@dataclass(frozen=True)
class Region:
    """What everything drawn on a region reads; all arrays are (H, W) on its grid.

    ``x_um, y_um`` are pixel centres, ``um`` the pixel size; ``maps`` the anatomy's slow maps; ``tumour`` is 1
    inside the tumour region, falling to 0 over its edge; ``along, across`` are coordinates in the direction
    of the collagen and over it; ``fibre``, ``grain`` and ``patchy`` are textures of mean 0, fine to coarse;
    ``depth`` is how far inside the tissue a point lies, in micrometres.
    """

    x_um: Floats
    y_um: Floats
    um: float
    maps: dict[str, Floats]
    tumour: Floats
    along: Floats
    across: Floats
    fibre: Floats
    grain: Floats
    patchy: Floats
    rough: Floats
    depth: Floats

    @classmethod
    def make(cls, anatomy: Anatomy, weave: Weave, x_um: Floats, y_um: Floats, um: float) -> "Region":
        """Read maps and textures on a grid."""
        maps = anatomy.read_all(anatomy.maps, x_um, y_um)
        rough, patchy = weave.edge.at(x_um, y_um), weave.patchy.at(x_um, y_um)
        along, across = fibre_axes(anatomy, maps, x_um, y_um)
        across = across + 5.0 * weave.wave.at(x_um, y_um)
        thick, thin, bundle = (field.at(along, across) for field in weave.fibres)
        return cls(
            x_um=x_um,
            y_um=y_um,
            um=um,
            maps=maps,
            tumour=ramp((maps["tumour"] + 18 * rough) / 30 + 0.3),
            along=along,
            across=across,
            fibre=0.55 * thick + 0.4 * thin + 0.35 * bundle,
            grain=weave.grain.at(x_um, y_um),
            patchy=patchy,
            rough=rough,
            depth=maps["tissue"] + 14 * rough + 4 * patchy,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x_um.shape[0], self.x_um.shape[1]

    @property
    def origin_um(self) -> tuple[float, float]:
        """Position of the first pixel's corner."""
        return float(self.x_um[0, 0]) - self.um / 2, float(self.y_um[0, 0]) - self.um / 2

    @property
    def box_um(self) -> tuple[float, float, float, float]:
        """Left, top, width, height."""
        return *self.origin_um, self.shape[1] * self.um, self.shape[0] * self.um

    def pick(self, values: Floats, x_um: Floats, y_um: Floats) -> Floats:
        """Return a grid's values at points; points outside get the border's."""
        left, top = self.origin_um
        column = np.clip(((x_um - left) / self.um).astype(np.int64), 0, values.shape[1] - 1)
        row = np.clip(((y_um - top) / self.um).astype(np.int64), 0, values.shape[0] - 1)
        return values[row, column]


def fibre_axes(
    anatomy: Anatomy, maps: dict[str, Floats], x_um: Floats, y_um: Floats
) -> tuple[Floats, Floats]:
    """Return coordinates along and across the collagen, bent by the slow warps."""
    cos, sin = np.float32(np.cos(anatomy.fibre_angle)), np.float32(np.sin(anatomy.fibre_angle))
    bent_x, bent_y = x_um + maps["warp_x"], y_um + maps["warp_y"]
    return cos * bent_x + sin * bent_y, cos * bent_y - sin * bent_x


def ramp(level: Floats) -> Floats:
    """Clip to [0, 1]: a soft step from where a level passes 0 to where it passes 1."""
    return np.clip(level, 0, 1)
