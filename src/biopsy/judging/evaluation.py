"""Evaluation: the numbers of a run on one side, with intervals over patients, and the count of openings."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.data.ledger import count_openings, record_opening
from biopsy.data.packs import Pack
from biopsy.data.predictions import make_predictions, write_predictions
from biopsy.data.splits import find_split
from biopsy.errors import RunError
from biopsy.files import write_json
from biopsy.judging.baseline import colour_baseline
from biopsy.judging.subgroups import measure_subgroups
from biopsy.learning.classifiers import Classifier
from biopsy.learning.engine import Engine
from biopsy.learning.inference import predict_logits
from biopsy.learning.runs import Run
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.intervals import (
    describe_method,
    estimate_class_metrics,
    estimate_patch_metrics,
    estimate_patient_metrics,
)

FORMAT = "biopsy-metrics/1"
LEVEL = 0.95


def evaluate(
    run: Run | Path | str,
    *,
    side: str = "test",
    data: Pack | Path | str | None = None,
    split: str | None = None,
) -> dict[str, Any]:
    """Judge a run on its test or validation side, or on another pack, and keep the numbers in the run.

    Writes ``predictions/<side>.parquet`` and ``evaluation/metrics.json`` (``metrics-val.json`` for validation;
    both under ``external/<pack>/`` for another pack). Opening a test side is recorded in the pack's ledger.

    Args:
        run: A finished run.
        side: ``"test"`` or ``"val"``.
        data: Another pack with the same classes; all its patches are judged unless ``split`` names a side of it.
        split: With ``data``: the split of that pack whose ``side`` is judged.

    Returns:
        What ``metrics.json`` holds; see the file formats page.

    Raises:
        RunError: If the run has not finished, its pack changed, or there is nothing on that side.
    """
    run = Run.open(run)
    classifier = run.classifier
    if side not in ("test", "val"):
        raise RunError(f"side={side!r} cannot be judged: test or val")
    pack, sides, about = _choose_patches(run, classifier, side, data, split)
    rows = np.flatnonzero(sides == side)
    if not len(rows):
        raise RunError(
            f"{about['name']!r} has no {side} patches in {pack.path.name}: make a split with `biopsy split`"
        )
    engine = Engine("auto", run.recipe.train.precision)
    network = engine.place(classifier.network)
    logits = predict_logits(
        network, classifier.info.preprocessing, pack.patches, pack.sizes, rows, engine=engine
    )
    probs = classifier.probs(logits)
    threshold = run.info["threshold"]
    frame = make_predictions(
        pack,
        rows,
        logits,
        probs,
        sides=side,
        fold=about["fold"],
        threshold=None if threshold is None else threshold["value"],
    )
    place = run.path if data is None else run.path / "external" / pack.path.stem
    write_predictions(
        place / "predictions" / f"{side}.parquet",
        frame,
        {
            "pack_sha256": pack.info.content_sha256,
            "classifier_sha256": classifier.sha256,
            "split": about["name"],
            "threshold": threshold,
        },
    )
    openings = _open_ledger(run, pack, about, side)
    groups = pack.group_ids[rows]
    metrics = {
        "format": FORMAT,
        "side": side,
        "positive_class": pack.info.positive_class,
        "class_names": pack.class_names,
        "n_patches": len(rows),
        "n_patients": len(np.unique(groups)),
        "unit": pack.unit,
        "split": about,
        "threshold": threshold,
        **measure_predictions(pack, rows, probs, threshold, seed=run.info["seed"]),
        "interval": describe_method(
            len(np.unique(groups)), seed=run.info["seed"], level=LEVEL, unit=pack.unit
        ),
        "baseline": _compare_with_colour(run, pack, sides, side) if data is None else None,
        "subgroups": measure_subgroups(pack, rows, probs, threshold, seed=run.info["seed"]),
        "times_opened": openings and openings["times"],
        "ledger": openings,
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    name = "metrics.json" if side == "test" else f"metrics-{side}.json"
    write_json(place / "evaluation" / name, metrics)
    return metrics


def measure_predictions(
    pack: Pack, rows: np.ndarray, probs: np.ndarray, threshold: dict[str, Any] | None, *, seed: int
) -> dict[str, Any]:
    """Give the entries of ``metrics.json`` that follow from probabilities alone.

    Args:
        pack: Targets, patients and class names.
        rows: Which patches, ``(n,)``.
        probs: Their probabilities, ``(n, n_classes)``.
        threshold: ``value``, ``rule``, ``chosen_on``; None for more than two classes.
        seed: Of bootstrap draws and of the simulated calibration floor.
    """
    target, groups, positive = pack.target[rows], pack.group_ids[rows], pack.positive_index
    if positive is None or threshold is None:
        per_class, macro = estimate_class_metrics(
            target, probs, groups, pack.class_names, seed=seed, level=LEVEL, unit=pack.unit
        )
        confusion = pd.crosstab(
            pd.Categorical(target, range(len(pack.class_names))),
            pd.Categorical(probs.argmax(axis=1), range(len(pack.class_names))),
            dropna=False,
        )
        return {
            "confusion_matrix": confusion.to_numpy(),
            "per_class": {
                name: {metric: interval.to_dict() for metric, interval in values.items()}
                for name, values in per_class.items()
            },
            "macro": {metric: interval.to_dict() for metric, interval in macro.items()},
        }
    truth, prob, value = (target == positive).astype(int), probs[:, positive], threshold["value"]
    patch = estimate_patch_metrics(truth, prob, groups, value, seed=seed, level=LEVEL, unit=pack.unit)
    document: dict[str, Any] = {
        "confusion": count_calls(truth, prob, value),
        "at_half": count_calls(truth, prob, 0.5),
        "prevalence": float(truth.mean()),
        "patch": {name: interval.to_dict() for name, interval in patch.items()},
        "ece_floor": ece_floor(prob, seed=seed),
    }
    if pack.unit != "patch":
        patients = estimate_patient_metrics(truth, prob, groups, value, level=LEVEL, unit=pack.unit)
        document["patient"] = {name: summary.to_dict() for name, summary in patients.items()}
    return document


def count_calls(truth: np.ndarray, prob: np.ndarray, threshold: float) -> dict[str, int]:
    """Count true and false positives and negatives at a threshold."""
    called = prob >= threshold
    return {
        "tp": int((called & (truth == 1)).sum()),
        "fp": int((called & (truth == 0)).sum()),
        "fn": int((~called & (truth == 1)).sum()),
        "tn": int((~called & (truth == 0)).sum()),
    }


def _choose_patches(
    run: Run, classifier: Classifier, side: str, data: Pack | Path | str | None, split_name: str | None
) -> tuple[Pack, np.ndarray, dict[str, Any]]:
    """Give the pack, the side of each of its patches, and the ``split`` entry of ``metrics.json``."""
    if data is None:
        if split_name is not None:
            raise RunError(
                f"split={split_name!r} goes with data=: {run.path.name} is judged on its own split"
            )
        pack = run.open_pack()
        return (
            pack,
            run.sides(pack),
            {key: run.info["split"][key] for key in ("name", "fold", "patients_overlap")},
        )
    pack = Pack.open(data)
    pack.verify()
    if pack.class_names != classifier.info.class_names:
        raise RunError(
            f"{pack.path} has the classes {pack.class_names}, the run learned {classifier.info.class_names}"
        )
    if pack.info.mpp and classifier.info.mpp and abs(pack.info.mpp / classifier.info.mpp - 1) > 0.05:
        raise RunError(
            f"{pack.path} has {pack.info.mpp} um/px, the classifier was trained at {classifier.info.mpp}: "
            "prepare the patches at that resolution"
        )
    if split_name is None:
        return pack, np.full(len(pack), side), {"name": None, "fold": None, "patients_overlap": None}
    split = find_split(pack, split_name)
    return pack, split.sides(pack), {"name": split.name, "fold": None, "patients_overlap": None}


def _compare_with_colour(run: Run, pack: Pack, sides: np.ndarray, side: str) -> dict[str, Any]:
    result = colour_baseline(pack, sides, seed=run.info["seed"], side=side)
    return {name: value for name, value in result.items() if name != "probs"}


def _open_ledger(run: Run, pack: Pack, split: dict[str, Any], side: str) -> dict[str, Any] | None:
    if side != "test":
        return None
    entry = {
        "run": run.info["id"],
        "recipe": run.info["recipe"],
        "seed": run.info["seed"],
        "split": split["name"] or "all patches",
        "fold": split["fold"],
        "side": side,
    }
    record_opening(pack, run.path, entry)
    return count_openings(pack, split=entry["split"], fold=split["fold"], run_dir=run.path)
