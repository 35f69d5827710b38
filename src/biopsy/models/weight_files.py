"""Loading of weight files (safetensors, PyTorch, Keras) into networks."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biopsy.core.errors import DataError, FileFormatError
from biopsy.core.loaders import open_regular, read_tensors, refusing
from biopsy.models.networks.encoders import PREFIX, fill_encoder
from biopsy.models.networks.libraries import LibraryNetwork, build_library_network, create_timm, split_name
from biopsy.models.networks.stages import StagedNetwork

KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", *KERAS_SUFFIXES)
_HEADS = re.compile(r"(classifier|fc|heads?|aux\d?|AuxLogits)\.")
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)")  # of torchvision's older files


def fill_network(network: nn.Module, name: str, path: Path) -> bool:
    """Load a weight file into a network; no code in the file is executed.

    The file may be of the complete network as saved by this package, without the head, or as published by the
    network's library, whose ImageNet head is ignored.

    Args:
        name: Its name; for timm, with the tag of the weights if it is not the default.
        path: ``.safetensors``, ``.pth`` (also ``.pt``, ``.bin``), ``.h5`` (also ``.hdf5``) or ``.keras``.

    Returns:
        Whether the head was loaded too.

    Raises:
        FileFormatError: If the file cannot be read, or is of another network.
    """
    is_keras = path.suffix.lower() in KERAS_SUFFIXES
    tensors = {} if is_keras else _read_tensors(path)
    weights = {key: value for key, value in tensors.items() if not key.startswith("extra.")}
    try:
        if _is_native(network, weights):
            return _fill_native(network, weights)
        if isinstance(network, LibraryNetwork) and network.is_cut:
            return _fill_truncated(network, name, path)
        if is_keras:
            return _fill_from_keras(network, path)
        if isinstance(network, LibraryNetwork) and name.startswith(PREFIX):
            fill_encoder(network, name, tensors)
        elif not isinstance(network, LibraryNetwork):
            _fill_in_order(_backbone(network), tensors)
        elif split_name(name)[0] == "timm":
            if any(key.startswith("_conv_stem.") for key in tensors):
                _fill_lukemelas(network, tensors)
            else:
                _fill_timm(network, name, path)
        else:
            tensors = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in tensors.items()}
            body = {key: value for key, value in tensors.items() if not _HEADS.match(key)}
            expected = network.body.state_dict()
            network.body.load_state_dict(body | {key: tensors[key] for key in tensors if key in expected})
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split("\n")[:2]).replace("\t", " ")
        raise FileFormatError(path, "architecture", f"does not fit {name}: {reason}") from None
    return False


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() == ".safetensors":
        return read_tensors(path, framework="pt")[0]
    result = _load_pickled(path)
    for key in ("state_dict", "model"):
        if isinstance(result, dict) and isinstance(result.get(key), dict):
            result = result[key]
    if not isinstance(result, dict) or not all(isinstance(value, Tensor) for value in result.values()):
        raise DataError(f"{path} has no named weights")
    return result


def _load_pickled(path: Path) -> Any:
    """Read a file of ``torch.save`` with tensors and plain containers only."""
    with open_regular(path) as file, refusing(path, "weights"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                n_bytes = sum(entry.file_size for entry in archive.infolist())
            if n_bytes > os.fstat(file.fileno()).st_size:  # PyTorch does not compress
                raise FileFormatError(path, "too-large", f"unpacks to {n_bytes:,} bytes: it is not read")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        except pickle.UnpicklingError:
            raise FileFormatError(
                path, "value", "has objects other than tensors, or is truncated; it is not unpickled"
            ) from None


def _is_native(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Return whether a file is of this package, with or without the head."""
    names = network.state_dict().keys()
    return tensors.keys() <= names and all(is_head(key) for key in names - tensors.keys())


def is_head(name: str) -> bool:
    """Return whether a tensor of a network of this package is in its head."""
    return name.startswith("head.")


def _fill_native(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Load a file of this package, without a head of another size."""
    current = network.state_dict()
    head = [key for key in current if is_head(key)]
    fits = all(key in tensors and tensors[key].shape == current[key].shape for key in head)
    network.load_state_dict(tensors if fits else tensors | {key: current[key] for key in head})
    return fits


def _fill_truncated(network: LibraryNetwork, name: str, path: Path) -> bool:
    """Load the complete network of the library, and copy the layers that were kept."""
    complete = build_library_network(name, n_classes=2, input_px=network.size, head="linear")
    fill_network(complete, name, path)
    tensors = complete.body.state_dict()
    network.body.load_state_dict({key: tensors[key] for key in network.body.state_dict()})
    return False


def _fill_from_keras(network: nn.Module, path: Path) -> bool:
    from biopsy.models.importers.keras import load_keras_into

    try:
        load_keras_into(path, network)
    except DataError as complete_error:
        try:
            load_keras_into(path, _backbone(network))
        except DataError:
            raise complete_error from None
        return False
    return True


def _fill_timm(network: LibraryNetwork, name: str, path: Path) -> None:
    """Load the file by timm into a second network and copy its body."""
    overlay = {"file": str(path), "custom_load": False}
    twin = create_timm(split_name(name)[1], network.size, pretrained=True, pretrained_cfg_overlay=overlay)
    twin.reset_classifier(0)  # type: ignore[operator]
    network.body.load_state_dict(twin.state_dict())


def _fill_lukemelas(network: LibraryNetwork, tensors: dict[str, Tensor]) -> None:
    """Load weights of L. Melas-Kyriazi's EfficientNet into timm's, which has the same tensors in the same
    order."""
    targets = network.body.state_dict()
    values = [value for key, value in tensors.items() if not key.startswith("_fc.")]
    if [value.shape for value in values] != [target.shape for target in targets.values()]:
        raise KeyError(f"{len(values)} tensors besides the head; expected {len(targets)} of other shapes")
    network.body.load_state_dict(dict(zip(targets, values, strict=True)))


def _fill_in_order(base: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load convolutions from torchvision's ``features.NUMBER.weight`` and ``.bias``, in order."""
    names = sorted(
        (key for key in tensors if re.fullmatch(r"features\.\d+\.(weight|bias)", key)),
        key=lambda key: (int(key.split(".")[1]), key.endswith("bias")),
    )
    targets = [*base.state_dict()]
    shapes = [tuple(value.shape) for value in base.state_dict().values()]
    if [tuple(tensors[key].shape) for key in names] != shapes:
        raise KeyError(f"{len(names)} tensors features.NUMBER; expected {len(targets)} of other shapes")
    base.load_state_dict({target: tensors[name] for target, name in zip(targets, names, strict=True)})


def _backbone(network: nn.Module) -> nn.Module:
    """Return the network without its head."""
    if isinstance(network, LibraryNetwork):
        return network.body
    stages = network.stages() if isinstance(network, StagedNetwork) else []
    return nn.Sequential(*(module for _, module in stages[:-1]))
