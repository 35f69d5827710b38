"""The registry of exporters: what a bundle holds beside the classifier's own files.

To add one, write a file in this folder, or a module that an installed package names in the entry point group
``biopsy.exporters``, and register an `Exporter`. Every bundle is then written with it, and left only where
its probabilities equal the classifier's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biopsy.core.plugins import Registry
from biopsy.models.classifier import Classifier


@dataclass(frozen=True)
class Exporter:
    """A form of the network.

    Attributes:
        name: As it stands in ``parity.json``.
        write: Writes it into the bundle's folder.
        predict: Returns the probabilities ``(n, n_classes)`` that programs get from what was written, of
            patches, uint8 ``(n, patch_px, patch_px, 3)``; None where nothing was written.
        packages: Packages that decide what it gives; their versions are kept.
        code: The file that is code: in a bundle from elsewhere it runs only if its hash is named.
    """

    name: str
    write: Callable[[Classifier, Path], None]
    predict: Callable[[Classifier, Path, np.ndarray], np.ndarray | None]
    packages: tuple[str, ...] = ()
    code: str | None = None


FORMATS: Registry[Exporter] = Registry("biopsy.exporters", "biopsy.exporting.formats")


def register_exporter(exporter: Exporter) -> Exporter:
    """Make an exporter known under its name."""
    FORMATS.add(exporter.name, exporter, exporter.write)
    return exporter
