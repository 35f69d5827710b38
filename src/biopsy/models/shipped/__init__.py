"""Classifiers that ship with the package, by name: ``idc`` and ``pcam``, each a folder here.

A folder is a classifier (``classifier.json``, ``weights.safetensors`` in half precision) with its model card,
``README.md``. ``benchmarks/shipped.py`` makes it from a finished run.
"""

import logging
from pathlib import Path

from biopsy.models.classifier import DOCUMENT, Classifier

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_MODEL_FILES = (DOCUMENT, "run.json", "config.json")  # of a classifier or bundle, a run, a WSInfer model


def list_shipped() -> list[str]:
    """Return the names of the classifiers that ship, in alphabetical order."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{DOCUMENT}"))


def is_shipped(model: Path | str) -> bool:
    """Return whether a name means a classifier that ships: one has that name, and no local model does."""
    path = Path(model)
    return str(path) in list_shipped() and not any((path / name).is_file() for name in _MODEL_FILES)


def open_shipped(name: Path | str) -> Classifier:
    """Open a classifier that ships, and log what it was trained on, in one short line."""
    if Path(name).exists():
        logger.info("%s: the classifier that ships with biopsy; ./%s holds no model", name, name)
    classifier = Classifier.load(FOLDER / str(name))
    logger.info("%s: %s; more: `biopsy list classifiers`", name, _describe_training(classifier))
    return classifier


def describe_shipped(name: str) -> str:
    """Return what a classifier that ships was trained on, as in "trained on 7,126 patches of IDC"."""
    return _describe_training(Classifier.load(FOLDER / name))


def _describe_training(classifier: Classifier) -> str:
    trained_on = classifier.info.description.partition(" (")[0]
    return trained_on[:1].lower() + trained_on[1:]
