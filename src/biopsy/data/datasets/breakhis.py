"""BreakHis: images of breast tumours of eight subtypes at four magnifications, encoded in file names.

``SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<number>.png``, such as ``SOB_B_A-14-22549AB-100-001.png``,
in any folder tree. The patient is the case (year and number); letters after the number are its pieces.

Classes are the subtypes; ``--positive malignant`` merges them into two. Magnifications are not mixed: the
layout names one of several, such as ``breakhis-100x``. The pixel size is not reliably published and must be
given.
"""

import re
from functools import partial

from biopsy.core.errors import DataError
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets.base import (
    Dataset,
    ImageFiles,
    Listing,
    list_images,
    make_table,
    mostly,
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
    return mostly(archive, _match)


def list_patches(archive: Archive, magnification: int | None = None) -> Listing:
    """List the images by their names, checked against their folders."""
    unique, skipped, counts = list_images(archive, _identify)
    named = [(match, entry) for _, entry in unique if (match := _match(entry))]
    chosen = [item for item in named if magnification in (None, int(item[0]["magnification"]))]
    magnifications = sorted({int(match["magnification"]) for match, _ in chosen})
    if len(magnifications) > 1:
        raise DataError(
            f"{archive.path} has the magnifications {', '.join(f'{number}X' for number in magnifications)}: "
            f"choose one, such as --dataset breakhis-{magnifications[0]}x"
        )
    entries = [entry for _, entry in chosen]
    class_names = [_subtype(match) for match, _ in chosen]
    return Listing(
        table=make_table(
            patch_id=[_identify(entry) for entry in entries],
            patient_id=[match["case"] for match, _ in chosen],
            slide_id=[match["case"] + match["piece"].upper() for match, _ in chosen],
            class_name=class_names,
            source=[entry.name for entry in entries],
            magnification=[f"{match['magnification']}X" for match, _ in chosen],
        ),
        pixels=ImageFiles(archive, entries),
        class_names=[name for name in _SUBTYPES.values() if name in class_names],
        positive_class=None,
        mpp=None,
        skipped=skipped,
        counts=counts | {"other_magnifications": len(unique) - len(chosen)},
    )


def _match(entry: Entry) -> re.Match[str] | None:
    match = _NAME.fullmatch(entry.name.rpartition("/")[2])
    return match if match and (match["kind"].upper(), match["code"].upper()) in _SUBTYPES else None


def _subtype(match: re.Match[str]) -> str:
    return _SUBTYPES[match["kind"].upper(), match["code"].upper()]


def _identify(entry: Entry) -> str:
    """Return the id of an image; refuse a name that contradicts a folder."""
    match = _match(entry)
    if match is None:
        raise DataError("is not named SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<number>")
    kind = "benign" if match["kind"].upper() == "B" else "malignant"
    expected = {
        "class": (_subtype(match), set(_SUBTYPES.values())),
        "kind": (kind, {"benign", "malignant"}),
        "magnification": (f"{match['magnification']}x", {f"{number}x" for number in MAGNIFICATIONS}),
    }
    for folder in entry.name.lower().split("/")[:-1]:
        for field, (value, options) in expected.items():
            if folder in options and folder != value:
                raise DataError(f"is in the folder {folder}, but its name has the {field} {value}")
    return match[0].rpartition(".")[0].upper()


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
