"""The pixels of a pack on their way to disk: decoded in blocks on all cores, written in order."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from biopsy.data.datasets.layouts import Listing, Skipped, refuse_empty
from biopsy.data.packs import pad, patch_sha256
from biopsy.errors import DataError

_BLOCK_BYTES = 2**22  # pixels that one worker decodes at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """Which rows of a listing are written, and into what shape."""

    rows: list[int]
    patch_px: int
    largest: str
    """Source of the patch that decides ``patch_px``."""

    @property
    def n_bytes(self) -> int:
        """Size of the pixels on disk."""
        return len(self.rows) * self.patch_px**2 * 3


@dataclass
class Written:
    """What became of the pixels."""

    rows: list[int] = field(default_factory=list)
    """Rows of the listing, in the order in which their pixels lie on disk."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """True ``(width, height)`` of each."""
    hashes: list[str] = field(default_factory=list)
    """`patch_sha256` of each."""
    skipped: list[Skipped] = field(default_factory=list)
    """Rows that could not be decoded."""


@dataclass
class _Block:
    """Patches decoded by one worker, padded to the pack's size, and those it could not decode."""

    pixels: np.ndarray
    rows: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)


def write_pixels(path: Path, listing: Listing, plan: Plan, on_progress: Progress | None) -> Written:
    """Decode rows and write them as an ``.npy`` file uint8 ``(n, patch_px, patch_px, 3)``.

    Memory is bounded: a few blocks per core are decoded ahead of the writing. The file holds as many patches
    as could be decoded, in the order of ``plan.rows``.

    Raises:
        DataError: If not one patch can be decoded.
    """
    written = Written()
    sources = listing.table["source"].tolist()
    done = 0
    with open(path, "wb") as file:
        _write_header(file, len(plan.rows), plan.patch_px)
        for block in _decode_blocks(listing, plan):
            file.write(block.pixels.data)
            written.rows += block.rows
            written.sizes += block.sizes
            written.hashes += block.hashes
            written.skipped += [{"source": sources[row], "reason": reason} for row, reason in block.failures]
            done += len(block.rows) + len(block.failures)
            if on_progress is not None:
                on_progress(done, len(plan.rows))
        if not written.rows:
            raise refuse_empty(written.skipped)
        file.seek(0)
        _write_header(file, len(written.rows), plan.patch_px)
        file.flush()
        os.fsync(file.fileno())
    return written


def _write_header(file: BinaryIO, n_patches: int, patch_px: int) -> None:
    """Write the header of an ``.npy`` file; numpy pads it so that its length does not depend on the count."""
    shape = (n_patches, patch_px, patch_px, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decode_blocks(listing: Listing, plan: Plan) -> Iterator[_Block]:
    n_workers = os.cpu_count() or 1
    block_rows = max(1, _BLOCK_BYTES // (plan.patch_px**2 * 3))
    waiting: deque[Future[_Block]] = deque()
    with ThreadPoolExecutor(n_workers, thread_name_prefix="decode") as pool:
        try:
            for start in range(0, len(plan.rows), block_rows):
                rows = plan.rows[start : start + block_rows]
                waiting.append(pool.submit(_decode_block, listing, rows, plan.patch_px))
                if len(waiting) > n_workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _decode_block(listing: Listing, rows: list[int], patch_px: int) -> _Block:
    pixels = np.empty((len(rows), patch_px, patch_px, 3), np.uint8)
    block = _Block(pixels)
    for row, patch in zip(rows, listing.pixels.read(rows), strict=True):
        if isinstance(patch, DataError):
            block.failures.append((row, str(patch)))
            continue
        height, width = patch.shape[:2]
        if max(height, width) > patch_px:
            block.failures.append((row, f"decodes to {width} x {height} pixels, more than its header says"))
            continue
        pad(patch, patch_px, pixels[len(block.rows)])
        block.rows.append(row)
        block.sizes.append((width, height))
        block.hashes.append(patch_sha256(patch))
    return replace(block, pixels=pixels[: len(block.rows)])
