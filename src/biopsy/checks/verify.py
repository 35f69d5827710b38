"""Verification of runs, packs, bundles and slide maps: file hashes and recomputed results."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy.special import softmax

from biopsy.checks.results import Checklist, CheckReport, Status, describe_differences
from biopsy.core.errors import BiopsyError, DataError, RunError
from biopsy.core.files import find_changed, plain, read_json, sha256_file
from biopsy.core.loaders import load_json, validate
from biopsy.core.seeds import make_rng
from biopsy.data.pack_files import DOCUMENT as PACK
from biopsy.data.packs import Pack
from biopsy.data.predictions import decide, read_predictions
from biopsy.data.splits import list_splits, load_split
from biopsy.evaluation.evaluate import FORMAT as METRICS_FORMAT
from biopsy.evaluation.measure import measure_performance
from biopsy.evaluation.scored import ScoredPatches
from biopsy.exporting import hub
from biopsy.exporting.formats import FORMATS
from biopsy.models.classifier import DOCUMENT as CLASSIFIER
from biopsy.models.classifier import Classifier, score_classes
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_classifier, predict_logits
from biopsy.slides import outputs
from biopsy.slides.maps import SlideMap, collect_regions, find_regions, write_geojson
from biopsy.training.metrics import Metrics
from biopsy.training.runs import DOCUMENT as RUN
from biopsy.training.runs import OnEpoch, Run, RunInfo

MAX_LISTED = 5  # names in a sentence
SAMPLE = 256
"""Number of recomputed predictions, and of patches on which the networks of a bundle are compared."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Tolerance of probabilities before calibration, across machines."""


def verify(
    path: Run | Pack | Path | str,
    *,
    retrain: bool = False,
    trust_model: str | None = None,
    on_epoch: OnEpoch | None = None,
) -> CheckReport:
    """Check that a run, pack, classifier, bundle or slide map is unchanged, and recompute its results.

    For a run: the recorded hashes of its files; the content of the pack; metrics recomputed from the stored
    predictions (equal); probabilities and decisions recomputed from the stored logits; and the logits of a
    random sample of patches recomputed with the classifier (probabilities before calibration within 1e-4 in
    float32, 0.02 in bfloat16). For a pack: its files, the hash of its content, its splits. For a bundle: its
    hashes, and the probabilities of every network compared with those of the weights. For slide maps (the
    folder of one slide, or of several): hashes, and summary and regions recomputed from ``map.parquet``.
    Nothing is written.

    Args:
        path: A run, a pack, a classifier, a bundle, or an output folder of `biopsy.slide`.
        retrain: Also train the run again, from the recorded recipe, split and seed, in a temporary folder,
            and compare the weights.
        trust_model: SHA-256 of a bundle's TorchScript, which is code and runs only if its hash is given.
        on_epoch: With ``retrain``: called after every epoch.

    Returns:
        One row per check: PASS, WARN (not checked, or changed on purpose) or FAIL, with the remedy.

    Raises:
        DataError: If the path contains nothing that can be verified.
    """
    folder = path.path if isinstance(path, Run | Pack) else Path(path)
    kinds: dict[str, Callable[[Checklist], object]] = {
        RUN: lambda checks: _verify_run(checks, folder, retrain, on_epoch),
        PACK: lambda checks: _verify_pack(checks, folder),
        hub.DOCUMENT: lambda checks: _verify_bundle(checks, folder, trust_model),
        CLASSIFIER: lambda checks: _verify_classifier(checks, folder),
        outputs.SUMMARY: lambda checks: _verify_map(checks, folder),
    }
    document = next((name for name in kinds if (folder / name).is_file()), None)
    maps = [] if document else sorted(file.parent for file in folder.glob(f"*/{outputs.SUMMARY}"))
    if document is None and not maps:
        raise DataError(
            f"{folder} cannot be verified: it holds none of {', '.join(kinds)}, and no folder of a slide map"
        )
    if retrain and document != RUN:
        raise DataError(f"{folder} is no run: only a run can be trained again")
    checks = Checklist()
    if document is not None:
        kinds[document](checks)
    for map_folder in maps:
        _verify_map(checks, map_folder, f"{map_folder.name}: ")
    return CheckReport.of(str(folder), checks)


