"""From an archive of patches to a pack: decoded once, in blocks, on all cores, in bounded memory."""

import contextlib
import errno
import gc
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, PackError
from biopsy.core.files import create_directory, sha256_file
from biopsy.data.archives import SYNTHETIC, Archive, open_archive
from biopsy.data.cutting import Cutting
from biopsy.data.datasets import annotated_slides, find_dataset
from biopsy.data.datasets.base import Dataset, Listing, Skipped, find_positive, refuse_empty
from biopsy.data.labels import fold_classes, relabel
from biopsy.data.packs import COLUMNS, PIXELS, Pack, finish_pack, is_pack, pad, patch_sha256
from biopsy.data.tables import add_people, check_ids, join_columns

MAX_RATIO = 4
"""How many times as long as the median patch a patch may be: all are padded to the longest."""

_BLOCK_BYTES = 2**20  # pixels that one worker decodes at a time
_AHEAD_BYTES = 2**29  # pixels that are decoded ahead of the writing
_SAMPLE_ROWS = 256
_PART_ROWS = 32  # that one worker measures at a time

Progress = Callable[[int, int], None]


@dataclass
class Written:
    """What became of the pixels."""

    patch_px: int
    """Side of the square all patches are padded to."""
    rows: list[int] = field(default_factory=list)
    """Rows of the listing, in the order in which their pixels lie on disk."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """True ``(width, height)`` of each."""
    hashes: list[str] = field(default_factory=list)
    """`patch_sha256` of each."""
    skipped: list[Skipped] = field(default_factory=list)
    """Rows that could not be decoded, or are too large."""


@dataclass
class _Block:
    """Patches decoded by one worker, padded to the pack's size, and those it could not decode."""

    pixels: np.ndarray
    rows: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    has_larger: bool = False


class _LargerPatch(Exception):
    """A patch does not fit the size that was taken for the largest."""


def write_pixels(path: Path, listing: Listing, on_progress: Progress | None = None) -> Written:
    """Decode rows and write them as an ``.npy`` file uint8 ``(n, patch_px, patch_px, 3)``.

    Memory is bounded: a few blocks per core are decoded ahead of the writing. The file holds as many patches
    as could be decoded, in the order of the listing. Nothing is forced to the disk, which would take half as
    long as the decoding: should the power fail, the pack's content hash tells.

    All patches are padded to the longest of those that decode, whatever headers say, and that are at most
    `MAX_RATIO` times as long as the median patch. Longer ones are skipped and named. Most datasets are of one
    size, so the first patches decide; should a larger one come, all are measured and the work starts again.

    Raises:
        DataError: If not one patch can be decoded, a quarter of them are too long, or the disk has no room.
    """
    n_rows = len(listing.table)
    try:
        longest = _find_longest(_measure(listing, range(min(n_rows, _SAMPLE_ROWS))), listing)
        return _write(path, listing, longest, on_progress)
    except _LargerPatch:
        longest = _find_longest(_measure(listing, range(n_rows)), listing)
        return _write(path, listing, longest, on_progress, is_measured=True)


def _measure(listing: Listing, rows: range) -> np.ndarray:
    """Return the longer side of each patch once it is decoded, 0 where it cannot be."""

    def measure(part: range) -> list[int]:
        return [
            0 if isinstance(patch, DataError) else max(patch.shape[:2]) for patch in listing.pixels.read(part)
        ]

    parts = [rows[start : start + _PART_ROWS] for start in range(0, len(rows), _PART_ROWS)]
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="measure") as pool:
        return np.concatenate([np.array(sides) for sides in pool.map(measure, parts)])


