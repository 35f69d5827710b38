"""The colour-only baseline: a classifier that ignores tissue structure.

A network that does not outperform it may rely on staining only.
"""

from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.slide_io.stain import FEATURE_NAMES, colour_features
from biopsy.training.metrics import ColourBaseline

C = 1.0  # inverse strength of the L2 penalty on standardised features
MAX_TRAIN_PATCHES = 50_000


def colour_baseline(
    pack: Pack, subsets: np.ndarray, *, seed: int = 0, subset: str = "test"
) -> tuple[ColourBaseline, np.ndarray]:
    """Fit a logistic regression on colour statistics of the training subset and score another subset.

    Args:
        subsets: The subset of each patch, ``(n_patches,)``.
        seed: Seed of the sample of 50,000 training patches, if there are more.

    Returns:
        The baseline, and its probabilities on that subset, ``(n, n_classes)``; empty if it was not fitted.
    """
    train, index = np.flatnonzero(subsets == "train"), np.flatnonzero(subsets == subset)
    if len(train) > MAX_TRAIN_PATCHES:
        train = np.sort(make_rng(seed, "colour baseline").choice(train, MAX_TRAIN_PATCHES, replace=False))
    baseline = ColourBaseline(
        name="logistic regression on colour statistics",
        features=list(FEATURE_NAMES),
        C=C,
        n_train=len(train),
    )
    classes = np.unique(pack.target[train])
    probs = np.zeros((len(index), len(pack.class_names)))
    if len(classes) < 2 or not len(index):
        reason = f"train has {len(classes)} classes and {subset} {len(index)} patches"
        return replace(baseline, reason=reason), probs[:0]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, solver="newton-cholesky"))
    model.fit(colour_features(pack.patches, pack.sizes, index=train), pack.target[train])
    probs[:, classes] = model.predict_proba(colour_features(pack.patches, pack.sizes, index=index))
    auroc = _auroc(pack.target[index], probs, pack.positive_index)
    undefined = "the scored subset lacks a class" if auroc is None else None
    return replace(baseline, auroc=auroc, reason=undefined), probs


def _auroc(target: np.ndarray, probs: np.ndarray, positive_index: int | None) -> float | None:
    """Return the AUROC of the positive class, or the mean over classes; None where a class is absent."""
    indices = range(probs.shape[1]) if positive_index is None else [positive_index]
    is_class = [target == index for index in indices]
    if not all(0 < belongs.sum() < len(target) for belongs in is_class):
        return None
    scores = [
        roc_auc_score(belongs, probs[:, index]) for index, belongs in zip(indices, is_class, strict=True)
    ]
    return float(np.mean(scores))
