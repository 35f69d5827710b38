"""Preparation by name: a pack, and the folder tree of a recipe's own split beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biopsy.core.errors import DataError
from biopsy.data import packing
from biopsy.data.cutting import REGION, Cutting
from biopsy.data.packing import Progress
from biopsy.data.packs import Pack, is_pack

if TYPE_CHECKING:  # what only a tree needs would take a third of the time that a small archive does
    from biopsy.data.splits import Split

TREE_RECIPE = "cancernet-2020"
"""Whose post has the tree, and whose split it gets where no other is named."""


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

    The same command again opens the pack that is there; a pack of another source is never overwritten. Files
    that cannot be read are skipped, named and counted.

    The tree of ``export_tree`` holds the source's files, unchanged, as
    ``training|validation|testing/<class>/<file>``. Class folders are the numbers of the classes in the pack,
    so that Keras, which sorts folders by name, numbers them alike. Files of one name take their whole path
    with ``__`` for ``/``. Patches in no subset are left out and counted; where a published split validates on
    the test subset, its files are in both folders. The folder must not exist. PCam's h5 files hold arrays,
    not files: no tree can be made of them.

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
        split: Split of the tree: one of the pack, or a protocol without further options.
        recipe: Recipe whose published split the tree has, without a split (default: ``cancernet-2020``).
        on_progress: Called with the numbers of patches done and in all.

    Returns:
        The pack. Files that could not be read are in ``pack.info.skipped`` with the reason.

    Raises:
        DataError: If the source is not readable or recognised, a csv or an annotation does not fit, no patch
            can be read, the disk is full, or there are no files to export. Nothing is left under ``out``
            then, or, where only the tree failed, under ``export_tree``.
    """
    if export_tree is None and (split is not None or recipe is not None):
        raise DataError("--split and --recipe say how --export-tree sorts files: name its folder")
    if split is not None and recipe is not None:
        raise DataError("the tree has one split: name --split or --recipe, not both")
    cutting = None
    if patch_px is not None:
        if mpp is None:
            raise DataError("--patch-px cuts slides: say with --mpp at how many micrometres a pixel")
        names = tuple(classes) or None
        cutting = Cutting(
            mpp, patch_px, stride_px, label_frac, names, rest, region, slide_mpp, annotations, crop
        )
    elif any(option is not None for option in (stride_px, rest, slide_mpp, annotations)) or classes:
        raise DataError(
            "--stride-px, --classes, --rest, --slide-mpp and --annotations are for slides: say --patch-px as "
            "well"
        )
    if export_tree is not None:
        from biopsy.data.export_tree import check_exportable
        from biopsy.recipes import load_recipe

        published = load_recipe(recipe or TREE_RECIPE).as_published.split
        if not is_pack(source):
            check_exportable(source, export_tree)
    pack = packing.prepare(
        source,
        out,
        dataset=dataset,
        patients=patients,
        labels=labels,
        join=join,
        positive=positive,
        mpp=mpp,
        cutting=cutting,
        on_progress=on_progress,
    )
    if export_tree is not None:
        from biopsy.data.export_tree import export_tree as write_tree

        sides = _choose_split(pack, split, published)
        write_tree(pack, source, export_tree, sides, on_progress=on_progress)
    return pack


def _choose_split(pack: Pack, name: str | None, published: Mapping[str, Any]) -> "Split":
    """Find the split by name; without one, or for ``as-published``, make the recipe's own."""
    from biopsy.data.splits import find_split, list_splits, make_split

    if name is not None and (name != "as-published" or name in list_splits(pack)):
        return find_split(pack, name)
    return make_split(pack, protocol="as-published", recipe=published)
