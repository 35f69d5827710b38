"""Preparation of packs from archives of patches or annotated slides, and export of folder trees."""

import contextlib
import errno
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biopsy.core.errors import DataError, PackError
from biopsy.core.files import create_directory, sha256_file
from biopsy.core.storage import stage
from biopsy.data.archives import SYNTHETIC, Archive, open_archive
from biopsy.data.datasets import annotated_slides, find_dataset
from biopsy.data.datasets.annotated_slides import REGION, Cutting
from biopsy.data.datasets.base import Dataset, Listing, find_positive, refuse_empty
from biopsy.data.pack_files import describe_origin
from biopsy.data.packing import Progress, write_listing
from biopsy.data.packs import Pack, is_pack
from biopsy.data.tables import check_ids, fold_classes, join_columns, join_patients, relabel

if TYPE_CHECKING:  # slow import, needed for trees only
    from biopsy.data.splits import Split

TREE_RECIPE = "cancernet-2020"
"""Recipe whose published split the tree has by default."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


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
    patch_px: int | None = None,
    stride_px: int | None = None,
    label_frac: float = 0.5,
    classes: Sequence[str] = (),
    rest: str | None = None,
    region: str = REGION,
    slide_mpp: float | str | Path | None = None,
    annotations: Path | str | None = None,
    crop: bool = True,
    export_tree: Path | str | None = None,
    split: str | None = None,
    recipe: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Pack:
    """Decode an archive of patches, or cut annotated slides into patches, and write a pack.

    Repeating the command opens the existing pack; a pack of another source is never overwritten. Unreadable
    files are skipped, named and counted.

    The tree of ``export_tree`` holds the source's files, unchanged, as
    ``training|validation|testing/<class>/<file>``. Class folders are named by the index of the class in the
    pack, so that Keras, which sorts folders by name, assigns the same indices. Files of the same name are
    named by their path with ``__`` for ``/``. Patches in no subset are left out and counted; if a published
    split validates on the test subset, its files are in both folders. The folder must not exist. HDF5 sources
    (PCam) have no image files and cannot be exported.

    Args:
        source: Zip or folder of patches, or folder of slides with annotations beside them.
        out: Output folder of the pack.
        dataset: Layout of the source, as ``biopsy list datasets`` names it (default: recognised).
        patients: Patients of the patches: a csv, or a regular expression searched in each path.
        labels: A csv of labels that override those of the source.
        join: A csv of further columns, such as site, scanner or age.
        positive: Positive class; several, separated by commas, are merged into one.
        mpp: Pixel size in µm. Required if the source does not record it; for slides, the resolution at
            which patches are cut.
        patch_px: Side in pixels of the patches cut from slides.
        stride_px: Stride in pixels of the patches cut from slides (default: the patch size).
        label_frac: Minimum fraction of a patch covered by its class, for patches cut from slides.
        classes: Classes of patches cut from slides and their annotations, ``NAME=ANNOTATED`` each or a
            name alone; ``=ANNOTATED`` excludes an area (default: the annotated names).
        rest: Class assigned to unannotated tissue inside the region (default: such patches are left out).
        region: Annotation class that outlines the fully annotated area.
        slide_mpp: Pixel size in µm of slides that do not record it: one value, or a csv with columns
            ``slide,mpp``.
        annotations: Annotations of slides (GeoJSON; XML of ASAP, HALO or ImageScope): folder, or one file
            (default: beside the slides).
        crop: Whether QuPath cropped slides to their scanned bounds on export.
        export_tree: Output folder of a tree of the original files, sorted by subset and class.
        split: Split that divides the tree: one of the pack, or a protocol without further options.
        recipe: Recipe whose published split divides the tree, without a split (default: ``cancernet-2020``).
        on_progress: Called with the numbers of patches done and in all.

    Returns:
        The pack. Files that could not be read are in ``pack.info.skipped`` with the reason.

    Raises:
        DataError: If the source is not readable or recognised, a csv or an annotation does not fit, no patch
            can be read, the disk is full, or there are no files to export. Nothing is left under ``out``
            then, or, where only the tree failed, under ``export_tree``.
    """
    if export_tree is None and (split is not None or recipe is not None):
        raise DataError("--split and --recipe need --export-tree: name its folder")
    if split is not None and recipe is not None:
        raise DataError("--split and --recipe exclude each other: use one")
    if mpp is not None and not 0 < mpp < 1000:
        raise DataError(f"mpp is {mpp}; it must be between 0 and 1000 um/px")
    cutting = None
    if patch_px is not None:
        if mpp is None:
            raise DataError("--patch-px needs --mpp, the pixel size in um at which slides are cut")
        names = tuple(classes) or None
        cutting = Cutting(
            mpp, patch_px, stride_px, label_frac, names, rest, region, slide_mpp, annotations, crop
        )
    elif any(option is not None for option in (stride_px, rest, slide_mpp, annotations)) or classes:
        raise DataError(
            "--stride-px, --classes, --rest, --slide-mpp and --annotations are for slides and need --patch-px"
        )
    source = stage(source)
    if is_pack(source):
        raise DataError(f"{source} is already a pack")
    if export_tree is not None:
        from biopsy.data.export_tree import check_exportable
        from biopsy.data.export_tree import export_tree as write_tree
        from biopsy.recipes import load_recipe

        published = load_recipe(recipe or TREE_RECIPE).as_published.split
        check_exportable(source, export_tree)
    out = Path(out)
    with _garbage_collection_disabled():
        archive, layout = _open_source(source, dataset, cutting)
        request = _describe_request(
            archive, layout, positive, cutting, patients=patients, labels=labels, join=join, mpp=mpp
        )
        pack = _open_finished(out, request)
        if pack is None:
            listing = _list_patches(archive, layout, cutting, mpp)
            listing.origin["request"] = request
            _add_tables(listing, patients, labels, join, positive, layout.groups)
            _warn(listing, archive, layout.expected)
            _write(out, layout.name, listing, on_progress)
            pack = Pack.open(out)
    if export_tree is not None:
        chosen = _choose_split(pack, split, published)
        pack.tree = (
            Path(export_tree),
            write_tree(pack, source, export_tree, chosen, on_progress=on_progress),
        )
    return pack


def _open_source(source: Path | str, dataset: str | None, cutting: Cutting | None) -> tuple[Archive, Dataset]:
    """Return the archive and its layout; refuse options that do not apply."""
    if cutting is not None and cutting.annotations is not None:
        return annotated_slides.open_slides(source), annotated_slides.SLIDES
    if annotated_slides.is_slide(Path(source)):
        raise DataError(
            f"{source} is one image or slide: give a folder of patches, or of slides and their annotations"
        )
    archive = open_archive(source)
    layout = find_dataset(archive, dataset)
    if layout.cuts_slides and cutting is None:
        raise DataError(
            f"{archive.path} holds annotated slides: set --mpp (um/px) and --patch-px (side of the patches)"
        )
    if cutting is not None and not layout.cuts_slides:
        raise DataError(
            f"{archive.path} holds patches ({layout.name}): --patch-px is for {annotated_slides.LOOKS_FOR}"
        )
    return archive, layout


@contextlib.contextmanager
def _garbage_collection_disabled() -> Iterator[None]:
    """Disable garbage collection while half a million entries, none in a reference cycle, are created."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _describe_request(
    archive: Archive,
    layout: Dataset,
    positive: str | Sequence[str] | None,
    cutting: Cutting | None,
    **options: str | Path | float | None,
) -> dict[str, object]:
    """Return the source and the options, files by their hashes, as recorded in a pack."""

    def describe(option: str | Path | float | None) -> str | float | None:
        if option is None or isinstance(option, float | int):
            return option
        return sha256_file(option) if Path(option).is_file() else str(option)

    request: dict[str, object] = {
        "fingerprint": archive.fingerprint(),
        "dataset": layout.name,
    }
    described = {name: describe(option) for name, option in options.items()}
    described["positive"] = positive if isinstance(positive, str | None) else ",".join(positive)
    request |= {name: value for name, value in described.items() if value is not None}
    if cutting is not None:
        request["cutting"] = cutting.to_dict() | {
            "slide_mpp": describe(cutting.slide_mpp),
            "annotations": cutting.annotations and annotated_slides.fingerprint_notes(cutting.annotations),
        }
    return request


