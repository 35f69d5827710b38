"""Which patches a run gets wrong, and what goes with it: what they hold, where they lie, what they are like.

The record stands in the run, ``errors/errors.json`` with ``errors.parquet``, from which every number in it
can be computed again. To measure one more thing of a patch, add it to `biopsy.evaluation.patch_properties`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import plain, read_json, replace_atomic, sha256_file, write_json
from biopsy.core.tables import read_parquet_table
from biopsy.data.packs import Pack
from biopsy.evaluation.errors.nearest_training_patches import find_nearest_training_patches
from biopsy.evaluation.hypotheses.measure import MAX_MEASURED, draw_rows, subset_key
from biopsy.evaluation.neighbours import count_neighbours, find_zones, measure_zones
from biopsy.evaluation.patch_properties import PROPERTIES, measure_properties
from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.engine import Engine
from biopsy.statistics.contrasts import contrast_groups
from biopsy.statistics.resampling import Interval
from biopsy.training.runs import Run

FORMAT = "biopsy-errors/1"
FOLDER = "errors"
DOCUMENT, TABLE = "errors.json", "errors.parquet"
SHOWN_EACH = 12
KINDS = {"fn": "false negative", "fp": "false positive", "tp": "true positive", "tn": "true negative"}
AGAINST = {"fn": "tp", "fp": "tn"}
"""The errors of each class, and the patches called right that they are compared with."""
UNUSUAL = 0.1  # a property counts as unusual within this share of either end of those called right
FEWEST_RIGHT = 10  # patches called right that "unusual" needs
DRAWS = 500  # of each bootstrap, from 100 patients on; a standard error is within 6 % of that of many more
MOST_GROUPS = 24  # patients listed one by one


@dataclass(frozen=True)
class ErrorRecord:
    """What is known of a run's errors on one subset.

    Attributes:
        about: What ``errors.json`` holds.
        table: What ``errors.parquet`` holds: one row a judged patch.
    """

    about: dict[str, Any]
    table: pd.DataFrame


def measure_errors(
    run: Run | Path | str, *, subset: str | None = None, n: int = SHOWN_EACH, device: str = "auto"
) -> ErrorRecord:
    """Find a run's errors on one subset, measure them, and keep the record in the run.

    Where the record is there already, for the same classifier, subset and ``n``, it is read. A folder that
    cannot be written to gets none. Nothing is opened by this: a subset must have been predicted.

    Args:
        run: A finished run that tells two classes apart.
        subset: ``test`` or ``validation``; the subset last judged by default.
        n: How many missed patches, false alarms and uncertain patches are looked at closely.
        device: Where the network is asked for features.

    Raises:
        RunError: If the run has more than two classes, or the subset has not been predicted.
    """
    run = Run.open(run)
    subset = subset or run.evaluated_subset
    frame, predicted = run.predictions(subset)
    if "prob" not in frame:
        raise RunError(f"{run.path} has more than two classes: error analysis needs two")
    if n < 1:
        raise RunError(f"n={n!r}: expected at least 1")
    requested = {**subset_key(run, FORMAT, subset, frame, predicted), "n": n}
    place = run.path / FOLDER
    known = _read_known(place, requested)
    if known is not None:
        return known
    result = _measure(run, frame, requested, device)
    try:
        _write(place, result)
    except OSError:
        return result
    return _read_known(place, requested) or result


def read_errors(run: Run) -> ErrorRecord | None:
    """Return what is known of the errors on the subset evaluated last; None where nothing is."""
    subset = run.evaluated_subset
    frame, predicted = run.predictions(subset)
    return _read_known(run.path / FOLDER, subset_key(run, FORMAT, subset, frame, predicted))


def _measure(run: Run, frame: pd.DataFrame, asked: Mapping[str, Any], device: str) -> ErrorRecord:
    pack, classifier = run.open_pack(verify=False), run.classifier
    seed, n, threshold = asked["seed"], asked["n"], classifier.threshold
    assert pack.positive_index is not None and threshold is not None
    rows = pack.rows_of(frame["patch_id"])
    table = tabulate_errors(pack, rows, frame["prob"].to_numpy(float), threshold)
    sampled = draw_rows(len(table), MAX_MEASURED, seed)
    galleries = pick_galleries(table, threshold, n)
    shown = sorted({place for places in galleries.values() for place in places})
    measured = np.union1d(sampled, np.array(shown, int))
    properties = measure_properties(pack.patches, pack.sizes, index=rows[measured], mpp=pack.info.mpp)
    table = table.join(properties.set_axis(measured))
    table.insert(len(table.columns) - len(PROPERTIES), "sampled", np.isin(np.arange(len(table)), sampled))
    alike = find_nearest_training_patches(run, pack, classifier, rows[shown], engine=Engine(device))
    names = [f"prob_{name}" for name in pack.class_names]
    scored = ScoredPatches.of_pack(pack, rows, frame[names].to_numpy(float), threshold, seed=seed)
    sample = table.iloc[sampled]
    about = {
        **asked,
        "positive_class": pack.info.positive_class,
        "unit": pack.unit,
        "n_groups": scored.n_groups,
        "n_measured": len(sampled),
        "threshold": threshold,
        "counts": {kind: int((table["kind"] == kind).sum()) for kind in KINDS},
        "properties": PROPERTIES,
        **contrast_errors(sample, scored.group_ids[sampled], seed=seed, unit=pack.unit),
        "zones": measure_zones(table["zone"].to_numpy(object), scored, threshold),
        "training_reference": alike.about,
        "galleries": {
            kind: [
                {
                    "patch_id": str(table["patch_id"].iloc[place]),
                    "unusual": find_unusual(table.iloc[place], sample),
                    "nearest": alike.nearest[shown.index(place)],
                }
                for place in places
            ]
            for kind, places in galleries.items()
        },
    }
    return ErrorRecord(plain(about), table)


def tabulate_errors(pack: Pack, rows: np.ndarray, prob: np.ndarray, threshold: float) -> pd.DataFrame:
    """Return for each patch how it was called and where it lies.

    Args:
        pack: Of two classes.
        prob: Probability of the positive class, ``(n,)``.
        threshold: From which a patch is called positive.

    Returns:
        ``patch_id``, ``patient_id``, ``slide_id``, ``x``, ``y``, ``target``, ``prob``, ``kind`` (one of
        `KINDS`), and the columns of `neighbours.find_zones`, counted over the whole pack.
    """
    positive, called = pack.target[rows] == pack.positive_index, prob >= threshold
    kind = np.where(positive, np.where(called, "tp", "fn"), np.where(called, "fp", "tn"))
    zones = find_zones(count_neighbours(pack.table, pack.target, len(pack.class_names)), pack.target)
    about = pack.table[["patch_id", "patient_id", "slide_id", "x", "y", "target"]].iloc[rows]
    return pd.concat(
        [
            about.reset_index(drop=True).assign(prob=prob, kind=kind),
            zones.iloc[rows].reset_index(drop=True),
        ],
        axis=1,
    )


def pick_galleries(table: pd.DataFrame, threshold: float, n: int) -> dict[str, list[int]]:
    """Return the rows looked at closely: the surest ``fn`` and ``fp``, and those nearest to the threshold."""
    ordered = table.assign(near=(table["prob"] - threshold).abs(), far=-table["prob"])
    kinds = {"fn": ["prob", "patch_id"], "fp": ["far", "patch_id"]}
    galleries = {
        kind: ordered[ordered["kind"] == kind].sort_values(by).index[:n].tolist()
        for kind, by in kinds.items()
    }
    return {**galleries, "uncertain": ordered.sort_values(["near", "patch_id"]).index[:n].tolist()}


def contrast_errors(
    sample: pd.DataFrame, group_ids: np.ndarray, *, seed: int, unit: str, level: float = 0.95
) -> dict[str, Any]:
    """Compare every property between errors and patches of the same class that were called right.

    A comparison is made within each patient: the chance that an error has the higher value, averaged over
    patients that have both. Intervals are so wide that all of them together hold with ``level`` (Bonferroni).

    Args:
        sample: ``kind`` and the columns of `PROPERTIES`.
        unit: What a group is; where it is the patch, there is nothing to compare within.
        level: Nominal coverage of all intervals together.

    Returns:
        ``n_comparisons``, ``level_each``, ``draws`` of a bootstrap, and ``contrasts``, a record each.
    """
    kinds = sample["kind"].to_numpy(str)
    requested = [
        (name, wrong, right)
        for wrong, right in AGAINST.items()
        for name in PROPERTIES
        if sample[name].notna().all()
    ]
    possible = [one for one in requested if all((kinds == kind).any() for kind in one[1:])]
    level_each = 1 - (1 - level) / max(1, len(possible))
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
        few = len(result.by_group) <= MOST_GROUPS
        contrasts.append(
            {
                "property": name,
                "errors": wrong,
                "others": right,
                "n_errors": result.n_chosen,
                "n_others": result.n_others,
                "mean_errors": result.mean_chosen,
                "mean_others": result.mean_others,
                "within": result.within,
                "auroc": result.auroc,
                "difference_sd": result.difference_sd,
                "verdict": _judge(result.within or result.auroc),
                "by_group": result.by_group.replace({np.nan: None}).to_dict(orient="index") if few else {},
            }
        )
    item = {"n_comparisons": len(possible), "level_each": level_each, "draws": DRAWS}
    return {**item, "contrasts": contrasts}


def _judge(estimate: Interval) -> str:
    if estimate.low is None or estimate.high is None:
        return "unsaid"
    return "higher" if estimate.low > 0.5 else "lower" if estimate.high < 0.5 else "not seen"


def find_unusual(row: pd.Series, sample: pd.DataFrame) -> list[dict[str, Any]]:
    """Say what sets a patch apart from those of its class that were called right.

    Returns:
        The two properties furthest out, if they are among the `UNUSUAL` lowest or highest: ``property``,
        ``value`` and ``rank``, the share of those called right that lie below (ties count half).
    """
    right = "tp" if row["kind"] in ("tp", "fn") else "tn"
    like = sample[(sample["kind"] == right) & (sample["patch_id"] != row["patch_id"])]
    if len(like) < FEWEST_RIGHT:
        return []
    result: list[dict[str, Any]] = []
    for name in PROPERTIES:
        value, others = row[name], like[name].to_numpy(float)
        rank = float(((others < value) + 0.5 * (others == value)).mean())
        if not np.isnan(value) and (rank <= UNUSUAL or rank >= 1 - UNUSUAL):
            result.append({"property": name, "value": float(value), "rank": rank})
    return sorted(result, key=lambda each: -abs(each["rank"] - 0.5))[:2]


def _write(place: Path, found: ErrorRecord) -> None:
    place.mkdir(exist_ok=True)
    with replace_atomic(place / TABLE) as partial:
        found.table.to_parquet(partial, index=False)
    write_json(place / DOCUMENT, {**found.about, "table_sha256": sha256_file(place / TABLE)})


def _read_known(place: Path, asked: Mapping[str, Any]) -> ErrorRecord | None:
    """Read what was measured before, if it answers the same question."""
    try:
        about = read_json(place / DOCUMENT, format=FORMAT)
        if about.pop("table_sha256", None) != sha256_file(place / TABLE):
            return None
        table, _ = read_parquet_table(place / TABLE)
    except DataError:
        return None
    same = len(table) == asked["n_patches"] and all(about.get(key) == asked[key] for key in asked)
    return ErrorRecord(about, table) if same else None
