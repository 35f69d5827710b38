"""`biopsy probe`: compares encoders by logistic regression on their features, on the same patients."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from biopsy.core.errors import RecipeError
from biopsy.core.files import plain, write_json
from biopsy.core.loaders import map_array
from biopsy.core.results import Result, Table, number
from biopsy.core.tables import write_csv
from biopsy.data.packs import Pack
from biopsy.evaluation.comparison.compare import compare
from biopsy.evaluation.comparison.measure import ComparisonDocument, MetricDifference
from biopsy.evaluation.evaluate import evaluate
from biopsy.evaluation.predictions import evaluate_predictions
from biopsy.models.networks.encoders import PREFIX, find_encoder
from biopsy.models.weights import choose_weights, feed_as_encoder
from biopsy.recipes import Overrides, load_recipe, setting_lines
from biopsy.statistics.resampling import Interval
from biopsy.training.probe import FOLDER, neighbour_votes
from biopsy.training.runs import DOCUMENT as RUN
from biopsy.training.runs import EpochRecord, OnEpoch, Run
from biopsy.training.train import open_data, train

RECIPE, FORMAT = "probe", "biopsy-probe/1"
DOCUMENT, TABLE = "probe.json", "probe.csv"


@dataclass(frozen=True)
class EncoderResult:
    """Results of an encoder: a row of ``probe.csv``.

    Attributes:
        difference: Paired difference in AUROC from the first encoder, NaN for that one.
    """

    encoder: str
    auroc: Interval
    balanced_accuracy: Interval
    ece: Interval
    knn_auroc: float | None
    difference: Interval
    p_holm: float | None
    C: float
    n_features: int
    parameters: int
    input_px: int
    um_per_px: float | None
    feature_seconds: float
    ms_per_patch: float
    licence: str | None
    weights: str
    run: str

    def to_row(self) -> dict[str, object]:
        """Return the columns; an interval has three."""
        row: dict[str, object] = {}
        for name, value in vars(self).items():
            if isinstance(value, Interval):
                row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                row[name] = value
        return row


@dataclass(frozen=True, eq=False, repr=False)
class Probe(Result):
    """Comparison of encoders on a pack; ``probe["rows"]`` has a row per encoder, first the reference."""

    results: Sequence[EncoderResult]

    def blocks(self) -> list[str | Table]:
        rows = [
            [
                result.encoder,
                _estimate(result.auroc),
                _estimate(result.difference, "+"),
                number(result.knn_auroc),
                _estimate(result.balanced_accuracy),
                _estimate(result.ece),
                number(result.n_features),
                number(result.ms_per_patch),
                number(result.licence),
            ]
            for result in self.results
        ]
        header = ["encoder", "AUROC (95 %)", "difference from the first", "k-NN AUROC", "balanced accuracy"]
        return [Table([*header, "ECE", "features", "ms a patch", "licence"], rows), str(self["path"])]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per encoder: metrics with intervals, difference from the first, cost."""
        return pd.DataFrame(self["rows"])


def _estimate(result: Interval, sign: str = "") -> str:
    if math.isnan(result.value):
        return ""
    interval = "" if result.low is None else f" ({result.low:{sign}.3f} to {result.high:{sign}.3f})"
    return f"{result.value:{sign}.3f}{interval}"


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
    differences: dict[str, MetricDifference] = {}
    if len(runs) > 1:
        comparison = compare(runs, out=folder / "comparison").record
        assert isinstance(comparison, ComparisonDocument)
        differences = {difference.of: difference.metrics["auroc"] for difference in comparison.differences}
    results = [
        _measure(name, run, pack, differences.get(run.path.name))
        for name, run in zip(settings, runs, strict=True)
    ]
    rows = [result.to_row() for result in results]
    document = {
        "format": FORMAT,
        "pack": pack.path.name,
        "split": runs[0].info["split"]["name"],
        "rows": rows,
    }
    write_csv(folder / TABLE, pd.DataFrame(rows))
    write_json(folder / DOCUMENT, document)
    return Probe(plain(document | {"path": folder}), results)


def _settings(name: str, overrides: Sequence[str]) -> list[str]:
    """Return the settings of the recipe for ``NAME`` or ``NAME=FILE``."""
    encoder, _, file = name.partition("=")
    if not encoder:
        raise RecipeError(f"{name!r} has no encoder: write NAME or NAME=FILE", "value")
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


def _measure(name: str, run: Run, pack: Pack, difference: MetricDifference | None) -> EncoderResult:
    metrics, record = run.metrics(), run.log()[-1]
    input_px = run.recipe.preprocessing.input_px
    um = None if pack.info.mpp is None else pack.info.patch_px * pack.info.mpp
    return EncoderResult(
        encoder=name.partition("=")[0],
        auroc=metrics.patch["auroc"],
        balanced_accuracy=metrics.patch["balanced_accuracy"],
        ece=metrics.patch["ece"],
        knn_auroc=_neighbours(run, pack, record),
        difference=difference or Interval(math.nan),
        p_holm=difference.p_holm if difference else None,
        C=record["penalty"],
        n_features=record["n_features"],
        parameters=run.info["parameters"]["total"],
        input_px=input_px,
        um_per_px=None if um is None else um / input_px,
        feature_seconds=record["feature_seconds"],
        ms_per_patch=1000 * record["feature_seconds"] / len(pack),
        licence=run.info["weights"]["licence"],
        weights=run.info["weights"]["weights"] or "random",
        run=run.path.name,
    )


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
    return result.metrics.patch["auroc"].value
