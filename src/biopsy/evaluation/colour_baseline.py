"""The colour-only baseline: how far one gets without looking at structure.

A network that does not beat it has learned stain.
"""

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.slide_io.stain import FEATURE_NAMES, colour_features

C = 1.0  # inverse strength of the L2 penalty on standardised features
MAX_TRAIN_PATCHES = 50_000


def colour_baseline(pack: Pack, sides: np.ndarray, *, seed: int = 0, side: str = "test") -> dict[str, Any]:
    """Fit a logistic regression on colour statistics of the train side and score another side.

    Args:
        pack: The patches.
        sides: The side of each patch, ``(n_patches,)``.
        seed: Seed of the draw of 50,000 patches to learn from, where there are more.
        side: The side that is scored.

    Returns:
        ``auroc`` (of the positive class; for more than two classes the mean over classes, one against
        rest; None with a ``reason`` where it cannot be had), ``index`` (rows of the pack on that side,
        ``(n,)``), ``probs`` ``(n, n_classes)`` or None, and what it is: ``name``, ``features``, ``C``,
        ``n_train``.
    """
    train, index = np.flatnonzero(sides == "train"), np.flatnonzero(sides == side)
    if len(train) > MAX_TRAIN_PATCHES:
        train = np.sort(make_rng(seed, "colour baseline").choice(train, MAX_TRAIN_PATCHES, replace=False))
    result: dict[str, Any] = {
        "name": "logistic regression on colour statistics",
        "features": list(FEATURE_NAMES),
        "C": C,
        "n_train": len(train),
        "index": index,
        "probs": None,
        "auroc": None,
        "reason": None,
    }
    classes = np.unique(pack.target[train])
    if len(classes) < 2 or not len(index):
        return result | {"reason": f"train has {len(classes)} classes and {side} {len(index)} patches"}
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, solver="newton-cholesky"))
    model.fit(colour_features(pack.patches, pack.sizes, index=train), pack.target[train])
    probs = np.zeros((len(index), len(pack.class_names)))
    probs[:, classes] = model.predict_proba(colour_features(pack.patches, pack.sizes, index=index))
    auroc, reason = _score(pack.target[index], probs, pack.positive_index)
    return result | {"probs": probs, "auroc": auroc, "reason": reason}


def _score(
    target: np.ndarray, probs: np.ndarray, positive_index: int | None
) -> tuple[float | None, str | None]:
    """Return the AUROC of the positive class, or the mean over the classes that are there."""
    indices = range(probs.shape[1]) if positive_index is None else [positive_index]
    scores = [
        float(roc_auc_score(target == index, probs[:, index]))
        for index in indices
        if 0 < (target == index).sum() < len(target)
    ]
    return (float(np.mean(scores)), None) if scores else (None, "the scored side has one class only")
