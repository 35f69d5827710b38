"""From logits to a map: probabilities, decisions left open, and the record of how both were made."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.text import printable
from biopsy.learning.classifiers import Classifier
from biopsy.slides.grids import PatchGrid
from biopsy.slides.maps import SlideMap, check_probs


def make_map(
    name: str,
    grid: PatchGrid,
    logits: np.ndarray,
    classifier: Classifier,
    *,
    about: Mapping[str, Any],
    picture: np.ndarray | None = None,
) -> SlideMap:
    """Turn a slide's logits into its map, as the classifier reads them.

    Raises:
        SlideError: If the classifier's outputs are no numbers.
    """
    places = pd.DataFrame({"x": grid.x_px, "y": grid.y_px, "slide_id": name, "patient_id": name})
    info, probs = classifier.info, classifier.probs(classifier.add_context(logits, places))
    checked, abstained = check_probs(probs, name), classifier.abstains(probs)
    return SlideMap(
        name,
        grid,
        checked,
        np.zeros(len(probs), bool) if abstained is None else abstained,
        info.class_names,
        info.positive_class,
        None if info.positive_class is None else (classifier.threshold or 0.5),
        dict(about),
        picture,
    )


def describe_model(classifier: Classifier, precision: str, device: str) -> dict[str, Any]:
    """Say which classifier answered, on what and with which versions."""
    from biopsy import __version__

    info = classifier.info
    return {
        "classifier": {
            "sha256": classifier.sha256,
            "weights_sha256": info.weights_sha256,
            "network": info.network,
            "recipe": info.recipe,
            "mpp": info.mpp,
            "patch_px": info.patch_px,
            "calibrator": info.calibrator.get("method", "none"),
            "threshold": info.thresholds[0] if info.thresholds else None,
            "licence": info.licence,
        },
        "precision": precision,
        "device": device,
        "versions": {
            "biopsy": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def is_calibrated(classifier: Classifier) -> bool:
    """Say whether the classifier's probabilities were calibrated."""
    return classifier.info.calibrator.get("method", "none") != "none"


def repeat_command(source: Path, model: object, settings: Mapping[str, Any]) -> str:
    """Give the command that maps a slide again; folders are left to the reader."""
    named = "CLASSIFIER" if isinstance(model, Classifier) else Path(str(getattr(model, "path", model))).name
    words = ["biopsy", "slide", named, printable(source.name), "--out", "DIR"]
    for flag, value in settings.items():
        if value is True:
            words.append(f"--{flag}")
        elif value not in (None, False):
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return " ".join(words)
