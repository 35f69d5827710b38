"""What sets one patient apart: tissue and tumour, and how the slide was cut, stained and scanned."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from biopsy.core.seeds import make_rng
from biopsy.phantom.noise import Floats


@dataclass(frozen=True)
class Habit:
    """A patient's traits; lengths in micrometres, shares in 0-1, amounts in units of an average stain."""

    # tumour
    nest_um: float  # size of the nests
    cord_um: float  # thickness of the cords
    cords: float  # share of the tumour that grows in cords rather than nests
    fill: float  # how much of the tumour is epithelium: below 0 sparse, above 1 solid
    tubules: float  # how readily nests open into glands
    cleft: float  # white retraction clefts round nests
    nucleus_um: float  # mean radius of a tumour nucleus
    nucleus_gap_um: float  # distance between tumour nuclei
    pleomorphism: float  # spread of the logarithm of nuclear radius
    nucleus_stain: float
    cytoplasm_h: float
    cytoplasm_e: float
    necrosis: float
    loose_cells: float  # share of stromal sites inside the tumour that hold a single tumour cell
    desmoplasia: float  # how much the tumour's own stroma differs from the rest
    # the rest
    fat: float
    fat_pushed: float  # how completely the tumour replaces fat
    fat_cell_um: float
    glands_per_mm2: float
    proliferation: float  # share of glands filled with regular cells
    cellularity: float
    lymphocytes: float
    fibre: float  # contrast of collagen
    cracks: float
    stroma_e: float
    mucoid: float  # bluish ground substance
    bleeding: float
    debris: float  # grey-brown granular artefact over fat


def draw_habit(seed: int, patient: str, *, high_grade: bool = False) -> Habit:
    """Draw a patient's traits; the same seed and patient give the same traits.

    Args:
        high_grade: Solid tumour of large nuclei in tissue crowded with small ones.
    """
    rng = make_rng(seed, "phantom", patient, "habit")
    nucleus_um = rng.uniform(3.3, 4.7)
    habit = Habit(
        nest_um=rng.uniform(30, 65),
        cord_um=rng.uniform(12, 26),
        cords=rng.uniform(0.0, 1.0),
        fill=rng.uniform(0.0, 0.52),
        tubules=max(0.0, rng.uniform(-1.0, 1.0)),
        cleft=max(0.0, rng.uniform(-1.2, 1.0)),
        nucleus_um=nucleus_um,
        nucleus_gap_um=nucleus_um * rng.uniform(2.0, 2.7),
        pleomorphism=rng.uniform(0.22, 0.4),
        nucleus_stain=rng.uniform(0.5, 0.85),
        cytoplasm_h=rng.uniform(0.1, 0.26),
        cytoplasm_e=rng.uniform(0.45, 0.85),
        necrosis=max(0.0, rng.uniform(-1.0, 1.0)),
        loose_cells=rng.uniform(0.12, 0.38),
        desmoplasia=rng.uniform(0.0, 0.8),
        fat=rng.uniform(-0.05, 0.33),
        fat_pushed=rng.uniform(0.0, 1.0),
        fat_cell_um=rng.uniform(36, 56),
        glands_per_mm2=rng.uniform(7.0, 15.0),
        proliferation=rng.uniform(0.0, 0.4),
        cellularity=float(np.exp(rng.normal(0.7, 0.6))),
        lymphocytes=rng.uniform(0.4, 1.4),
        fibre=rng.uniform(0.1, 0.22),
        cracks=rng.uniform(0.0, 1.0),
        stroma_e=rng.uniform(0.55, 1.1),
        mucoid=rng.uniform(0.0, 0.5),
        bleeding=max(0.0, rng.uniform(-1.0, 1.0)),
        debris=max(0.0, rng.uniform(-4.0, 1.0)),
    )
    if not high_grade:
        return habit
    return replace(
        habit,
        fill=0.6 + 0.4 * habit.fill,
        tubules=0.0,
        cleft=0.0,
        nucleus_um=2.25 * habit.nucleus_um,
        nucleus_gap_um=5.4 * habit.nucleus_um,
        nucleus_stain=0.6,
        cytoplasm_h=0.1,
        cytoplasm_e=0.8 * habit.stroma_e,
        proliferation=0.0,
        cellularity=4 * habit.cellularity,
        lymphocytes=1.5 * habit.lymphocytes,
    )


INKS = {  # optical density of the inks that mark a specimen's margin, per channel
    "teal": (1.3, 0.45, 0.5),
    "black": (1.9, 1.8, 1.8),
    "brown": (0.7, 1.6, 2.2),
    "blue": (1.5, 1.0, 0.35),
}


@dataclass(frozen=True)
class Look:
    """What all pixels of one patient share.

    ``stains`` is (3, 3): optical density per channel of one unit of haematoxylin, eosin and red blood.
    """

    stains: Floats
    white: Floats
    gamma: float
    blur_px: float
    sharpen: float
    noise: float
    ink: str | None


def draw_look(seed: int, patient: str, *, stain_spread: float = 0.2) -> Look:
    """Draw a patient's stain and scanner; the same seed and patient give the same look.

    Args:
        stain_spread: Standard deviation of the logarithm of the amounts of haematoxylin and eosin.
    """
    rng = make_rng(seed, "phantom", patient, "look")
    # Ratios read off stroma and the darkest nuclei of real IDC patches, none of the benchmark's test slides.
    haematoxylin = np.array([0.84, 0.98, 0.53]) * rng.normal(1.0, [0.07, 0.06, 0.08])
    eosin = np.array([0.11, 0.56, 0.33]) * rng.normal(1.0, [0.2, 0.06, 0.09])
    blood = np.array([0.16, 1.15, 0.72]) * rng.normal(1.0, [0.25, 0.08, 0.12])
    amounts = np.exp(rng.normal(0.0, [stain_spread, stain_spread, 0.1]))
    stains = np.stack([haematoxylin, eosin, blood]) * amounts[:, None]
    return Look(
        stains=np.clip(stains, 0.005, None).astype(np.float32),
        white=np.clip(rng.normal(243, 3, 1) + rng.normal(0, 1.2, 3), 232, 254).astype(np.float32),
        gamma=float(np.exp(rng.normal(0.0, 0.07))),
        blur_px=float(rng.uniform(0.15, 0.42)),
        sharpen=float(rng.uniform(0.0, 0.45)),
        noise=float(rng.uniform(0.6, 2.2)),
        ink=str(rng.choice(list(INKS))) if rng.random() < 0.4 else None,
    )


def transmit(density: Floats) -> Floats:
    """Return the share of light that passes, ``exp(-density)``, in [0, 1]."""
    return np.exp(-density)


def scan(light: Floats, look: Look, seed: int) -> NDArray[np.uint8]:
    """Turn transmitted light ``(H, W, 3)`` in [0, 1] at the final pixel size into a scanner's RGB."""
    if look.blur_px > 0.2:
        light = _blur(light, look.blur_px)
    if look.sharpen > 0:
        light = light + look.sharpen * (light - _blur(light, 1.0))
    values = look.white * np.power(np.clip(light, 0.0, 1.03), np.float32(look.gamma))
    drawn = np.random.default_rng(seed).integers(0, 256, (*light.shape[:2], 4), dtype=np.uint8)
    grain = (drawn.astype(np.float32) - 127.5) * np.float32(look.noise / 73.9)  # spread of a byte: 73.9
    values += 0.6 * grain[..., :1] + 0.5 * grain[..., 1:]
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _blur(light: Floats, sigma_px: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(light, (0, 0), sigma_px), np.float32)
