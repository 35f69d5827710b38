"""Data sets, one `Dataset` per file: layout, expected counts, pixel size, citation, licence and download.

Modules in this folder, and modules in the entry point group ``biopsy.datasets`` of installed packages, are
registered automatically.
"""

from biopsy.core.errors import DataError, suggest
from biopsy.data.archives import Archive
from biopsy.data.datasets.base import DATASETS, Dataset, Listing, register_dataset

__all__ = ["DATASETS", "Dataset", "Listing", "find_dataset", "list_datasets", "register_dataset"]


def list_datasets() -> list[Dataset]:
    """Return all data sets in the order in which they are tried on an archive."""
    return sorted(DATASETS.values(), key=lambda dataset: dataset.takes_any)


def find_dataset(archive: Archive, name: str | None = None) -> Dataset:
    """Return the data set called ``name``, or the first that recognises the archive.

    Raises:
        DataError: If there is none; lists the known layouts.
    """
    if name is not None:
        if name not in DATASETS:
            raise DataError(f"unknown dataset layout {name!r}; {suggest(name, DATASETS)}")
        return DATASETS[name]
    datasets = list_datasets()
    for dataset in datasets:
        if dataset.recognise(archive):
            return dataset
    named = {dataset.looks_for: dataset.name for dataset in reversed(datasets)}  # of each layout the first
    layouts = "; ".join(f"{name}: {looks_for}" for looks_for, name in reversed(named.items()))
    examples = ", ".join(repr(entry.name) for entry in archive.entries[:3])
    raise DataError(f"{archive.path} has no known layout (it holds {examples}). Known layouts: {layouts}")
