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
    """Read an archive of patches as it is, or cut annotated slides, and write a pack.

    Args:
        source: A zip or a folder in one of the layouts of `biopsy.data.datasets`, or a folder of slides with
            a ``.geojson`` of their name beside each (see `biopsy.data.cutting` for the rules).
        out: The folder of the new pack. One made from the same source with the same options is opened again.
        dataset: Name of the layout; None to recognise it.
        patients: A csv that names each patch's patient, slide or site, or a pattern searched in its path.
        labels: A csv that overrides labels (see `biopsy.data.labels.relabel`).
        join: A csv whose columns are added (see `biopsy.data.tables.join_columns`).
        positive: The positive class; several, as a list or separated by commas, are folded into one.
        mpp: Micrometres a pixel; None for the dataset's own. Of slides: at which patches are cut.
        patch_px: Side of the patches cut from slides, in pixels at ``mpp``.
        stride_px: Step of the grid of patches, by default their side.
        label_frac: Share of a patch that an annotation must cover for the patch to be of its class.
        classes: Of slides, ``NAME=ANNOTATED`` for each class, or a name alone; ``=ANNOTATED`` leaves the area
            out. By default the annotated names.
        rest: Class of what lies in the region and in no annotation; by default such patches are left out.
        region: Annotated class that limits where labels are valid.
        slide_mpp: Micrometres a pixel of slides that do not say: a number, or a csv of ``slide, mpp``.
        annotations: Of slides, a folder of annotation files, or one file; by default those beside the slides.
        crop: Whether QuPath cropped slides to what was scanned, as it does unless it is told ``--no-crop``.
        export_tree: Also write the source's files, unchanged, into this folder as
            ``training|validation|testing/<class>/`` (see `biopsy.data.export_tree.export_tree`).
        split: The tree's split: one of the pack, or a protocol that needs nothing more.
        recipe: Whose published split the tree has, where no split is named; ``cancernet-2020`` by default.
        on_progress: Called with the patches done and the patches in all.

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