# --- runs
def _verify_run(checks: Checklist, folder: Path, retrain: bool, on_epoch: OnEpoch | None) -> None:
    again = "bring the file back from a copy, or train again"
    run = checks.run(RUN, lambda: ("as written", Run.open(folder)), again)
    if run is None:
        return
    for name in run.info.get("files", {}):
        checks.run(name, partial(_call, "has the recorded SHA-256", run.require_unchanged, name), again)
    _verify_outputs(checks, folder)
    if run.info["status"] != "finished":
        state = f"{run.info['status']} after {run.info['epochs_done']} of {run.info['epochs']} epochs"
        checks.add("training", "WARN", state, f"go on with `biopsy train --resume {folder}`")
        return
    classifier = checks.run("classifier", lambda: _describe_classifier(run.classifier), again)
    pack = checks.run(
        "pack",
        lambda: ("is the one the run was trained on, unchanged", run.open_pack()),
        "bring the pack back to where it was, or beside the run",
    )
    for subset in ("validation", "test"):
        _verify_subset(checks, run, subset, classifier, pack)
    for external in sorted((folder / "external").glob("*")):
        for subset in ("validation", "test"):
            _verify_subset(checks, run, subset, classifier, None, external)
    if retrain and pack is not None and classifier is not None:
        _retrain(checks, run, pack, on_epoch)


def _describe_classifier(classifier: Classifier) -> tuple[str, Classifier]:
    _ = classifier.network  # refused if the weights do not fit it
    return f"its weights are those that were saved ({classifier.info.weights_sha256[:12]})", classifier


def _verify_outputs(checks: Checklist, folder: Path, prefix: str = "") -> None:
    """Check the files in the manifest of a folder, which users may have changed on purpose."""
    changed = find_changed(folder)
    if changed is not None:
        checks.add(
            f"{prefix}other files",
            "WARN" if changed else "PASS",
            f"changed or removed since: {', '.join(changed)}" if changed else "as written",
            "nothing, if that was on purpose; else remove them and repeat the command that wrote them",
        )


def _verify_subset(
    checks: Checklist,
    run: Run,
    subset: str,
    classifier: Classifier | None,
    pack: Pack | None,
    subset_folder: Path | None = None,
) -> None:
    """Check the predictions and metrics of one subset of a run, or of another pack under ``external/``."""
    subset_folder = subset_folder or run.path
    path = subset_folder / "predictions" / f"{subset}.parquet"
    if not path.exists():
        return
    name = path.relative_to(run.path).as_posix()
    again = f"evaluate again with `biopsy evaluate {run.path}`"
    read = checks.run(name, lambda: ("as written", _read_predictions(path, run)), again)
    if read is None:
        return
    frame, precision = read, run.info.get("precision", "fp32")
    metrics = (
        subset_folder / "evaluation" / ("metrics.json" if subset == "test" else f"metrics-{subset}.json")
    )
    if metrics.exists():
        title = metrics.relative_to(run.path).as_posix()
        checks.run(title, lambda: (_recompute_metrics(metrics, frame, run), None), again)
    if classifier is not None:
        checks.run(f"{name}: decisions", lambda: (_recompute_decisions(frame, classifier), None), again)
    if classifier is not None and pack is not None:
        sample = _recompute_sample
        checks.run(f"{name}: sample", lambda: (sample(frame, classifier, pack, precision), None), again)


def _read_predictions(path: Path, run: Run) -> pd.DataFrame:
    frame, metadata = read_predictions(path)
    run.require_same_classifier(path, metadata.get("classifier_sha256"))
    return frame


def _recompute_metrics(path: Path, frame: pd.DataFrame, run: Run) -> str:
    """Compare recomputed performance metrics with those in ``metrics.json``."""
    stored = read_json(path, format=METRICS_FORMAT)
    metrics = validate(path, Metrics, stored)
    scored = ScoredPatches.of_predictions(
        frame, metrics.class_names, metrics.positive_class, metrics.unit, seed=run.info["seed"]
    )
    threshold = None if metrics.threshold is None else metrics.threshold["value"]
    result = plain(measure_performance(scored, threshold))
    differences = describe_differences({name: stored.get(name) for name in result}, result)
    if differences:
        raise RunError(f"{path} does not follow from the predictions: {_list(differences)} differ")
    return f"recomputed from {len(frame):,} predictions: equal"


def _recompute_decisions(frame: pd.DataFrame, classifier: Classifier) -> str:
    """Compare stored probabilities, classes and abstentions with those computed from the stored logits."""
    names = classifier.info.class_names
    classifier = classifier.for_patches(frame)
    probs = classifier.probs(frame[[f"logit_{name}" for name in names]].to_numpy())
    difference = np.abs(probs - frame[[f"prob_{name}" for name in names]].to_numpy()).max()
    pred = decide(probs, classifier.positive_index, classifier.threshold)
    n_other = int((pred != frame["pred"].to_numpy(int)).sum())
    abstained = classifier.abstains(probs)
    if abstained is not None:
        n_other += int((abstained != frame["abstained"].to_numpy(bool)).sum())
    if not difference <= 1e-9 or n_other:
        raise RunError(
            f"probabilities differ by up to {difference:.2g} from those of the stored logits, and "
            f"{n_other:,} decisions are others: the classifier was calibrated again since"
        )
    return f"probabilities and decisions of {len(frame):,} patches follow from their logits"


