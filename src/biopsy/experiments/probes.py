"""`biopsy probe`: compares encoders by logistic regression on their features, on the same patients."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import RecipeError
from biopsy.core.files import write_json
from biopsy.core.loaders import map_array
from biopsy.core.results import Result, Table, number
from biopsy.core.tables import write_csv
from biopsy.data.packs import Pack
from biopsy.evaluation.comparison.compare import compare
from biopsy.evaluation.evaluate import evaluate
from biopsy.evaluation.predictions import evaluate_predictions
from biopsy.models.networks.encoders import PREFIX, find_encoder
from biopsy.models.weights import choose_weights, feed_as_encoder
from biopsy.recipes import Overrides, load_recipe, setting_lines
from biopsy.training.fit import OnEpoch
from biopsy.training.probe import FOLDER, neighbour_votes
from biopsy.training.runs import DOCUMENT as RUN
from biopsy.training.runs import EpochRecord, Run
from biopsy.training.train import open_data, train

RECIPE, FORMAT = "probe", "biopsy-probe/1"
DOCUMENT, TABLE = "probe.json", "probe.csv"
SHOWN = ("auroc", "balanced_accuracy", "ece")


class Probe(Result):
    """Comparison of encoders on a pack; ``probe["rows"]`` has a row per encoder, first the reference."""

    def blocks(self) -> list[str | Table]:
        rows = [
            [
                row["encoder"],
                _estimate(row, "auroc"),
                _estimate(row, "difference", "+"),
                number(row["knn_auroc"]),
                _estimate(row, "balanced_accuracy"),
                _estimate(row, "ece"),
                number(row["n_features"]),
                number(row["ms_per_patch"]),
                row["licence"],
            ]
            for row in self["rows"]
        ]
        header = ["encoder", "AUROC (95 %)", "difference from the first", "k-NN AUROC", "balanced accuracy"]
        return [Table([*header, "ECE", "features", "ms a patch", "licence"], rows), str(self["path"])]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per encoder: metrics with intervals, difference from the first, cost."""
        return pd.DataFrame(self["rows"])


def _estimate(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    if row[name] is None:
        return ""
    low, high = (row[f"{name}_{end}"] for end in ("low", "high"))
    interval = "" if low is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{row[name]:{sign}.3f}{interval}"


def probe(
    encoders: Sequence[str] | str,
    data: Pack | Path | str,
    *,
    split: str | None = None,
    fold: int | None = None,
    seed: int = 0,
    overrides: Overrides = (),
    out: Path | str | None = None,
    device: str = "auto",
    on_epoch: OnEpoch | None = None,
) -> Probe:
    """Compare encoders by logistic regression on their features, tested on the same patients.

    Features are computed once for each encoder and kept in the pack; differences are paired, the first
    encoder is the reference. The same command continues an interrupted comparison. The test subset is
    evaluated once for each encoder, which the ledger records.

    Args:
        encoders: Names of ``biopsy list encoders``, ``hf-hub:ORG/NAME``, ``timm:NAME`` or
            ``torchvision:NAME``; ``NAME=FILE`` gives the file of its weights.
        data: Pack, or an archive to prepare.
        split: Split of the pack (default: the data set's own, else by patient).
        fold: Fold to test, of a split with folds.
        seed: Seed of folds and of random weights.
        overrides: Changes of recipe settings, ``KEY=VALUE`` such as ``train.precision=fp32``; may be repeated
            (in Python: a list or a mapping).
        out: Output folder (default: ``probes/<pack>``).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        on_epoch: Called with each probe's record.

    Raises:
        RecipeError: If an encoder is unknown, its weights are not available, or their licence was not
            accepted; checked before anything is computed.
        DataError: If a file of weights has another hash than expected.
    """
    names = [encoders] if isinstance(encoders, str) else list(encoders)
    pack = open_data(data)
    settings = {name: _settings(name, setting_lines(overrides)) for name in names}
    for lines in settings.values():
        recipe = load_recipe(RECIPE, lines)
        recipe = feed_as_encoder(recipe, pack.info.patch_px, pack.info.mpp)
        if recipe.model.pretrained:
            choose_weights(recipe)
    folder = Path(out) if out is not None else Path("probes") / pack.path.stem
    runs = [
        _train(pack, folder / f"{_slug(name)}-s{seed}", lines, split, fold, seed, device, on_epoch)
        for name, lines in settings.items()
    ]
    rows = [_row(name, run, pack) for name, run in zip(settings, runs, strict=True)]
    if len(runs) > 1:
        _add_differences(rows, runs, folder / "comparison")
    document = {
        "format": FORMAT,
        "pack": pack.path.name,
        "split": runs[0].info["split"]["name"],
        "rows": rows,
    }
    write_csv(folder / TABLE, pd.DataFrame(rows))
    write_json(folder / DOCUMENT, document)
    return Probe(document | {"path": str(folder)})


def _settings(name: str, overrides: Sequence[str]) -> list[str]:
    """Return the settings of the recipe for ``NAME`` or ``NAME=FILE``."""
    encoder, _, file = name.partition("=")
    if not encoder:
        raise RecipeError(f"{name!r} has no encoder: write NAME or NAME=FILE")
    if ":" not in encoder or encoder.startswith(PREFIX):
        encoder = find_encoder(encoder).tag
    return [f"model.name={encoder}", *([f"model.weights={file}"] if file else []), *overrides]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name.partition("=")[0])


