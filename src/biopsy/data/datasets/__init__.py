"""Data sets, one file each: all that is known of one stands in its `Dataset`.

That is how it is recognised, how its files become rows (patient, slide, place, class, its own split), what
the whole set counts, micrometres per pixel, whom to cite, its licence and where it is downloaded. A file
here, or a module that an installed package names in the entry point group ``biopsy.datasets``, is found by
itself. Annotated slides are no `Dataset`, for they need to be told how to be cut: `biopsy.data.packing` asks
for them.
"""

from biopsy.core.errors import DataError, suggest
from biopsy.data.archives import Archive
from biopsy.data.datasets import annotated_slides
from biopsy.data.datasets.base import DATASETS, Dataset, Listing, register_dataset

__all__ = ["DATASETS", "Dataset", "Listing", "find_dataset", "list_datasets", "register_dataset"]


def list_datasets() -> list[Dataset]:
    """Return all data sets in the order in which they are tried on an archive."""
    return sorted(DATASETS.values(), key=lambda dataset: dataset.takes_any)


def find_dataset(archive: Archive, name: str | None = None) -> Dataset:
    """Return the data set called ``name``, or the first that recognises the archive.

    Raises:
        DataError: If there is none; says what each is recognised by.
    """
    if name is not None:
        if name not in DATASETS:
            raise DataError(
                f"no dataset layout is called {name!r}; {suggest(name, (*DATASETS, annotated_slides.NAME))}"
            )
        return DATASETS[name]
    known = list_datasets()
    for dataset in known:
        if dataset.recognise(archive):
            return dataset
    looked_for = {dataset.name: dataset.looks_for for dataset in known}
    looked_for[annotated_slides.NAME] = annotated_slides.LOOKS_FOR
    wanted = "; ".join(f"{name}: {what}" for name, what in looked_for.items())
    examples = ", ".join(repr(entry.name) for entry in archive.entries[:3])
    raise DataError(f"{archive.path} has no known layout (it holds {examples}). Looked for {wanted}")
