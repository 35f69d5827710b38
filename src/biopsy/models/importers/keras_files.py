"""Reading weights and configuration from Keras files (``.h5``, ``.weights.h5``, ``.keras``)."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from biopsy.core.errors import ArchiveError, DataError, FileFormatError
from biopsy.core.hdf5 import check_heaps, find_dataset, find_group, open_hdf5
from biopsy.core.loaders import open_regular, parse_json
from biopsy.data.archives import ZipArchive

_CONTAINERS = ("Sequential", "Functional", "Model")
_ROOTS = ("keras", "tensorflow", "tf_keras")
MAX_INPUT_PX = 512
_WITHOUT_EFFECT = ("InputLayer", "Dropout", "Flatten")
_STEPS = {
    "Conv2D": "convolution",
    "SeparableConv2D": "separable convolution",
    "Dense": "dense layer",
    "MaxPooling2D": "max-pooling",
}


class ConfigLayer(NamedTuple):
    """A layer of the configuration."""

    name: str
    class_name: str
    settings: dict[str, object]


def list_config_layers(model: Any) -> list[ConfigLayer]:
    """Return the layers of a model's configuration in order, including nested models."""
    try:
        return _walk(model)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise DataError("has no valid configuration of a Keras model") from None


def _walk(node: Any) -> list[ConfigLayer]:
    class_name, config = str(node["class_name"]), node["config"]
    module, registered = node.get("module") or "keras", node.get("registered_name") or ""
    if class_name == "Lambda" or module.partition(".")[0] not in _ROOTS or ">" in registered:
        layer_name = config.get("name", "") if isinstance(config, dict) else ""
        raise DataError(
            f"has the layer {layer_name!r}, a {registered or class_name} of {module}: custom code is not run,"
            " so the model cannot be converted"
        )
    if class_name in _CONTAINERS:
        layers = config if isinstance(config, list) else config["layers"]  # a list before Keras 2.2.3
        return [result for layer in layers for result in _walk(layer)]
    if config.get("data_format") == "channels_first":
        raise DataError(f"has channels first in {config['name']!r}; only channels last is supported")
    return [ConfigLayer(str(config["name"]), class_name, config)]


def list_steps(layers: list[ConfigLayer]) -> tuple[list[str], str]:
    """Return the operations of a model, and its output activation.

    Returns:
        Operations such as ``"convolution"`` or ``"relu"``, without those that have no effect in prediction,
        and ``"softmax"``, ``"sigmoid"`` or ``""``.
    """
    steps: list[str] = []
    for layer in layers:
        settings, class_name = layer.settings, layer.class_name
        activation = settings.get("activation")
        if class_name == "BatchNormalization":
            steps.append(name_normalisation(settings.get("epsilon", 1e-3)))
        elif class_name == "Softmax":
            activation = "softmax"
        elif class_name == "ReLU":
            limits = {key: settings.get(key) for key in ("max_value", "negative_slope", "threshold")}
            changed = ", ".join(f"{key} {value}" for key, value in limits.items() if value)
            activation = f"relu ({changed})" if changed else "relu"
        elif class_name not in (*_WITHOUT_EFFECT, "Activation"):
            steps.append(_STEPS.get(class_name, class_name))
        if activation not in (None, "linear"):
            steps.append(activation if isinstance(activation, str) else f"activation {activation}")
    last = steps.pop() if steps and steps[-1] in ("softmax", "sigmoid") else ""
    return steps, last


def find_input_px(layers: list[ConfigLayer]) -> int | None:
    """Return the input size; None if it is not specified."""
    settings = layers[0].settings if layers else {}
    shape = settings.get("batch_shape") or settings.get("batch_input_shape")  # the second in Keras 2
    if not isinstance(shape, list) or shape[1:3] == [None, None]:
        return None
    side = shape[1] if len(shape) > 1 else None
    if not isinstance(side, int) or not 0 < side <= MAX_INPUT_PX or shape[1:] != [side, side, 3]:
        raise DataError(f"has the input shape {shape[1:]}; expected a square with three channels")
    return side