def _find_longest(sides: np.ndarray, listing: Listing) -> tuple[int, int]:
    """Return the side to which patches are padded, and the row of a patch that has it."""
    if not sides.any():
        return 1, 0  # what is wrong with each is named when it is decoded again
    median = int(np.quantile(sides[sides > 0], 0.5, method="lower"))
    too_long = sides > MAX_RATIO * median
    if 4 * too_long.sum() >= (sides > 0).sum():
        row = int(np.argmax(sides))
        raise DataError(
            f"patches differ too much in size: {listing.table['source'].iloc[row]} has {sides[row]:,} px, "
            f"half of them at most {median:,} px, and all are padded to the longest: prepare each size alone"
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
) -> Written:
    patch_px, largest = longest
    written = Written(patch_px)
    sources = listing.table["source"].tolist()
    _check_space(path.parent, len(sources), patch_px, sources[largest])
    done = 0
    with open(path, "wb") as file:
        _write_header(file, len(sources), patch_px)
        for block in _decode_blocks(listing, patch_px):
            if block.has_larger and not is_measured:
                raise _LargerPatch
            file.write(block.pixels.data)
            written.rows += block.rows
            written.sizes += block.sizes
            written.hashes += block.hashes
            written.skipped += [{"source": sources[row], "reason": reason} for row, reason in block.failures]
            done += len(block.rows) + len(block.failures)
            if on_progress is not None:
                on_progress(done, len(sources))
        if not written.rows:
            raise refuse_empty(written.skipped)
        file.seek(0)
        _write_header(file, len(written.rows), patch_px)
    return written


def _check_space(folder: Path, n_patches: int, patch_px: int, largest: str) -> None:
    needed, free = n_patches * patch_px**2 * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{n_patches:,} patches padded to the largest ({largest}, {patch_px} px) "
            f"need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {folder.parent}"
        )


def _write_header(file: BinaryIO, n_patches: int, patch_px: int) -> None:
    """Write the header of an ``.npy`` file; numpy pads it so that its length does not depend on the count."""
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
    block = _Block(pixels)
    for row, patch in zip(rows, listing.pixels.read(rows), strict=True):
        if isinstance(patch, DataError):
            block.failures.append((row, str(patch)))
            continue
        height, width = patch.shape[:2]
        if max(height, width) > patch_px:
            block.has_larger = True
            reason = f"is {width:,} x {height:,} pixels, over {MAX_RATIO} times as long as the median patch"
            block.failures.append((row, reason))
            continue
        pad(patch, patch_px, pixels[len(block.rows)])
        block.rows.append(row)
        block.sizes.append((width, height))
        block.hashes.append(patch_sha256(patch))
    return replace(block, pixels=pixels[: len(block.rows)])


