"""Prediction of patches from images, folders, zips and packs with a trained classifier."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from biopsy.core.errors import ArchiveError, DataError, RunError, SlideError
from biopsy.core.files import refuse_inputs
from biopsy.core.results import SKIPPED, Output, Table, name_skipped
from biopsy.core.storage import parse_url, stage
from biopsy.core.text import class_title, count, normalize_name, printable
from biopsy.data.archives import MAX_ENTRY_BYTES, open_archive
from biopsy.data.pack_files import TABLE, pad, patch_sha256
from biopsy.data.packs import Pack, is_pack
from biopsy.data.predictions import (
    IDENTITY,
    FixedThreshold,
    check_name,
    check_replaceable,
    give_ids,
    write_predictions,
    write_submission,
)
from biopsy.data.splits import FOLDER as SPLITS
from biopsy.data.tables import refuse_decided
from biopsy.models.classifier import Classifier, Tta
from biopsy.models.engine import Engine
from biopsy.models.hardware import Precision, pick_device
from biopsy.models.inference import Predictor, open_predictor
from biopsy.models.out_of_distribution import OOD_ADVICE, ood_warning, out_of_distribution_scores
from biopsy.models.runtimes import MIN_PATCHES_TO_CONVERT
from biopsy.slide_io.backends import SLIDE_SUFFIXES, list_slide_files
from biopsy.slide_io.images import IMAGE_SUFFIXES, decode, read_header
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run

logger = logging.getLogger(__name__)

SHOWN_PATCHES = 20  # maximum number of patches that are printed
_SLIDE = 4  # sides of a patch, beyond which an image is rather a slide
CHUNK = 2048  # patches held in memory at once

Skipped = list[dict[str, str]]


@dataclass(frozen=True)
class Prediction(Output):
    """Result of `predict`.

    Attributes:
        frame: The table: the columns of every predictions file, ``source`` (the input path),
            ``colour_distance``, ``feature_distance`` (multiples of their limits) and ``out_of_distribution``.
        skipped: Unreadable inputs: ``source`` and ``reason``.
        class_names: Names of the classes, in the order of ``pred``.
        positive_class: Positive class of two; None for more classes.
        threshold: Decision threshold on its probability; None if there is none, or if inputs with and without
            coordinates were decided by different ones.
        n_training: Number of patches that the model was trained on; None if its run or pack is unavailable.
    """

    frame: pd.DataFrame
    path: Path
    skipped: Skipped
    class_names: list[str]
    positive_class: str | None = None
    threshold: FixedThreshold | None = None
    n_training: int | None = None

    def count_classes(self) -> dict[str, int]:
        """Return the number of patches predicted as each class."""
        return {name: int((self.frame["pred"] == i).sum()) for i, name in enumerate(self.class_names)}

    def blocks(self) -> list[str | Table]:
        n = len(self.frame)
        counts = ", ".join(f"{n:,} {class_title(name)}" for name, n in self.count_classes().items() if n)
        lines = [str(self.path), f"{count(n, 'patch')}: {counts or 'none'}"]
        return [self._table(), *lines] if 0 < n <= SHOWN_PATCHES else [*lines]

    def _table(self) -> Table:
        """Return class and probability of each patch, abstentions and patches out of distribution.

        For two classes the probability is that of the positive class, which the threshold refers to.
        """
        rows, positive, threshold = [], self.positive_class, self.threshold
        for patch in self.frame.to_dict("records"):
            name = self.class_names[patch["pred"]]
            notes = {"abstains": patch["abstained"], "out of distribution": patch["out_of_distribution"]}
            noted = ", ".join(note for note, holds in notes.items() if holds is True)
            rows.append(
                [str(patch["patch_id"]), class_title(name), f"{patch[f'prob_{positive or name}']:.3f}", noted]
            )
        title = class_title(positive or "")
        note = f"predicted {title} from {threshold['value']:.3f} on" if threshold else ""
        heading = f"probability of {title}" if positive else "probability"
        return Table(["patch", "class", heading, ""], rows, note=note)

    def to_json(self) -> dict[str, object]:
        return {
            "path": self.path,
            "n_patches": len(self.frame),
            "pred": self.count_classes(),
            "n_training": self.n_training,
            "skipped": self.skipped,
        }

    def problems(self) -> list[str]:
        n = self.n_training
        used = [f"{n:,} of these patches were used for training (column subset)"] if n else []
        return [*used, *name_skipped(self.skipped, self.path)]

    @property
    def exit_code(self) -> int:
        return SKIPPED if self.skipped else 0


@dataclass(frozen=True)
class _Chunk:
    """Patches in memory; ``table`` has their identity, ``source`` and, if known, ``target``."""

    table: pd.DataFrame
    patches: np.ndarray
    sizes: np.ndarray


def predict(
    model: Run | Classifier | Path | str,
    paths: Sequence[Path | str] | Path | str,
    *,
    out: Path | str | None = None,
    format: Literal["csv", "parquet", "kaggle"] = "csv",
    precision: Precision = "auto",
    device: str = "auto",
    tta: Tta | None = None,
    trust_model: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Predict patches from images, folders, zips and packs, and write one table.

    Files that are not images, or larger than the classifier's patches, are skipped and listed.
    Out-of-distribution patches are marked in ``out_of_distribution``. The column ``subset`` states the subset
    of patches that the run was trained, validated or tested on, which are recognised by their pixels.

    Args:
        model: Finished run, classifier, bundle, folder of a WSInfer model, name of a shipped classifier, or
            ``hf:ORG/NAME[@REVISION]`` on the Hugging Face hub.
        paths: Images, folders, zips and packs.
        out: Output table, ``.csv`` or ``.parquet`` (default: ``predictions.csv``, or ``submission.csv``
            for kaggle).
        format: Format of the table without ``out``; ``kaggle`` writes ``id,label``: the file name without
            its suffix, and the probability of the positive class.
        precision: Arithmetic: ``auto`` is bf16 if the device computes it in hardware and there are 1,024
            patches or more, else fp32; ``int8`` needs a bundle written with ``export --int8``.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tta: Test-time augmentation: ``none`` predicts one view of each patch, ``d4`` averages its eight
            symmetries in eight times the time (default: the classifier's own, with which it was calibrated).
        trust_model: SHA-256 of a WSInfer model's TorchScript, which is code and runs only if its hash is
            given.
        on_progress: Called with the numbers of patches done and in all.

    Raises:
        RunError: If the model cannot be opened, or is not trusted.
        DataError: If a path does not exist, or nothing could be read; for Kaggle, if the classifier has more
            than two classes or ids are duplicated.
        SlideError: If a path is a slide or a folder of slides.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    skipped: Skipped = []
    is_remote = any(parse_url(path) is not None for path in paths)
    sources = [] if is_remote else open_sources(list(map(Path, paths)), skipped)
    classifier = open_classifier(model, trust_model=trust_model, tta=tta)
    subsets = _subsets_by_hash(model)
    device = pick_device(device)
    if is_remote:  # copied only for a model that can be opened
        sources = open_sources([Path(stage(path)) for path in paths], skipped)
    check_packs(classifier, sources)
    path = Path(out or ("submission.csv" if format == "kaggle" else f"predictions.{format}"))
    if path.suffix not in (".csv", ".parquet"):
        raise DataError(f"predictions cannot be written to {path.name!r}; use .parquet or .csv")
    refuse_inputs(path, *_list_protected(model, sources))
    refuse_decided(path)
    check_replaceable(path, is_named=out is not None)
    if format == "kaggle":
        _check_submission(classifier, path, sources)
    n_patches, done = sum(map(len, sources)) + len(skipped), 0
    is_short = precision == "auto" and n_patches < MIN_PATCHES_TO_CONVERT
    engine = Engine(device, "fp32" if is_short else precision)
    frames, thresholds = [], []
    with open_predictor(classifier, engine, n_patches) as predictor:
        for source in sources:
            chunks = []
            for chunk in source.read(classifier, skipped):
                chunk.table["subset"] = _find_subsets(chunk, subsets)
                chunks.append(_predict_chunk(classifier, chunk, predictor))
                done += len(chunk.table)
                if on_progress:
                    on_progress(done + len(skipped), n_patches)
            if chunks:
                predicted, used = _decide(classifier, chunks)
                frames.append(predicted)
                thresholds.append(used.decision_threshold)
    if not frames:
        first = f"; {skipped[0]['source']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"no patch could be read from {', '.join(map(str, paths))}{first}")
    frame = pd.concat(frames, ignore_index=True)
    _warn_of_novelty(frame, classifier)
    threshold = thresholds[0] if all(other == thresholds[0] for other in thresholds) else None
    metadata = {
        "classifier_sha256": classifier.sha256,
        "classifier_source": classifier.source,
        "pack_sha256": None,
        "split": None,
        "threshold": threshold,
        "tta": classifier.info.tta,
        "precision": engine.precision,
        "sources": [str(source) for source in paths],
        "skipped": skipped,
        "software": dict([predictor.software]),
    }
    write = write_submission if format == "kaggle" else write_predictions
    n_training = int((frame["subset"] == "train").sum()) if subsets else None
    info = classifier.info
    written = write(path, frame, metadata)
    return Prediction(
        frame, written, skipped, info.class_names, info.positive_class, threshold, n_training=n_training
    )


def _subsets_by_hash(model: Run | Classifier | Path | str) -> dict[str, str]:
    """Return the subset of each patch of a run's pack by hash; empty if the run or pack is unavailable."""
    if isinstance(model, Classifier):
        return {}
    if not isinstance(model, Run):
        folder = next(
            (path for path in (Path(model), Path(model).parent) if (path / "run.json").is_file()), None
        )
        if folder is None:
            return {}
        model = Run.open(folder)
    try:
        pack = model.open_pack(verify=False)
    except RunError:
        return {}
    subsets = model.subsets(pack)
    order = np.argsort(subsets == "train", kind="stable")  # train overrides for duplicate patches
    return dict(zip(pack.table["sha256"].to_numpy(str)[order], subsets[order], strict=True))


