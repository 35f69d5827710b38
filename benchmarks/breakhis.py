"""BreakHis with cases apart: eight-class and two-class runs, every number recomputed with scikit-learn.

The photographs at 100X, reduced to a quarter of their sides, are prepared twice, with their subtypes as
classes and as benign and malignant; a small network is trained on five folds of cases with two seeds. Every
metric of every run, of each class against the rest, of the classification report, the confusion matrix, the
subgroups and the means over patients, and every number of the study page (folds, seeds, pooled) is then
computed again by scikit-learn from the stored predictions, but for calibration error and intercept, which it
lacks. The networks are small and trained briefly: the differences are the result, the accuracies are not.

Command (about five minutes on one core)::

    python benchmarks/breakhis.py breakhis_100x_subset.zip --out studies/breakhis

Finished runs are kept. Writes ``results/breakhis.csv``: a row per task, level (``run``, ``class``, ``fold``,
``pooled`` ...) and metric, with how many numbers were compared, how many are undefined here, the largest
difference, and the mean over runs.
"""

import argparse
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

import biopsy
from biopsy.core.files import plain, read_json
from biopsy.training.runs import Run
from biopsy.training.study import Study

RESULTS = Path(__file__).parent / "results" / "breakhis.csv"
MPP = 0.65  # published nowhere; what most accounts have for "100X"
TIMES = 4  # smaller than the photographs, so that the runs are short
SETTINGS = {"preprocessing.input_px": 64, "train.epochs": 2, "model.context": 0}
UNCOMPARED = ("ece", "calibration_intercept")  # scikit-learn has neither
TASKS = {"subtypes": None, "malignant": "malignant"}

Comparison = tuple[str, str, float | None, float]
"""Level, metric, our value (None where it is undefined) and scikit-learn's."""


def reduce_photographs(source: Path, out: Path) -> None:
    """Write a zip of the same names, each photograph reduced ``TIMES`` times, as PNG."""
    with zipfile.ZipFile(source) as photographs, zipfile.ZipFile(out, "w") as reduced:
        for name in photographs.namelist():
            if name.endswith((".jpg", ".png")):
                with Image.open(photographs.open(name)) as image:
                    small = image.convert("RGB").reduce(TIMES)
                encoded = io.BytesIO()
                small.save(encoded, "PNG")
                reduced.writestr(str(Path(name).with_suffix(".png")), encoded.getvalue())


def of_two(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray) -> dict[str, Callable[[], float]]:
    """Return scikit-learn's value of each metric of two classes, the positive one being 1."""
    matrix = sk.confusion_matrix(y_true, y_pred, labels=[0, 1])

    def slope() -> float:
        logit = np.log(y_prob / (1 - y_prob))
        return float(LogisticRegression(C=np.inf, tol=1e-10).fit(logit[:, None], y_true).coef_[0, 0])

    def specificity_at(sensitivity: float) -> float:
        fpr, tpr, _ = sk.roc_curve(y_true, y_prob, drop_intermediate=False)
        return float(1 - fpr[tpr >= sensitivity].min())

    return {
        "specificity_at_sensitivity_95": lambda: specificity_at(0.95),
        "specificity_at_sensitivity_98": lambda: specificity_at(0.98),
        "auroc": lambda: sk.roc_auc_score(y_true, y_prob),
        "auprc": lambda: sk.average_precision_score(y_true, y_prob),
        "sensitivity": lambda: matrix[1, 1] / matrix[1].sum(),
        "specificity": lambda: matrix[0, 0] / matrix[0].sum(),
        "ppv": lambda: matrix[1, 1] / matrix[:, 1].sum(),
        "npv": lambda: matrix[0, 0] / matrix[:, 0].sum(),
        "accuracy": lambda: sk.accuracy_score(y_true, y_pred),
        "balanced_accuracy": lambda: sk.balanced_accuracy_score(y_true, y_pred),
        "f1": lambda: sk.f1_score(y_true, y_pred, zero_division=0),
        "mcc": lambda: sk.matthews_corrcoef(y_true, y_pred),
        "brier": lambda: sk.brier_score_loss(y_true, y_prob),
        "nll": lambda: sk.log_loss(y_true, y_prob, labels=[0, 1]),
        "calibration_slope": slope,
    }