def _open_finished(out: Path, request: dict[str, object]) -> Pack | None:
    """Return the pack at ``out`` if it was made by the same request; refuse to overwrite anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_pack(out):
        raise DataError(f"{out} exists and is not a pack: choose another --out, or remove it")
    pack = Pack.open(out)
    if pack.info.origin.get("request") != request:
        raise PackError(
            f"{out} is a pack of another source or other options: choose another --out, or remove it",
            "exists",
        )
    logger.info("%s exists and was made from the same source and options", out)
    return pack


def _list_patches(archive: Archive, layout: Dataset, cutting: Cutting | None, mpp: float | None) -> Listing:
    """Return the patches of the source, with their provenance."""
    if layout.needs_mpp and mpp is None:
        raise DataError(f"{archive.path} ({layout.name}) does not record the pixel size: set --mpp (um/px)")
    listing = layout.list_patches(archive, cutting) if layout.cuts_slides else layout.list_patches(archive)
    listing.mpp = listing.mpp if mpp is None else mpp
    listing.origin |= describe_origin(archive.path.name)
    listing.origin["synthetic"] = any(entry.name.rpartition("/")[2] == SYNTHETIC for entry in archive.entries)
    return listing


def _add_tables(
    listing: Listing,
    patients: str | Path | None,
    labels: Path | str | None,
    join: Path | str | None,
    positive: str | Sequence[str] | None,
    groups: Mapping[str, Sequence[str]],
) -> None:
    """Add the user's tables to a listing and its provenance, in place."""
    origin = listing.origin
    if listing.table.empty:
        raise refuse_empty(listing.skipped)
    if patients is not None:
        listing.table, origin["patients"] = join_patients(listing.table, patients)
    if labels is not None:
        listing.table, class_names, origin["labels"] = relabel(listing.table, labels, listing.class_names)
        if class_names != listing.class_names:
            listing.class_names, listing.positive_class = class_names, find_positive(class_names)
    if positive is not None:
        listing.table, listing.class_names, listing.positive_class = fold_classes(
            listing.table, listing.class_names, positive, groups
        )
    elif len(listing.class_names) == 2 and listing.positive_class is None:
        raise DataError(
            f"the classes are {' and '.join(listing.class_names)}: set --positive, the positive class"
        )
    if join is not None:
        listing.table, origin["join"] = join_columns(listing.table, join)
    listing.table, missing = check_ids(listing.table)
    if missing:
        origin["patients_missing"] = missing