def _find_subsets(chunk: _Chunk, subsets: dict[str, str]) -> list[str | None]:
    """Return the subset of each patch in the run's pack; None for others."""
    if not subsets:
        return [None] * len(chunk.table)
    patches = zip(chunk.patches, chunk.sizes, strict=True)
    return [subsets.get(patch_sha256(patch[:height, :width])) or None for patch, (width, height) in patches]


def _list_protected(model: Run | Classifier | Path | str, sources: "list[Source]") -> Iterator[Path]:
    """Yield the tables of the model and the packs, which must not be overwritten."""
    if not isinstance(model, Classifier):
        folder = model.path if isinstance(model, Run) else Path(model)
        yield from (folder / "split.csv", folder / "predictions")
    for source in sources:
        if isinstance(source, PackSource):
            yield from (source.path / TABLE, source.path / SPLITS)


def _check_submission(classifier: Classifier, path: Path, sources: "list[Source]") -> None:
    """Check the requirements of a Kaggle submission before prediction."""
    if classifier.positive_index is None:
        raise DataError(
            "a Kaggle submission has one probability per patch, but the classifier has "
            f"{len(classifier.info.class_names)} classes: write csv or parquet"
        )
    check_name(path)
    give_ids([name for source in sources for name in source.names])


def _warn_of_novelty(frame: pd.DataFrame, classifier: Classifier) -> None:
    """Log a warning if more patches look out-of-distribution than expected from the reference quantile."""
    reference = classifier.info.out_of_distribution
    if reference is None:
        return
    share = float(frame["out_of_distribution"].mean())
    if (expected := ood_warning(share, reference["quantile"])) is not None:
        logger.warning("%s (column out_of_distribution): %s", expected, OOD_ADVICE)


