"""Patches out of the training distribution: another stain, another scanner, no tissue, no slide at all.

Two squared Mahalanobis distances from the training patches: by colour statistics, and by the network's
penultimate layer (Lee et al. 2018, without their classes). The limit of each is the 99th percentile over
validation patches, which come from patients that training has not seen.
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
MUCH = 2  # times the expected share
LEAST_AREA = 0.1  # share of a patch that must be image rather than padding
REFERENCE_PATCHES = 2000  # of up to a few hundred features; asking a large network for more takes minutes


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
    """Store in a classifier what training patches are like, and how far validation patches are from them.

    Args:
        classifier: Gets ``info.out_of_distribution`` and its ``extras``.
        predictor: The classifier's, see `open_predictor`.
        patches: uint8 ``(N, H, W, 3)``.
        sizes: True ``(width, height)`` of each patch.
        train: Rows of training patches; at most `REFERENCE_PATCHES` of them are drawn.
    """
    from sklearn.covariance import ledoit_wolf  # imports for a second

    rng = make_rng(seed, "unlike training")
    drawn = np.sort(rng.choice(train, min(len(train), REFERENCE_PATCHES), replace=False))
    held_out = np.sort(rng.choice(val, min(len(val), REFERENCE_PATCHES), replace=False))
    limits: dict[str, float] = {}
    known, unseen = (_measure(predictor, patches, sizes, rows) for rows in (drawn, held_out))
    for kind, values in known.items():
        mean, spread = values.mean(axis=0), values.std(axis=0)
        spread[spread == 0] = 1
        covariance, _ = ledoit_wolf((values - mean) / spread)
        classifier.extras |= {
            f"{kind}_mean": mean,
            f"{kind}_spread": spread,
            f"{kind}_precision": np.linalg.pinv(covariance, hermitian=True),
        }
        limits[kind] = float(np.quantile(_distance(classifier, kind, unseen[kind]), QUANTILE))
    classifier.info.out_of_distribution = {
        "method": "squared Mahalanobis distance, Ledoit-Wolf covariance",
        "quantile": QUANTILE,
        "chosen_on": f"{len(held_out)} validation patches",
        "limits": limits,
    }


def expected_share(quantile: float) -> tuple[float, float]:
    """Return the share of patches like those of training that a limit at this quantile flags, low and high.

    Either of two distances may be beyond its limit: as many patches as one flags, or twice as many.
    """
    return 1 - quantile, 2 * (1 - quantile)


def say_unexpected(share: float, quantile: float) -> str | None:
    """Return the warning about a share of out-of-distribution patches; None where it is not unusual.

    It is unusual from twice the upper expected share on.
    """
    low, high = expected_share(quantile)
    if share < MUCH * high:
        return None
    return (
        f"{share:.0%} of the patches look out-of-distribution ({100 * low:.0f}-{100 * high:.0f} % expected): "
        "their predictions may be unreliable"
    )


def out_of_distribution_scores(
    classifier: Classifier, patches: np.ndarray, sizes: np.ndarray | None, features: np.ndarray
) -> pd.DataFrame:
    """Return how far patches are from training.

    Returns:
        ``colour_distance`` and ``feature_distance``, each as a multiple of its limit, and
        ``out_of_distribution``: whether either is above 1, the patch is grey, or its true size is less than a
        tenth of a patch. Without ``feature_distance`` where another test-time augmentation was asked for
        (`Classifier.with_tta`); empty for a classifier without a reference.
    """
    about = classifier.info.out_of_distribution
    if about is None:
        return pd.DataFrame(index=range(len(patches)))
    measured = {"colour": colour_features(patches, sizes), "feature": features}
    frame = pd.DataFrame(
        {
            f"{kind}_distance": _distance(classifier, kind, measured[kind]) / limit
            for kind, limit in about["limits"].items()
        }
    )
    return frame.assign(out_of_distribution=(frame > 1).any(axis=1) | _is_no_patch(patches, sizes))


def _is_no_patch(patches: np.ndarray, sizes: np.ndarray | None) -> np.ndarray:
    """Return which patches are grey, which no H&E stain is, or nearly all padding, bool ``(n,)``."""
    grey = np.asarray(~np.diff(patches.astype(np.int16), axis=-1).any(axis=(1, 2, 3)))
    if sizes is None:
        return grey
    is_small = np.asarray(np.prod(sizes, axis=1) < LEAST_AREA * np.prod(patches.shape[1:3]))
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