def _train(
    pack: Pack,
    path: Path,
    lines: Sequence[str],
    split: str | None,
    fold: int | None,
    seed: int,
    device: str,
    on_epoch: OnEpoch | None,
) -> Run:
    """Train and evaluate a probe, or resume an interrupted one."""
    if (path / RUN).is_file() and Run.open(path).info["status"] != "finished":
        run = train(resume=path, device=device, on_epoch=on_epoch)
    else:
        run = train(
            RECIPE,
            pack,
            split=split,
            fold=fold,
            seed=seed,
            overrides=lines,
            out=path,
            device=device,
            on_epoch=on_epoch,
        )
    if run.evaluated_subset != "test":
        evaluate(run)
    return run


def _row(name: str, run: Run, pack: Pack) -> dict[str, Any]:
    metrics, record = run.metrics(), run.log()[-1]
    input_px = run.recipe.preprocessing.input_px
    um = None if pack.info.mpp is None else pack.info.patch_px * pack.info.mpp
    row: dict[str, Any] = {"encoder": name.partition("=")[0]}
    for metric in SHOWN:
        estimate = metrics.patch[metric]
        row |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    return row | {
        "knn_auroc": _neighbours(run, pack, record),
        "difference": None,
        "difference_low": None,
        "difference_high": None,
        "p_holm": None,
        "C": record["penalty"],
        "n_features": record["n_features"],
        "parameters": run.info["parameters"]["total"],
        "input_px": input_px,
        "um_per_px": None if um is None else um / input_px,
        "feature_seconds": record["feature_seconds"],
        "ms_per_patch": 1000 * record["feature_seconds"] / len(pack),
        "licence": run.info["weights"]["licence"],
        "weights": run.info["weights"]["weights"] or "random",
        "run": run.path.name,
    }


def _neighbours(run: Run, pack: Pack, record: EpochRecord) -> float | None:
    """Return the AUROC of k nearest neighbours on the test subset; None without stored features."""
    path, positive = pack.path / FOLDER / record["features"], pack.positive_index
    if positive is None or not path.is_file():
        return None
    features, subsets = map_array(path, dtype=np.float32, ndim=2), run.subsets(pack)
    train_rows, test = (np.flatnonzero(subsets == subset) for subset in ("train", "test"))
    votes = neighbour_votes(
        np.asarray(features[train_rows]),
        pack.target[train_rows],
        np.asarray(features[test]),
        n_classes=len(pack.class_names),
    )
    result = evaluate_predictions(
        (pack.target[test] == positive).astype(int), votes[:, positive], groups=pack.group_ids[test]
    )
    return result["patch"]["auroc"]["value"]


def _add_differences(rows: list[dict[str, Any]], runs: list[Run], folder: Path) -> None:
    """Add the paired difference in AUROC of each encoder from the first."""
    table = compare(runs, out=folder).to_frame()
    table = table[table["metric"] == "auroc"].set_index("classifier")
    for row in rows[1:]:
        result = table.loc[row["run"]]
        keys = {
            "difference": "difference",
            "difference_low": "low",
            "difference_high": "high",
            "p_holm": "p_holm",
        }
        row |= {ours: None if pd.isna(result[key]) else float(result[key]) for ours, key in keys.items()}
