"""Kaggle's "Histopathologic Cancer Detection": PCam without its duplicates, as ``.tif`` files.

Either as downloaded, ``train_labels.csv`` (id, label) and ``train/<id>.tif`` (``row``: index in the csv;
the unlabelled ``test/`` is excluded), or sorted into ``train|validation|test/{pos,neg}``. Slides are
not published by Kaggle; a csv such as the forum's ``patch_id_wsi_full.csv`` (id, wsi) provides them.
"""

import re
from collections.abc import Sequence

from biopsy.core.errors import ArchiveError, DataError
from biopsy.core.tables import parse_csv
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    SUBSET_BY_FOLDER,
    Dataset,
    ImageFiles,
    KaggleData,
    Listing,
    Skipped,
    list_images,
    make_table,
    mostly,
    register_dataset,
)
from biopsy.data.tables import normalize_cells

CLASS_NAMES = ["normal", "tumour"]
MPP = 0.972  # PCam's
LABELS = "train_labels.csv"

_SORTED = re.compile(r"(?:^|/)(?P<subset>[^/]+)/(?P<label>pos|neg)/(?P<id>[^/]+)\.tif$", re.IGNORECASE)
_ID = re.compile(r"[0-9a-f]{40}")  # ids are SHA-1 hashes


def recognise(archive: Archive) -> bool:
    """Return whether an archive has the csv, or the sorted tree with Kaggle's ids."""

    def is_sorted(entry: Entry) -> bool:
        match = _SORTED.search(entry.name)
        return bool(match and match["subset"] in SUBSET_BY_FOLDER and _ID.fullmatch(match["id"]))

    return _find_labels(archive) is not None or mostly(archive, is_sorted)


def list_patches(archive: Archive) -> Listing:
    """List the patches by the csv, or by their folders."""
    labels = _find_labels(archive)
    return _list_by_folders(archive) if labels is None else _list_by_csv(archive, labels)


def _find_labels(archive: Archive) -> Entry | None:
    return next((entry for entry in archive.entries if entry.name.rpartition("/")[2] == LABELS), None)


def _list_by_csv(archive: Archive, labels_entry: Entry) -> Listing:
    labels = _read_labels(archive, labels_entry)
    images = archive.images
    labelled = [entry for entry in images if entry.name.rpartition("/")[0].rpartition("/")[2] != "test"]

    def identify(entry: Entry) -> str:
        patch_id = entry.name.rpartition("/")[2].rpartition(".")[0]
        if patch_id not in labels:
            raise DataError(f"is not in {LABELS}")
        return patch_id

    unique, skipped, counts = list_images(archive, identify, labelled)
    listed = {patch_id for patch_id, _ in unique}
    skipped += [
        {"source": f"{labels_entry.name}#{row}", "reason": f"has no image: {patch_id}.tif is missing"}
        for patch_id, (row, _) in labels.items()
        if patch_id not in listed
    ]
    targets = [labels[patch_id][1] for patch_id, _ in unique]
    rows = [labels[patch_id][0] for patch_id, _ in unique]
    counts |= {"unlabelled": len(images) - len(labelled), "other_files": counts["other_files"] - 1}
    return _make_listing(archive, unique, targets, skipped, counts, row=rows)


def _read_labels(archive: Archive, entry: Entry) -> dict[str, tuple[int, int]]:
    """Return row and label by id from ``train_labels.csv``."""
    source = f"{archive.path}: {entry.name}"
    try:
        content = bytes(archive.read(entry))
    except DataError as error:
        raise ArchiveError(f"{source} {error}") from None
    headings = {name: name for name in ("id", "label")}
    table = parse_csv(content, source, aliases=headings, required=("id", "label"))
    table = table.assign(id=normalize_cells(table["id"]), label=normalize_cells(table["label"]))
    wrong = table[table["id"].isna() | ~table["label"].isin(["0", "1"])]
    if len(wrong):
        row, first = wrong.index[0], wrong.iloc[0]
        raise ArchiveError(
            f"{source} has {len(wrong):,} rows without an id or a label 0 or 1, first row {row} "
            f"(id {first['id']}, label {first['label']})"
        )
    repeated = table["id"][table["id"].duplicated()]
    if len(repeated):
        raise ArchiveError(f"{source} has {len(repeated):,} repeated ids, {repeated.iloc[0]} first")
    return dict(zip(table["id"], enumerate(table["label"].astype(int)), strict=True))


def _list_by_folders(archive: Archive) -> Listing:
    folders: dict[str, tuple[str, str]] = {}

    def identify(entry: Entry) -> str:
        match = _SORTED.search(entry.name)
        if match is None or match["subset"].lower() not in SUBSET_BY_FOLDER:
            raise DataError("is not in <train|validation|test>/<pos|neg>/")
        folder = (SUBSET_BY_FOLDER[match["subset"].lower()], match["label"].lower())
        first_folder = folders.setdefault(match["id"], folder)
        if first_folder != folder:
            raise DataError(f"is also in {'/'.join(first_folder)}: one patch in two folders")
        return match["id"]

    unique, skipped, counts = list_images(archive, identify)
    targets = [folders[patch_id][1] == "pos" for patch_id, _ in unique]
    subsets = [folders[patch_id][0] for patch_id, _ in unique]
    return _make_listing(archive, unique, targets, skipped, counts, official_subset=subsets)


def _make_listing(
    archive: Archive,
    unique: list[tuple[str, Entry]],
    targets: Sequence[int],
    skipped: list[Skipped],
    counts: dict[str, int],
    **columns: Sequence[object],
) -> Listing:
    return Listing(
        table=make_table(
            patch_id=[patch_id for patch_id, _ in unique],
            class_name=[CLASS_NAMES[target] for target in targets],
            source=[entry.name for _, entry in unique],
            **columns,
        ),
        pixels=ImageFiles(archive, [entry for _, entry in unique]),
        class_names=CLASS_NAMES,
        positive_class="tumour",
        mpp=MPP,
        skipped=skipped,
        counts=counts,
    )


register_dataset(
    Dataset(
        name="hcd",
        title="Histopathologic Cancer Detection, Kaggle 2018-2019",
        looks_for="train_labels.csv beside train/<id>.tif, or <train|validation|test>/<pos|neg>/<SHA-1>.tif",
        recognise=recognise,
        list_patches=list_patches,
        expected={"patches": 220_025, "normal": 130_908, "tumour": 89_117, "unlabelled": 57_458},
        mpp=MPP,
        citation="Cukierski 2018 (Kaggle), from PCam: Veeling et al. 2018 (MICCAI)",
        licence="Kaggle competition rules; the images are PCam's (CC0 1.0)",
        # 277,483 uncompressed 96-px TIFFs of 28 kB, and an archive at most as large.
        kaggle=KaggleData("histopathologic-cancer-detection", "competition", needed_bytes=16_000_000_000),
        credentials="a Kaggle account that has accepted the competition's rules, and its API token in"
        " ~/.kaggle/access_token, ~/.kaggle/kaggle.json or KAGGLE_API_TOKEN",
    )
)
