"""Invasive ductal carcinoma: Kaggle's "Breast Histopathology Images", with metadata in file names.

``<patient>/<0|1>/<patient>_idx5_x<X>_y<Y>_class<0|1>.png``, in the root folder,
``IDC_regular_ps50_idx5/``, or both (the current archive has every file twice; copies are dropped).
The release has one slide per patient, so ``slide_id`` is the patient's id.
"""

import re

import pandas as pd

from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    COLUMNS,
    Dataset,
    ImageFiles,
    KaggleData,
    Listing,
    RemoteFile,
    Skipped,
    drop_copies,
    is_image,
    register_dataset,
)

CLASS_NAMES = ["non_idc", "idc"]
MPP = 4.0  # nominal 40x scans (0.25 um/px), downsampled 16 times

MAX_PX = 50_000  # 200 mm at `MPP`, larger than any slide; limits reassembled pictures

_NAME = re.compile(
    r"(?P<patient>[^/]+)_idx[0-9]+_x(?P<x>[0-9]+)_y(?P<y>[0-9]+)_class(?P<label>[01])\.png", re.IGNORECASE
)
_COORDINATES = re.compile(r"_x([0-9]+)_y([0-9]+)_class", re.IGNORECASE)


def recognise(archive: Archive) -> bool:
    """Return whether at least half of the images have names of IDC."""
    images = [entry for entry in archive.entries if is_image(entry)]
    return bool(images) and 2 * sum(_match(entry) is not None for entry in images) >= len(images)


def list_patches(archive: Archive) -> Listing:
    """List the patches by their names, checked against their folders."""
    images = [entry for entry in archive.entries if is_image(entry)]
    patients = {entry.name.rpartition("/")[2].partition("_idx")[0] for entry in images}
    skipped: list[Skipped] = []
    keyed = []
    for entry in images:
        match = _match(entry)
        if match is None:
            skipped.append(
                {"source": entry.name, "reason": "is not named <patient>_idx5_x<X>_y<Y>_class<0|1>.png"}
            )
        elif reason := _find_contradiction(entry, match, patients):
            skipped.append({"source": entry.name, "reason": reason})
        else:
            keyed.append((f"{match['patient']}/{match['label']}/{match[0][:-4]}", entry))
    unique, n_copies, differing = drop_copies(archive, keyed)
    rows = []
    for key, entry in unique:
        patient, label, patch_id = key.split("/")
        x, y = (int(value) for value in _COORDINATES.findall(patch_id)[-1])
        rows.append((patch_id, patient, patient, None, x, y, CLASS_NAMES[int(label)], entry.name))
    return Listing(
        table=pd.DataFrame(rows, columns=COLUMNS),
        pixels=ImageFiles(archive, [entry for _, entry in unique]),
        class_names=CLASS_NAMES,
        positive_class="idc",
        mpp=MPP,
        skipped=skipped + differing,
        counts={"duplicates": n_copies, "other_files": len(archive.entries) - len(images)},
    )


def _match(entry: Entry) -> re.Match[str] | None:
    return _NAME.fullmatch(entry.name.rpartition("/")[2])


def _find_contradiction(entry: Entry, match: re.Match[str], patients: set[str]) -> str:
    """Return the reason if an entry's name contradicts its folders or is out of range, else "".

    The folder above the class is a patient if it is a number or a known patient; other folders, such as
    ``training/``, are ignored.
    """
    *parents, folder = ["", *entry.name.split("/")[:-1]]
    if folder in ("0", "1") and folder != match["label"]:
        return f"is in the folder of class {folder}, but its name has class {match['label']}"
    patient = parents[-1] if parents and folder in ("0", "1") else ""
    if (patient.isdigit() or patient in patients) and patient != match["patient"]:
        return f"is in the folder of patient {patient}, but its name has patient {match['patient']}"
    x, y = match["x"], match["y"]
    if len(x) > 9 or len(y) > 9 or int(x) > MAX_PX or int(y) > MAX_PX:
        return f"has coordinates out of range: x and y must be at most {MAX_PX:,} px"
    return ""


# The commit is pinned, since no checksums are published. The
# 84, 29 and 49 patients are those of Cruz-Roa et al. 2014 and Janowczyk & Madabhushi 2016.
_CASE_LISTS = (
    "https://raw.githubusercontent.com/choosehappy/public/8560e48bc5eaf41b349d203f6ac0a2b7d9be1b67/"
    "DL%20tutorial%20Code/6-idc/cases_{name}.txt"
)


register_dataset(
    Dataset(
        name="idc",
        title="Breast Histopathology Images (invasive ductal carcinoma), Kaggle release",
        looks_for="images named <patient>_idx5_x<X>_y<Y>_class<0|1>.png",
        recognise=recognise,
        list_patches=list_patches,
        expected={"patches": 277_524, "patients": 279, "non_idc": 198_738, "idc": 78_786},
        mpp=MPP,
        citation="Cruz-Roa et al. 2014 (SPIE 9041); Janowczyk and Madabhushi 2016 (J Pathol Inform 7:29)",
        licence="stated on the Kaggle page; read it there",
        files=tuple(RemoteFile(_CASE_LISTS.format(name=name)) for name in ("train", "val", "test")),
        # 277,524 PNGs, twice in the archive: 6.0 kB each there (mean of 8,151), 8.1 kB in blocks on disk.
        kaggle=KaggleData(
            "paultimothymooney/breast-histopathology-images", "dataset", needed_bytes=7_900_000_000
        ),
        credentials="usually none; where Kaggle asks for an account, a token as for hcd",
    )
)
