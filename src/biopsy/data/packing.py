"""Decoding of a listing into the files of a pack, in parallel and in bounded memory."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError
from biopsy.data.datasets.base import Listing, Skipped, refuse_empty
from biopsy.data.pack_files import COLUMNS, PIXELS, finish_pack, pad, patch_sha256

MAX_RATIO = 4
"""Largest side of a patch relative to the median; all are padded to the largest."""

_BLOCK_BYTES = 2**20  # pixels per task of a worker
_AHEAD_BYTES = 2**29  # pixels decoded ahead of writing
_SAMPLE_ROWS = 256
_PART_ROWS = 32  # measured per task of a worker

Progress = Callable[[int, int], None]


class _Block(NamedTuple):
    """Patches decoded and padded by one worker."""

    pixels: np.ndarray
    rows: list[tuple[int, int, int, str]]
    """Row of the listing, true width and height, and `patch_sha256` of each decoded patch."""
    failures: list[tuple[int, str]]
    """Row and reason of each patch that could not be decoded or is too large."""
    has_larger: bool


class _LargerPatch(Exception):
    """A patch is larger than the sampled patches."""


def write_listing(folder: Path, dataset: str, listing: Listing, on_progress: Progress | None = None) -> None:
    """Decode the patches of a listing and write the files of a pack."""
    patch_px, written, not_decoded = _write_pixels(folder / PIXELS, listing, on_progress)
    table = _make_table(listing, written)
    skipped = listing.skipped + not_decoded
    n_padded = int((table[["width", "height"]] != patch_px).any(axis=1).sum())
    finish_pack(
        folder,
        table,
        dataset=dataset,
        class_names=listing.class_names,
        positive_class=listing.positive_class,
        mpp=listing.mpp,
        patch_px=patch_px,
        counts=listing.counts | {"skipped": len(skipped), "padded": n_padded},
        origin=listing.origin,
        skipped=skipped,
    )


_Written = tuple[int, list[tuple[int, int, int, str]], list[Skipped]]
"""Side of the padded patches, rows as in `_Block` in the order of the pixel file, and skipped patches."""


def _write_pixels(path: Path, listing: Listing, on_progress: Progress | None) -> _Written:
    """Decode rows and write them as an ``.npy`` file uint8 ``(n, patch_px, patch_px, 3)``.

    A few blocks per core are decoded ahead of writing. The file has the decodable patches in the order of the
    listing. It is not flushed to disk, which would take half as long as decoding; the content hash detects
    losses by a power failure.

    Patches are padded to the largest decoded size of at most `MAX_RATIO` times the median; larger ones are
    skipped and reported. The size is taken from the first patches; if a larger one follows, all patches are
    measured and writing starts again.
    """
    n_rows = len(listing.table)
    try:
        longest = _find_longest(_measure(listing, range(min(n_rows, _SAMPLE_ROWS))), listing)
        return _write(path, listing, longest, on_progress)
    except _LargerPatch:
        longest = _find_longest(_measure(listing, range(n_rows)), listing)
        return _write(path, listing, longest, on_progress, is_measured=True)


def _measure(listing: Listing, rows: range) -> np.ndarray:
    """Return the longer side of each decoded patch, 0 if it cannot be decoded."""

    def measure(part: range) -> list[int]:
        return [
            0 if isinstance(patch, DataError) else max(patch.shape[:2]) for patch in listing.pixels.read(part)
        ]

    parts = [rows[start : start + _PART_ROWS] for start in range(0, len(rows), _PART_ROWS)]
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="measure") as pool:
        return np.concatenate([np.array(sides) for sides in pool.map(measure, parts)])


def _find_longest(sides: np.ndarray, listing: Listing) -> tuple[int, int]:
    """Return the side to which patches are padded, and the row of a patch of that size."""
    if not sides.any():
        return 1, 0  # errors are reported when patches are decoded again
    median = int(np.quantile(sides[sides > 0], 0.5, method="lower"))
    too_long = sides > MAX_RATIO * median
    if 4 * too_long.sum() >= (sides > 0).sum():
        row = int(np.argmax(sides))
        raise DataError(
            f"patches differ too much in size: {listing.table['source'].iloc[row]} has {sides[row]:,} px, "
            f"the median is {median:,} px, and all are padded to the largest: prepare each size separately"
        )
    row = int(np.argmax(np.where(too_long, 0, sides)))
    return int(sides[row]), row


def _write(
    path: Path,
    listing: Listing,
    longest: tuple[int, int],
    on_progress: Progress | None,
    *,
    is_measured: bool = False,
) -> _Written:
    patch_px, largest = longest
    rows, skipped = [], list[Skipped]()
    sources = listing.table["source"].tolist()
    _check_space(path.parent, len(sources), patch_px, sources[largest])
    done = 0
    with open(path, "wb") as file:
        _write_header(file, len(sources), patch_px)
        for block in _decode_blocks(listing, patch_px):
            if block.has_larger and not is_measured:
                raise _LargerPatch
            file.write(block.pixels.data)
            rows += block.rows
            skipped += [{"source": sources[row], "reason": reason} for row, reason in block.failures]
            done += len(block.rows) + len(block.failures)
            if on_progress is not None:
                on_progress(done, len(sources))
        if not rows:
            raise refuse_empty(skipped)
        file.seek(0)
        _write_header(file, len(rows), patch_px)
    return patch_px, rows, skipped


def _check_space(folder: Path, n_patches: int, patch_px: int, largest: str) -> None:
    needed, free = n_patches * patch_px**2 * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{n_patches:,} patches padded to the largest ({largest}, {patch_px} px) "
            f"need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {folder.parent}"
        )


def _write_header(file: BinaryIO, n_patches: int, patch_px: int) -> None:
    """Write the header of an ``.npy`` file, whose padded length does not depend on the count."""
    shape = (n_patches, patch_px, patch_px, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decode_blocks(listing: Listing, patch_px: int) -> Iterator[_Block]:
    n_workers, n_rows = os.cpu_count() or 1, len(listing.table)
    patch_bytes = patch_px**2 * 3
    block_rows = max(1, _BLOCK_BYTES // patch_bytes)
    n_ahead = min(n_workers + 1, _AHEAD_BYTES // (block_rows * patch_bytes))
    waiting: deque[Future[_Block]] = deque()
    with ThreadPoolExecutor(n_workers, thread_name_prefix="decode") as pool:
        try:
            for start in range(0, n_rows, block_rows):
                rows = range(start, min(start + block_rows, n_rows))
                waiting.append(pool.submit(_decode_block, listing, rows, patch_px))
                if len(waiting) > n_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _decode_block(listing: Listing, rows: range, patch_px: int) -> _Block:
    pixels = np.empty((len(rows), patch_px, patch_px, 3), np.uint8)
    decoded, failures, has_larger = list[tuple[int, int, int, str]](), list[tuple[int, str]](), False
    for row, patch in zip(rows, listing.pixels.read(rows), strict=True):
        if isinstance(patch, DataError):
            failures.append((row, str(patch)))
            continue
        height, width = patch.shape[:2]
        if max(height, width) > patch_px:
            has_larger = True
            reason = f"is {width:,} x {height:,} pixels, over {MAX_RATIO} times the median size"
            failures.append((row, reason))
            continue
        pad(patch, patch_px, pixels[len(decoded)])
        decoded.append((row, width, height, patch_sha256(patch)))
    return _Block(pixels[: len(decoded)], decoded, failures, has_larger)


def _make_table(listing: Listing, written: list[tuple[int, int, int, str]]) -> pd.DataFrame:
    """Return the pack's table of the rows whose pixels were written."""
    rows, widths, heights, hashes = zip(*written, strict=True)
    table = listing.table.iloc[list(rows)].reset_index(drop=True)
    index = {name: position for position, name in enumerate(listing.class_names)}
    table["target"] = table["class_name"].map(index).astype(np.int64)
    table["width"], table["height"], table["sha256"] = np.array(widths), np.array(heights), hashes
    extra = [name for name in table.columns if name not in COLUMNS and name != "class_name"]
    return table[[*COLUMNS, *extra]].astype({"x": "Int64", "y": "Int64"})
