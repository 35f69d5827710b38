"""The audit: what in a pack, or in a split of it, would spoil a result, and what one should know of it.

Near duplicates are found by a perceptual hash and then looked at. Pictures that were stored again (another
compression, a little brighter) keep the order of neighbouring grey values. A 64-bit difference hash keeps
just that; pairs whose hashes differ in few bits are compared pixel by pixel, so that a chance likeness of
hashes is never reported. Of copies of 1,500 real IDC patches, those within 4 bits: stored as JPEG at
quality 90, .97; at 75, .93; 5 % darker, .997; with noise of 5 grey levels, .92.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import cv2
import numpy as np
import pandas as pd

from biopsy.data.packs import Pack, PackCounts
from biopsy.data.protocols import SUBSETS
from biopsy.data.splits import Split, find_overlap

MAX_BITS = 4  # bits by which hashes of one picture may differ
# Correlation of grey values from which two patches are one picture; on IDC unlike ones reached .48.
MIN_CORRELATION = 0.9
BLANK_SD = 4.0  # grey levels; a patch that varies less shows nothing to compare
CHUNK = 4096
PAIRS_AT_ONCE = 4_000_000

_N_BANDS = MAX_BITS + 1  # hashes at most MAX_BITS apart agree in at least one of MAX_BITS + 1 bands
_BAND_BITS = 64 // _N_BANDS
_BITS_SET = np.array([number.bit_count() for number in range(2**16)], np.uint8)


def hash_patches(patches: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference hash and the spread of grey values of every patch.

    Args:
        patches: uint8 ``(N, H, W, 3)`` RGB, may be memory-mapped.
        sizes: True ``(width, height)``, ``(N, 2)``.

    Returns:
        uint64 ``(N,)`` hashes and float32 ``(N,)`` standard deviations of grey values (0-255).
    """
    small = np.empty((len(patches), 8, 9), np.uint8)
    spread = np.empty(len(patches), np.float32)

    def fill(start: int) -> None:
        for row in range(start, min(start + CHUNK, len(patches))):
            grey = _grey(patches[row], sizes[row])
            small[row] = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
            spread[row] = cv2.meanStdDev(grey)[1][0, 0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(patches), CHUNK)))
    rises = (small[:, :, 1:] > small[:, :, :-1]).reshape(len(small), 64)
    return np.packbits(rises, axis=1, bitorder="little").view(np.uint64).ravel(), spread


