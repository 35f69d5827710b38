"""The layouts real archives come in, one file each, found by name or recognised.

To add one, write a module with a `Layout` named ``LAYOUT``: how it is recognised, how its files become rows
(patient, slide, place, class), what the whole set counts, whom to cite, its licence. Name it in ``_MODULES``
below, before ``folders``, which takes any tree of class folders; put a miniature tree in ``tests/trees``.

Annotated slides are no `Layout`, for they need to be told how to be cut: `biopsy.data.packing` asks for them.
"""

from biopsy.core.errors import DataError, suggest
from biopsy.data.archives import Archive
from biopsy.data.datasets import annotated_slides, breakhis, folders, hcd, idc, pcam
from biopsy.data.datasets.base import Layout, Listing

_MODULES = (idc, pcam, hcd, breakhis, folders)
LAYOUTS = {
    layout.name: layout for module in _MODULES for layout in getattr(module, "LAYOUTS", (module.LAYOUT,))
}

__all__ = ["LAYOUTS", "Layout", "Listing", "find_layout"]


def find_layout(archive: Archive, name: str | None = None) -> Layout:
    """Give the layout called ``name``, or the first that recognises the archive.

    Raises:
        DataError: If there is none; says what each layout looks for.
    """
    if name is not None:
        if name not in LAYOUTS:
            raise DataError(
                f"no dataset layout is called {name!r}; {suggest(name, (*LAYOUTS, annotated_slides.NAME))}"
            )
        return LAYOUTS[name]
    for layout in LAYOUTS.values():
        if layout.recognise(archive):
            return layout
    looked_for = {layout.name: layout.looks_for for layout in LAYOUTS.values()}
    looked_for[annotated_slides.NAME] = annotated_slides.LOOKS_FOR
    wanted = "; ".join(f"{name}: {what}" for name, what in looked_for.items())
    examples = ", ".join(repr(entry.name) for entry in archive.entries[:3])
    raise DataError(f"{archive.path} has no known layout (it holds {examples}). Looked for {wanted}")