def _write(out: Path, dataset: str, listing: Listing, on_progress: Progress | None) -> None:
    try:
        with create_directory(out) as folder:
            write_listing(folder, dataset, listing, on_progress)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DataError(f"the disk at {out} is full; no files were left there") from None
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from None


def _warn(listing: Listing, archive: Archive, expected: dict[str, int]) -> None:
    """Log what a user should know before training."""
    table = listing.table
    if archive.unread:
        logger.warning("%s in the folder was not read", ", ".join(archive.unread))
    if listing.counts.get("duplicates"):
        logger.info("%s duplicate files were left out", f"{listing.counts['duplicates']:,}")
    if table["class_name"].nunique() == 1:
        logger.warning("all patches are of one class, %s", table["class_name"].iloc[0])
    if table["patient_id"].notna().all() and table["patient_id"].nunique() == 1:
        logger.warning(
            "all patches are of one patient, %s: no split by patient is possible", table["patient_id"].iloc[0]
        )
    if expected and len(table) != expected["patches"] and not listing.origin["synthetic"]:
        whole = f"{expected['patches']:,}"
        logger.info("the source has %s patches; the complete data set has %s", f"{len(table):,}", whole)


def _choose_split(pack: Pack, name: str | None, published: Mapping[str, object]) -> "Split":
    """Return the named split; by default, and for ``as-published``, the recipe's published split."""
    from biopsy.data.splits import find_split, list_splits
    from biopsy.data.splits import split as make_split

    if name is not None and (name != "as-published" or name in list_splits(pack)):
        return find_split(pack, name)
    return make_split(pack, protocol="as-published", recipe=published, save=False)
