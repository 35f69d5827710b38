"""Small classifiers and maps, for the tests of what is drawn on slides."""

from pathlib import Path
from typing import Any

import numpy as np

from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.compiling import write_compiled
from biopsy.models.networks import build_network
from biopsy.models.networks.layers import initialise
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.slides.grids import PatchGrid
from biopsy.slides.maps import SlideMap
from kept_files import write_again


def make_classifier(
    *, mpp: float | None = 1.0, patch_px: int = 16, n_classes: int = 2, seed: int = 0, **info: Any
) -> Classifier:
    """Make an untrained CancerNet that takes patches of 16 px at 1 um/px and sees them at 12 px."""
    network = build_network("cancernet", n_classes=n_classes, input_px=12)
    initialise(network, seed)
    names = ["non_idc", "idc"] if n_classes == 2 else [f"class_{index}" for index in range(n_classes)]
    about: dict[str, Any] = {
        "network": "cancernet",
        "class_names": names,
        "positive_class": "idc" if n_classes == 2 else None,
        "patch_px": patch_px,
        "mpp": mpp,
        "preprocessing": Preprocessing(input_px=12),
        "thresholds": [{"value": 0.5, "rule": "youden", "chosen_on": "validation"}] if n_classes == 2 else [],
    }
    return Classifier(ClassifierInfo(**about | info), network)


def save_classifier(path: Path, **options: Any) -> Path:
    """Write such a classifier's folder, with its compiled network, as a bundle has it."""

    def make() -> None:
        classifier = make_classifier(**options)
        classifier.save(path)
        write_compiled(classifier, path)

    return write_again(path, ("classifier", sorted(options.items())), make)


def make_map(
    cells: np.ndarray,
    *,
    abstained: np.ndarray | None = None,
    threshold: float = 0.5,
    scale: float = 2.0,
    slide_mpp: float = 0.5,
    **options: Any,
) -> SlideMap:
    """Make a map without overlap of the probabilities in ``cells``, NaN where no patch lies."""
    row, column = np.nonzero(~np.isnan(cells))
    prob = cells[row, column].astype(np.float32)
    height, width = (round(n * 10 * scale) + 7 for n in cells.shape)
    grid = PatchGrid(column, row, 10, 10, scale, slide_mpp, width, height)
    left_open = np.zeros(len(prob), bool) if abstained is None else abstained[row, column]
    return SlideMap(
        "case",
        grid,
        np.stack([1 - prob, prob], axis=1),
        left_open,
        ["normal", "tumour"],
        "tumour",
        threshold,
        **options,
    )
