"""Evaluation of predictions from arrays, tables of other programs, or a classifier."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from biopsy.core.errors import DataError, MetricError, suggest
from biopsy.core.files import plain
from biopsy.core.tables import find_column, read_table
from biopsy.core.text import normalize_id
from biopsy.data.building import index_labels
from biopsy.data.datasets.base import find_positive
from biopsy.data.ledger import record_opening
from biopsy.data.packs import Pack, known_groups
from biopsy.data.predictions import decide, is_changed, read_metadata, tabulate_predictions
from biopsy.data.splits import find_split
from biopsy.evaluation.evaluate import SplitUse, check_classes, measure, predict_subset
from biopsy.evaluation.results import Evaluation
from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.classifier import Classifier, Threshold
from biopsy.models.engine import Engine
from biopsy.statistics.decisions import check_prevalence
from biopsy.statistics.multiclass import SUM_TOLERANCE

logger = logging.getLogger(__name__)

Unit = Literal["patient", "slide"]

TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")
TRUTH_COLUMNS = ("y_true", "target", "label", "true_class", "class", "truth", "ground_truth")
PROB_COLUMNS = ("prob", "y_prob", "probability", "y_score", "score")
PROB_PREFIXES = ("prob_", "y_prob_", "probability_")
GROUP_COLUMNS: dict[str, Unit] = {
    "patient_id": "patient",
    "patient": "patient",
    "groups": "patient",
    "group": "patient",
    "case_id": "patient",
    "case": "patient",
    "slide_id": "slide",
    "slide": "slide",
}
ID_COLUMNS = ("patch_id", "image_id", "id", "image", "path", "filename", "file")
_ROLES = {
    **dict.fromkeys(TRUTH_COLUMNS, "true classes"),
    **dict.fromkeys(PROB_COLUMNS, "probabilities"),
    **dict.fromkeys(GROUP_COLUMNS, "patients"),
    **dict.fromkeys(ID_COLUMNS, "patches"),
}
_N_TO_JUDGE = 20  # probabilities, below which all may be 0.5 or more by chance
_SIMILAR = 0.85  # patientid and patient_id, labels and label; not patient_age


def evaluate_predictions(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
    positive_class: str | None = None,
    threshold: float | None = None,
    subgroups: Mapping[str, ArrayLike] | pd.DataFrame | None = None,
    patch_ids: ArrayLike | None = None,
    prevalence: float | None = None,
    unit: Unit = "patient",
    seed: int = 0,
) -> Evaluation:
    """Evaluate predictions of any classifier: every metric with an interval over patients.

    Args:
        y_true: True class per patch, shape ``(n,)``: an index into ``class_names``, or a name.
        y_prob: Probability of the positive class, shape ``(n,)``, or of each class, ``(n, n_classes)``.
        groups: Patient (or slide) id per patch, the unit of the intervals. Without it, patches are treated as
            independent, and intervals are too narrow if several patches come from one patient.
        class_names: Names in the order of the columns of ``y_prob``. By default the sorted names in
            ``y_true``, as scikit-learn's ``classes_``; the numbers from 0 if it holds numbers.
        positive_class: For two classes, the one whose recall is the sensitivity and whose probability a
            one-dimensional ``y_prob`` holds; by default the second class.
        threshold: Decision threshold for two classes (default 0.5), chosen on other patches than these.
        subgroups: Columns with one value per patch; the metrics are repeated within each value.
        patch_ids: One unique id per patch.
        prevalence: Also return PPV and NPV at this share of positive patches.
        unit: Unit of ``groups``.
        seed: Seed of the bootstrap (used from 100 groups on) and of the simulated calibration floor.

    Returns:
        The evaluation: `to_frame` for a table, `to_json` for JSON, `biopsy.report` for a page.

    Raises:
        MetricError: If lengths or the orders of indices differ, values are missing, probabilities are outside
            0-1 or do not sum to one, there is one class only, a class is unknown, or a patch id is
            duplicated.

    Examples:
        >>> y_true, y_prob = [0, 1, 1, 0, 1, 0], [0.2, 0.9, 0.4, 0.3, 0.8, 0.1]
        >>> evaluation = evaluate_predictions(y_true, y_prob, groups=["a", "a", "b", "b", "c", "c"])
        >>> evaluation["patch"]["auroc"]["value"]
        1.0
    """
    _refuse_other_order(y_true=y_true, y_prob=y_prob, groups=groups)
    labels = _read_labels(y_true)
    probs = _read_probs(y_prob, len(labels))
    names, positive = _name_classes(labels, probs, class_names, positive_class)
    if probs.ndim == 1:
        if len(probs) >= _N_TO_JUDGE and probs.min() >= 0.5:
            logger.warning(
                "all probabilities are 0.5 or more: if they are those of the predicted class, these results "
                "are wrong; give those of the class %s",
                positive,
            )
        columns = (1 - probs, probs) if names.index(str(positive)) == 1 else (probs, 1 - probs)
        probs = np.stack(columns, axis=1)
    target = _index_classes(labels, names)
    if threshold is not None and (positive is None or not 0 <= threshold <= 1):
        raise MetricError(
            f"threshold={threshold!r}: expected a probability between 0 and 1, for two classes only; with "
            "more classes, the most probable one is predicted",
            "value",
        )
    if prevalence is not None:
        check_prevalence(prevalence)
    subgroup_values = {
        str(name): _read_vector(str(name), values, len(labels))
        for name, values in dict({} if subgroups is None else subgroups).items()
    }
    patch_table = _tabulate_patches(groups, patch_ids, unit, len(labels))
    positive_index = None if positive is None else names.index(positive)
    cutoff = None if positive is None else 0.5 if threshold is None else float(threshold)
    scored = ScoredPatches(
        target=target,
        probs=probs,
        pred=decide(probs, positive_index, cutoff),
        group_ids=patch_table["patch_id" if groups is None else f"{unit}_id"].to_numpy(object),
        class_names=names,
        positive_class=positive,
        unit="patch" if groups is None else unit,
        seed=seed,
    )
    frame = tabulate_predictions(
        patch_table.assign(target=target), names, positive_index, None, probs, threshold=cutoff
    )
    rule = "0.5" if threshold is None else "given"
    thresholds: list[Threshold] = []
    if cutoff is not None:
        thresholds = [{"value": cutoff, "rule": rule, "chosen_on": None}]
    metrics = measure(
        scored,
        pd.DataFrame(subgroup_values),
        thresholds,
        groups=known_groups(frame, scored.unit),
        prevalence=prevalence,
    )
    return Evaluation(plain(metrics), frame)


def evaluate_classifier(
    classifier: Classifier,
    data: Pack | Path | str,
    *,
    subset: str = "test",
    split: str | None = None,
    prevalence: float | None = None,
) -> Evaluation:
    """Evaluate a classifier without a run on a pack, and record the evaluation in the pack's ledger.

    Args:
        classifier: A classifier with the classes of the pack.
        data: A pack; all its patches are predicted unless a split is given.
        split: Name of a split of the pack.
        prevalence: As in `evaluate_predictions`.

    Raises:
        RunError: If the classes differ, or the split has no patches in that subset.
        DataError: If the pack's patches have another resolution than the classifier's or are larger.
    """
    pack = Pack.open(data)
    pack.verify()
    check_classes(pack, classifier)
    classifier.check_pack(pack)
    subsets = np.full(len(pack), subset) if split is None else find_split(pack, split).subsets(pack)
    split_use, engine = SplitUse(split), Engine("auto")
    predicted = predict_subset(classifier, pack, subsets, subset, split_use, engine=engine, seed=0)
    entry = {"run": classifier.sha256[:12], "split": split or "all patches", "fold": None, "subset": subset}
    record_opening(pack, classifier.path or Path(), entry)
    thresholds = predicted.classifier.info.thresholds[:1]
    metrics = replace(predicted.measure(thresholds, prevalence), split=split_use)
    return Evaluation(plain(metrics), predicted.frame)


def _read_vector(name: str, values: ArrayLike, n_expected: int | None = None) -> np.ndarray:
    """Return a one-dimensional array with one value per patch."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise MetricError(f"{name} has shape {array.shape}: give one value per patch", "shape")
    if n_expected is not None and len(array) != n_expected:
        raise MetricError(
            f"{name} has {len(array):,} values for {n_expected:,} patches: give one per patch", "shape"
        )
    if n_expected is None and not len(array):
        raise MetricError("there are no patches to evaluate: at least one per class is needed", "empty")
    return array