def of_classes(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray) -> dict[str, Callable[[], float]]:
    """Return scikit-learn's value of each metric of more than two classes."""
    labels = np.arange(y_prob.shape[1])
    shared: dict[str, Any] = {"labels": labels, "zero_division": 0}
    y_prob = y_prob / y_prob.sum(axis=1, keepdims=True)
    return {
        "accuracy": lambda: sk.accuracy_score(y_true, y_pred),
        "balanced_accuracy": lambda: sk.balanced_accuracy_score(y_true, y_pred),
        "f1_macro": lambda: sk.f1_score(y_true, y_pred, average="macro", **shared),
        "f1_weighted": lambda: sk.f1_score(y_true, y_pred, average="weighted", **shared),
        "kappa": lambda: sk.cohen_kappa_score(y_true, y_pred, labels=labels),
        "kappa_quadratic": lambda: sk.cohen_kappa_score(y_true, y_pred, labels=labels, weights="quadratic"),
        "mcc": lambda: sk.matthews_corrcoef(y_true, y_pred),
        "auroc": lambda: sk.roc_auc_score(y_true, y_prob, multi_class="ovr", labels=labels),
        "auroc_micro": lambda: sk.roc_auc_score(np.eye(len(labels))[y_true].ravel(), y_prob.ravel()),
        "nll": lambda: sk.log_loss(y_true, y_prob, labels=labels),
        "brier": lambda: sk.brier_score_loss(y_true, y_prob, labels=labels, scale_by_half=False),
    }


def measure(
    frame: pd.DataFrame, class_names: list[str], positive: int | None
) -> dict[str, Callable[[], float]]:
    """Return scikit-learn's metrics of a table of predictions."""
    y_true, y_pred = frame["target"].to_numpy(int), frame["pred"].to_numpy(int)
    y_prob = frame[[f"prob_{name}" for name in class_names]].to_numpy(float)
    if positive is None:
        return of_classes(y_true, y_prob, y_pred)
    return of_two((y_true == positive).astype(int), y_prob[:, positive], (y_pred == positive).astype(int))


def compare_values(
    level: str, ours: dict[str, Any], theirs: dict[str, Callable[[], float]]
) -> Iterator[Comparison]:
    """Yield each metric that both have; one that is undefined here is not asked of scikit-learn."""
    for name in ours.keys() & theirs.keys():
        value = ours[name]["value"]
        yield level, name, value, float("nan") if value is None else float(theirs[name]())


def compare_run(run: Run) -> Iterator[Comparison]:
    """Yield the numbers of a run's ``metrics.json`` beside scikit-learn's."""
    document, (frame, _) = plain(run.metrics()), run.predictions("test")
    names = document["class_names"]
    positive = None if document["positive_class"] is None else names.index(document["positive_class"])
    yield from compare_values("run", document["patch"], measure(frame, names, positive))
    y_true, y_pred = frame["target"].to_numpy(int), frame["pred"].to_numpy(int)
    for k, name in enumerate(names if positive is None else ()):
        is_class, prob = (y_true == k).astype(int), frame[f"prob_{name}"].to_numpy(float)
        theirs = of_two(is_class, np.clip(prob, 1e-12, 1 - 1e-12), (y_pred == k).astype(int))
        del theirs["calibration_slope"]  # of classes that are told apart without an error there is none
        yield from compare_values("class", document["one_vs_rest"][name], theirs)
    yield from compare_report("report", document["classification_report"], names, y_true, y_pred)
    yield from compare_counts("counts", document, y_true, y_pred, positive)
    if positive is not None:
        yield from compare_groups("patient mean", document["patient"], frame, names, positive)
        table = run.open_pack().table.set_index("patch_id")
        for (column, name), values in list_subgroups(document):
            part = frame[frame["patch_id"].map(table[column]) == name]
            yield "subgroup", "n_patches", values["n_patches"], len(part)
            yield from compare_values("subgroup", values["patch"], measure(part, names, positive))


