"""Pseudo-slides: groups of patches alike in colour and texture, for packs without patients and slides.

Patches of one slide share stain and scanner, so clusters of appearance keep most neighbours together. They
are not slides: one slide may be in several clusters, and a cluster holds patches of several slides.
"""

import numpy as np
import pandas as pd

from biopsy.core.errors import SplitError
from biopsy.core.text import plural
from biopsy.data.packs import Pack
from biopsy.data.protocols.groups import (
    FRACTIONS,
    N_DRAWS,
    SUBSETS,
    Plan,
    Request,
    check_known,
    divide_groups,
    named_note,
)

PSEUDO_SLIDE = "pseudo_slide"
"""Further column of a split: the pseudo-slide of each patch."""
N_PSEUDO_SLIDES = 24
MIN_CLASS_SHARE = 0.2  # of the even share 1 / n_classes; 10 % of a group's patches for two classes
N_STARTS = 4
# -log of the transmitted light, with white at 255 of 256 so that black stays finite.
OPTICAL_DENSITY = -np.log(np.arange(1, 257) / 256)


def describe_appearance(pack: Pack, rows: np.ndarray) -> np.ndarray:
    """Return statistics of colour and texture per patch, ``(len(rows), 11)``.

    These are, per channel of the optical density, its mean, standard deviation and 10th percentile, then the
    mean absolute difference between neighbouring pixels of its mean over channels, down and across.
    """
    features = np.empty((len(rows), 11))
    density_of = OPTICAL_DENSITY.astype(np.float32)
    for feature, row in zip(features, rows, strict=True):
        pixels = pack.pixels(int(row))
        n_pixels = pixels.shape[0] * pixels.shape[1]
        counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
        mean = counts @ OPTICAL_DENSITY / n_pixels
        square = counts @ OPTICAL_DENSITY**2 / n_pixels
        palest = np.cumsum(counts[:, ::-1], axis=1) > 0.1 * (n_pixels - 1)
        feature[0:3] = mean
        feature[3:6] = np.sqrt(np.maximum(square - mean**2, 0))
        feature[6:9] = OPTICAL_DENSITY[255 - palest.argmax(axis=1)]
        density = density_of[pixels].mean(axis=2)
        for axis in (0, 1):
            steps = np.abs(np.diff(density, axis=axis))
            feature[9 + axis] = steps.sum() / max(1, steps.size)
    return features


def cluster_appearance(features: np.ndarray, n_groups: int, *, seed: int) -> np.ndarray:
    """Return the group of each patch, numbered from the largest to the smallest, int64 ``(n_patches,)``.

    The groups are clusters of the standardised features by k-means, the best of 4 starts by k-means++ (Arthur
    & Vassilvitskii 2007).

    Raises:
        SplitError: If there are fewer distinct patches than groups.
    """
    from sklearn.cluster import KMeans  # slow import

    n_distinct = len(np.unique(features, axis=0))
    if not 2 <= n_groups <= n_distinct:
        raise SplitError(
            f"{n_distinct:,} distinct patches cannot form {n_groups} pseudo-slides; use --n-groups from 2 to "
            f"{n_distinct}",
            "too-few",
        )
    spread = features.std(axis=0)
    standardised = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    labels = KMeans(n_groups, n_init=N_STARTS, random_state=seed).fit_predict(standardised)
    sizes = np.bincount(labels, minlength=n_groups)
    rank = np.empty(n_groups, np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(n_groups)
    return rank[labels]


def have_all_classes(counts: np.ndarray) -> np.ndarray:
    """Return which groups hold at least `MIN_CLASS_SHARE` of an even share of each class.

    Args:
        counts: Patches ``(n_groups, n_classes)``, of the classes present in any group.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    enough: np.ndarray = shares.min(axis=1) >= MIN_CLASS_SHARE / counts.shape[1]
    return enough


def split_by_pseudo_slide(request: Request) -> Plan:
    """Assign clusters of patches alike in colour and texture to subsets, where no patient or slide is named.

    Validation (and, if no test is named, test) groups are drawn by `divide_groups` from those with enough
    patches of each class. Named official subsets or sites are tested; official validation and test subsets
    that are not named are left out.
    """
    pack = request.pack
    if request.unit != "patch":
        raise SplitError(
            f"{pack.path.name} names {plural(request.unit)}, which pseudo-slides only stand in for; use the "
            "protocol 'patients' or 'folds'",
            "unit",
        )
    if request.val_ids:
        raise SplitError(
            "the protocol pseudo-slides draws the validation subset itself; omit --val-patients, or use the "
            "protocol 'site'",
            "patient",
        )
    is_tested, is_left_out = _named_subsets(request)
    subsets = np.select([is_tested, is_left_out], ["test", ""], "train").astype("<U10")
    rows = np.flatnonzero(subsets == "train")
    rows = rows[np.argsort(pack.table["patch_id"].to_numpy(str)[rows])]
    if not len(rows):
        raise SplitError(
            "all patches are tested and none are left for pseudo-slides; name fewer for test", "too-few"
        )
    groups = cluster_appearance(describe_appearance(pack, rows), request.n_groups, seed=request.seed)
    counts = pd.crosstab(groups, pack.target[rows]).to_numpy()
    eligible = have_all_classes(counts)
    names = SUBSETS[:2] if is_tested.any() else SUBSETS
    fractions = np.array(FRACTIONS[: len(names)])
    held_back = fractions[1:] / fractions.sum() * request.n_groups / max(1, eligible.sum())
    if eligible.sum() < len(names) or held_back.sum() >= 1:
        raise SplitError(
            f"{eligible.sum()} of {request.n_groups} pseudo-slides have {MIN_CLASS_SHARE:.0%} or more of an "
            f"even share of each class, which are too few for {len(names)} subsets: classes differ in colour "
            "and texture; use another --n-groups",
            "too-few",
        )
    may_hold_back = eligible[groups]
    parts = divide_groups(
        groups[may_hold_back],
        pack.target[rows[may_hold_back]],
        [1 - held_back.sum(), *held_back],
        seed=request.seed,
        unit="pseudo-slide",
    )
    subsets[rows[may_hold_back]] = np.array(names)[parts]
    columns = np.full(len(subsets), "", dtype="<U10")
    columns[rows] = groups.astype(str)
    subset_of = dict(zip(groups.tolist(), subsets[rows].tolist(), strict=True))
    present = np.unique(pack.target[rows])
    return subsets, {
        "fractions": fractions.tolist(),
        "method": f"k-means of colour and texture, then the best balanced of {N_DRAWS:,} random assignments",
        "n_groups": request.n_groups,
        "pseudo_slides": [
            {
                "pseudo_slide": str(group),
                "subset": subset_of[group],
                "per_class": {pack.class_names[index]: int(n) for index, n in zip(present, row, strict=True)},
            }
            for group, row in enumerate(counts)
        ],
        "left_out": {"patches": int(is_left_out.sum())},
        PSEUDO_SLIDE: columns,
        **named_note(request),
    }


def _named_subsets(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of patches in a named official subset or site, and in other held-out official subsets."""
    table = request.pack.table
    official, sites = (
        table[name].fillna("").to_numpy(str) if name in table else np.full(len(table), "")
        for name in ("official_subset", "site_id")
    )
    names = np.concatenate([official, sites])
    check_known(request.test_ids, names[names != ""], "official subset or site")
    is_tested = np.isin(official, request.test_ids) | np.isin(sites, request.test_ids)
    is_held_out = np.isin(official, SUBSETS[1:]) & ~is_tested
    return is_tested, is_held_out if request.test_ids else np.zeros(len(table), bool)
