"""What sets one patient's tissue and tumour apart: growth pattern, nuclei, stroma, fat, inflammation."""

from dataclasses import dataclass

import numpy as np

from biopsy.core.seeds import make_rng


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


def draw_habit(seed: int, patient: str) -> Habit:
    """Draw a patient's traits; the same seed and patient give the same traits."""
    rng = make_rng(seed, "phantom", patient, "habit")
    nucleus_um = rng.uniform(3.3, 4.7)
    return Habit(
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
