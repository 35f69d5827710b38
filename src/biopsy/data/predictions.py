"""Tables of predictions, from which all reported numbers can be recomputed, and Kaggle submissions."""

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
from biopsy.data.pack_files import hash_columns
from biopsy.data.packs import Pack
from biopsy.slide_io.images import IMAGE_SUFFIXES

FORMAT = "biopsy-predictions/1"


class FixedThreshold(TypedDict):
    """Decision threshold on the positive probability, its rule, and the subset on which it was chosen."""

    value: Annotated[float, Field(ge=0, le=1.001)]  # above 1: no patch is predicted positive
    rule: str
    chosen_on: str | None


IDENTITY = ("patch_id", "patient_id", "slide_id", "x", "y")
_TEXT = ("patch_id", "patient_id", "slide_id", "subset", "source")
_INTEGER = ("x", "y", "fold", "target", "pred")
_OOD = "out_of_distribution"
_YES_NO = ("abstained", _OOD)
_FLOAT = re.compile(r"^(prob|logit)_|_distance$")
_KEY = b"biopsy"
_REMEDY = "make it again with `biopsy evaluate` or `biopsy predict`"

_CONTENT = "content_sha256"
_NEEDED = (*IDENTITY, "subset", "fold", "target", "pred", "abstained")


class PredictionsInfo(TypedDict, total=False):
    """Metadata of a table of predictions."""

    format: str
    pack_sha256: str
    classifier_sha256: str
    split: str
    fold: int | None
    threshold: FixedThreshold | None


def describe_patches(pack: Pack, rows: np.ndarray, *, subset: str, fold: int | None = None) -> pd.DataFrame:
    """Return identity, subset, fold and target of rows of a pack, for `tabulate_predictions`."""
    patches = pack.table.iloc[rows][[*IDENTITY, "target"]]
    return patches.assign(subset=subset, fold=fold).reset_index(drop=True)


def tabulate_predictions(
    patches: pd.DataFrame,
    class_names: list[str],
    positive_index: int | None,
    logits: np.ndarray | None,
    probs: np.ndarray,
    *,
    threshold: float | None = 0.5,
    abstained: np.ndarray | None = None,
) -> pd.DataFrame:
    """Return a table of patches with their logits, probabilities and predicted classes.

    Args:
        patches: ``patch_id`` and any of `IDENTITY`, subset, fold and target, ``n`` rows; missing columns are
            null.
        logits: ``(n, n_classes)``; None if unknown.
        threshold: For two classes, the decision threshold on the positive probability; None for the most
            probable class, as always for more than two classes.

    Raises:
        DataError: If shapes do not match or a probability is outside [0, 1].
    """
    shape = (len(patches), len(class_names))
    for array in (probs, *([] if logits is None else [logits])):
        if array.shape != shape:
            raise DataError(
                f"logits or probabilities {array.shape} do not fit {shape[0]} patches, {shape[1]} classes"
            )
    probs = np.asarray(probs, np.float64)
    if not ((probs >= 0) & (probs <= 1)).all():
        raise DataError("probabilities must be numbers in [0, 1]; check the outputs of the classifier")
    table = patches.reindex(columns=[*IDENTITY, "subset", "fold", "target"])
    for values, kind in ((logits, "logit"), (probs, "prob")):
        if values is None:
            continue
        for column, name in enumerate(class_names):
            table[f"{kind}_{name}"] = np.asarray(values[:, column], np.float64)
    table["pred"] = decide(probs, positive_index, threshold)
    table["abstained"] = False if abstained is None else np.asarray(abstained, bool)
    if positive_index is not None:
        table["prob"] = probs[:, positive_index]
    return _with_types(table)


def write_predictions(path: Path | str, frame: pd.DataFrame, metadata: Mapping[str, object]) -> Path:
    """Write predictions as Parquet or CSV, by the suffix of ``path``, atomically."""
    path = Path(path)
    info = plain({**metadata, "format": FORMAT})
    info[_CONTENT] = _hash_content(frame, info)
    if path.suffix == ".parquet":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({_KEY: json.dumps(info).encode()})
        with replace_atomic(path) as partial:
            pq.write_table(table, partial)
    elif path.suffix == ".csv":
        write_described_csv(path, frame, info)
    else:
        raise DataError(f"predictions cannot be written to {path.name!r}; use .parquet or .csv")
    return path