_log = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def prepare(
    source: Path | str,
    out: Path | str,
    *,
    dataset: str | None = None,
    patients: str | Path | None = None,
    labels: Path | str | None = None,
    join: Path | str | None = None,
    positive: str | Sequence[str] | None = None,
    mpp: float | None = None,
    cutting: Cutting | None = None,
    on_progress: Progress | None = None,
) -> Pack:
    """Read an archive of patches as it is and write a pack.

    Args:
        source: A zip or a folder in one of the layouts of `biopsy.data.datasets`, or annotated slides.
        out: The folder of the new pack. One made from the same source with the same options is opened again.
        dataset: Name of the layout; None to recognise it.
        patients: A csv that names each patch's patient, slide or site, or a pattern searched in its path.
        labels: A csv that overrides labels (see `biopsy.data.labels.relabel`).
        join: A csv whose columns are added (see `biopsy.data.tables.join_columns`).
        positive: The positive class; several, as a list or separated by commas, are folded into one.
        mpp: Micrometres a pixel; None for the dataset's own.
        cutting: How annotated slides are cut; for nothing else.
        on_progress: Called with the patches done and the patches in all.

    Returns:
        The pack. Files that could not be read are in ``pack.info.skipped`` with the reason.

    Raises:
        DataError: If the source is not readable or recognised, a csv does not fit, no patch can be read, or
            the disk is full. Nothing is left under ``out`` then.
    """
    out = Path(out)
    if mpp is not None and not 0 < mpp < 1000:
        raise DataError(f"mpp is {mpp}; micrometres a pixel lie between 0 and 1000")
    if is_pack(source):
        raise DataError(f"{source} is a pack already: use it as it is")
    with _collector_paused():
        is_apart = cutting is not None and cutting.annotations is not None
        archive = annotated_slides.open_slides(source) if is_apart else open_archive(source)
        layout = None if is_apart else _find_dataset(archive, dataset, cutting)
        name = annotated_slides.NAME if layout is None else layout.name
        requested = _describe_request(archive, name, patients, labels, join, positive, mpp, cutting)
        if (known := _open_finished(out, requested)) is not None:
            return known
        if layout is not None and layout.needs_mpp and mpp is None:
            raise DataError(f"{archive.path} ({layout.name}) states no um/px: say it with --mpp")
        if layout is not None:
            listing, records = layout.list_patches(archive), {}
        elif cutting is not None:
            listing, rules = annotated_slides.list_patches(archive, cutting)
            records = {"annotations": rules}
        groups = {} if layout is None else layout.groups
        records |= _complete(listing, patients, labels, join, positive, groups)
        _warn(listing, archive, {} if layout is None else layout.expected)
        origin = {
            "source": archive.path.name,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version("biopsy"),
            "asked": requested,
            "synthetic": any(entry.name.rpartition("/")[2] == SYNTHETIC for entry in archive.entries),
            **records,
        }
        try:
            with create_directory(out) as folder:
                written = write_pixels(folder / PIXELS, listing, on_progress)
                finish_listing(folder, name, listing, written, origin, mpp)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise DataError(f"the disk at {out} is full; nothing was left there") from None
            raise DataError(f"{out} cannot be written: {error.strerror or error}") from None
    return Pack.open(out)


def _find_dataset(archive: Archive, dataset: str | None, cutting: Cutting | None) -> Dataset | None:
    """Return the archive's layout, None for annotated slides; refuse answers that do not belong to it."""
    if dataset == annotated_slides.NAME or (dataset is None and annotated_slides.recognise(archive)):
        if not annotated_slides.recognise(archive):
            raise DataError(f"{archive.path} is no folder of {annotated_slides.LOOKS_FOR}")
        if cutting is None:
            raise DataError(
                f"{archive.path} holds annotated slides: say how patches are cut, --mpp (um/px) and "
                "--patch-px (their side)"
            )
        return None
    layout = find_dataset(archive, dataset)
    if cutting is not None:
        raise DataError(
            f"{archive.path} holds patches ({layout.name}): --patch-px and what goes with it are for "
            f"{annotated_slides.LOOKS_FOR}"
        )
    return layout


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Spare the garbage collector walking half a million entries again and again; none of them is a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _describe_request(
    archive: Archive,
    dataset: str,
    patients: str | Path | None,
    labels: Path | str | None,
    join: Path | str | None,
    positive: str | Sequence[str] | None,
    mpp: float | None,
    cutting: Cutting | None = None,
) -> dict[str, Any]:
    """Say what was asked of which source, so that the same question finds its pack again."""

    def describe(option: str | Path | float | None) -> str | float | None:
        if option is None or isinstance(option, float | int):
            return option
        return sha256_file(option) if Path(option).is_file() else str(option)

    request = {
        "fingerprint": archive.fingerprint(),
        "dataset": dataset,
        "patients": describe(patients),
        "labels": describe(labels),
        "join": describe(join),
        "positive": positive if isinstance(positive, str | None) else ",".join(positive),
        "mpp": mpp,
        "cutting": None
        if cutting is None
        else cutting.to_dict()
        | {
            "slide_mpp": describe(cutting.slide_mpp),
            "annotations": cutting.annotations and annotated_slides.fingerprint_notes(cutting.annotations),
        },
    }
    return {name: value for name, value in request.items() if value is not None}