def find_near_duplicates(
    patches: np.ndarray,
    sizes: np.ndarray,
    hashes: np.ndarray,
    candidates: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of patches that show one picture.

    Args:
        patches: uint8 ``(N, H, W, 3)`` RGB.
        sizes: True ``(width, height)``, ``(N, 2)``.
        hashes: As `hash_patches` gives them.
        candidates: Rows to compare, ``(n,)``: one of each group of exact duplicates, none that is blank.

    Returns:
        Pairs of rows ``(n_pairs, 2)``, smaller first, sorted, and the correlation of their grey values.
    """
    result = [candidates[pair] for pair in _close_pairs(hashes[candidates])]
    pairs = (
        np.unique(np.sort(np.concatenate(result), axis=1), axis=0) if result else np.empty((0, 2), np.int64)
    )
    likeness = np.array(
        [_correlate(_grey(patches[a], sizes[a]), _grey(patches[b], sizes[b])) for a, b in pairs]
    )
    same = likeness >= MIN_CORRELATION if len(pairs) else np.empty(0, bool)
    return pairs[same], likeness[same]


def _close_pairs(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs of places whose hashes differ in at most `MAX_BITS` bits, some of them more than once."""
    for band in range(_N_BANDS):
        values = (hashes >> np.uint64(band * _BAND_BITS)) & np.uint64(2**_BAND_BITS - 1)
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        # Each place is paired with those after it that share its band.
        n_after = np.searchsorted(ordered, ordered, side="right") - np.arange(len(order)) - 1
        for first, last in _blocks(n_after):
            counts = n_after[first:last]
            a = np.repeat(np.arange(first, last), counts)
            b = a + 1 + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            a, b = order[a], order[b]
            close = _count_bits(hashes[a] ^ hashes[b]) <= MAX_BITS
            yield np.stack([a[close], b[close]], axis=1)


def _blocks(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut places into runs with about `PAIRS_AT_ONCE` pairs each."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE)))
        yield first, last
        first = last


def _count_bits(numbers: np.ndarray) -> np.ndarray:
    return _BITS_SET[numbers.view(np.uint16).reshape(-1, 4)].sum(axis=1, dtype=np.uint8)


def _grey(patch: np.ndarray, size: np.ndarray) -> np.ndarray:
    width, height = size
    return cv2.cvtColor(np.ascontiguousarray(patch[:height, :width]), cv2.COLOR_RGB2GRAY)


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Correlate grey values; patches of two true sizes are compared at the first one's."""
    if first.shape != second.shape:
        second = cv2.resize(second, first.shape[::-1], interpolation=cv2.INTER_AREA)
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


FORMAT = "biopsy-audit/1"
LIST_LIMIT = 100
"""Lists are cut to this length; the count beside them is always whole."""


class Findings(TypedDict):
    """How many, and the first `LIST_LIMIT` of them."""

    count: int
    items: list[Any]


class Overlap(TypedDict):
    """How many patients (slides) are in several subsets, and in which the first of them are."""

    count: int
    items: dict[str, list[str]]


class SplitAudit(TypedDict):
    """What of a split would spoil a result, or is to be known of it."""

    name: str
    protocol: str
    is_published: bool
    may_overlap: bool
    patients_overlap: bool | None
    overlap: Overlap
    duplicates_across_subsets: Findings
    near_duplicates_across_subsets: Findings


class LabelConflicts(TypedDict):
    """Patches of the same pixels, or of the same place on a slide, whose labels differ."""

    same_pixels: Findings
    same_pixels_blank: Findings
    same_place: Findings
    repeated_places: int


class Audit(TypedDict):
    """What ``audit.json`` holds."""

    format: str
    pack_sha256: str
    dataset: str
    unit: str
    counts: PackCounts
    unreadable: Findings
    odd_sizes: dict[str, object]
    blank: Findings
    exact_duplicates: dict[str, object]
    near_duplicates: dict[str, object]
    label_conflicts: LabelConflicts
    coordinates: dict[str, object]
    groups: dict[str, object]
    split: SplitAudit | None


def audit_pack(pack: Pack, split: Split | None = None) -> Audit:
    """Look for everything in a pack that would spoil a result.

    Args:
        split: A split of it, of which overlap and duplicates between subsets are then looked for.

    Returns:
        What ``audit.json`` holds. Findings are ``{"count", "items"}`` with at most 100 items. A blank patch
        (grey values vary by less than 4 levels) looks like any other, so that blank duplicates are counted
        apart and spoil nothing.

    Raises:
        SplitError: If the split is another pack's.
    """
    hashes, spread = hash_patches(pack.patches, pack.sizes)
    blank = spread < BLANK_SD
    pictures = pd.factorize(pack.table["sha256"])[0]
    first_of_picture = np.unique(pictures, return_index=True)[1]
    candidates = first_of_picture[~blank[first_of_picture]]
    near, likeness = find_near_duplicates(pack.patches, pack.sizes, hashes, candidates)
    return {
        "format": FORMAT,
        "pack_sha256": pack.info.content_sha256,
        "dataset": pack.info.dataset,
        "unit": pack.unit,
        "counts": pack.info.counts,
        "unreadable": _listed(pack.info.skipped),
        "odd_sizes": _audit_sizes(pack),
        "blank": _listed_ids(pack, blank),
        "exact_duplicates": _audit_exact(pack, pictures, blank),
        "near_duplicates": _audit_near(pack, near, likeness),
        "label_conflicts": _audit_labels(pack, pictures, blank),
        "coordinates": _audit_coordinates(pack),
        "groups": _audit_groups(pack),
        "split": None if split is None else _audit_split(pack, split, pictures, blank, near),
    }


def find_blocking_issues(audit: Audit) -> list[str]:
    """Return a line for each thing that would spoil a result; an empty list means that nothing would.

    A split that is published, or made to measure a leak, is exempt: its overlap is stated as what it is.
    """
    reasons = []
    conflicts = audit["label_conflicts"]
    pixels, place = conflicts["same_pixels"], conflicts["same_place"]
    for result, words in ((pixels, "the same pixels"), (place, "the same place")):
        if result["count"]:
            first = result["items"][0]
            reasons.append(
                f"{result['count']:,} label conflicts: patches of {words} with different labels, such as "
                f"{' and '.join(first[:2])}; correct them with `biopsy prepare --labels CSV`"
            )
    split = audit["split"]
    if split is None or split["may_overlap"]:
        return reasons
    overlap = split["overlap"]
    if overlap["count"]:
        group, subsets = next(iter(overlap["items"].items()))
        reasons.append(
            f"{overlap['count']:,} {audit['unit']}s in two subsets of split {split['name']!r}, such as "
            f"{group} in {' and '.join(subsets)}; split by {audit['unit']}"
        )
    across = split["duplicates_across_subsets"]
    if across["count"]:
        reasons.append(
            f"{across['count']:,} pictures in two subsets of split {split['name']!r}, such as "
            f"{' and '.join(across['items'][0][:2])}; keep their {audit['unit']}s in one subset"
        )
    return reasons


def _audit_sizes(pack: Pack) -> dict[str, object]:
    odd = (pack.sizes != pack.info.patch_px).any(axis=1)
    sizes, counts = np.unique(pack.sizes[odd], axis=0, return_counts=True)
    by_size = [
        {"width": int(w), "height": int(h), "count": int(n)} for (w, h), n in zip(sizes, counts, strict=True)
    ]
    return {"by_size": by_size, **_listed_ids(pack, odd)}


def _audit_exact(pack: Pack, pictures: np.ndarray, blank: np.ndarray) -> dict[str, object]:
    repeated = np.bincount(pictures)[pictures] > 1
    return {
        "patches": int(repeated.sum()),
        "blank_patches": int((repeated & blank).sum()),
        **_listed(_groups(pack, pictures, repeated)),
    }


def _audit_near(pack: Pack, pairs: np.ndarray, likeness: np.ndarray) -> dict[str, object]:
    order = np.argsort(-likeness, kind="stable")
    return {
        "method": f"difference hash of 64 bits, at most {MAX_BITS} apart, then correlation of grey values "
        f">= {MIN_CORRELATION}; turned and shifted copies are not looked for",
        **_listed(
            {"patches": ids, "correlation": round(correlation, 4)}
            for ids, correlation in zip(_pair_ids(pack, pairs[order]), likeness[order].tolist(), strict=True)
        ),
    }


def _audit_labels(pack: Pack, pictures: np.ndarray, blank: np.ndarray) -> LabelConflicts:
    table = pack.table
    whose = table["slide_id"].where(table["slide_id"].notna(), table["patient_id"])
    known = (whose.notna() & table["x"].notna() & table["y"].notna()).to_numpy()
    places = pd.DataFrame({"whose": whose, "x": table["x"], "y": table["y"]})[known]
    place = np.full(len(table), -1)
    place[known] = places.groupby(["whose", "x", "y"], sort=False).ngroup()
    same_pixels = _differing(pictures, pack.target)
    return {
        "same_pixels": _listed(_groups(pack, pictures, same_pixels & ~blank)),
        "same_pixels_blank": _listed(_groups(pack, pictures, same_pixels & blank)),
        "same_place": _listed(_groups(pack, place, _differing(place, pack.target))),
        "repeated_places": int(places.duplicated().sum()),
    }


def _audit_coordinates(pack: Pack) -> dict[str, object]:
    """Count patches with a place, and those that stand off the grid most of them share."""
    places = pack.table[["x", "y"]].dropna().astype(np.int64).to_numpy()
    if not len(places):
        return {"known": 0, "off_grid": 0, "negative": 0}
    offsets, counts = np.unique(places % pack.info.patch_px, axis=0, return_counts=True)
    return {
        "known": len(places),
        "off_grid": int(len(places) - counts.max()),
        "grid_offset": offsets[np.argmax(counts)].tolist(),
        "negative": int((places < 0).any(axis=1).sum()),
    }


def _audit_groups(pack: Pack) -> dict[str, object]:
    """Count the classes of every patient (slide, where no patients are named), and patches of no known."""
    if pack.unit == "patch":
        return {"count": None, "one_class": None, "items": [], "unknown": len(pack)}
    known = pack.table[f"{pack.unit}_id"].notna().to_numpy()
    table = pd.crosstab(pack.group_ids[known], pack.target[known]).reindex(
        columns=range(len(pack.class_names)), fill_value=0
    )
    present = (table > 0).sum(axis=1)
    items = [
        {
            "id": group,
            "patches": int(counts.sum()),
            "per_class": dict(zip(pack.class_names, counts.tolist(), strict=True)),
        }
        for group, counts in zip(table.index.tolist(), table.to_numpy(), strict=True)
    ]
    one_class = _listed(table.index[present == 1].tolist())
    return {"count": len(table), "one_class": one_class, "items": items, "unknown": int((~known).sum())}


def _audit_split(
    pack: Pack, split: Split, pictures: np.ndarray, blank: np.ndarray, near: np.ndarray
) -> SplitAudit:
    repeated = (np.bincount(pictures)[pictures] > 1) & ~blank
    overlap: dict[str, list[str]] = {}
    across = np.zeros(len(pictures), bool)
    near_across = np.zeros(len(near), bool)
    for fold in range(split.n_folds) if split.n_folds else [None]:
        subsets = split.assign(pack, fold)
        subset_index = np.select([subsets == subset for subset in SUBSETS], range(len(SUBSETS)), -1)
        across |= _differing(np.where(repeated & (subset_index >= 0), pictures, -1), subset_index)
        first, second = subset_index[near[:, 0]], subset_index[near[:, 1]]
        near_across |= (first != second) & (first >= 0) & (second >= 0)
        if pack.unit != "patch":
            overlap = find_overlap(pack.group_ids, subsets) | overlap
    return {
        "name": split.name,
        "protocol": split.protocol,
        "is_published": split.is_published,
        "may_overlap": split.may_overlap,
        "patients_overlap": None if pack.unit == "patch" else bool(overlap),
        "overlap": {"count": len(overlap), "items": dict(list(overlap.items())[:LIST_LIMIT])},
        "duplicates_across_subsets": _listed(_groups(pack, pictures, across)),
        "near_duplicates_across_subsets": _listed(_pair_ids(pack, near[near_across])),
    }


def _differing(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mark members of groups (numbers; -1 is none) whose values are not all the same."""
    marked = np.zeros(len(groups), bool)
    member = groups >= 0
    if member.any():
        n_groups = int(groups.max()) + 1
        low = np.full(n_groups, np.iinfo(np.int64).max)
        high = np.full(n_groups, -1)
        np.minimum.at(low, groups[member], values[member])
        np.maximum.at(high, groups[member], values[member])
        marked[member] = (low < high)[groups[member]]
    return marked


def _groups(pack: Pack, groups: np.ndarray, chosen: np.ndarray) -> list[list[str]]:
    """List the patch ids of the chosen members of each group."""
    ids = pack.table["patch_id"][chosen]
    return [list(members) for _, members in ids.groupby(groups[chosen], sort=False)]


def _pair_ids(pack: Pack, pairs: np.ndarray) -> list[list[str]]:
    return pack.table["patch_id"].to_numpy(object)[pairs].tolist()


def _listed_ids(pack: Pack, chosen: np.ndarray) -> Findings:
    return _listed(pack.table["patch_id"][chosen].tolist())


def _listed(items: Iterable[Any]) -> Findings:
    items = list(items)
    return {"count": len(items), "items": items[:LIST_LIMIT]}