def list_subgroups(document: dict[str, Any]) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """Return column, name and entry of each subgroup in ``metrics.json``."""
    subgroups = document["subgroups"]
    return [((column, name), entry) for column, of in subgroups.items() for name, entry in of.items()]


def compare_counts(
    level: str, document: dict[str, Any], y_true: np.ndarray, y_pred: np.ndarray, positive: int | None
) -> Iterator[Comparison]:
    """Yield the counts of the confusion matrix, and the prevalence."""
    labels = np.arange(len(document["class_names"]))
    theirs = sk.confusion_matrix(y_true, y_pred, labels=labels)
    if positive is None:
        for ours, expected in zip(np.ravel(document["confusion_matrix"]), theirs.ravel(), strict=True):
            yield level, "confusion_matrix", float(ours), float(expected)
        return
    if positive == 0:
        theirs = theirs[::-1, ::-1]
    for name, expected in zip(("tn", "fp", "fn", "tp"), theirs.ravel(), strict=True):
        yield level, name, document["confusion"][name], float(expected)
    if "prevalence" in document:
        yield level, "prevalence", document["prevalence"], float((y_true == positive).mean())


def compare_groups(
    level: str, ours: dict[str, Any], frame: pd.DataFrame, names: list[str], positive: int
) -> Iterator[Comparison]:
    """Yield the means of a metric over the patients in whom it is defined."""
    by_patient: dict[str, list[float]] = {}
    for _, part in frame.groupby("patient_id"):
        has = set((part["target"] == positive).tolist())
        theirs = measure(part, names, positive)
        for name in ours.keys() & theirs.keys():
            needs = {"sensitivity": {True}, "f1": {True}, "specificity": {False}}.get(name, set())
            if name.startswith(("auroc", "auprc", "balanced", "mcc", "specificity_at")):
                needs = {True, False}
            if needs <= has:
                with np.errstate(invalid="ignore"):
                    by_patient.setdefault(name, []).append(float(theirs[name]()))
    for name, summary in ours.items():
        if defined := [value for value in by_patient.get(name, ()) if np.isfinite(value)]:
            yield level, name, summary["value"], float(np.mean(defined))
        elif name not in UNCOMPARED:
            yield level, name, summary["value"], float("nan")


def compare_report(
    level: str, rows: list[dict[str, Any]], names: list[str], y_true: np.ndarray, y_pred: np.ndarray
) -> Iterator[Comparison]:
    """Yield precision, recall, F1 and counts of the classification report."""
    labels = np.arange(len(names))
    options: dict[str, Any] = {"labels": labels, "zero_division": np.nan}
    columns = sk.precision_recall_fscore_support(y_true, y_pred, **options)
    of_class = dict(zip(names, np.transpose(columns), strict=True))
    for row in rows:
        if row["name"] in of_class:
            theirs = of_class[row["name"]]
        elif row["name"] == "micro average":
            theirs = [sk.accuracy_score(y_true, y_pred)] * 3 + [len(y_true)]
        else:
            average = row["name"].removesuffix(" average")
            averaged = sk.precision_recall_fscore_support(y_true, y_pred, average=average, **options)
            theirs = [*averaged[:3], len(y_true)]
        for key, value in zip(("precision", "recall", "f1", "n"), theirs, strict=True):
            yield level, key, row[key], float("nan") if row[key] is None else float(value)


