"""BreakHis: images of breast tumours of eight subtypes at four magnifications, encoded in file names.

``SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<number>.png``, such as ``SOB_B_A-14-22549AB-100-001.png``,
in any folder tree. The patient is the case (year and number); letters after the number are its pieces.

Classes are the subtypes; ``--positive malignant`` merges them into two. Magnifications are not mixed: the
layout names one of several, such as ``breakhis-100x``. The pixel size is not reliably published and must be
given.
"""

import re
from functools import partial

import pandas as pd

from biopsy.core.errors import DataError
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    COLUMNS,
    Dataset,
    ImageFiles,
    Listing,
    Skipped,
    drop_copies,
    is_image,
    register_dataset,
)

BENIGN = {"A": "adenosis", "F": "fibroadenoma", "PT": "phyllodes_tumor", "TA": "tubular_adenoma"}
MALIGNANT = {
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
MAGNIFICATIONS = {40: 1_995, 100: 2_081, 200: 2_013, 400: 1_820}
"""Number of images at each magnification, from the paper."""

_SUBTYPES = {("B", code): name for code, name in BENIGN.items()} | {
    ("M", code): name for code, name in MALIGNANT.items()
}
_NAME = re.compile(
    r"SOB_(?P<kind>[BM])_(?P<code>[A-Z]{1,2})-(?P<case>[0-9]{2}-[0-9]+)(?P<piece>[A-Z]*)"
    r"-(?P<magnification>40|100|200|400)-[0-9]+\.[a-z]+",
    re.IGNORECASE,
)


def recognise(archive: Archive) -> bool:
    """Return whether at least half of the images have names of BreakHis."""
    images = [entry for entry in archive.entries if is_image(entry)]
    return bool(images) and 2 * sum(_match(entry) is not None for entry in images) >= len(images)


def list_patches(archive: Archive, magnification: int | None = None) -> Listing:
    """List the images by their names, checked against their folders.

    Raises:
        DataError: If there are several magnifications and none is named.
    """
    images = [entry for entry in archive.entries if is_image(entry)]
    skipped: list[Skipped] = []
    keyed: list[tuple[str, Entry]] = []
    for entry in images:
        match = _match(entry)
        if match is None:
            reason = "is not named SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<number>"
        else:
            reason = _find_contradiction(entry, match)
        if reason or match is None:
            skipped.append({"source": entry.name, "reason": reason})
        else:
            keyed.append((match[0].rpartition(".")[0].upper(), entry))
    unique, n_copies, differing = drop_copies(archive, keyed)
    rows, entries = [], []
    for patch_id, entry in unique:
        match = _match(entry)
        assert match is not None
        if magnification in (None, int(match["magnification"])):
            rows.append((patch_id, *_describe(match), entry.name, f"{match['magnification']}X"))
            entries.append(entry)
    table = pd.DataFrame(rows, columns=[*COLUMNS, "magnification"])
    magnifications = sorted(table["magnification"].unique(), key=lambda name: int(name[:-1]))
    if len(magnifications) > 1:
        raise DataError(
            f"{archive.path} has the magnifications {', '.join(magnifications)}: choose one, "
            f"such as --dataset breakhis-{magnifications[0].lower()}"
        )
    present = set(table["class_name"])
    return Listing(
        table=table,
        pixels=ImageFiles(archive, entries),
        class_names=[name for name in _SUBTYPES.values() if name in present],
        positive_class=None,
        mpp=None,
        skipped=skipped + differing,
        counts={
            "duplicates": n_copies,
            "other_magnifications": len(unique) - len(rows),
            "other_files": len(archive.entries) - len(images),
        },
    )


def _match(entry: Entry) -> re.Match[str] | None:
    match = _NAME.fullmatch(entry.name.rpartition("/")[2])
    return match if match and (match["kind"].upper(), match["code"].upper()) in _SUBTYPES else None


def _describe(match: re.Match[str]) -> tuple:
    """Return patient, slide, site, coordinates and class."""
    slide_id = match["case"] + match["piece"].upper()
    subtype = _SUBTYPES[match["kind"].upper(), match["code"].upper()]
    return match["case"], slide_id, None, pd.NA, pd.NA, subtype


def _find_contradiction(entry: Entry, match: re.Match[str]) -> str:
    """Return the reason if a folder of an entry contradicts its name, else ""."""
    subtype = _SUBTYPES[match["kind"].upper(), match["code"].upper()]
    kind = "benign" if match["kind"].upper() == "B" else "malignant"
    expected = {
        "class": (subtype, set(_SUBTYPES.values())),
        "kind": (kind, {"benign", "malignant"}),
        "magnification": (f"{match['magnification']}x", {f"{number}x" for number in MAGNIFICATIONS}),
    }
    for folder in entry.name.lower().split("/")[:-1]:
        for field, (value, options) in expected.items():
            if folder in options and folder != value:
                return f"is in the folder {folder}, but its name has the {field} {value}"
    return ""


def _make_dataset(magnification: int | None) -> Dataset:
    return Dataset(
        name="breakhis" if magnification is None else f"breakhis-{magnification}x",
        title="BreakHis, Spanhol et al. 2016"
        + ("" if magnification is None else f", its {magnification}X alone"),
        looks_for="images named SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<number>",
        recognise=recognise if magnification is None else lambda archive: False,
        list_patches=partial(list_patches, magnification=magnification),
        expected={
            "patches": sum(MAGNIFICATIONS.values())
            if magnification is None
            else MAGNIFICATIONS[magnification]
        },
        mpp=None,
        needs_mpp=True,
        groups={"benign": tuple(BENIGN.values()), "malignant": tuple(MALIGNANT.values())},
        citation="Spanhol et al. 2016 (IEEE Trans Biomed Eng 63:1455)",
        licence="CC BY 4.0, as its authors state",
    )


for _magnification in (None, *MAGNIFICATIONS):  # all magnifications, and each one
    register_dataset(_make_dataset(_magnification))