def name_normalisation(epsilon: object) -> str:
    """Return the name of a batch normalisation step, with its epsilon."""
    return f"normalisation with epsilon {epsilon}"


MAX_CONFIG_BYTES = 2**24
_GROUPS = ("layers", "_layer_checkpoint_dependencies")  # the second in Keras 2.12 to 2.15


class Layer(NamedTuple):
    """Name, kind and weights of a layer, in Keras's order and layout: of a file, or views of a module's."""

    name: str
    kind: str
    weights: list[Any]


@dataclass(frozen=True)
class KerasFile:
    """Content of a Keras file.

    Attributes:
        format: ``h5``, ``weights.h5`` or ``keras``.
        layers: Layers with weights, in order.
        config: All layers of the configuration; None if the file has weights only.
        input_px: Input size; None if it is not specified.
        order_is_certain: False for files with weights only of nested models, where Keras writes frozen layers
            last, so that the order of names may be the right one.
    """

    path: Path
    format: str
    layers: list[Layer]
    config: list[ConfigLayer] | None
    input_px: int | None = None
    order_is_certain: bool = True

    def by_name(self) -> list[Layer]:
        """Return the layers in order of their names, ``conv2d_10`` after ``conv2d_9``."""
        return sorted(self.layers, key=lambda layer: _natural_key(layer.name))


