"""Predictions: the table from which every reported number can be recomputed; Kaggle's submission csv."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, FileFormatError, UserFileError
from biopsy.core.files import plain, read_json, replace_atomic, sha256_file, warn_unsealed, write_json
from biopsy.core.loaders import parse_json, refusing
from biopsy.core.tables import read_csv_table, read_parquet_metadata, read_parquet_table, write_csv
from biopsy.data.packs import Pack, hash_columns
from biopsy.slide_io.images import IMAGE_SUFFIXES

FORMAT = "biopsy-predictions/1"


class FrozenThreshold(TypedDict):
    """The probability from which a patch is called positive, how it was chosen, and on which subset."""

    value: Annotated[float, Field(ge=0, le=1.001)]  # just above 1 where nothing is called positive
    rule: str
    chosen_on: str | None


IDENTITY = ("patch_id", "patient_id", "slide_id", "x", "y")
_TEXT = ("patch_id", "patient_id", "slide_id", "subset", "source")
_WHOLE = ("x", "y", "fold", "target", "pred")
_YES_NO = ("abstained", "out_of_distribution")
_FLOAT = re.compile(r"^(prob|logit)_|_distance$")
_KEY = b"biopsy"
_REMEDY = "make it again with `biopsy evaluate` or `biopsy predict`"

_CONTENT = "content_sha256"
_NEEDED = (*IDENTITY, "subset", "fold", "target", "pred", "abstained")


class PredictionsInfo(TypedDict, total=False):
    """What predictions were made with, as it is stored beside them."""

    format: str
    pack_sha256: str
    classifier_sha256: str
    split: str
    fold: int | None
    threshold: FrozenThreshold | None


def make_predictions(
    pack: Pack,
    index: np.ndarray,
    logits: np.ndarray,
    probs: np.ndarray,
    *,
    subsets: np.ndarray | str,
    fold: int | None = None,
    threshold: float | None = 0.5,
    abstained: np.ndarray | None = None,
) -> pd.DataFrame:
    """Return the predictions of some patches of a pack.

    Args:
        index: Which rows of the pack were predicted, ``(n,)``.
        logits: Before calibration, ``(n, n_classes)``.
        probs: After calibration, ``(n, n_classes)``.
        subsets: The subset of each predicted patch, ``(n,)``, or of all of them.
        threshold: As in `tabulate_predictions`.
        abstained: As in `tabulate_predictions`.

    Returns:
        The table, in the order of ``index``.
    """
    rows = pack.table.iloc[index]
    about = (
        rows[list(IDENTITY)].assign(subset=subsets, fold=fold, target=rows["target"]).reset_index(drop=True)
    )
    return tabulate_predictions(
        about, pack.class_names, pack.positive_index, logits, probs, threshold=threshold, abstained=abstained
    )


def tabulate_predictions(
    about: pd.DataFrame,
    class_names: list[str],
    positive_index: int | None,
    logits: np.ndarray | None,
    probs: np.ndarray,
    *,
    threshold: float | None = 0.5,
    abstained: np.ndarray | None = None,
) -> pd.DataFrame:
    """Put what is known of patches, their logits and probabilities, and the decision into one table.

    Args:
        about: ``patch_id`` and what else is known of `IDENTITY`, subset, fold and target, ``n`` rows. What is
            missing is null.
        class_names: Names of the classes, in the order of the columns of ``logits``.
        positive_index: Index of the positive class; None for more than two classes.
        logits: ``(n, n_classes)``; None where they are not known.
        probs: ``(n, n_classes)``, each in [0, 1].
        threshold: For two classes, the probability from which a patch is called positive; None takes the
            likeliest class, as always for more than two.
        abstained: Where no decision is given, bool ``(n,)``.

    Raises:
        DataError: If shapes do not agree or a probability is not one.
    """
    shape = (len(about), len(class_names))
    for array in (probs, *([] if logits is None else [logits])):
        if array.shape != shape:
            raise DataError(
                f"logits or probabilities {array.shape} do not fit {shape[0]} patches, {shape[1]} classes"
            )
    probs = np.asarray(probs, np.float64)
    if not ((probs >= 0) & (probs <= 1)).all():
        raise DataError("probabilities must lie in 0 to 1 and be numbers; check the classifier's outputs")
    frame = about.reindex(columns=[*IDENTITY, "subset", "fold", "target"])
    for values, kind in ((logits, "logit"), (probs, "prob")):
        if values is None:
            continue
        for column, name in enumerate(class_names):
            frame[f"{kind}_{name}"] = np.asarray(values[:, column], np.float64)
    frame["pred"] = decide(probs, positive_index, threshold)
    frame["abstained"] = False if abstained is None else np.asarray(abstained, bool)
    if positive_index is not None:
        frame["prob"] = probs[:, positive_index]
    return _with_types(frame)


def write_predictions(path: Path | str, frame: pd.DataFrame, metadata: Mapping[str, object]) -> Path:
    """Write predictions as Parquet or CSV, by the ending of ``path``, whole or not at all.

    Args:
        path: ``*.parquet``, or ``*.csv`` with ``*.csv.json`` beside it.
        frame: As `make_predictions` gives it.
        metadata: What they were made with: hashes of pack and classifier, split, threshold and its rule.

    Raises:
        DataError: If the ending is another one.
    """
    path = Path(path)
    about = plain({**metadata, "format": FORMAT})
    about[_CONTENT] = _hash_content(frame, about)
    if path.suffix == ".parquet":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({_KEY: json.dumps(about).encode()})
        with replace_atomic(path) as partial:
            pq.write_table(table, partial)
    elif path.suffix == ".csv":
        write_described_csv(path, frame, about)
    else:
        raise DataError(f"predictions cannot be written to {path.name!r}; use .parquet or .csv")
    return path


def write_described_csv(path: Path, table: pd.DataFrame, metadata: Mapping[str, object]) -> None:
    """Write a csv, and its metadata with its own hash into ``<name>.csv.json`` beside it."""
    write_csv(path, table)
    write_json(_beside(path), {**metadata, "sha256": sha256_file(path)})


def check_replaceable(path: Path, *, is_named: bool) -> None:
    """Refuse to replace a table, or what is beside a csv, that this package did not write.

    Args:
        path: ``*.csv`` or ``*.parquet``.
        is_named: Whether the user named this very file, which may then be any.

    Raises:
        UserFileError: If it is another file, or was changed since it was written.
    """
    about = _beside(path)
    if path.suffix == ".csv" and about.exists() and _read_beside(path) is None:
        raise UserFileError(
            about, "foreign", f"was not written by biopsy: move it, or write {path.name} elsewhere"
        )
    if path.exists() and not is_named and not _is_unchanged(path):
        raise UserFileError(
            path, "foreign", "was not written by biopsy, or changed since: name a file with --out"
        )


def _is_unchanged(path: Path) -> bool:
    if path.suffix == ".csv":
        return (_read_beside(path) or {}).get("sha256") == sha256_file(path)
    try:
        return _KEY in read_parquet_metadata(path)
    except FileFormatError:
        return False


def _read_beside(path: Path) -> dict[str, object] | None:
    """Return the metadata beside a csv; None where there is none of this package."""
    try:
        about = read_json(_beside(path), may_lack_hash=True)
    except DataError:
        return None
    return about if str(about.get("format")).startswith("biopsy-") else None


def read_predictions(path: Path | str) -> tuple[pd.DataFrame, PredictionsInfo]:
    """Read predictions and their metadata from Parquet or CSV.

    Raises:
        FileFormatError: If the file is missing, damaged, of a newer format, lacks columns, or was changed
            since it was written.
    """
    path = Path(path)
    if path.suffix == ".csv":
        about = read_json(_beside(path), format=FORMAT, remedy=_REMEDY, may_lack_hash=True)
        frame = read_csv_table(path, required=_NEEDED)
    else:
        frame, metadata = read_parquet_table(path)
        about = parse_json(metadata.get(_KEY, b"{}"), path)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise FileFormatError(path, "format", f"is no table of predictions of format {FORMAT!r}")
    missing = [name for name in _NEEDED if name not in frame]
    if missing or not class_columns(frame):
        raise FileFormatError(
            path, "columns", f"lacks the columns {missing or ['prob_<class>']}: it is no table of predictions"
        )
    with refusing(path, "predictions"):
        frame = _with_types(frame)
    probs = frame[[f"prob_{name}" for name in class_columns(frame)]].to_numpy()
    if not ((probs >= 0) & (probs <= 1)).all() or not _are_classes(frame):
        raise FileFormatError(path, "value", "holds probabilities beyond 0 to 1, or classes without a column")
    about.pop("sha256", None)  # of a csv's text, by which it is known to be replaceable
    content_sha256 = about.pop(_CONTENT, None)
    if content_sha256 is None:
        warn_unsealed(path, _CONTENT)
    elif content_sha256 != _hash_content(frame, about) or not _is_of_class(frame):
        raise FileFormatError(path, "altered", f"was changed since it was written; {_REMEDY}")
    return frame, cast(PredictionsInfo, about)


def _are_classes(frame: pd.DataFrame) -> bool:
    known = (
        frame[["target", "pred"]].isin(range(len(class_columns(frame)))) | frame[["target", "pred"]].isna()
    )
    return bool(known.all(axis=None) and frame["pred"].notna().all())


def _is_of_class(frame: pd.DataFrame) -> bool:
    """Return whether ``prob``, which the hash does not cover, is the column of a class, if it is there."""
    columns = (frame[f"prob_{name}"] for name in class_columns(frame))
    return "prob" not in frame or any((frame["prob"] == column).all() for column in columns)


def _hash_content(frame: pd.DataFrame, about: Mapping[str, object]) -> str:
    """Hash what reported numbers rest on; columns that were joined may come and go."""
    names = [name for name in frame if name in _NEEDED or _FLOAT.search(str(name))]
    known = {key: value for key, value in about.items() if key != _CONTENT}
    text = json.dumps([hash_columns(frame, names), known], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_metadata(path: Path | str) -> PredictionsInfo:
    """Return what stands beside a table of predictions; empty for a table of another program's."""
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            about = parse_json(read_parquet_metadata(path).get(_KEY, b"{}"), path)
        else:
            about = read_json(_beside(path), may_lack_hash=True)
    except FileFormatError:
        return {}
    is_ours = isinstance(about, dict) and about.get("format") == FORMAT
    return cast(PredictionsInfo, about) if is_ours else {}