def compare_pooled(study: Study) -> Iterator[Comparison]:
    """Yield the means over seeds of the pooled out-of-fold numbers."""
    pooled = pd.read_parquet(study.path / "predictions.parquet")
    ((_, entry),) = read_json(study.path / "metrics.json")["recipes"].items()
    names, positive = entry["pooled"]["class_names"], read_json(study.path / "metrics.json")["positive_class"]
    index = None if positive is None else names.index(positive)
    seeds = [measure(frame, names, index) for _, frame in pooled.groupby("seed")]
    theirs = {
        name: lambda name=name: float(np.mean([values[name]() for values in seeds])) for name in seeds[0]
    }
    yield from compare_values("pooled", entry["pooled"]["patch"], theirs)
    target, pred = pooled["target"].to_numpy(int), pooled["pred"].to_numpy(int)
    yield from compare_counts("pooled counts", entry["pooled"], target, pred, index)
    yield from compare_report("pooled report", entry["pooled"]["classification_report"], names, target, pred)
    for name in entry["over_seeds"].keys() & seeds[0].keys():
        values = pd.Series([values[name]() for values in seeds])
        for key, value in describe_spread(values).items():
            yield "over seeds", f"{name}, {key}", entry["over_seeds"][name][key], value
    yield from compare_folds(pooled, entry, names, index)


def describe_spread(values: pd.Series) -> dict[str, float]:
    """Return mean, standard deviation and range."""
    return {"mean": values.mean(), "sd": values.std(ddof=1), "min": values.min(), "max": values.max()}


def compare_folds(
    pooled: pd.DataFrame, entry: dict[str, Any], names: list[str], positive: int | None
) -> Iterator[Comparison]:
    """Yield the numbers of each fold over seeds, and their means over folds, as on the study page."""
    folds = {fold["fold"]: fold for fold in entry["folds"]}
    means: dict[str, list[float]] = {}
    for fold, part in pooled.groupby("fold"):
        runs = [measure(frame, names, positive) for _, frame in part.groupby("seed")]
        yield "fold", "n_patches", folds[fold]["n_patches"], len(part) / len(runs)
        for name in folds[fold].keys() & runs[0].keys():
            ours = folds[fold][name]
            if ours["mean"] is None:
                yield "fold", f"{name}, mean", None, float("nan")
                continue
            if name == "calibration_slope" and ours["sd"] is None:  # undefined with one of the seeds
                continue
            values = pd.Series([float(run[name]()) for run in runs])
            means.setdefault(name, []).append(values.mean())
            for key in ("mean", "sd"):
                yield "fold", f"{name}, {key}", ours[key], describe_spread(values)[key]
    for name, ours in entry["within_folds"].items():
        if len(means.get(name, ())) == len(folds):
            spread = describe_spread(pd.Series(means[name]))
            for key in ("mean", "min", "max"):
                yield "within folds", f"{name}, {key}", ours[key], spread[key]


def tabulate(task: str, compared: list[Comparison]) -> pd.DataFrame:
    """Return a row per level and metric."""
    frame = pd.DataFrame(compared, columns=["level", "metric", "ours", "sklearn"])
    frame["ours"] = frame["ours"].astype(float)
    frame["difference"] = (frame["ours"] - frame["sklearn"]).abs()
    found = frame.groupby(["level", "metric"], sort=True).agg(
        n_compared=("difference", "count"),
        n_undefined=("ours", lambda values: int(values.isna().sum())),
        largest_difference=("difference", "max"),
        mean=("ours", "mean"),
    )
    return found.reset_index().assign(task=task)[["task", *found.reset_index().columns]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("studies/breakhis"))
    arguments = parser.parse_args()
    tables = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = arguments.out / "reduced.zip"
    if not source.exists():
        reduce_photographs(arguments.source, source)
    for task, positive in TASKS.items():
        place = arguments.out / task
        pack = biopsy.prepare(
            source,
            arguments.out / f"{task}.pack",
            dataset="breakhis-100x",
            mpp=TIMES * MPP,
            positive=positive,
        )
        study = biopsy.study(
            "idc-small", pack, folds=5, seeds=(0, 1), overrides=SETTINGS, out=place, device="cpu"
        )
        compared = [item for run in study.evaluated_runs() for item in compare_run(run)]
        tables.append(tabulate(task, [*compared, *compare_pooled(study)]))
    table = pd.concat(tables)
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.to_string(index=False))
    print(f"largest difference: {table['largest_difference'].max():.2g}")


if __name__ == "__main__":
    main()
