"""Measurement of a run's errors: properties and positions of misclassified patches, nearest training patches.

The record is kept in the run, ``errors/errors.json`` with ``errors.parquet``, from which every number can be
recomputed. To measure another property of a patch, add it to `biopsy.evaluation.patch_properties`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import replace_atomic, sha256_file, write_json
from biopsy.core.tables import read_parquet_table
from biopsy.data.packs import Pack
from biopsy.evaluation.errors.nearest_training_patches import (
    NearestPatch,
    ReferenceDescription,
    TrainingReference,
)
from biopsy.evaluation.neighbours import Zone, count_neighbours, find_zones, measure_zones
from biopsy.evaluation.patch_properties import PROPERTIES, measure_properties
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.stored_results import MAX_MEASURED, ResultKey, draw_rows, read_result, result_key
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from biopsy.statistics.contrasts import Contrast, contrast_groups
from biopsy.training.runs import Run

FORMAT = "biopsy-errors/2"
FOLDER = "errors"
DOCUMENT, TABLE = "errors.json", "errors.parquet"
N_SHOWN = 12
KINDS = {"fn": "false negative", "fp": "false positive", "tp": "true positive", "tn": "true negative"}
AGAINST = {"fn": "tp", "fp": "tn"}
"""The errors of each class, and the correct patches that they are compared with."""
UNUSUAL = 0.1  # share at either end of the correct patches within which a value counts as unusual
MIN_CORRECT = 10  # correct patches needed to find unusual values
DRAWS = 500  # per bootstrap, from 100 patients on; standard errors within 6 % of those of many more draws
MAX_GROUPS = 24  # groups listed individually


@dataclass(frozen=True)
class _Comparison:
    property: str
    errors: str
    others: str


@dataclass(frozen=True)
class ErrorContrast(Contrast, _Comparison):
    """A property of errors, ``fn`` or ``fp``, against that of the correct patches ``others``."""

    verdict: str


class ErrorContrasts(TypedDict):
    """Comparisons of properties, the level of each of their intervals, and the draws of a bootstrap."""

    n_comparisons: int
    level_each: float
    draws: int
    contrasts: list[ErrorContrast]


class UnusualValue(TypedDict):
    """A property of a patch, and the share of correct patches with a lower value (ties count half)."""

    property: str
    value: float
    rank: float


class GalleryPatch(TypedDict):
    """A patch in a gallery."""

    patch_id: str
    unusual: list[UnusualValue]
    nearest: list[NearestPatch]


class ErrorsKey(ResultKey):
    """What was requested."""

    n: int


class Errors(ErrorsKey, ErrorContrasts):
    """Content of ``errors.json``; see the file formats page."""

    positive_class: str
    unit: str
    n_groups: int
    n_measured: int
    threshold: float
    counts: dict[str, int]
    properties: dict[str, str]
    zones: dict[str, Zone]
    training_reference: ReferenceDescription
    galleries: dict[str, list[GalleryPatch]]


@dataclass(frozen=True)
class CaseView:
    """Images of one patch, uint8 ``(height, width, 3)``.

    Attributes:
        overlay: The patch with its saliency map superimposed.
        is_constant: Whether the map has the same value at every pixel.
        overview: Its position on the slide; None without coordinates.
        nearest: The nearest training patches.
    """

    patch: np.ndarray
    overlay: np.ndarray
    is_constant: bool
    overview: np.ndarray | None
    nearest: list[np.ndarray]


@dataclass(frozen=True)
class ErrorRecord:
    """The errors of a run on one subset.

    Attributes:
        document: The content of ``errors.json``.
        table: The content of ``errors.parquet``: one row per evaluated patch.
        views: Images of the patches in the galleries, by ``patch_id``; empty if not drawn.
        caption: What the saliency maps of the images show and what they do not.
    """

    document: Errors
    table: pd.DataFrame
    views: Mapping[str, CaseView] = field(default_factory=dict)
    caption: str = ""

    @property
    def entries(self) -> dict[str, GalleryPatch]:
        """The patches in the galleries by ``patch_id``."""
        return {item["patch_id"]: item for part in self.document["galleries"].values() for item in part}


def measure_errors(
    run: Run | Path | str, *, subset: str | None = None, n: int = N_SHOWN, device: str = "auto"
) -> ErrorRecord:
    """Measure the errors of a run on one subset, and keep the record in the run.

    A current record, for the same classifier, subset and ``n``, is read instead. Nothing is written to a
    read-only run.

    Args:
        subset: ``test`` or ``validation``; it must have been predicted (default: the subset evaluated last).
        n: Number of false negatives, false positives and uncertain patches in the galleries.

    Raises:
        RunError: If the run has more than two classes, or the subset has not been predicted.
    """
    run = Run.open(run)
    subset = subset or run.evaluated_subset
    frame, metadata = run.predictions(subset)
    if "prob" not in frame:
        raise RunError(f"{run.path} has more than two classes: error analysis needs two")
    if n < 1:
        raise RunError(f"n={n!r}: expected at least 1")
    requested: ErrorsKey = {**result_key(run, FORMAT, subset, frame, metadata), "n": n}
    folder = run.path / FOLDER
    cached = _read_cached(folder, requested)
    if cached is not None:
        return cached
    result = _measure(run, frame, requested, device)
    try:
        _write(folder, result)
    except OSError:
        return result
    return _read_cached(folder, requested) or result


def read_errors(run: Run) -> ErrorRecord | None:
    """Return the stored record of the subset evaluated last; None if there is none."""
    subset = run.evaluated_subset
    frame, metadata = run.predictions(subset)
    return _read_cached(run.path / FOLDER, result_key(run, FORMAT, subset, frame, metadata))


def _measure(run: Run, frame: pd.DataFrame, request: ErrorsKey, device: str) -> ErrorRecord:
    pack, classifier = run.open_pack(verify=False), run.classifier
    seed, n, threshold = request["seed"], request["n"], classifier.threshold
    assert pack.info.positive_class is not None and threshold is not None
    rows = pack.rows_of(frame["patch_id"])
    table = tabulate_errors(pack, rows, frame["prob"].to_numpy(float), threshold)
    sampled = draw_rows(len(table), MAX_MEASURED, seed)
    galleries = pick_galleries(table, threshold, n)
    shown_rows = sorted({index for indices in galleries.values() for index in indices})
    measured = np.union1d(sampled, np.array(shown_rows, int))
    properties = measure_properties(pack.patches, pack.sizes, index=rows[measured], mpp=pack.info.mpp)
    table = table.join(properties.set_axis(measured))
    table.insert(len(table.columns) - len(PROPERTIES), "sampled", np.isin(np.arange(len(table)), sampled))
    engine = Engine(device)
    reference = TrainingReference.from_run(run, pack, classifier, engine=engine)
    _, features = predict_with_features(classifier, pack.patches, pack.sizes, rows[shown_rows], engine=engine)
    nearest = reference.find_nearest(features)
    names = [f"prob_{name}" for name in pack.class_names]
    scored = ScoredPatches.of_pack(pack, rows, frame[names].to_numpy(float), threshold, seed=seed)
    sample = table.iloc[sampled]
    document: Errors = {
        **request,
        "positive_class": pack.info.positive_class,
        "unit": pack.unit,
        "n_groups": scored.n_groups,
        "n_measured": len(sampled),
        "threshold": threshold,
        "counts": {kind: int((table["kind"] == kind).sum()) for kind in KINDS},
        "properties": PROPERTIES,
        **contrast_errors(sample, scored.group_ids[sampled], seed=seed, unit=pack.unit),
        "zones": measure_zones(table["zone"].to_numpy(object), scored, threshold),
        "training_reference": reference.description,
        "galleries": {
            kind: [
                {
                    "patch_id": str(table["patch_id"].iloc[index]),
                    "unusual": find_unusual(table.iloc[index], sample),
                    "nearest": nearest[shown_rows.index(index)],
                }
                for index in indices
            ]
            for kind, indices in galleries.items()
        },
    }
    return ErrorRecord(document, table)


def tabulate_errors(pack: Pack, rows: np.ndarray, prob: np.ndarray, threshold: float) -> pd.DataFrame:
    """Return for each patch whether its prediction is correct, and its position.

    Args:
        rows: Rows of the patches in a pack with two classes, ``(n,)``.
        prob: Probability of the positive class, ``(n,)``.

    Returns:
        ``patch_id``, ``patient_id``, ``slide_id``, ``x``, ``y``, ``target``, ``prob``, ``kind`` (one of
        `KINDS`), and the columns of `neighbours.find_zones`, counted over the whole pack.
    """
    positive, predicted_positive = pack.target[rows] == pack.positive_index, prob >= threshold
    kind = np.where(
        positive, np.where(predicted_positive, "tp", "fn"), np.where(predicted_positive, "fp", "tn")
    )
    zones = find_zones(count_neighbours(pack.table, pack.target, len(pack.class_names)), pack.target)
    columns = pack.table[["patch_id", "patient_id", "slide_id", "x", "y", "target"]].iloc[rows]
    return pd.concat(
        [
            columns.reset_index(drop=True).assign(prob=prob, kind=kind),
            zones.iloc[rows].reset_index(drop=True),
        ],
        axis=1,
    )


def pick_galleries(table: pd.DataFrame, threshold: float, n: int) -> dict[str, list[int]]:
    """Return the rows of the most confident ``fn`` and ``fp``, and of those nearest to the threshold."""
    ordered = table.assign(near=(table["prob"] - threshold).abs(), far=-table["prob"])
    kinds = {"fn": ["prob", "patch_id"], "fp": ["far", "patch_id"]}
    galleries = {
        kind: ordered[ordered["kind"] == kind].sort_values(by).index[:n].tolist()
        for kind, by in kinds.items()
    }
    return {**galleries, "uncertain": ordered.sort_values(["near", "patch_id"]).index[:n].tolist()}


def contrast_errors(sample: pd.DataFrame, group_ids: np.ndarray, *, seed: int, unit: str) -> ErrorContrasts:
    """Compare every property between errors and correct patches of the same class.

    Comparisons are made within each patient: the probability that an error has the higher value, averaged
    over patients with both; not with the patch as the unit. The 95 % intervals are simultaneous (Bonferroni).

    Args:
        sample: ``kind`` and the columns of `PROPERTIES`.
    """
    kinds = sample["kind"].to_numpy(str)
    requested = [
        (name, wrong, right)
        for wrong, right in AGAINST.items()
        for name in PROPERTIES
        if sample[name].notna().all()
    ]
    n_comparisons = sum((kinds == wrong).any() and (kinds == right).any() for _, wrong, right in requested)
    level_each = 1 - 0.05 / max(1, n_comparisons)
    contrasts = []
    for name, wrong, right in requested:
        among = np.isin(kinds, (wrong, right))
        result = contrast_groups(
            sample[name].to_numpy(float)[among],
            kinds[among] == wrong,
            group_ids[among],
            seed=seed,
            unit=unit,
            names=(KINDS[wrong], KINDS[right]),
            level=level_each,
            draws=DRAWS,
        )
        if len(result.by_group) > MAX_GROUPS:
            result = replace(result, by_group={})
        verdict = (result.within or result.auroc).compare(0.5)
        contrasts.append(ErrorContrast(name, wrong, right, **vars(result), verdict=verdict))
    return {
        "n_comparisons": n_comparisons,
        "level_each": level_each,
        "draws": DRAWS,
        "contrasts": contrasts,
    }


def find_unusual(row: pd.Series, sample: pd.DataFrame) -> list[UnusualValue]:
    """Return the properties in which a patch differs most from correct patches of its class.

    Returns:
        Up to two properties with a value among the `UNUSUAL` lowest or highest.
    """
    right = "tp" if row["kind"] in ("tp", "fn") else "tn"
    correct = sample[(sample["kind"] == right) & (sample["patch_id"] != row["patch_id"])]
    if len(correct) < MIN_CORRECT:
        return []
    result: list[UnusualValue] = []
    for name in PROPERTIES:
        value, others = row[name], correct[name].to_numpy(float)
        rank = float(((others < value) + 0.5 * (others == value)).mean())
        if not np.isnan(value) and (rank <= UNUSUAL or rank >= 1 - UNUSUAL):
            result.append({"property": name, "value": float(value), "rank": rank})
    return sorted(result, key=lambda item: -abs(item["rank"] - 0.5))[:2]


def _write(folder: Path, record: ErrorRecord) -> None:
    folder.mkdir(exist_ok=True)
    with replace_atomic(folder / TABLE) as partial:
        record.table.to_parquet(partial, index=False)
    write_json(folder / DOCUMENT, {**record.document, "table_sha256": sha256_file(folder / TABLE)})


def _read_cached(folder: Path, requested: ResultKey) -> ErrorRecord | None:
    """Return the stored record if it belongs to the requested predictions, else None."""
    try:
        key = {**requested, "table_sha256": sha256_file(folder / TABLE)}
        document = read_result(folder / DOCUMENT, key, Errors)
        if document is None:
            return None
        table, _ = read_parquet_table(folder / TABLE)
    except DataError:
        return None
    return ErrorRecord(document, table) if len(table) == requested["n_patches"] else None