def _recompute_sample(frame: pd.DataFrame, classifier: Classifier, pack: Pack, precision: str) -> str:
    """Predict a random sample again; with context, whole slides, because logits are means over neighbours."""
    rng = make_rng(0, "verify")
    chosen = np.sort(rng.permutation(len(frame))[:SAMPLE])
    if classifier.info.context:
        slides = frame["slide_id"].fillna("").astype(str)
        chosen = np.flatnonzero(slides.isin(set(slides.iloc[chosen[:4]])))
    rows = pack.rows_of(frame["patch_id"].iloc[chosen])
    engine = Engine("auto", precision)  # type: ignore[arg-type]
    logits = predict_classifier(classifier, pack.patches, pack.sizes, rows, engine=engine)
    table = pack.table.iloc[rows]
    logits = classifier.for_patches(table).add_context(logits, table)
    columns = [f"logit_{name}" for name in classifier.info.class_names]
    stored = frame[columns].iloc[chosen].to_numpy()
    ours, theirs = (
        softmax(score_classes(values, classifier.info.outputs), axis=1) for values in (logits, stored)
    )
    difference = np.abs(ours - theirs).max()
    if not difference <= TOLERANCE[precision]:
        raise RunError(
            f"the classifier gives other predictions than are stored: probabilities of {len(chosen):,} "
            f"patches differ by up to {difference:.2g}, where {precision} allows {TOLERANCE[precision]:g}"
        )
    return (
        f"{len(chosen):,} patches predicted again: probabilities differ by at most {difference:.1g} "
        f"(allowed in {precision}: {TOLERANCE[precision]:g})"
    )


_RESULTS = ("chosen_epoch", "threshold", "classifier_sha256", "batch_norm", "warnings", "stopped_early")


def _retrain(checks: Checklist, run: Run, pack: Pack, on_epoch: OnEpoch | None) -> None:
    if run.info.get("transform") is not None:
        remedy = "train it again in Python with the same transform"
        checks.add("training again", "WARN", "not done: the run used a transform of its user's", remedy)
        return
    from biopsy.training.train import train  # imports PyTorch

    classifier = run.classifier
    with TemporaryDirectory() as folder:
        kept = {key: value for key, value in run.info.items() if key not in _RESULTS}
        info = cast(RunInfo, {**kept, "status": "running", "epochs_done": 0, "seconds": 0.0})
        split = pd.DataFrame({"patch_id": pack.table["patch_id"], "subset": run.subsets(pack)})
        again = Run.create(Path(folder) / "run", info, run.recipe, split)
        again = train(resume=again, data=pack, on_epoch=on_epoch)
        is_identical = again.classifier.info.weights_sha256 == classifier.info.weights_sha256
        frames = [one.predictions("validation")[0] for one in (run, again)]
    columns = [f"logit_{name}" for name in classifier.info.class_names]
    outputs = classifier.info.outputs
    probs = [softmax(score_classes(frame[columns].to_numpy(), outputs), axis=1) for frame in frames]
    difference, tolerance = np.abs(probs[0] - probs[1]).max(), TOLERANCE[run.info.get("precision", "fp32")]
    if is_identical:
        checks.add("training again", "PASS", "the weights are the same, bit for bit")
        return
    ours, theirs = run.info["environment"], again.info["environment"]
    changed = [key for key in theirs if theirs[key] != ours.get(key)]
    detail = f"validation probabilities differ by up to {difference:.2g} (allowed: {tolerance:g})"
    if changed:
        detail += f"; other than then: {', '.join(changed)}"
    status: Status = "PASS" if difference <= tolerance else "WARN" if changed else "FAIL"
    remedy = "compare both with `biopsy compare`; the same bits need the same processor, threads and versions"
    checks.add("training again", status, detail, remedy)


# --- packs
def _verify_pack(checks: Checklist, folder: Path) -> None:
    again = "bring the file back, or make the pack again with `biopsy prepare`"
    pack = checks.run("files", lambda: ("sizes, hashes and columns as written", Pack.open(folder)), again)
    if pack is None:
        return
    checks.run("content", partial(_call, f"{len(pack):,} patches have the recorded hash", pack.verify), again)
    for name in list_splits(pack):
        checks.run(
            f"split {name}",
            partial(_call, "is of this pack, as written", load_split, pack, name),
            "make it again with `biopsy split`",
        )