def write_described_csv(path: Path, table: pd.DataFrame, metadata: Mapping[str, object]) -> None:
    """Write a csv, and its metadata with the hash of the csv to ``<name>.csv.json``."""
    write_csv(path, table)
    write_json(_metadata_path(path), {**metadata, "sha256": sha256_file(path)})


def check_replaceable(path: Path, *, is_named: bool) -> None:
    """Refuse to replace a table, or the metadata of a csv, that was not written by this package.

    Args:
        is_named: Whether the user named this file, which may then be replaced.
    """
    json_path = _metadata_path(path)
    if path.suffix == ".csv" and json_path.exists() and _read_csv_metadata(path) is None:
        raise UserFileError(
            json_path, "foreign", f"was not written by biopsy: move it, or write {path.name} elsewhere"
        )
    if path.exists() and not is_named and not _is_unchanged(path):
        raise UserFileError(
            path, "foreign", "was not written by biopsy, or was changed since: name a file with --out"
        )


def _is_unchanged(path: Path) -> bool:
    if path.suffix == ".csv":
        return (_read_csv_metadata(path) or {}).get("sha256") == sha256_file(path)
    try:
        return _KEY in read_parquet_metadata(path)
    except FileFormatError:
        return False


def _read_csv_metadata(path: Path) -> dict[str, object] | None:
    """Return the metadata of a csv; None if it was not written by this package."""
    try:
        info = read_json(_metadata_path(path), may_lack_hash=True)
    except DataError:
        return None
    return info if str(info.get("format")).startswith("biopsy-") else None


def read_predictions(path: Path | str) -> tuple[pd.DataFrame, PredictionsInfo]:
    """Read predictions and their metadata from Parquet or CSV.

    Raises:
        FileFormatError: If the file is missing, damaged, of a newer format, lacks columns, or was changed
            since it was written.
    """
    path = Path(path)
    if path.suffix == ".csv":
        info = read_json(_metadata_path(path), format=FORMAT, remedy=_REMEDY, may_lack_hash=True)
        frame = read_csv_table(path, required=_NEEDED)
    else:
        frame, metadata = read_parquet_table(path)
        info = parse_json(metadata.get(_KEY, b"{}"), path)
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise FileFormatError(path, "format", f"is not a table of predictions of format {FORMAT!r}")
    missing = [name for name in _NEEDED if name not in frame]
    if missing or not class_columns(frame):
        raise FileFormatError(
            path,
            "columns",
            f"lacks the columns {missing or ['prob_<class>']}: it is not a table of predictions",
        )
    with refusing(path, "predictions"):
        frame = _with_types(frame)
    probs = frame[[f"prob_{name}" for name in class_columns(frame)]].to_numpy()
    if not ((probs >= 0) & (probs <= 1)).all() or not _are_classes(frame):
        raise FileFormatError(path, "value", "has probabilities outside [0, 1], or classes without a column")
    info.pop("sha256", None)  # of the text of a csv
    content_sha256 = info.pop(_CONTENT, None)
    if content_sha256 is None:
        warn_unsealed(path, _CONTENT)
    elif content_sha256 != _hash_content(frame, info) or not _is_of_class(frame) or is_changed(path):
        raise FileFormatError(path, "altered", f"was changed since it was written; {_REMEDY}")
    return frame, cast(PredictionsInfo, info)


def _are_classes(frame: pd.DataFrame) -> bool:
    is_valid = (
        frame[["target", "pred"]].isin(range(len(class_columns(frame)))) | frame[["target", "pred"]].isna()
    )
    return bool(is_valid.all(axis=None) and frame["pred"].notna().all())


def _is_of_class(frame: pd.DataFrame) -> bool:
    """Return whether ``prob``, which the hash does not cover, is the column of one of two classes."""
    columns = [frame[f"prob_{name}"] for name in class_columns(frame)]
    if "prob" not in frame:
        return len(columns) > 2
    return any((frame["prob"] == column).all() for column in columns)


