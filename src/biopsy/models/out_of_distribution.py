"""Detection of out-of-distribution patches, such as another stain or scanner, or no tissue.

Two squared Mahalanobis distances from the training patches are used: of colour statistics, and of the
penultimate layer (Lee et al. 2018, not per class). The limit of each is the 99th percentile of validation
patches, which are of other patients.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biopsy.core.seeds import make_rng
from biopsy.models.classifier import Classifier
from biopsy.slide_io.stain import colour_features

if TYPE_CHECKING:
    from biopsy.models.inference import Predictor

QUANTILE = 0.99
WARNING_FACTOR = 2  # multiple of the expected fraction above which a warning is given
MIN_AREA = 0.1  # minimum fraction of a patch that is not padding
REFERENCE_PATCHES = 2000  # enough for a few hundred features; more take minutes with large networks


def fit_reference(
    classifier: Classifier,
    predictor: "Predictor",
    patches: np.ndarray,
    sizes: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    *,
    seed: int,
) -> None:
    """Store reference statistics of training patches and limits from validation patches in a classifier.

    Args:
        classifier: Its ``info.out_of_distribution`` and ``extras`` are set.
        train: Rows of training patches; at most `REFERENCE_PATCHES` of them are drawn.
    """
    from sklearn.covariance import ledoit_wolf  # slow import

    rng = make_rng(seed, "unlike training")
    drawn = np.sort(rng.choice(train, min(len(train), REFERENCE_PATCHES), replace=False))
    held_out = np.sort(rng.choice(val, min(len(val), REFERENCE_PATCHES), replace=False))
    limits: dict[str, float] = {}
    training, validation = (_measure(predictor, patches, sizes, rows) for rows in (drawn, held_out))
    for kind, values in training.items():
        mean, spread = values.mean(axis=0), values.std(axis=0)
        spread[spread == 0] = 1
        covariance, _ = ledoit_wolf((values - mean) / spread)
        classifier.extras |= {
            f"{kind}_mean": mean,
            f"{kind}_spread": spread,
            f"{kind}_precision": np.linalg.pinv(covariance, hermitian=True),
        }
        limits[kind] = float(np.quantile(_distance(classifier, kind, validation[kind]), QUANTILE))
    classifier.info.out_of_distribution = {
        "method": "squared Mahalanobis distance, Ledoit-Wolf covariance",
        "quantile": QUANTILE,
        "chosen_on": f"{len(held_out)} validation patches",
        "limits": limits,
    }


OOD_ADVICE = (
    "do not use probabilities there. For tissue, stain or scanner unlike training, make a classifier of "
    "labelled patches or annotated slides of it: `biopsy prepare`, then `biopsy train`"
)
"""What to do about out-of-distribution patches, after where they are listed."""


def expected_share(quantile: float) -> tuple[float, float]:
    """Return bounds of the expected fraction of in-distribution patches above a limit at this quantile.

    With two distances, the fraction is between that of one and that of both.
    """
    return 1 - quantile, 2 * (1 - quantile)


def ood_warning(share: float, quantile: float) -> str | None:
    """Return a warning if the fraction of out-of-distribution patches is high, else None.

    The limit is twice the upper expected fraction.
    """
    low, high = expected_share(quantile)
    if not share >= WARNING_FACTOR * high:  # nor where it was not measured, nan
        return None
    return (
        f"{share:.0%} of the patches look out-of-distribution ({100 * low:.0f}-{100 * high:.0f} % expected): "
        "their predictions may be unreliable"
    )


def out_of_distribution_scores(
    classifier: Classifier, patches: np.ndarray, sizes: np.ndarray | None, features: np.ndarray
) -> pd.DataFrame:
    """Return the out-of-distribution scores of patches.

    Returns:
        ``colour_distance`` and ``feature_distance``, each divided by its limit, and ``out_of_distribution``:
        whether either is above 1, the patch is grey, or nine tenths of it are padding. Without
        ``feature_distance`` if the test-time augmentation was changed (`Classifier.with_tta`); empty without
        reference statistics.
    """
    reference = classifier.info.out_of_distribution
    if reference is None:
        return pd.DataFrame(index=range(len(patches)))
    measured = {"colour": colour_features(patches, sizes), "feature": features}
    frame = pd.DataFrame(
        {
            f"{kind}_distance": _distance(classifier, kind, measured[kind]) / limit
            for kind, limit in reference["limits"].items()
        }
    )
    return frame.assign(out_of_distribution=(frame > 1).any(axis=1) | _is_unusable(patches, sizes))


def _is_unusable(patches: np.ndarray, sizes: np.ndarray | None) -> np.ndarray:
    """Return a mask of patches without colour (no H&E stain) or nearly all padding, bool ``(n,)``."""
    grey = np.asarray(~np.diff(patches.astype(np.int16), axis=-1).any(axis=(1, 2, 3)))
    if sizes is None:
        return grey
    is_small = np.asarray(np.prod(sizes, axis=1) < MIN_AREA * np.prod(patches.shape[1:3]))
    return grey | is_small


def _measure(
    predictor: "Predictor", patches: np.ndarray, sizes: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    _, features = predictor.logits_and_features(patches, sizes, rows)
    return {
        "colour": colour_features(patches, sizes, index=rows).astype(np.float64),
        "feature": features.astype(np.float64),
    }


def _distance(classifier: Classifier, kind: str, values: np.ndarray) -> np.ndarray:
    extras = classifier.extras
    offset = (values - extras[f"{kind}_mean"]) / extras[f"{kind}_spread"]
    precision = extras[f"{kind}_precision"]
    return ((offset @ precision) * offset).sum(axis=1)