# --- classifiers and bundles
def _verify_classifier(checks: Checklist, folder: Path) -> Classifier | None:
    remedy = "bring the folder back from a copy, or export or train again"
    return checks.run("classifier", lambda: _describe_classifier(Classifier.load(folder)), remedy)


def _verify_bundle(checks: Checklist, folder: Path, trust_model: str | None) -> None:
    remedy = "export it again with `biopsy export`"
    document = checks.run(hub.DOCUMENT, lambda: ("as written", hub.read_bundle(folder)), remedy)
    if document is None:
        return
    hashes = document["files"]
    changed = [name for name, sha256 in hashes.items() if not _has_hash(folder / name, sha256)]
    detail = f"changed or missing: {_list(changed)}" if changed else f"{len(hashes)} files as written"
    checks.require("files", not changed, detail, remedy)
    classifier = _verify_classifier(checks, folder)
    if classifier is None or changed:  # what is another file than was written is not loaded
        return
    same = classifier.sha256 == document["classifier_sha256"]
    checks.require("bundle of this classifier", same, "same hash" if same else "another hash", remedy)
    from biopsy.exporting.bundles import draw_patches  # imports PyTorch

    patches = draw_patches(classifier.info.patch_px)
    single = classifier.single_patch()
    engine = Engine("cpu")
    logits = predict_logits(single.network, single.info.preprocessing, patches, engine=engine)
    for name, form in FORMATS.items():
        code = None if form.code is None else sha256_file(folder / form.code)
        if code is not None and code != (trust_model or "").strip().lower():
            checks.add(
                name,
                "WARN",
                f"not run: {form.code} is code",
                f"if you trust where it comes from, pass --trust-model {code}",
            )
            continue
        checks.run(name, partial(_compare, form, single, folder, patches, logits), remedy)


def _has_hash(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _compare(
    form: Any, classifier: Classifier, folder: Path, patches: np.ndarray, logits: np.ndarray
) -> tuple[str, None]:
    from biopsy.exporting.bundles import TOLERANCE as TOLERANCE_OF_FORMATS  # imports PyTorch

    try:
        probs = form.predict(classifier, folder, patches)
    except BiopsyError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise RunError(f"{form.name} does not run: {error}") from None
    if probs is None:
        return "not in this bundle", None
    difference = np.abs(probs - classifier.probs(logits)).max()
    if not difference <= TOLERANCE_OF_FORMATS:
        raise RunError(
            f"{form.name} differs by {difference:.2g} in a probability from the weights, where at most "
            f"{TOLERANCE_OF_FORMATS:g} is allowed"
        )
    return (
        f"probabilities of {len(patches)} synthetic patches differ by at most {difference:.1g} from those of "
        f"the weights (allowed: {TOLERANCE_OF_FORMATS:g})",
        None,
    )


# --- slide maps
def _verify_map(checks: Checklist, folder: Path, prefix: str = "") -> None:
    remedy = "remove the folder and map the slide again with `biopsy slide`"
    summary = checks.run(
        f"{prefix}{outputs.SUMMARY}",
        lambda: ("as written", outputs.read_summary(folder)),
        remedy,
    )
    _verify_outputs(checks, folder, prefix)
    path = folder / outputs.MAP
    slide_map = checks.run(f"{prefix}{outputs.MAP}", lambda: _read_map(path), remedy)
    if summary is None or slide_map is None:
        return
    regions = find_regions(slide_map)
    positive = summary.get("positive")
    result = plain(
        outputs.summarise(
            slide_map, regions, is_calibrated=positive is not None and positive["expected_mm2"] is not None
        )
    )
    differences = describe_differences({name: summary.get(name) for name in result}, result)
    detail = f"{_list(differences)} differ" if differences else "areas and shares follow from the map"
    checks.require(f"{prefix}areas", not differences, detail, remedy)
    with TemporaryDirectory() as place:
        again = load_json(write_geojson(Path(place) / "r.geojson", collect_regions(slide_map, regions)))
    checks.run(
        f"{prefix}{outputs.REGIONS}",
        lambda: (_compare_regions(folder / outputs.REGIONS, again, len(regions)), None),
        remedy,
    )


def _read_map(path: Path) -> tuple[str, SlideMap]:
    slide_map = SlideMap.from_parquet(path)
    return f"{len(slide_map):,} patches", slide_map


def _compare_regions(path: Path, again: Any, n_regions: int) -> str:
    if load_json(path) != again:
        raise DataError(f"{path} holds other regions than follow from the map")
    return f"{n_regions} regions follow from the map"


def _call(detail: str, function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    return detail, function(*arguments)


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest
