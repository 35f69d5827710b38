"""Sampling of training patches per epoch, and class weights."""

from collections.abc import Iterator

import numpy as np

from biopsy.core.errors import DataError
from biopsy.core.seeds import make_rng

MAX_DRAWS = 16
"""Most draws of a patch in an epoch of ``within-patient``, in expectation; up to 15 on 18 slides of IDC."""


def take_fraction(index: np.ndarray, target: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return a stratified random fraction of the training rows, with at least one patch per class.

    With the same seed a smaller share is part of every larger one.

    Args:
        index: Rows of the training patches, ascending, ``(n,)``.
        fraction: Above 0, at most 1.
    """
    if fraction == 1:
        return index
    chosen = []
    for label in np.unique(target[index]):
        rows = index[target[index] == label]
        count = max(1, round(fraction * len(rows)))
        chosen.append(make_rng(seed, "fraction", label).permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))


def sample_passes(step: int, n_steps: int, steps_per_pass: int) -> Iterator[tuple[int, int, int]]:
    """Yield the batches of the next updates, by pass over the patches.

    Passes are shuffled and follow each other; an epoch may start and end within one.

    Yields:
        ``(number of the pass from 1, first batch, batch to stop before)``.

    Example:
        >>> list(sample_passes(step=3, n_steps=4, steps_per_pass=5))
        [(1, 3, 5), (2, 0, 2)]
    """
    end = step + n_steps
    while step < end:
        number, start = divmod(step, steps_per_pass)
        stop = min(steps_per_pass, start + end - step)
        yield number + 1, start, stop
        step += stop - start


def within_patient_shares(
    index: np.ndarray, target: np.ndarray, groups: np.ndarray, single_class_weight: float
) -> np.ndarray:
    """Return each training patch's share of the draws of an epoch, float64 ``(n,)``; they sum to 1.

    The share of a patch of class ``c`` of patient ``p`` is proportional to ``m / (k n)``: ``k`` is the number
    of classes that the patient has in training, ``n`` its number of patches of class ``c``, and ``m`` its
    number of patches, times ``single_class_weight`` where ``k`` is 1. So the classes of a patient weigh
    equally, patients of several classes weigh by their patches, and stain, which differs between patients
    more than within them, tells the class less than where patches are drawn alike. Where no patient has
    several classes, all shares are equal. No share is above `MAX_DRAWS` draws; what exceeds it goes to the
    others in proportion to theirs.

    Args:
        index: Rows of the training patches, ``(n,)``.
        groups: Patient of every patch of the pack.
        single_class_weight: Factor on patients with patches of one class only, above 0, at most 1.
    """
    names, patient = np.unique(groups[index], return_inverse=True)
    counts = np.zeros((len(names), target.max() + 1))
    np.add.at(counts, (patient, target[index]), 1)
    n_present = (counts > 0).sum(axis=1)
    mass = counts.sum(axis=1) * np.where(n_present > 1, 1.0, single_class_weight)
    weight = (mass / n_present)[patient] / counts[patient, target[index]]
    shares, limit = weight / weight.sum(), MAX_DRAWS / len(index)
    while (shares > limit * (1 + 1e-9)).any():
        is_full = shares >= limit
        shares[is_full] = limit
        shares[~is_full] *= (1 - limit * is_full.sum()) / shares[~is_full].sum()
    return shares


def _draw(index: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return as many rows as there are: each its expected number of times, rounded down or up at random.

    Rounding is by systematic sampling (Madow 1949), which keeps every expected number.
    """
    expected = shares * len(index)
    times = np.floor(expected + 1e-9)
    order = rng.permutation(len(index))
    edges = np.r_[0, np.cumsum(np.maximum(expected - times, 0)[order])]
    edges[-1] = round(edges[-1])
    times[order] += np.diff(np.floor(edges + rng.random()))
    return np.repeat(index, times.astype(int))


def sample_epoch(
    index: np.ndarray,
    target: np.ndarray,
    *,
    sampling: str,
    seed: int,
    epoch: int,
    groups: np.ndarray | None = None,
    single_class_weight: float = 1.0,
) -> np.ndarray:
    """Return the rows of one shuffled pass over the training patches.

    Args:
        index: Rows of the training patches, ``(n,)``.
        sampling: ``"none"``: every patch once. ``"undersample"``: as many patches of each class as the
            rarest has, drawn once for the whole run. ``"oversample"``: as many as the commonest has; every
            patch at least as often as the class allows, the remainder drawn for each epoch.
            ``"within-patient"``: as many as there are, in expectation by `within_patient_shares`; every
            patch its expected number of times rounded down, the remainder drawn for each epoch.
        epoch: Number of the pass, counted from 1.
        groups: For ``"within-patient"``: patient of every patch of the pack.
        single_class_weight: For ``"within-patient"``.
    """
    classes = [index[target[index] == label] for label in np.unique(target[index])]
    if sampling == "undersample":
        count = min(map(len, classes))
        rng = make_rng(seed, "undersample")
        index = np.concatenate([rng.choice(rows, count, replace=False) for rows in classes])
    elif sampling == "oversample":
        count = max(map(len, classes))
        rng = make_rng(seed, "oversample", epoch)
        index = np.concatenate(
            [
                np.r_[np.tile(rows, count // len(rows)), rng.choice(rows, count % len(rows), False)]
                for rows in classes
            ]
        )
    elif sampling == "within-patient":
        assert groups is not None
        shares = within_patient_shares(index, target, groups, single_class_weight)
        index = _draw(index, shares, make_rng(seed, "within-patient", epoch))
    return make_rng(seed, "order", epoch).permutation(index)


def class_weights(target: np.ndarray, n_classes: int, method: str) -> np.ndarray | None:
    """Return class weights, float64 ``(n_classes,)``, or None if they are equal.

    ``"largest"`` is max(count) / count (the CancerNet post), ``"balanced"`` total / (n_classes * count)
    (King & Zeng 2001, as scikit-learn has it).

    Raises:
        DataError: If a class has no training patch.
    """
    if method == "none":
        return None
    counts = np.bincount(target, minlength=n_classes)
    if (counts == 0).any():
        raise DataError(
            f"class weights {method!r} need every class in training, found counts {counts.tolist()}: "
            "use another split, or --set train.class_weights=none"
        )
    return counts.max() / counts if method == "largest" else counts.sum() / (n_classes * counts)