def _open_finished(out: Path, asked: dict[str, Any]) -> Pack | None:
    """Return the pack at ``out`` if it answers the same request; refuse to overwrite anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_pack(out):
        raise DataError(f"{out} exists and is not a pack: choose another --out, or remove it")
    pack = Pack.open(out)
    if pack.info.origin.get("asked") != asked:
        raise PackError(
            f"{out} is a pack of another source or other options: choose another --out, or remove it"
        )
    _log.info("%s was made from the same source before and is used again", out)
    return pack


def _complete(
    listing: Listing,
    patients: str | Path | None,
    labels: Path | str | None,
    join: Path | str | None,
    positive: str | Sequence[str] | None,
    groups: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Bring in what the user adds, in place; give what is to be recorded."""
    records: dict[str, Any] = {}
    if listing.table.empty:
        raise refuse_empty(listing.skipped)
    if patients is not None:
        listing.table, records["patients"] = add_people(listing.table, patients)
    if labels is not None:
        listing.table, class_names, records["labels"] = relabel(listing.table, labels, listing.class_names)
        if class_names != listing.class_names:
            listing.class_names, listing.positive_class = class_names, find_positive(class_names)
    if positive is not None:
        listing.table, listing.class_names, listing.positive_class = fold_classes(
            listing.table, listing.class_names, positive, groups
        )
    elif len(listing.class_names) == 2 and listing.positive_class is None:
        raise DataError(
            f"which of the classes {' and '.join(listing.class_names)} is positive? name it: --positive"
        )
    if join is not None:
        listing.table, records["join"] = join_columns(listing.table, join)
    listing.table, records["patients_missing"] = check_ids(listing.table)
    return {name: record for name, record in records.items() if record}


def _warn(listing: Listing, archive: Archive, expected: dict[str, int]) -> None:
    """Say once what a user should know before training."""
    table = listing.table
    if archive.unread:
        _log.warning("%s beside the patches was not read", ", ".join(archive.unread))
    if listing.counts.get("duplicates"):
        _log.info("%s identical copies were left out", f"{listing.counts['duplicates']:,}")
    if table["class_name"].nunique() == 1:
        _log.warning("all patches are of one class, %s", table["class_name"].iloc[0])
    if table["patient_id"].notna().all() and table["patient_id"].nunique() == 1:
        _log.warning(
            "all patches are of one patient, %s: no split by patient is possible", table["patient_id"].iloc[0]
        )
    if expected:
        _log.info("%s of the full dataset's %s patches", f"{len(table):,}", f"{expected['patches']:,}")


def finish_listing(
    folder: Path,
    dataset: str,
    listing: Listing,
    written: Written,
    origin: dict[str, Any],
    mpp: float | None,
) -> None:
    """Write what belongs beside the pixels."""
    table = _make_table(listing, written)
    skipped = listing.skipped + written.skipped
    n_odd = int((table[["width", "height"]] != written.patch_px).any(axis=1).sum())
    finish_pack(
        folder,
        table,
        dataset=dataset,
        class_names=listing.class_names,
        positive_class=listing.positive_class,
        mpp=mpp if mpp is not None else listing.mpp,
        patch_px=written.patch_px,
        counts=listing.counts | {"skipped": len(skipped), "odd_sizes": n_odd},
        origin=origin,
        skipped=skipped,
    )


def _make_table(listing: Listing, written: Written) -> pd.DataFrame:
    """Return the pack's table: what the layout said, for the rows whose pixels were written."""
    table = listing.table.iloc[written.rows].reset_index(drop=True)
    index = {name: position for position, name in enumerate(listing.class_names)}
    table["target"] = table["class_name"].map(index).astype(np.int64)
    table["width"], table["height"] = np.array(written.sizes, np.int64).T
    table["sha256"] = written.hashes
    extra = [name for name in table.columns if name not in COLUMNS and name != "class_name"]
    return table[list(chain(COLUMNS, extra))].astype({"x": "Int64", "y": "Int64"})