def class_columns(frame: pd.DataFrame) -> list[str]:
    """Name the classes a table of predictions has probabilities for, in order."""
    return [name.removeprefix("prob_") for name in frame.columns if name.startswith("prob_")]


def decide(probs: np.ndarray, positive_index: int | None, threshold: float | None) -> np.ndarray:
    """Return the class that each patch is called, ``(n,)``; threshold as in `tabulate_predictions`."""
    if positive_index is None or threshold is None:
        return probs.argmax(axis=1)
    return np.where(probs[:, positive_index] >= threshold, positive_index, 1 - positive_index)


def _with_types(frame: pd.DataFrame) -> pd.DataFrame:
    """Return columns of the same types however they were stored: text, integers, floats, nulls in each."""
    types = dict.fromkeys(_TEXT, "string") | dict.fromkeys(_WHOLE, "Int64") | dict.fromkeys(_YES_NO, "bool")
    floats = [name for name in frame.columns if name == "prob" or _FLOAT.search(name)]
    types |= dict.fromkeys(floats, "float64")
    for name in _YES_NO:
        if name in frame and pd.api.types.is_string_dtype(frame[name].dtype):  # as csv has it
            frame[name] = [{"True": True, "False": False}[word] for word in frame[name]]
    return frame.astype({name: kind for name, kind in types.items() if name in frame})


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