_Predicted = tuple[pd.DataFrame, np.ndarray, pd.DataFrame]
"""Table, logits and out-of-distribution scores of a chunk."""


def _predict_chunk(classifier: Classifier, chunk: _Chunk, predictor: Predictor) -> _Predicted:
    logits, features = predictor.logits_and_features(chunk.patches, chunk.sizes)
    return chunk.table, logits, out_of_distribution_scores(classifier, chunk.patches, chunk.sizes, features)


def _decide(classifier: Classifier, chunks: list[_Predicted]) -> tuple[pd.DataFrame, Classifier]:
    """Return the predictions of a source from its logits, and the classifier with or without context."""
    tables, all_logits, ood_scores = zip(*chunks, strict=True)
    table = pd.concat(tables, ignore_index=True)
    classifier = classifier.for_patches(table)
    logits = classifier.add_context(np.concatenate(all_logits), table)
    frame = classifier.tabulate(table, logits)
    if "source" in table:
        frame["source"] = table["source"].astype("string")
    return pd.concat([frame, pd.concat(ood_scores, ignore_index=True)], axis=1), classifier


@dataclass(frozen=True)
class PackSource:
    """Patches of a pack."""

    path: Path
    pack: Pack

    def __len__(self) -> int:
        return len(self.pack)

    @property
    def names(self) -> list[str]:
        return self.pack.table["patch_id"].tolist()

    def read(self, classifier: Classifier, skipped: Skipped) -> Iterator[_Chunk]:
        pack = self.pack
        same_classes = pack.class_names == classifier.info.class_names
        if not same_classes:
            logger.warning(
                "%s: its classes (%s) are not the classifier's (%s); its labels are left out",
                self.path,
                ", ".join(pack.class_names),
                ", ".join(classifier.info.class_names),
            )
        for start in range(0, len(pack), CHUNK):
            rows = slice(start, start + CHUNK)
            table = pack.table[list(IDENTITY)].iloc[rows].reset_index(drop=True)
            if same_classes:
                table["target"] = pack.target[rows]
            yield _Chunk(table.assign(source=str(self.path)), pack.patches[rows], pack.sizes[rows])


