"""Active learning (`next`): patches to label, at random or by uncertainty and distance from training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from biopsy.app.annotations import COLUMNS as LABELS
from biopsy.core.errors import DataError
from biopsy.core.files import check_outputs, refuse_inputs, update_directory
from biopsy.core.results import Output, Table, number
from biopsy.core.tables import read_csv_table, write_csv
from biopsy.core.text import class_title
from biopsy.data.packs import Pack, is_pack
from biopsy.data.predictions import IDENTITY
from biopsy.data.tables import refuse_decided
from biopsy.evaluation.predict import predict_patches
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.slides.mapping import Mapper
from biopsy.slides.sources import list_sources
from biopsy.training.open_model import open_classifier, open_run
from biopsy.training.runs import Run

SHOWN = 20  # patches printed
Strategy = Literal["random", "informative"]
COLUMNS = (*LABELS, "slide", "patient_id", "x", "y", "side", "prob", "uncertainty", "ood_score")


@dataclass(frozen=True)
class LabelQueue(Output):
    """Result of `next`.

    Attributes:
        table: The queue in its order: the columns of a label sheet, ``slide, patient_id, x, y, side``
            (level-0 pixels), ``prob``, ``uncertainty`` (0-1) and ``ood_score`` (multiple of the limit).
    """

    table: pd.DataFrame
    path: Path

    def blocks(self) -> list[str | Table]:
        columns = ["patch_id", "patient_id", "prob", "reason"]
        rows = self.table[columns].head(SHOWN).to_numpy(object).tolist()
        return [Table(columns, [[number(cell) for cell in row] for row in rows]), str(self.path)]

    def to_json(self) -> list[dict[str, object]]:
        return self.table.to_dict("records")


def next(
    model: Run | Classifier | Path | str,
    paths: Sequence[Path | str] | Path | str,
    *,
    budget: int = 100,
    strategy: Strategy = "random",
    seed: int = 0,
    out: Path | str = "queue.csv",
    mpp: float | None = None,
    device: str = "auto",
) -> LabelQueue:
    """Choose patches to label, and write them as a queue.

    Patches are drawn at random by default: the informative ranking has not been shown to need fewer labels.
    Informative patches rank by the mean of two percentiles: how near their probability is to the
    threshold, and how far they are from training (if the model has a reference). Patients take turns, and
    patches beside each other on a slide are not chosen together while there are others. Patches that the
    run was trained on are left out. ``biopsy view PACK --queue FILE`` shows the queue; its file is also a
    label sheet for ``biopsy prepare --labels`` once the column ``decision`` is filled in.

    Args:
        model: Run, classifier or bundle.
        paths: Packs, slides or folders of slides.
        budget: Number of patches to choose.
        strategy: How patches are chosen: ``random`` or ``informative``.
        seed: Seed of the random patches.
        out: Output file of the queue.
        mpp: Pixel size at level 0 in µm. Required for slides that do not record it.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DataError: If a path does not exist, or there is no patch to choose from.
    """
    if budget < 1:
        raise DataError(f"budget={budget}: expected at least 1")
    inputs = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    refuse_inputs(out, *inputs)
    refuse_decided(Path(out))
    check_outputs(Path(out).parent, Path(out).name)
    classifier = open_classifier(model)
    run = open_run(model)
    parts = [_from_pack(classifier, Pack.open(path), run, device) for path in inputs if is_pack(path)]
    slides = [path for path in inputs if not is_pack(path)]
    if slides:
        parts += _from_slides(model, slides, mpp, device)
    candidates = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if candidates.empty:
        raise DataError(f"{', '.join(map(str, inputs))} holds no patch that the model was not trained on")
    if strategy == "random":
        rows = np.random.default_rng(seed).permutation(len(candidates))[:budget]
    else:
        rows = choose(candidates, budget)
    chosen = candidates.iloc[rows].reset_index(drop=True)
    queue = chosen.reindex(columns=list(COLUMNS))
    _write(Path(out), queue)
    return LabelQueue(queue, Path(out))


def choose(candidates: pd.DataFrame, budget: int) -> np.ndarray:
    """Return the rows to label, most informative first.

    Args:
        candidates: ``uncertainty``, ``ood_score`` (NaN if unknown), ``patient_id``, ``slide``, ``x``, ``y``,
            ``side`` of each patch.
    """
    score = candidates["uncertainty"].rank(pct=True).to_numpy()
    ood_score = candidates["ood_score"].rank(pct=True).to_numpy(float)
    score = np.where(np.isnan(ood_score), score, (score + ood_score) / 2)
    order = np.argsort(-score, kind="stable")
    patients = candidates["patient_id"].fillna(candidates["slide"]).fillna("").to_numpy(str)
    waiting: dict[str, list[int]] = {}
    for row in order:
        waiting.setdefault(patients[row], []).append(int(row))
    x, y, side = (candidates[name].to_numpy(float) for name in ("x", "y", "side"))
    slides = candidates["slide"].fillna("").to_numpy(str)
    chosen: list[int] = []
    adjacent: dict[str, list[int]] = {name: [] for name in waiting}  # adjacent to chosen patches, used last
    taken: dict[str, list[int]] = {}

    def is_adjacent(row: int) -> bool:
        near = taken.get(slides[row], [])
        return bool(
            (np.maximum(np.abs(x[near] - x[row]), np.abs(y[near] - y[row])) <= 1.01 * side[row]).any()
        )

    for queues, may_touch in ((waiting, False), (adjacent, True)):
        while len(chosen) < budget and any(queues.values()):
            for patient, rows in queues.items():
                while rows and not may_touch and is_adjacent(rows[0]):
                    adjacent[patient].append(rows.pop(0))
                if rows and len(chosen) < budget:
                    row = rows.pop(0)
                    chosen.append(row)
                    taken.setdefault(slides[row], []).append(row)
    return np.array(chosen, int)


def read_queue(path: Path | str) -> pd.DataFrame:
    """Read a queue that `next` wrote; numbers as numbers.

    Raises:
        DataError: If the file is missing or no queue.
    """
    queue = read_csv_table(path, required=["patch_id", "slide", "x", "y", "side", "reason"])
    for name in ("x", "y", "side", "prob"):
        queue[name] = pd.to_numeric(queue.get(name), errors="coerce")
    return queue


def _from_pack(classifier: Classifier, pack: Pack, run: Run | None, device: str) -> pd.DataFrame:
    classifier.check_pack(pack)
    rows = np.arange(len(pack))
    if run is not None and run.info["pack"]["content_sha256"] == pack.info.content_sha256:
        rows = np.flatnonzero(run.subsets(pack) != "train")
    if not len(rows):
        return pd.DataFrame()
    ids = pack.table[list(IDENTITY)].iloc[rows].reset_index(drop=True)
    with open_predictor(classifier, Engine(device), len(rows)) as predictor:
        frame = predict_patches(classifier, ids, pack.patches[rows], pack.sizes[rows], predictor=predictor)
    names = classifier.info.class_names
    distances = [name for name in ("colour_distance", "feature_distance") if name in frame]
    probs = frame[[f"prob_{name}" for name in names]].to_numpy(float)
    table = pack.table.iloc[rows].reset_index(drop=True)
    ood_score = frame[distances].max(axis=1).to_numpy(float) if distances else np.full(len(rows), np.nan)
    patches = pd.DataFrame(
        {
            "patch_id": table["patch_id"].astype(str),
            "label": [pack.class_names[index] for index in pack.target[rows]],
            "slide": table["slide_id"].fillna(table["patient_id"]).astype("string"),
            "patient_id": table["patient_id"].astype("string"),
            "x": table["x"].astype(float),
            "y": table["y"].astype(float),
            "side": float(pack.info.patch_px),
        }
    )
    return _describe(patches, probs, classifier, ood_score)


def _from_slides(
    model: Run | Classifier | Path | str, paths: list[Path], mpp: float | None, device: str
) -> list[pd.DataFrame]:
    mapper = Mapper(model, mpp, None, False, "auto", device, None, None, None)
    parts, errors = [], []
    for mapped in mapper.map(list_sources(paths, mpp)):
        if isinstance(mapped.result, DataError):
            errors.append(mapped.result)
            continue
        slide_map = mapped.result.slide_map
        grid, name = slide_map.grid, mapped.source.name
        patches = pd.DataFrame({"x": grid.x, "y": grid.y}).assign(
            patch_id=[f"{name}@{x},{y}" for x, y in zip(grid.x, grid.y, strict=True)],
            label=None,
            slide=name,
            patient_id=name,
            side=grid.patch_px * grid.scale,
        )
        is_ood = slide_map.ood
        ood_score = np.full(len(patches), np.nan) if is_ood is None else np.where(is_ood == 1, 2.0, np.nan)
        parts.append(_describe(patches, slide_map.probs.astype(float), mapper.classifier, ood_score))
    if not parts and errors:
        raise errors[0] or DataError("no slide could be read")
    return parts


def _describe(
    patches: pd.DataFrame, probs: np.ndarray, classifier: Classifier, ood_score: np.ndarray
) -> pd.DataFrame:
    """Add what ranks patches: uncertainty, 1 at the threshold (or where two classes are equally likely)."""
    names, positive = classifier.info.class_names, classifier.positive_index
    if positive is None:
        first, second = -np.sort(-probs, axis=1)[:, :2].T
        shown, uncertainty, suggested = first, 1 - (first - second), probs.argmax(axis=1)
        classes = [names[index] for index in suggested]
    else:
        shown, threshold = probs[:, positive], classifier.threshold or 0.5
        room = np.where(shown >= threshold, max(1 - threshold, 1e-9), max(threshold, 1e-9))
        uncertainty = 1 - np.abs(shown - threshold) / room
        suggested = np.where(shown >= threshold, positive, 1 - positive)
        classes = [names[positive]] * len(shown)
    reasons = [
        f"P({class_title(name)}) {prob:.2f}"
        + (f"; out-of-distribution ({far:.1f} times the limit)" if far > 1 else "")
        for name, prob, far in zip(classes, shown, ood_score, strict=True)
    ]
    return patches.assign(
        prob=shown,
        uncertainty=uncertainty.clip(0, 1),
        ood_score=ood_score,
        reason=reasons,
        suggested=[names[index] for index in suggested],
        decision=None,
        who=None,
        when=None,
    )


def _write(path: Path, queue: pd.DataFrame) -> None:
    if path.suffix.lower() != ".csv":
        raise DataError(f"{path} is no name of a csv file: a queue is a csv")
    with update_directory(path.parent, path.name) as folder:
        write_csv(folder / path.name, queue.round({"prob": 6, "uncertainty": 6, "ood_score": 4}))