FORMAT_SUBMISSIONS = "biopsy-submission/1"


def give_ids(patch_ids: Sequence[str]) -> list[str]:
    """Return each patch the id Kaggle knows it by: its file's name without folders and ending.

    Raises:
        DataError: If two patches have the same id, which Kaggle refuses.
    """
    ids = []
    for patch_id in patch_ids:
        name = patch_id.rpartition("/")[2]
        stem, dot, ending = name.rpartition(".")
        ids.append(stem if stem and (dot + ending).lower() in IMAGE_SUFFIXES else name)
    seen = pd.Series(ids, dtype=str)
    twice = seen[seen.duplicated()]
    if len(twice):
        raise DataError(f"two patches have the id {twice.iloc[0]!r}: Kaggle's csv takes each id once")
    return ids


def check_name(path: Path | str) -> Path:
    """Refuse a file that is not named as a csv."""
    path = Path(path)
    if path.suffix != ".csv":
        raise DataError(f"Kaggle takes a csv, not {path.name!r}; name the submission with .csv")
    return path


def write_submission(path: Path | str, frame: pd.DataFrame, metadata: Mapping[str, object]) -> Path:
    """Write the probability of the positive class of each patch, in order, and ``<name>.csv.json`` beside it.

    Args:
        path: ``*.csv``.
        frame: Predictions of two classes, with ``patch_id`` and ``prob``.

    Raises:
        DataError: If the ending is another one, or two patches have one id.
    """
    path = check_name(path)
    table = pd.DataFrame({"id": give_ids(frame["patch_id"].tolist()), "label": frame["prob"].to_numpy(float)})
    write_described_csv(path, table, {**metadata, "format": FORMAT_SUBMISSIONS})
    return path
