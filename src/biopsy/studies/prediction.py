"""Prediction: patches of any origin through a trained classifier, into one table."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from biopsy.data.archives import Archive, Entry, open_archive
from biopsy.data.packs import Pack, is_pack
from biopsy.data.predictions import IDENTITY, tabulate_predictions, write_predictions
from biopsy.errors import DataError, RunError
from biopsy.imaging.decode import decode
from biopsy.learning.classifiers import DOCUMENT, Classifier
from biopsy.learning.engine import Engine
from biopsy.learning.inference import predict_with_features
from biopsy.learning.novelty import measure_novelty
from biopsy.learning.runs import Run

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
CHUNK = 2048  # patches held in memory at once

Skipped = list[dict[str, str]]


@dataclass(frozen=True)
class Prediction:
    """What came of a call of `predict`.

    Attributes:
        frame: The table: the columns of every predictions file, and ``colour_distance``,
            ``feature_distance`` (multiples of their limits) and ``unlike_training``.
        path: Where it was written.
        skipped: What could not be read: ``source`` and ``reason``.
        class_names: Names of the classes that ``pred`` counts.
    """

    frame: pd.DataFrame
    path: Path
    skipped: Skipped
    class_names: list[str]


@dataclass(frozen=True)
class _Chunk:
    about: pd.DataFrame
    patches: np.ndarray
    sizes: np.ndarray


def predict(
    model: Run | Classifier | Path | str,
    paths: Sequence[Path | str] | Path | str,
    *,
    out: Path | str | None = None,
    format: Literal["csv", "parquet"] = "csv",
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Predict patches from images, folders, zips and packs, and write one table.

    A file that is no image, or larger than the patches the classifier was trained on, is skipped and named.
    Patches unlike anything in training are flagged in ``unlike_training``, not refused.

    Args:
        model: A finished run, or a classifier.
        paths: What to predict.
        out: The table to write; by default ``predictions.csv`` (or ``.parquet``) in the current folder.
        format: Of the table, where ``out`` does not say.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        on_progress: Called with patches done and patches in all.

    Raises:
        RunError: If the model is neither a finished run nor a classifier.
        DataError: If a path does not exist, or nothing could be read at all.
    """
    classifier = open_classifier(model)
    engine = Engine(device)
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    skipped: Skipped = []
    opened = [_open(Path(path)) for path in paths]
    n_patches, done = sum(map(len, opened)), 0
    frames = []
    for source in opened:
        for chunk in source.read(classifier, skipped):
            frames.append(_predict_chunk(classifier, chunk, engine))
            done += len(chunk.about)
            if on_progress:
                on_progress(done + len(skipped), n_patches)
    if not frames:
        first = f"; {skipped[0]['source']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"no patch could be read from {', '.join(map(str, paths))}{first}")
    frame = pd.concat(frames, ignore_index=True)
    path = Path(out) if out is not None else Path(f"predictions.{format}")
    about = {
        "classifier_sha256": classifier.sha256,
        "pack_sha256": None,
        "split": None,
        "threshold": classifier.info.thresholds[0] if classifier.info.thresholds else None,
        "sources": [str(source) for source in paths],
        "skipped": skipped,
    }
    return Prediction(frame, write_predictions(path, frame, about), skipped, classifier.info.class_names)


def open_classifier(model: Run | Classifier | Path | str) -> Classifier:
    """Give the classifier of a run, of a folder, or the one given."""
    if isinstance(model, Classifier):
        return model
    if not isinstance(model, Run) and (Path(model) / DOCUMENT).is_file():
        return Classifier.load(model)
    try:
        return Run.open(model).classifier
    except RunError as error:
        if isinstance(model, Run) or (Path(model) / "run.json").exists():
            raise
        raise RunError(f"{model} is neither a run nor a classifier") from error


def _predict_chunk(classifier: Classifier, chunk: _Chunk, engine: Engine) -> pd.DataFrame:
    logits, features = predict_with_features(classifier, chunk.patches, chunk.sizes, engine=engine)
    frame = tabulate_predictions(
        chunk.about,
        classifier.info.class_names,
        classifier.positive_index,
        logits,
        classifier.probs(logits),
        threshold=classifier.threshold,
    )
    return pd.concat([frame, measure_novelty(classifier, chunk.patches, chunk.sizes, features)], axis=1)


@dataclass(frozen=True)
class _PackSource:
    pack: Pack

    def __len__(self) -> int:
        return len(self.pack)

    def read(self, classifier: Classifier, skipped: Skipped) -> Iterator[_Chunk]:
        pack, wanted = self.pack, classifier.info
        if pack.info.mpp and wanted.mpp and abs(pack.info.mpp / wanted.mpp - 1) > 0.05:
            raise DataError(
                f"{pack.path} has {pack.info.mpp} um/px, the classifier was trained at {wanted.mpp}: "
                "prepare the patches at that resolution"
            )
        same_classes = pack.class_names == wanted.class_names
        for start in range(0, len(pack), CHUNK):
            rows = slice(start, start + CHUNK)
            about = pack.table[list(IDENTITY)].iloc[rows].reset_index(drop=True)
            if same_classes:
                about["target"] = pack.target[rows]
            yield _Chunk(about, pack.patches[rows], pack.sizes[rows])


@dataclass(frozen=True)
class _ImageSource:
    archive: Archive
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, classifier: Classifier, skipped: Skipped) -> Iterator[_Chunk]:
        patch_px = classifier.info.patch_px

        def load(entry: Entry) -> np.ndarray | str:
            try:
                image = decode(self.archive.read(entry))
            except DataError as error:
                return str(error)
            height, width = image.shape[:2]
            if max(height, width) > patch_px:
                return f"is {width}x{height} px where the classifier takes patches of {patch_px}x{patch_px}"
            return image

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self.entries), CHUNK):
                entries = self.entries[start : start + CHUNK]
                read, names = [], []
                for entry, image in zip(entries, pool.map(load, entries), strict=True):
                    if isinstance(image, str):
                        skipped.append({"source": f"{self.archive.path}/{entry.name}", "reason": image})
                    else:
                        read.append(image)
                        names.append(entry.name)
                if read:
                    yield _Chunk(pd.DataFrame({"patch_id": names}), *_pad(read, patch_px))


def _open(path: Path) -> _PackSource | _ImageSource:
    if is_pack(path):
        return _PackSource(Pack.open(path))
    if not path.exists():
        raise DataError(f"{path} does not exist: give images, folders, zips or packs")
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        archive = open_archive(path.parent)
        return _ImageSource(archive, [entry for entry in archive.entries if entry.name == path.name])
    archive = open_archive(path)
    return _ImageSource(archive, [e for e in archive.entries if e.name.lower().endswith(IMAGE_SUFFIXES)])


def _pad(images: list[np.ndarray], patch_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad images at the right and bottom by their edge, as a pack does; gives patches and true sizes."""
    sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
    patches = [
        np.pad(image, ((0, patch_px - image.shape[0]), (0, patch_px - image.shape[1]), (0, 0)), mode="edge")
        for image in images
    ]
    return np.stack(patches), sizes
