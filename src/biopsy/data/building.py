"""Listings of arrays, of a table of image files, or of a torch or Hugging Face data set."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from biopsy.core.errors import DataError, suggest
from biopsy.core.loaders import read_bytes
from biopsy.core.tables import find_column, read_table
from biopsy.core.text import normalize_id
from biopsy.data.archives import MAX_ENTRY_BYTES
from biopsy.data.datasets.base import Listing, RowPixels, find_positive
from biopsy.data.pack_files import describe_origin
from biopsy.data.tables import RESERVED
from biopsy.slide_io.images import decode

PATH_COLUMNS = ("path", "image_path", "image", "file", "filename", "file_name")
LABEL_COLUMNS = ("label", "target", "class", "class_name", "y_true", "diagnosis")
ID_COLUMNS = {
    "patient_id": ("patient_id", "patient", "case_id", "case", "groups", "group"),
    "slide_id": ("slide_id", "slide", "wsi"),
    "site_id": ("site_id", "site"),
    "patch_id": ("patch_id", "image_id", "id"),
}
Columns: TypeAlias = Mapping[str, ArrayLike] | pd.DataFrame
IMAGE_KEYS = ("image", "img", "pixel_values", "x")


def _one_at_a_time(get: Callable[[int], np.ndarray]) -> RowPixels:
    """Return the pixels of a data set, which may not be thread-safe."""
    lock = threading.Lock()

    def get_locked(row: int) -> np.ndarray:
        with lock:
            return get(row)

    return RowPixels(get_locked)


@dataclass
class ImageSource:
    """Images with their metadata and labels, input of `list_source`.

    Attributes:
        name: ``arrays``, ``table`` or ``dataset``.
        table: Metadata, one row per image, without the class.
        labels: Class of each image, ``(n,)``: names or indices.
        class_names: Names by index, if the source has them.
    """

    name: str
    table: pd.DataFrame
    pixels: RowPixels
    labels: ArrayLike
    class_names: Sequence[str] | None = None


def read_arrays(
    images: np.ndarray | Sequence[np.ndarray],
    labels: ArrayLike,
    patients: ArrayLike | None,
    columns: Columns | None,
) -> ImageSource:
    """Return arrays as images; see `Pack.from_arrays`."""
    if not len(images):
        raise DataError("there are no images: pass one or more")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise DataError(f"images have shape {images.shape}: expected uint8 (n, height, width, 3) RGB")
    table = _make_table(len(images), patients, columns)
    return ImageSource("arrays", table, _one_at_a_time(lambda row: to_rgb(images[row])), labels)


def read_image_table(path: Path | str, root: Path | str | None) -> ImageSource:
    """Return the image files of a table; see `Pack.from_table`."""
    path = Path(path)
    frame = read_table(path, {name for names in ID_COLUMNS.values() for name in names})
    file, label = find_column(frame, PATH_COLUMNS), find_column(frame, LABEL_COLUMNS)
    if file is None or label is None:
        raise DataError(
            f"{path} has the columns {', '.join(map(str, frame.columns))}; one of {', '.join(PATH_COLUMNS)} "
            f"and one of {', '.join(LABEL_COLUMNS)} are needed: rename yours"
        )
    if not len(frame) or frame[file].isna().any():
        raise DataError(f"{path}: column {file} is empty in {int(frame[file].isna().sum())} rows")
    ids = {
        name: result
        for name, names in ID_COLUMNS.items()
        if (result := find_column(frame, names)) not in (None, file, label)
    }
    folder = path.parent if root is None else Path(root)
    texts = frame[file].astype(str)
    metadata = frame.drop(columns=[file, label, *ids.values()]).assign(
        **{name: frame[column] for name, column in ids.items()}
    )
    if "patch_id" not in ids:
        metadata["patch_id"] = texts
    table = _make_table(len(frame), None, metadata).assign(source=texts.to_numpy())
    paths = [folder / name for name in texts]
    pixels = RowPixels(lambda row: decode(read_bytes(paths[row], max_bytes=MAX_ENTRY_BYTES)))
    return ImageSource("table", table, pixels, frame[label].to_numpy())


def read_dataset(
    dataset: Any, patients: ArrayLike | str | None, labels: ArrayLike | None, columns: Columns | None
) -> ImageSource:
    """Return the images of a torch or Hugging Face data set; see `Pack.from_dataset`."""
    if isinstance(dataset, Mapping):
        raise DataError(f"the data set has the splits {', '.join(map(str, dataset))}: give one of them")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no __len__ or __getitem__: load it whole, not as a stream"
        )
    n, names, class_names = len(dataset), getattr(dataset, "column_names", None), None
    if not n:
        raise DataError("the data set is empty")
    if names is not None:  # of Hugging Face: columns are read without decoding images
        if labels is None:
            label = _pick(names, (*LABEL_COLUMNS, "labels"))
            labels, class_names = dataset[label], getattr(dataset.features[label], "names", None)
        if patients is None:
            patients = next((name for name in ID_COLUMNS["patient_id"] if name in names), None)
        if isinstance(patients, str):
            patients = dataset[_pick(names, (patients,))]
    else:
        class_names = getattr(dataset, "classes", None)
        if labels is None:
            labels = getattr(dataset, "targets", None)
        if labels is None:
            parts = [_unpack_item(dataset[row]) for row in range(n)]
            labels = [part[1] for part in parts]
            if patients is None and all(part[2] is not None for part in parts):
                patients = [part[2] for part in parts]
    table = _make_table(n, _plain_list(patients), columns)
    pixels = _one_at_a_time(lambda row: to_rgb(_unpack_item(dataset[row])[0]))
    return ImageSource("dataset", table, pixels, _plain_list(labels), class_names)


def index_labels(labels: Any, class_names: Sequence[str]) -> np.ndarray:
    """Return the class index of each label; labels are class names or indices."""
    values = pd.Series(np.asarray(labels).reshape(-1))
    if values.isna().any():
        raise DataError(
            f"{int(values.isna().sum()):,} labels are missing, first in row "
            f"{int(values.isna().to_numpy().argmax())}"
        )
    texts = values.astype(str)
    if values.dtype.kind == "f":
        texts = texts.str.removesuffix(".0")
    elif values.dtype.kind == "b":
        texts = values.astype(int).astype(str)
    by_name = {name: k for k, name in enumerate(class_names)}
    by_index = {str(k): k for k in range(len(class_names))}
    target = texts.map(by_name if texts.isin(by_name).any() else by_index)
    unknown = target.isna().to_numpy()
    if unknown.any():
        at = int(unknown.argmax())
        raise DataError(
            f"{unknown.sum():,} labels are unknown, first {texts[at]!r} in row {at}; classes: "
            f"{', '.join(class_names)} (or their indices from 0)"
        )
    return target.to_numpy(np.intp)


def to_rgb(image: Any) -> np.ndarray:
    """Return an image as uint8 ``(height, width, 3)`` RGB.

    Args:
        image: Such an array; a PIL image; a tensor ``(3, height, width)``, uint8 or float in 0-1; or a
            mapping with the ``bytes`` of an image file.

    Raises:
        DataError: If it is of another type, shape or dtype.
    """
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return decode(image["bytes"])
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"))
    is_tensor = hasattr(image, "detach")
    array = image.detach().cpu().numpy() if is_tensor else np.asarray(image)
    if is_tensor and array.ndim == 3 and array.shape[0] == 3:
        array = np.moveaxis(array, 0, -1)
        if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
            array = np.rint(array * 255).astype(np.uint8)
    if array.ndim != 3 or array.shape[2] != 3:
        hint = ": move the channels to the end" if array.ndim == 3 and array.shape[0] == 3 else ""
        raise DataError(f"an image has shape {array.shape} where (height, width, 3) RGB is needed{hint}")
    if array.dtype != np.uint8:
        raise DataError(f"an image is of {array.dtype} where uint8 is needed: scale values to 0-255 first")
    return np.ascontiguousarray(array)


def _make_table(n: int, patients: ArrayLike | None, columns: Columns | None) -> pd.DataFrame:
    """Return the metadata of patches, without the class."""
    metadata = {} if columns is None else {str(name): columns[name] for name in columns}
    if patients is not None:
        metadata["patient_id"] = patients
    for name, values in metadata.items():
        if np.shape(values) != (n,):
            raise DataError(
                f"{name} has shape {np.shape(values)} for {n:,} patches: pass one value per patch"
            )
    table = pd.DataFrame({name: np.asarray(values) for name, values in metadata.items()}, index=range(n))
    taken = sorted(set(table) & (RESERVED - {"patch_id", "patient_id", "slide_id", "site_id", "x", "y"}))
    if taken:
        raise DataError(f"columns may not be called {', '.join(taken)}: rename them")
    for name in ID_COLUMNS:
        table[name] = table[name].map(normalize_id, na_action="ignore") if name in table else None
    if table["patch_id"].isna().all():
        table["patch_id"] = [str(row) for row in range(n)]
    twice = table["patch_id"][table["patch_id"].duplicated()]
    if len(twice):
        raise DataError(f"{len(twice):,} patch ids are repeated, first {twice.iloc[0]!r}")
    for name in ("x", "y"):
        try:
            table[name] = pd.array(table[name] if name in table else [pd.NA] * n, dtype="Int64")
        except (ValueError, TypeError, OverflowError):
            raise DataError(f"column {name} holds what is no whole number of pixels: correct it") from None
    return table.assign(source=table["patch_id"])


def list_source(
    source: ImageSource, class_names: Sequence[str] | None, positive_class: str | None, mpp: float | None
) -> Listing:
    """Return the listing of images, with the names of their classes checked."""
    table, labels = source.table, source.labels
    if np.shape(labels) != (len(table),):
        raise DataError(f"labels have shape {np.shape(labels)} for {len(table):,} images: pass one per image")
    if mpp is not None and not 0 < mpp < 1000:
        raise DataError(f"mpp is {mpp}: micrometres per pixel lie between 0 and 1000")
    names, positive = _name_classes(labels, class_names or source.class_names, positive_class)
    target = index_labels(labels, names)
    return Listing(
        table=table.assign(class_name=np.array(names, dtype=object)[target]),
        pixels=source.pixels,
        class_names=names,
        positive_class=positive,
        mpp=mpp,
        origin=describe_origin(source.name),
    )


def _name_classes(
    labels: Any, class_names: Sequence[str] | None, positive_class: str | None
) -> tuple[list[str], str | None]:
    values = pd.Series(np.asarray(labels))
    if class_names is not None:
        names = [str(name) for name in class_names]
    elif values.dtype.kind in "biu":
        names = [str(index) for index in range(int(values.max()) + 1)]
    else:
        names = sorted(values.dropna().astype(str).unique())
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"class_names={names}: pass two or more distinct names")
    if positive_class is not None and (len(names) != 2 or positive_class not in names):
        raise DataError(f"positive_class={positive_class!r} is none of two: {suggest(positive_class, names)}")
    if len(names) > 2:
        return names, None
    return names, positive_class or find_positive(names) or names[1]


def _unpack_item(item: Any) -> tuple[Any, Any, Any]:
    """Return image, label and patient of one item of a data set; None for missing fields."""
    if isinstance(item, Mapping):
        result = [
            next((item[key] for key in keys if key in item), None)
            for keys in (IMAGE_KEYS, (*LABEL_COLUMNS, "labels", "y"), ID_COLUMNS["patient_id"])
        ]
        if result[0] is None:
            keys = ", ".join(map(str, item))
            raise DataError(f"an item has the keys {keys}; one of {', '.join(IMAGE_KEYS)} is needed")
        return result[0], result[1], result[2]
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        image, label, *patient = item
        return image, label.item() if hasattr(label, "item") else label, patient[0] if patient else None
    raise DataError(f"an item is a {type(item).__name__} where (image, label) or a mapping is needed")


def _pick(names: Sequence[str], options: Sequence[str]) -> str:
    for name in options:
        if name in names:
            return name
    raise DataError(f"the data set has the columns {', '.join(names)}; one of {', '.join(options)} is needed")


def _plain_list(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else None if values is None else list(values)