def _refuse_other_order(**values: Any) -> None:
    """Refuse pandas objects with the same index in another order, since rows are matched by position."""
    indices = {
        name: value.index for name, value in values.items() if isinstance(value, pd.Series | pd.DataFrame)
    }
    for name, index in indices.items():
        first, expected = next(iter(indices.items()))
        if not index.equals(expected) and set(index) == set(expected):
            raise MetricError(
                f"{name} has the index of {first} in another order: sort both alike, rows are matched by "
                "position",
                "order",
            )


def _read_labels(y_true: ArrayLike) -> np.ndarray:
    """Return the true classes as numbers or as text."""
    labels = _read_vector("y_true", y_true)
    _refuse_missing("y_true", np.asarray(pd.isna(labels)))
    if labels.dtype.kind == "O" and all(isinstance(label, Integral) for label in labels):
        labels = labels.astype(np.int64)  # of pandas's Int64
    return labels.astype(np.int64) if labels.dtype.kind == "b" else labels


def _refuse_missing(name: str, missing: Any) -> None:
    if missing.any():
        raise MetricError(
            f"{name} is missing in {missing.sum():,} rows, first in row {int(missing.argmax())}: fill in "
            "the values or drop the rows",
            "missing",
        )


def _read_probs(y_prob: ArrayLike, n: int) -> np.ndarray:
    """Return probabilities ``(n,)`` or ``(n, n_classes)``, checked."""
    if hasattr(y_prob, "detach"):  # a tensor, with or without gradients
        y_prob = y_prob.detach().cpu()
    try:
        probs = np.asarray(y_prob)
        if probs.dtype.kind == "c":
            raise TypeError("complex numbers")
        probs = probs.astype(np.float64)
    except (TypeError, ValueError):
        raise MetricError("y_prob holds values that are not numbers: give probabilities", "prob") from None
    if probs.ndim == 2 and probs.shape[1] == 1:
        probs = probs[:, 0]
    if probs.ndim not in (1, 2):
        raise MetricError(f"y_prob has shape {probs.shape}: give (n,) or (n, n_classes)", "shape")
    if len(probs) != n:
        raise MetricError(
            f"y_true has {n:,} patches and y_prob {len(probs):,}: give one row per patch in both", "shape"
        )
    _refuse_missing("y_prob", np.isnan(probs.reshape(n, -1)).any(axis=1))
    low, high = probs.min(), probs.max()
    if low < 0 or high > 1:
        raise MetricError(
            f"y_prob ranges from {low:.4g} to {high:.4g}, expected probabilities in 0-1: apply the sigmoid "
            "(two classes) or softmax (more) to logits, and divide percentages by 100",
            "prob",
        )
    if probs.ndim == 2:
        sums = probs.sum(axis=1)
        wrong = np.abs(sums - 1) > SUM_TOLERANCE
        if wrong.any():
            at = int(wrong.argmax())
            raise MetricError(
                f"{wrong.sum():,} rows of y_prob do not sum to one, first row {at} with {sums[at]:.4g}: "
                "independent sigmoid outputs are not probabilities of exclusive classes",
                "prob",
            )
    return probs


