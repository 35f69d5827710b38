"""Kaggle's "Histopathologic Cancer Detection": PCam without its duplicates, as ``.tif`` files.

Either as downloaded, ``train_labels.csv`` (id, label) and ``train/<id>.tif`` (``row``: index in the csv;
the unlabelled ``test/`` is excluded), or sorted into ``train|validation|test/{pos,neg}``. Slides are
not published by Kaggle; a csv such as the forum's ``patch_id_wsi_full.csv`` (id, wsi) provides them.
"""

import re

import pandas as pd

from biopsy.core.errors import ArchiveError, DataError
from biopsy.core.tables import parse_csv
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    COLUMNS,
    SUBSET_BY_FOLDER,
    Dataset,
    ImageFiles,
    KaggleData,
    Listing,
    Skipped,
    drop_copies,
    is_image,
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
    if _find_labels(archive) is not None:
        return True
    matches = [_SORTED.search(entry.name) for entry in archive.entries if is_image(entry)]
    good = [
        match
        for match in matches
        if match and match["subset"] in SUBSET_BY_FOLDER and _ID.fullmatch(match["id"])
    ]
    return bool(matches) and 2 * len(good) >= len(matches)


def list_patches(archive: Archive) -> Listing:
    """List the patches by the csv, or by their folders."""
    labels = _find_labels(archive)
    return _list_by_folders(archive) if labels is None else _list_by_csv(archive, labels)


def _find_labels(archive: Archive) -> Entry | None:
    return next((entry for entry in archive.entries if entry.name.rpartition("/")[2] == LABELS), None)


def _list_by_csv(archive: Archive, labels_entry: Entry) -> Listing:
    labels = _read_labels(archive, labels_entry)
    images = [entry for entry in archive.entries if is_image(entry)]
    folders = {entry: entry.name.rpartition("/")[0].rpartition("/")[2] for entry in images}
    unlabelled = [entry for entry in images if folders[entry] == "test"]
    labelled = [(_id_of(entry), entry) for entry in images if folders[entry] != "test"]
    unique, n_copies, skipped = drop_copies(archive, labelled)
    rows, entries = [], []
    for patch_id, entry in unique:
        if patch_id not in labels:
            skipped.append({"source": entry.name, "reason": f"is not in {LABELS}"})
            continue
        row, label = labels[patch_id]
        rows.append((patch_id, None, None, None, pd.NA, pd.NA, CLASS_NAMES[label], entry.name, None, row))
        entries.append(entry)
    listed = {row[0] for row in rows}
    skipped += [
        {"source": f"{labels_entry.name}#{row}", "reason": f"has no image: {patch_id}.tif is missing"}
        for patch_id, (row, _) in labels.items()
        if patch_id not in listed
    ]
    n_other = len(archive.entries) - len(images) - 1
    counts = {"duplicates": n_copies, "unlabelled": len(unlabelled), "other_files": n_other}
    return _make_listing(archive, rows, entries, skipped, counts)


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
    images = [entry for entry in archive.entries if is_image(entry)]
    skipped: list[Skipped] = []
    folders: dict[str, tuple[str, str]] = {}
    keyed = []
    for entry in images:
        match = _SORTED.search(entry.name)
        if match is None or match["subset"].lower() not in SUBSET_BY_FOLDER:
            skipped.append({"source": entry.name, "reason": "is not in <train|validation|test>/<pos|neg>/"})
            continue
        folder = (SUBSET_BY_FOLDER[match["subset"].lower()], match["label"].lower())
        first_folder = folders.setdefault(match["id"], folder)
        if first_folder != folder:
            skipped.append(
                {
                    "source": entry.name,
                    "reason": f"is also in {'/'.join(first_folder)}: one patch in two folders",
                }
            )
        else:
            keyed.append((match["id"], entry))
    unique, n_copies, differing = drop_copies(archive, keyed)
    rows = []
    for patch_id, entry in unique:
        subset, label = folders[patch_id]
        class_name = CLASS_NAMES[label == "pos"]
        rows.append((patch_id, None, None, None, pd.NA, pd.NA, class_name, entry.name, subset, None))
    counts = {"duplicates": n_copies, "other_files": len(archive.entries) - len(images)}
    return _make_listing(archive, rows, [entry for _, entry in unique], skipped + differing, counts)


def _make_listing(
    archive: Archive, rows: list[tuple], entries: list[Entry], skipped: list[Skipped], counts: dict[str, int]
) -> Listing:
    table = pd.DataFrame(rows, columns=[*COLUMNS, "official_subset", "row"])
    unused = [name for name in ("official_subset", "row") if table[name].isna().all()]
    return Listing(
        table=table.drop(columns=unused),
        pixels=ImageFiles(archive, entries),
        class_names=CLASS_NAMES,
        positive_class="tumour",
        mpp=MPP,
        skipped=skipped,
        counts=counts,
    )


def _id_of(entry: Entry) -> str:
    return entry.name.rpartition("/")[2].rpartition(".")[0]


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