@dataclass(frozen=True)
class Image:
    """An image file; ``source`` is its path, or that of the folder or zip that contains it."""

    name: str
    source: str
    read: Callable[[], bytes | memoryview]


@dataclass(frozen=True)
class ImageSource:
    """Images of a folder or zip, or given one by one."""

    images: list[Image]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> list[str]:
        return [image.name for image in self.images]

    def read(self, classifier: Classifier, skipped: Skipped) -> Iterator[_Chunk]:
        patch_px = classifier.info.patch_px
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self.images), CHUNK):
                images = self.images[start : start + CHUNK]
                readable, decoded = [], []
                for image, pixels in zip(images, pool.map(lambda i: _load(i, patch_px), images), strict=True):
                    if isinstance(pixels, str):
                        skipped.append({"source": _full_path(image), "reason": pixels})
                    else:
                        readable.append(image)
                        decoded.append(pixels)
                if readable:
                    rows = [{"patch_id": image.name, "source": image.source} for image in readable]
                    yield _Chunk(pd.DataFrame(rows), *pad_patches(decoded, patch_px))


Source = PackSource | ImageSource


def _load(image: Image, patch_px: int) -> np.ndarray | str:
    """Return the pixels of an image, or the reason why it cannot be read."""
    try:
        return decode_patch(image.read(), patch_px)
    except DataError as error:
        return str(error)