def _name_classes(
    labels: np.ndarray, probs: np.ndarray, class_names: Sequence[str] | None, positive_class: str | None
) -> tuple[list[str], str | None]:
    """Return the class names in order, and the positive class (None for more than two classes)."""
    n_classes = 2 if probs.ndim == 1 else probs.shape[1]
    is_text = labels.dtype.kind in "OUS"
    if class_names is not None:
        names = [str(name) for name in class_names]
    elif is_text:
        names = sorted({str(label) for label in labels})
        if len(names) != n_classes:
            raise MetricError(
                f"y_true has {len(names)} classes ({', '.join(names)}) but y_prob has {n_classes}: list all "
                "in class_names, in the order of the columns of y_prob",
                "classes",
            )
    else:
        names = [str(index) for index in range(n_classes)]
    if len(names) != n_classes or len(set(names)) != len(names) or n_classes < 2:
        raise MetricError(
            f"class_names {names} do not match y_prob with {n_classes} classes: one unique name per class",
            "classes",
        )
    if positive_class is not None and str(positive_class) not in names:
        raise MetricError(
            f"positive_class={positive_class!r} is unknown: {suggest(str(positive_class), names)}", "classes"
        )
    if n_classes > 2:
        if positive_class is not None:
            raise MetricError(
                f"positive_class={positive_class!r} needs two classes, found {n_classes}", "classes"
            )
        return names, None
    if positive_class is None and class_names is None and is_text:
        positive_class = find_positive(names)
        if positive_class is None:
            raise MetricError(
                f"positive class of {' and '.join(names)} unknown: set positive_class", "classes"
            )
    return names, names[1] if positive_class is None else str(positive_class)


def _index_classes(labels: np.ndarray, names: list[str]) -> np.ndarray:
    """Return the class index of each label; at least two classes must occur."""
    try:
        target = index_labels(labels, names)
    except DataError as error:
        raise MetricError(str(error), "classes") from None
    if len(np.unique(target)) < 2:
        raise MetricError(
            f"all {len(target):,} patches have class {names[int(target[0])]!r}: an evaluation needs at "
            "least two classes; add patches of another class",
            "undefined",
        )
    return target