def read_keras(path: Path | str) -> KerasFile:
    """Read a Keras file.

    Raises:
        FileFormatError: If it is not a Keras file, truncated, or has unsupported content: custom code,
            links, or arrays that are not floating-point numbers or too large.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        return _read_archive(path) if is_zip else _read_h5(path)
    except FileFormatError as error:
        message = error.args[0].removeprefix(f"{error.path} ")
        expected = "expected a file saved by Keras (.h5, .weights.h5, .keras)"
        raise FileFormatError(error.path, error.reason, f"{message}; {expected}") from None
    except DataError as error:
        reason = "syntax" if isinstance(error, ArchiveError) else error.reason or "value"
        raise FileFormatError(path, reason, error.args[0].removeprefix(f"{path} ")) from None


def _read_archive(path: Path) -> KerasFile:
    archive = ZipArchive(path)
    entries = {entry.name: entry for entry in archive.entries}
    for name in ("config.json", "model.weights.h5"):
        if sum(entry.name == name for entry in archive.entries) != 1:
            raise DataError(f"is a zip without exactly one {name}: it is not a .keras file")
    if entries["config.json"].size > MAX_CONFIG_BYTES:
        raise DataError(
            f"has a config.json of {entries['config.json'].size:,} bytes: it is not read", "too-large"
        )
    contents = {}
    for name in ("config.json", "model.weights.h5"):
        try:
            contents[name] = bytes(archive.read(entries[name]))
        except DataError as error:
            raise DataError(f"holds a {name} that {error}") from None
    config = _parse_config(contents["config.json"], path)
    return _read_h5(path, io.BytesIO(contents["model.weights.h5"]), config)


def _read_h5(
    path: Path, content: io.BytesIO | None = None, config: list[ConfigLayer] | None = None
) -> KerasFile:
    check_heaps(path, content)
    with open_hdf5(path, content) as file:
        if (container := _find_container(file)) is not None:
            layers, is_certain = list(_walk_groups(find_group(file, container, path), path, set())), True
            format = "weights.h5" if config is None else "keras"
        else:
            if "model_config" in file.attrs:
                config = _parse_config(file.attrs["model_config"], path)
            group = find_group(file, "model_weights", path) if "model_weights" in file else file
            if _text(group.attrs.get("backend", "")) == "theano":
                raise DataError("was written by Keras on Theano, which is not supported (rotated kernels)")
            layers, is_certain = _read_groups(group, path)
            format = "h5"
    if config is not None:
        position = {layer.name: index for index, layer in enumerate(config)}
        if all(layer.name in position for layer in layers):
            layers = sorted(layers, key=lambda layer: position[layer.name])
        is_certain = True
    input_px = None if config is None else find_input_px(config)
    return KerasFile(path, format, layers, config, input_px, is_certain)


def _find_container(group: h5py.Group) -> str | None:
    return next((name for name in _GROUPS if name in group), None)


def _walk_groups(container: h5py.Group, path: Path, seen: set[int]) -> Iterator[Layer]:
    """Yield the layers of a ``.weights.h5``, whose groups are numbered class names.

    The order between classes is unknown, but layers are matched per kind. Nested models come first.
    """
    address = h5py.h5o.get_info(container.id).addr
    if address in seen:
        raise DataError(f"has {container.name!r} twice: it was altered")
    seen.add(address)
    groups = {name: find_group(container, name, path) for name in sorted(container, key=_natural_key)}
    for name in sorted(groups, key=lambda name: _find_container(groups[name]) is None):
        if (inner := _find_container(groups[name])) is not None:
            yield from _walk_groups(find_group(groups[name], inner, path), path, seen)
        elif "vars" in groups[name]:
            variables = find_group(groups[name], "vars", path)
            arrays = [_read(variables, number, path) for number in sorted(variables, key=_natural_key)]
            if arrays:
                yield Layer(_text(variables.attrs.get("name", name)), _find_kind(arrays), arrays)


def _read_groups(group: h5py.Group, path: Path) -> tuple[list[Layer], bool]:
    """Return the layers of an ``.h5`` in order, and whether there are no nested models."""
    layers: list[Layer] = []
    has_inner_models = False
    for name in _list_names(group, "layer_names"):
        layer = find_group(group, name, path)
        weights = {
            weight: _read(layer, weight, path)
            for weight in _list_names(layer, "weight_names")
            if "seed_generator" not in weight
        }
        kind = _find_kind(list(weights.values()))
        parts: dict[str, list[np.ndarray]] = {}
        for weight, array in weights.items():
            parts.setdefault(weight.rpartition("/")[0] if kind == "" else name, []).append(array)
        has_inner_models |= len(parts) > 1
        layers += [
            Layer(part.rpartition("/")[2] if kind == "" else part, _find_kind(arrays), arrays)
            for part, arrays in parts.items()
        ]
    return layers, not has_inner_models


def _find_kind(arrays: list[np.ndarray]) -> str:
    """Return the kind of layer with weights of these shapes, "" if unknown."""
    match [array.ndim for array in arrays]:
        case [4] | [4, 1]:
            return "convolution"
        case [4, 4] | [4, 4, 1] if arrays[1].shape[:2] == (1, 1):
            return "separable convolution"
        case [2] | [2, 1]:
            return "dense layer"
        case [1, 1, 1, 1]:
            return "normalisation"
    return ""


def _list_names(group: h5py.Group, attribute: str) -> list[str]:
    """Read a list of names, which Keras divides into numbered parts if it is long."""
    if attribute in group.attrs:
        parts: Iterable[Any] = [group.attrs[attribute]]
    else:
        numbers = [name for name in group.attrs if re.fullmatch(rf"{attribute}\d+", name)]
        parts = [group.attrs[name] for name in sorted(numbers, key=_natural_key)]
        if not numbers:
            raise DataError(f"holds no weights of a Keras model (no {attribute})")
    return [_text(name) for part in parts for name in np.atleast_1d(part).ravel()]


def _read(group: h5py.Group, name: str, path: Path) -> np.ndarray:
    """Read one array of numbers as float32."""
    dataset = find_dataset(group, name, path)
    if dataset.dtype.kind != "f":
        raise DataError(f"has {dataset.dtype} in {name!r}; expected floating-point numbers")
    if dataset.id.get_storage_size() < dataset.nbytes:  # limits memory to the size of the file
        raise DataError(f"holds {name!r} compressed or in part: save it again from Keras")
    array = dataset[()].astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"holds values in {name!r} that are not finite")
    return array


def _parse_config(text: bytes | str, path: Path) -> list[ConfigLayer]:
    if not isinstance(text, bytes | str):
        raise DataError("holds a configuration that is no text")
    return list_config_layers(parse_json(text, path, allow_nan=True))


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _natural_key(name: str) -> list[int | str]:
    """Return a sort key that compares numbers by value."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]