def decode_patch(data: bytes | memoryview, patch_px: int) -> np.ndarray:
    """Return the pixels of an image file, uint8 ``(h, w, 3)``, at most ``patch_px`` a side.

    Raises:
        DataError: If the file is not an image, damaged, or larger than ``patch_px``; without its name.
    """
    header = read_header(data)
    if max(header.width, header.height) > patch_px:
        size = f"{header.width}x{header.height}"
        is_slide = min(header.width, header.height) > _SLIDE * patch_px
        slide = ": map it as a slide (`biopsy slide`)" if is_slide else ""
        raise DataError(f"is {size} px where the classifier takes patches of {patch_px}x{patch_px}{slide}")
    return decode(data)


def predict_patches(
    classifier: Classifier,
    table: pd.DataFrame,
    patches: np.ndarray,
    sizes: np.ndarray,
    *,
    predictor: Predictor,
) -> pd.DataFrame:
    """Predict patches in memory; see `predict`.

    Args:
        table: ``patch_id`` of each patch, and ``x, y, slide_id, patient_id`` if known.
        patches: uint8 ``(n, patch_px, patch_px, 3)``, padded as by `pad_patches`.
        sizes: True ``(width, height)`` of each patch.
        predictor: From `open_predictor`.

    Returns:
        One row per patch: the columns of `Prediction.frame`, without ``source``.
    """
    return _decide(classifier, [_predict_chunk(classifier, _Chunk(table, patches, sizes), predictor)])[0]


def _full_path(image: Image) -> str:
    return image.source if Path(image.source).name == image.name else f"{image.source}/{image.name}"


def open_sources(paths: list[Path], skipped: Skipped) -> list[Source]:
    """Open images, folders, zips and packs; consecutive images are one source.

    Raises:
        DataError: If a path does not exist.
        SlideError: If a path is a slide or a folder of slides.
    """
    sources: list[Source] = []
    for are_images, group in groupby(paths, _is_image):
        if are_images:
            sources.append(
                ImageSource(
                    [Image(normalize_name(p.name), printable(str(p)), partial(_read_file, p)) for p in group]
                )
            )
            continue
        for path in group:
            if is_pack(path):
                sources.append(PackSource(path, Pack.open(path)))
            else:
                sources.append(_open_archive(path, skipped))
    return sources


def check_packs(classifier: Classifier, sources: Sequence[Source]) -> None:
    """Refuse packs that do not fit the classifier.

    Raises:
        DataError: Naming what differs.
    """
    for source in sources:
        if isinstance(source, PackSource):
            classifier.check_pack(source.pack)


def _open_archive(path: Path, skipped: Skipped) -> ImageSource:
    if not path.exists():
        raise DataError(f"{path} does not exist: give images, folders, zips or packs")
    if path.is_file() and path.suffix.lower() in SLIDE_SUFFIXES:
        raise SlideError(f"{path} is a slide, not a patch: map it with `biopsy slide`")
    slides = SlideError(f"{path} holds slides, not patches: map them with `biopsy slide`")
    try:
        archive = open_archive(path)
    except ArchiveError:
        if path.is_dir() and list_slide_files(path):
            raise slides from None
        raise
    skipped += [
        {"source": f"{path}/{name}", "reason": "is a zip inside a folder: give it separately"}
        for name in archive.unread
    ]
    entries = [entry for entry in archive.entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    if not entries and any(entry.name.lower().endswith(SLIDE_SUFFIXES) for entry in archive.entries):
        raise slides
    return ImageSource(
        [Image(entry.name, printable(str(path)), partial(archive.read, entry)) for entry in entries]
    )


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_ENTRY_BYTES:
            raise DataError(f"has {path.stat().st_size:,} bytes; at most {MAX_ENTRY_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None


def pad_patches(images: Sequence[np.ndarray], patch_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images padded as in a pack, and their true ``(width, height)``."""
    sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
    return np.stack([pad(image, patch_px) for image in images]), sizes