def _tabulate_patches(
    groups: ArrayLike | None, patch_ids: ArrayLike | None, unit: Unit, n: int
) -> pd.DataFrame:
    """Return ``patch_id`` and the id of each patch's group."""
    ids = np.arange(n) if patch_ids is None else _read_vector("patch_ids", patch_ids, n)
    table = pd.DataFrame({"patch_id": pd.Series(ids).astype(str)})
    duplicated = table["patch_id"].duplicated()
    if duplicated.any():
        raise MetricError(
            f"{duplicated.sum():,} duplicate patch ids, first {table['patch_id'][duplicated].iloc[0]!r}: "
            "evaluate each patch once",
            "duplicate",
        )
    if groups is None:
        logger.warning("no groups given: intervals treat patches as independent and may be too narrow")
        return table
    group_ids = _read_vector("groups", groups, n)
    _refuse_missing("groups", np.asarray(pd.isna(group_ids)))
    return table.assign(**{f"{unit}_id": pd.Series(group_ids).astype(str)})


def is_table(path: object) -> bool:
    """Return whether a path has the suffix of a table of predictions."""
    return isinstance(path, str | Path) and str(path).lower().endswith(TABLE_SUFFIXES)


def evaluate_table(
    path: Path | str,
    *,
    positive: str | None = None,
    threshold: float | None = None,
    subgroups: Sequence[str] = (),
    prevalence: float | None = None,
) -> Evaluation:
    """Evaluate a csv or Parquet table of predictions with one row per patch.

    Args:
        path: Table with a column of true classes (`TRUTH_COLUMNS`), one of the positive class's probability
            (`PROB_COLUMNS`) or one per class (``prob_<class>``), and optionally one of patients
            (`GROUP_COLUMNS`).
        positive: Positive class, for two classes.
        threshold: Decision threshold (default: the one stored with biopsy's own predictions, else 0.5).
        subgroups: Columns within whose values the metrics are repeated.
        prevalence: As in `evaluate_predictions`.

    Raises:
        DataError: If the file cannot be read or columns are not recognised.
        MetricError: As in `evaluate_predictions`.
    """
    table = read_table(Path(path), {*GROUP_COLUMNS, *ID_COLUMNS})
    lower = {str(name).lower(): str(name) for name in table.columns}
    _refuse_misspelt(path, [str(name) for name in table.columns if name not in subgroups])
    truth, prob, ids = (find_column(table, names) for names in (TRUTH_COLUMNS, PROB_COLUMNS, ID_COLUMNS))
    prefix = next((p for p in PROB_PREFIXES if any(name.startswith(p) for name in lower)), None)
    prob_columns = [lower[name] for name in lower if prefix and name.startswith(prefix)]
    if truth is None or (prob is None and len(prob_columns) < 2):
        raise DataError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; rename yours: expected a column "
            f"of true classes (one of {', '.join(TRUTH_COLUMNS)}) and of probabilities (one of "
            f"{', '.join(PROB_COLUMNS)}, or prob_<class> for every class)"
        )
    if table.empty:
        raise DataError(f"{path} has a heading and no rows: nothing to evaluate")
    if table[truth].isna().all():
        raise DataError(
            f"{path} holds predictions without true classes: its column {truth!r} is empty; fill it in"
        )
    missing = [name for name in subgroups if name not in table]
    if missing:
        raise DataError(
            f"{path} has no column {missing[0]!r}: {suggest(missing[0], map(str, table.columns))}"
        )
    group = find_column(table.dropna(axis=1, how="all"), GROUP_COLUMNS)
    class_names = [name[len(prefix or "") :] for name in prob_columns] if len(prob_columns) > 1 else None
    if class_names is not None and len(class_names) == 2:
        positive = positive or _find_positive_column(path, table, class_names, prob_columns, prob)
        _refuse_numbers(path, table[truth], class_names, positive)
    elif class_names is None and positive is None:
        _require_positive(path, table[truth])
    _refuse_text(path, table[prob_columns if class_names is not None else [prob]])
    _warn_of_others(path, table, truth, TRUTH_COLUMNS)
    if class_names is None:
        _warn_of_others(path, table, prob, PROB_COLUMNS)
    stored = read_metadata(path).get("threshold")
    if is_changed(Path(path)):
        logger.warning("%s was changed since it was written; its threshold is still that of its run", path)
    evaluation = evaluate_predictions(
        table[truth].to_numpy(),
        table[prob_columns if class_names is not None else prob].to_numpy(),
        None if group is None else table[group].map(normalize_id, na_action="ignore").to_numpy(object),
        class_names=class_names,
        positive_class=positive,
        threshold=stored["value"] if threshold is None and stored else threshold,
        subgroups=table[list(subgroups)],
        patch_ids=None if ids is None else table[ids].to_numpy(object),
        prevalence=prevalence,
        unit="patient" if group is None else GROUP_COLUMNS[group.lower()],
    )
    logger.info(
        "true classes from %s, probabilities from %s, %s",
        truth,
        ", ".join(prob_columns) if len(prob_columns) > 1 else prob,
        f"{GROUP_COLUMNS[group.lower()]}s from {group}" if group else "no column of patients",
    )
    return evaluation


