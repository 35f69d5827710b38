"""A data set."""

import re

import pandas as pd

from biopsy.data.archives import Archive
from biopsy.data.datasets import Dataset, Listing, register_dataset
from biopsy.data.datasets.base import ImageFiles, is_image

NAME = re.compile(r"(?P<patient>\w+)-\d+-(?P<class_name>benign|malignant)\.png")


def recognise(archive: Archive) -> bool:
    names = [entry.name.rpartition("/")[2] for entry in archive.entries if is_image(entry)]
    return bool(names) and all(NAME.fullmatch(name) for name in names)


def list_patches(archive: Archive) -> Listing:
    rows, entries = [], []
    for entry in archive.entries:
        if match := NAME.fullmatch(entry.name.rpartition("/")[2]):
            place = (None, None, pd.NA, pd.NA)
            rows.append((match[0][:-4], match["patient"], *place, match["class_name"], entry.name))
            entries.append(entry)
    columns = ["patch_id", "patient_id", "slide_id", "site_id", "x", "y", "class_name", "source"]
    return Listing(
        table=pd.DataFrame(rows, columns=columns),
        pixels=ImageFiles(archive, entries),
        class_names=["benign", "malignant"],
        positive_class="malignant",
        mpp=0.5,
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