def _hash_content(frame: pd.DataFrame, info: Mapping[str, object]) -> str:
    """Hash the columns of reported numbers and the metadata; joined columns are not included."""
    names = [name for name in frame if name in (*_NEEDED, _OOD) or _FLOAT.search(str(name))]
    hashed = {key: value for key, value in info.items() if key != _CONTENT}
    text = json.dumps([hash_columns(frame, names), hashed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_metadata(path: Path | str) -> PredictionsInfo:
    """Return the metadata of a table of predictions; empty for tables of other programs."""
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            info = parse_json(read_parquet_metadata(path).get(_KEY, b"{}"), path)
        else:
            info = read_json(_metadata_path(path), may_lack_hash=True)
    except FileFormatError:
        return {}
    is_ours = isinstance(info, dict) and info.get("format") == FORMAT
    return cast(PredictionsInfo, info) if is_ours else {}


def is_changed(path: Path) -> bool:
    """Return whether the text of a csv of this package was changed since it was written."""
    sha256 = (_read_csv_metadata(path) or {}).get("sha256") if path.suffix == ".csv" else None
    return sha256 is not None and sha256 != sha256_file(path)


def class_columns(frame: pd.DataFrame) -> list[str]:
    """Return the classes with a probability column, in order."""
    return [name.removeprefix("prob_") for name in frame.columns if name.startswith("prob_")]


def decide(probs: np.ndarray, positive_index: int | None, threshold: float | None) -> np.ndarray:
    """Return predicted class indices ``(n,)``; threshold as in `tabulate_predictions`."""
    if positive_index is None or threshold is None:
        return probs.argmax(axis=1)
    return np.where(probs[:, positive_index] >= threshold, positive_index, 1 - positive_index)


def _with_types(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the column types of predictions, however it was stored."""
    types = dict.fromkeys(_TEXT, "string") | dict.fromkeys(_INTEGER, "Int64") | dict.fromkeys(_YES_NO, "bool")
    floats = [name for name in frame.columns if name == "prob" or _FLOAT.search(name)]
    types |= dict.fromkeys(floats, "float64")
    for name in _YES_NO:
        if name in frame and pd.api.types.is_string_dtype(frame[name].dtype):  # from csv
            frame[name] = [{"True": True, "False": False}[word] for word in frame[name]]
    return frame.astype({name: kind for name, kind in types.items() if name in frame})


def _metadata_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


FORMAT_SUBMISSIONS = "biopsy-submission/1"


def give_ids(patch_ids: Sequence[str]) -> list[str]:
    """Return the Kaggle id of each patch: its file name without folders and suffix."""
    ids = []
    for patch_id in patch_ids:
        name = patch_id.rpartition("/")[2]
        stem, dot, ending = name.rpartition(".")
        ids.append(stem if stem and (dot + ending).lower() in IMAGE_SUFFIXES else name)
    seen = pd.Series(ids, dtype=str)
    twice = seen[seen.duplicated()]
    if len(twice):
        raise DataError(
            f"two patches have the id {twice.iloc[0]!r}: ids of a Kaggle submission must be unique"
        )
    return ids


def check_name(path: Path | str) -> Path:
    """Refuse a path without the suffix .csv."""
    path = Path(path)
    if path.suffix != ".csv":
        raise DataError(f"Kaggle takes a csv, not {path.name!r}; name the submission with .csv")
    return path


def write_submission(path: Path | str, frame: pd.DataFrame, metadata: Mapping[str, object]) -> Path:
    """Write a Kaggle submission (positive probability of each patch), and its metadata to ``*.csv.json``.

    Raises:
        DataError: If the suffix is not .csv, or two patches have the same id.
    """
    path = check_name(path)
    table = pd.DataFrame({"id": give_ids(frame["patch_id"].tolist()), "label": frame["prob"].to_numpy(float)})
    write_described_csv(path, table, {**metadata, "format": FORMAT_SUBMISSIONS})
    return path