def _require_positive(path: Path | str, labels: pd.Series) -> None:
    """Refuse two names of classes of which none is known as positive."""
    names = sorted(set(labels.dropna())) if pd.api.types.is_string_dtype(labels) else []
    if len(names) == 2 and find_positive(names) is None:
        raise DataError(f"{path}: positive class of {' and '.join(names)} unknown: set --positive")


def _refuse_text(path: Path | str, probs: pd.DataFrame) -> None:
    """Refuse cells that are not numbers, with the first one."""
    for name, cells in probs.items():
        known = cells.dropna()
        text = known[pd.to_numeric(known, errors="coerce").isna()].astype(str)
        if text.empty:
            continue
        if text.str.fullmatch(r"[+-]?\d*,\d+").all():
            raise DataError(
                f"{path}: column {name} has decimal commas, such as {text.iloc[0]}: write points (in a "
                "spreadsheet, set the language of the numbers to English before saving)"
            )
        raise DataError(f"{path}: column {name} has {text.iloc[0]!r} where a probability was expected")


def _find_positive_column(
    path: Path | str, table: pd.DataFrame, class_names: list[str], prob_columns: list[str], prob: str | None
) -> str:
    """Return the positive one of two classes: that of the column ``prob``, else by their names."""
    if prob is not None:
        is_same = [np.array_equal(table[name], table[prob]) for name in prob_columns]
        if sum(is_same) == 1:
            return class_names[is_same.index(True)]
        if not any(is_same):
            logger.warning("%s: column %s is neither %s: ignored", path, prob, " nor ".join(prob_columns))
    positive = find_positive(class_names)
    if positive is None:
        raise DataError(f"{path}: positive class of {' and '.join(class_names)} unknown: set --positive")
    return positive


def _refuse_numbers(path: Path | str, labels: pd.Series, class_names: Sequence[str], positive: str) -> None:
    """Refuse numbers as labels where the columns are named and the positive one is the first, 0."""
    is_number = pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels)
    if is_number and positive == class_names[0] and not any(name.isdecimal() for name in class_names):
        raise DataError(
            f"{path}: column {labels.name} has numbers, which count the columns in order: 0 would be "
            f"{class_names[0]!r}, 1 {class_names[1]!r}; write the names of the classes, or swap the columns"
        )


def _warn_of_others(path: Path | str, table: pd.DataFrame, used: str | None, names: Sequence[str]) -> None:
    """Warn of columns of the same role as the one used, with other values (labels: other classes)."""
    lower = {str(name).lower(): str(name) for name in table.columns}
    for name in (lower[name] for name in names if name in lower and lower[name] != used):
        pairs = table[[used, name]].drop_duplicates()
        if len(pairs) > max(pairs[used].nunique(), pairs[name].nunique()) or (
            names is PROB_COLUMNS and not np.array_equal(table[name], table[used])
        ):
            logger.warning("%s: columns %s and %s differ; %s is used", path, used, name, used)


def _role_of(column: str) -> str | None:
    return "probabilities" if column.startswith(PROB_PREFIXES) else _ROLES.get(column)


def _refuse_misspelt(path: Path | str, columns: Sequence[str]) -> None:
    """Refuse a column that is nearly one of those recognised, if no column has its role."""
    lower = {re.sub("[^a-z0-9]+", "_", name.lower()): name for name in columns}
    roles = {_role_of(name.lower()) for name in columns}
    for spelt, name in lower.items():
        close = get_close_matches(spelt, _ROLES, n=1, cutoff=_SIMILAR)
        if close and _ROLES[close[0]] not in roles and _role_of(name.lower()) is None:
            raise DataError(
                f"{path} has a column {name!r} and none of {_ROLES[close[0]]}; did you mean {close[0]!r}? "
                "Rename it, or name it by --subgroups"
            )
