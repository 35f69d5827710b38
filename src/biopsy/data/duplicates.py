"""Patches that are the same picture: near duplicates, found by a perceptual hash and then looked at.

Pictures that were stored again (another compression, a little brighter) keep the order of neighbouring
grey values. A 64-bit difference hash keeps just that; pairs whose hashes differ in few bits are compared
pixel by pixel, so that a chance likeness of hashes is never reported.

Of copies of 1,500 real IDC patches, those within 4 bits: stored as JPEG at quality 90, .97; at 75, .93;
5 % darker, .997; with noise of 5 grey levels, .92.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

MAX_BITS = 4  # bits by which hashes of one picture may differ
# Correlation of grey values from which two patches are one picture; on IDC unlike ones reached .48.
MIN_CORRELATION = 0.9
BLANK_SD = 4.0  # grey levels; a patch that varies less shows nothing to compare
CHUNK = 4096
PAIRS_AT_ONCE = 4_000_000

_N_BANDS = MAX_BITS + 1  # hashes at most MAX_BITS apart agree in at least one of MAX_BITS + 1 bands
_BAND_BITS = 64 // _N_BANDS
_BITS_SET = np.array([number.bit_count() for number in range(2**16)], np.uint8)
_WEIGHTS = np.left_shift(np.uint64(1), np.arange(64, dtype=np.uint64))


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
