"""Invasive ductal carcinoma: Kaggle's "Breast Histopathology Images", with metadata in file names.

``<patient>/<0|1>/<patient>_idx5_x<X>_y<Y>_class<0|1>.png``, in the root folder,
``IDC_regular_ps50_idx5/``, or both (the current archive has every file twice; copies are dropped).
The release has one slide per patient, so ``slide_id`` is the patient's id.
"""

import re

from biopsy.core.errors import DataError
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    Dataset,
    ImageFiles,
    KaggleData,
    Listing,
    RemoteFile,
    list_images,
    make_table,
    mostly,
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
    return mostly(archive, _match)


def list_patches(archive: Archive) -> Listing:
    """List the patches by their names, checked against their folders."""
    names = (entry.name.rpartition("/")[2] for entry in archive.images)
    patients = {name.partition("_idx")[0] for name in names}

    def identify(entry: Entry) -> str:
        match = _match(entry)
        if match is None:
            raise DataError("is not named <patient>_idx5_x<X>_y<Y>_class<0|1>.png")
        _check_name(entry, match, patients)
        return f"{match['patient']}/{match['label']}/{match[0][:-4]}"

    unique, skipped, counts = list_images(archive, identify)
    parts = [key.split("/") for key, _ in unique]
    coordinates = [_COORDINATES.findall(patch_id)[-1] for _, _, patch_id in parts]
    return Listing(
        table=make_table(
            patch_id=[patch_id for _, _, patch_id in parts],
            patient_id=[patient_id for patient_id, _, _ in parts],
            slide_id=[patient_id for patient_id, _, _ in parts],
            x=[int(x) for x, _ in coordinates],
            y=[int(y) for _, y in coordinates],
            class_name=[CLASS_NAMES[int(label)] for _, label, _ in parts],
            source=[entry.name for _, entry in unique],
        ),
        pixels=ImageFiles(archive, [entry for _, entry in unique]),
        class_names=CLASS_NAMES,
        positive_class="idc",
        mpp=MPP,
        skipped=skipped,
        counts=counts,
    )


def _match(entry: Entry) -> re.Match[str] | None:
    return _NAME.fullmatch(entry.name.rpartition("/")[2])


def _check_name(entry: Entry, match: re.Match[str], patients: set[str]) -> None:
    """Refuse an entry whose name contradicts its folders or is out of range.

    The folder above the class is a patient if it is a number or a known patient; other folders, such as
    ``training/``, are ignored.
    """
    *parents, folder = ["", *entry.name.split("/")[:-1]]
    if folder in ("0", "1") and folder != match["label"]:
        raise DataError(f"is in the folder of class {folder}, but its name has class {match['label']}")
    patient = parents[-1] if parents and folder in ("0", "1") else ""
    if (patient.isdigit() or patient in patients) and patient != match["patient"]:
        raise DataError(f"is in the folder of patient {patient}, but its name has patient {match['patient']}")
    x, y = match["x"], match["y"]
    if len(x) > 9 or len(y) > 9 or int(x) > MAX_PX or int(y) > MAX_PX:
        raise DataError(f"has coordinates out of range: x and y must be at most {MAX_PX:,} px")


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
        licence="CC0 1.0, as the Kaggle page says",
        files=tuple(RemoteFile(_CASE_LISTS.format(name=name)) for name in ("train", "val", "test")),
        # 277,524 PNGs, twice in the archive: 6.0 kB each there (mean of 8,151), 8.1 kB in blocks on disk.
        kaggle=KaggleData(
            "paultimothymooney/breast-histopathology-images", "dataset", needed_bytes=7_900_000_000
        ),
        credentials="usually none; where Kaggle asks for an account, a token as for hcd",
    )
)
