"""Formats of the network in a bundle, one file per format.

To add one, write a file in this folder, or a module of the entry point group ``biopsy.exporters``, and
register an `Exporter`. Every bundle then contains it, if its probabilities equal those of the classifier.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biopsy.core.plugins import Registry
from biopsy.models.classifier import Classifier


@dataclass(frozen=True)
class Exporter:
    """A format of the network.

    Attributes:
        name: Key in ``parity.json``.
        write: Writes it into the folder of a bundle.
        predict: Returns the probabilities ``(n, n_classes)`` of patches, uint8 ``(n, patch_px, patch_px,
            3)``, as other programs compute them; None if nothing was written.
        packages: Packages on which they depend, whose versions are recorded.
        code: Name of a file with code, which in a bundle from elsewhere runs only if its hash is given.
    """

    name: str
    write: Callable[[Classifier, Path], None]
    predict: Callable[[Classifier, Path, np.ndarray], np.ndarray | None]
    packages: tuple[str, ...] = ()
    code: str | None = None


FORMATS: Registry[Exporter] = Registry("biopsy.exporters", "biopsy.exporting.formats")


def register_exporter(exporter: Exporter) -> Exporter:
    FORMATS.add(exporter.name, exporter, exporter.write)
    return exporter
