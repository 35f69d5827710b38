"""A data set."""

import re

from biopsy.core.errors import DataError
from biopsy.data.archives import Archive, Entry
from biopsy.data.datasets import Dataset, Listing, register_dataset
from biopsy.data.datasets.base import ImageFiles, list_images, make_table, mostly

NAME = re.compile(r"(?P<patient>\w+)-\d+-(?P<class_name>benign|malignant)\.png")


def match_name(entry: Entry) -> re.Match[str] | None:
    return NAME.fullmatch(entry.name.rpartition("/")[2])


def recognise(archive: Archive) -> bool:
    return mostly(archive, match_name)


def identify(entry: Entry) -> str:
    match = match_name(entry)
    if match is None:
        raise DataError("is not named <patient>-<n>-<benign|malignant>.png")
    return match[0]


def list_patches(archive: Archive) -> Listing:
    unique, skipped, counts = list_images(archive, identify)
    matches = [NAME.fullmatch(name) for name, _ in unique]
    return Listing(
        table=make_table(
            patch_id=[match[0][:-4] for match in matches],
            patient_id=[match["patient"] for match in matches],
            class_name=[match["class_name"] for match in matches],
            source=[entry.name for _, entry in unique],
        ),
        pixels=ImageFiles(archive, [entry for _, entry in unique]),
        class_names=["benign", "malignant"],
        positive_class="malignant",
        mpp=0.5,
        skipped=skipped,
        counts=counts,
    )


register_dataset(
    Dataset(
        name="example-dashed",
        title="Patches named by patient and class",
        looks_for="images named <patient>-<n>-<benign|malignant>.png",
        recognise=recognise,
        list_patches=list_patches,
        expected={},
        mpp=0.5,
        citation="",
        licence="that of your data",
    )
)
