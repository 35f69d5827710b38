"""Files in Keras's layouts, written with h5py alone, and networks of ours as Keras would hold them."""

import io
import json
import re
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch

from biopsy.models.networks import build_network

CLASSES = {"SeparableConv2d": "SeparableConv2D", "Conv2d": "Conv2D", "BatchNorm2d": "BatchNormalization"}
CLASSES |= {"BatchNorm1d": "BatchNormalization", "Linear": "Dense", "OneLogit": "Dense"}
CLASSES |= {"ReLU": "Activation", "MaxPool2d": "MaxPooling2D"}
WEIGHT_NAMES = {
    "SeparableConv2D": ["depthwise_kernel", "pointwise_kernel", "bias"],
    "BatchNormalization": ["gamma", "beta", "moving_mean", "moving_variance"],
}


def build(name="cancernet", *, input_px=8, seed=0, n_classes=2, **params):
    """Build a network of ours whose every weight is random, ready to predict."""
    network = build_network(name, n_classes=n_classes, input_px=input_px, seed=seed, **params)
    return randomise(network).eval()


def randomise(network):
    """Move every weight and statistic off its start, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator) * 0.2
                tensor.add_(noise if "running_var" in name else noise - 0.1)
    return network


def keras_layers(network):
    """List ``(class, weights)`` of every layer in Keras's order, kernels in its layout."""
    layers, inside = [], set()
    for module in network.modules():
        kind = type(module).__name__
        if module in inside or kind not in CLASSES:
            continue
        inside |= set(module.modules())
        parts = [module]
        if kind == "SeparableConv2d":
            parts = [module.depthwise, module.pointwise]
        weights = []
        for part in parts:
            if isinstance(part, torch.nn.Conv2d):
                weights.append(part.weight.permute((2, 3, 0, 1) if part.groups > 1 else (2, 3, 1, 0)))
            elif isinstance(part, torch.nn.Linear):
                weights.append(part.weight.t())
            elif "BatchNorm" in kind:
                weights += [part.weight, part.bias, part.running_mean, part.running_var]
            if isinstance(part, torch.nn.Conv2d | torch.nn.Linear) and part.bias is not None:
                weights.append(part.bias)
        layers.append((CLASSES[kind], [weight.detach().numpy().copy() for weight in weights]))
    return layers


def name_layers(layers):
    """Return ``(name, class, weights)`` as Keras names layers: by class, with a running number."""
    counts, named = {}, []
    for kind, weights in layers:
        stem = re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()
        number = counts[stem] = counts.get(stem, -1) + 1
        named.append((f"{stem}_{number}" if number else stem, kind, weights))
    return named


def make_config(layers, *, input_px, last="softmax", **changes):
    """Write a Sequential's configuration; ``changes`` by class name replace settings of its layers."""
    first = {"name": "input_layer", "batch_shape": [None, input_px, input_px, 3]}
    nodes = [("InputLayer", first)]
    for name, kind, _ in name_layers(layers):
        settings = {"name": name, "data_format": "channels_last"} | changes.get(kind, {})
        if kind == "Activation":
            settings = {"activation": "relu"} | settings
        if kind == "BatchNormalization":
            settings = {"epsilon": 0.001} | settings
        nodes.append((kind, settings))
    nodes[-1][1]["activation"] = last
    listed = [{"module": "keras.layers", "class_name": kind, "config": config} for kind, config in nodes]
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "model", "layers": listed}}


def write_h5(path, layers, *, config=None, text=np.bytes_, root=True):
    """Write an ``.h5``; Keras 2 wrote names as bytes, Keras 3 writes them as text."""
    with h5py.File(path, "w") as file:
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
        group = file if root else file.create_group("model_weights")
        group.attrs["backend"] = text("tensorflow")
        names = [name for name, _, _ in name_layers(layers)]
        group.attrs["layer_names"] = _texts(names, text)
        for name, kind, weights in name_layers(layers):
            titles = WEIGHT_NAMES.get(kind, ["kernel", "bias"])[: len(weights)]
            weight_names = [f"{name}/{title}:0" for title in titles]
            layer = group.create_group(name)
            layer.attrs["weight_names"] = _texts(weight_names, text)
            for weight_name, weight in zip(weight_names, weights, strict=True):
                layer[weight_name] = weight
    return Path(path)


def write_weights_h5(path, layers):
    """Write a Keras 3 ``.weights.h5``: groups by class, arrays by number."""
    with h5py.File(path, "w") as file:
        for name, _, weights in name_layers(layers):
            variables = file.create_group(f"layers/{name}/vars")
            for number, weight in enumerate(weights):
                variables[str(number)] = weight
        file.create_group("optimizer/vars")["0"] = np.int64(7)
    return path if isinstance(path, io.BytesIO) else Path(path)


def write_keras(path, layers, config):
    """Write a ``.keras`` archive; ``config`` is a document or the text itself."""
    weights = write_weights_h5(io.BytesIO(), layers).getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", config if isinstance(config, str | bytes) else json.dumps(config))
        archive.writestr("model.weights.h5", weights)
    return Path(path)


def write_all(folder, layers, config):
    """Write one network in every layout; yields each path and its format."""
    yield write_h5(folder / "keras2.h5", layers, config=config, root=False), "h5"
    yield write_h5(folder / "weights2.h5", layers), "h5"
    yield write_h5(folder / "keras3.h5", layers, config=config, text=str, root=False), "h5"
    yield write_weights_h5(folder / "model.weights.h5", layers), "weights.h5"
    yield write_keras(folder / "model.keras", layers, config), "keras"


def _texts(names, text):
    return names if names and text is str else np.array(names, dtype="S")
