"""Conversion of PyTorch networks to OpenVINO."""

import logging
import os
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from biopsy.core.errors import MissingExtra, RunError, first_line
from biopsy.core.files import sha256_file, write_json
from biopsy.models.classifier import Classifier
from biopsy.models.networks import Network
from biopsy.models.networks.layers import SeparableConv2d
from biopsy.models.networks.stages import SequentialNetwork
from biopsy.models.openvino_runtime import (
    DOCUMENT,
    FOLDER,
    FORMAT,
    INT8_MODEL,
    MODEL,
    CompiledRuntime,
    describe_origin,
    empty_batch,
    import_openvino,
    read_compiled,
)
from biopsy.recipes.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

_CENTRE = 192.0  # grey level between tissue and glass
_TOLERANCE = 1e-4  # of the range of logits


class _FromBytes(nn.Module):
    """Normalisation and network in one module: uint8 ``(B, H, W, 3)`` to logits and features, if any."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        ones = torch.zeros(1, 3, *[preprocessing.input_px] * 2)
        self.has_features = cast(Network, network).features(ones).shape[1] > 0

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        batch = self.preprocessing.normalise(pixels.permute(0, 3, 1, 2).float() * (1 / 255))
        logits = self.network(batch)
        return (logits, cast(Network, self.network).features(batch)) if self.has_features else (logits,)


class _FromBytesCentred(nn.Module):
    """`_FromBytes` for sequential networks, with a first convolution that is accurate in bfloat16.

    Most of the error in bfloat16 arises in the first layer, since differences between pixels are small
    compared with their mean. So pixels are centred, and weights and bias are sums of two bfloat16 numbers,
    applied to repeated channels and a constant channel, at almost no cost. In float32 results are unchanged.
    """

    weight: Tensor
    pointwise: Tensor | None
    bias: Tensor

    def __init__(self, network: SequentialNetwork, preprocessing: Preprocessing) -> None:
        super().__init__()
        first, *others = (layer for layer in network.body if not isinstance(layer, nn.Dropout))
        separable = first if isinstance(first, SeparableConv2d) else None
        conv = separable.depthwise if separable else first
        assert isinstance(conv, nn.Conv2d)
        down, across = (int(pixels) for pixels in conv.padding)
        self.padding, self.is_bgr = (across, across, down, down), preprocessing.channel_order == "bgr"
        self.stride = conv.stride
        scale = torch.tensor([preprocessing.scale / std for std in preprocessing.std])
        weight = conv.weight.detach() * scale.view(*((-1, 1, 1, 1) if separable else (1, -1, 1, 1)))
        brightness = _CENTRE * weight.sum(dim=(1, 2, 3))
        coarse, fine = _split(weight)
        ones = torch.zeros(len(weight), 1, *weight.shape[2:])  # weights of the constant channel
        if separable:
            mixing = separable.pointwise.weight.detach()
            assert separable.pointwise.bias is not None
            bias, remainder = _split(separable.pointwise.bias.detach() + mixing[:, :, 0, 0] @ brightness)
            ones[:, :, 0, 0] = 1
            self.weight = nn.Buffer(torch.cat([coarse, ones[:1], fine, coarse]))
            often, seldom = _split(mixing)
            self.pointwise = nn.Buffer(torch.cat([often, remainder.view(-1, 1, 1, 1), mixing, seldom], dim=1))
        else:
            bias, remainder = _split(brightness if conv.bias is None else conv.bias.detach() + brightness)
            ones[:, 0, 0, 0] = remainder
            self.weight = nn.Buffer(torch.cat([coarse, ones, fine], dim=1))
            self.pointwise = None
        self.bias, self.groups = nn.Buffer(bias), len(self.weight) if separable else 1
        self.body, self.head = nn.Sequential(*others), network.head

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        values = functional.pad(pixels.permute(0, 3, 1, 2).float(), self.padding) - _CENTRE
        values = values.flip(1) if self.is_bgr else values
        ones = torch.ones_like(values[:, :1])
        if self.pointwise is None:
            channels = torch.cat([values, ones, values], dim=1)
            values = functional.conv2d(channels, self.weight, self.bias, self.stride)
        else:
            channels = torch.cat([values, ones, values, values], dim=1)
            values = functional.conv2d(channels, self.weight, None, self.stride, groups=self.groups)
            values = functional.conv2d(values, self.pointwise, self.bias)
        features = self.body(values)
        return self.head(features), features


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers rounded to bfloat16, and the remainders."""
    coarse = weight.bfloat16().float()
    return coarse, weight - coarse


def _take_bytes(network: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """Return a network with the preprocessing, whose input is uint8."""
    if isinstance(network, SequentialNetwork) and not any(preprocessing.mean):
        first = network.body[0]
        if isinstance(first, SeparableConv2d) or (isinstance(first, nn.Conv2d) and first.groups == 1):
            return _FromBytesCentred(network, preprocessing)
    return _FromBytes(network, preprocessing)


def convert(classifier: Classifier) -> Any:
    """Return the OpenVINO model of a classifier: uint8 ``(16, px, px, 3)`` to logits and features."""
    openvino = import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    preprocessing = classifier.info.preprocessing
    pixels = torch.from_numpy(empty_batch(preprocessing.input_px))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; sizes are constants
        network = _take_bytes(classifier.network, preprocessing).eval()
        script = torch.jit.trace(network, pixels, check_trace=False)
        decoder = TorchScriptPythonDecoder(script, example_input=pixels)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.inputs[0].get_node().set_element_type(openvino.Type.u8)
    model.reshape(openvino.PartialShape(list(pixels.shape)))
    model.validate_nodes_and_infer_types()
    return model


def try_to_convert(classifier: Classifier) -> Any:
    """Convert a classifier's network and verify its outputs; None if they differ from PyTorch's."""
    network = classifier.network
    if any(tensor.dtype == torch.float64 for tensor in (*network.parameters(), *network.buffers())):
        return None  # OpenVINO would use float32
    try:
        model = convert(classifier)
        largest = _largest_difference(classifier, model)
    except Exception as error:  # converters raise various exceptions
        if "KeyboardInterrupt" in str(error):  # of Python code that OpenVINO's converter had called
            raise KeyboardInterrupt from None
        logger.warning("OpenVINO cannot run this network, PyTorch is used: %s", first_line(error))
        return None
    if not largest <= _TOLERANCE:
        logger.warning("OpenVINO's logits differ by %.2g of their range, PyTorch is used", largest)
        return None
    return model


def _largest_difference(classifier: Classifier, model: Any) -> float:
    """Return the largest difference to PyTorch's logits of random patches, relative to their range."""
    preprocessing = classifier.info.preprocessing
    shape, rng = empty_batch(preprocessing.input_px).shape, np.random.default_rng(0)
    colours = rng.integers(0, 192, (shape[0], 1, 1, 3))
    noise = (colours + rng.integers(0, 64, shape)).astype(np.uint8)
    with torch.inference_mode():
        expected = classifier.network(preprocessing.prepare(noise)).numpy()
    result = CompiledRuntime(classifier, model, "fp32", n_threads=1).logits(noise)
    return float(np.abs(result - expected).max() / max(1e-9, np.ptp(expected, axis=0).max()))


def write_compiled(classifier: Classifier, folder: Path) -> None:
    """Write the OpenVINO model into a classifier's folder, if it can be converted."""
    model = try_to_convert(classifier) if find_spec("openvino") else None
    if model is None:
        return
    openvino = import_openvino()
    target = folder / FOLDER
    target.mkdir()
    openvino.save_model(model, target / MODEL, compress_to_fp16=False)
    _write_document(classifier, target)


def write_quantised(classifier: Classifier, folder: Path, patches: np.ndarray) -> None:
    """Write a network with 8-bit weights and activations next to that of `write_compiled`.

    Args:
        patches: Calibration patches, uint8 ``(n, patch_px, patch_px, 3)``, for the ranges of activations
            (post-training quantisation by NNCF).
    """
    target = folder / FOLDER
    if not target.is_dir():
        raise RunError(f"OpenVINO cannot run the network {classifier.info.network}: it cannot be quantised")
    os.environ.setdefault("NNCF_CI", "1")  # disables telemetry
    openvino = import_openvino()
    try:
        import nncf
    except ImportError:
        raise MissingExtra("int8", "quantisation") from None
    nncf.set_log_level(logging.ERROR)
    pixels = classifier.info.preprocessing.resize_patches(patches)
    size = len(empty_batch(1))
    batches = [pixels[start : start + size] for start in range(0, len(pixels) - size + 1, size)]
    try:
        with redirect_stdout(StringIO()):  # progress bars
            model = nncf.quantize(
                read_compiled(target, classifier), nncf.Dataset(batches), subset_size=len(batches)
            )
    except RuntimeError as error:
        reason = first_line(error)
        raise RunError(f"the network {classifier.info.network} cannot be quantised: {reason}") from error
    openvino.save_model(model, target / INT8_MODEL, compress_to_fp16=False)
    _write_document(classifier, target)


def _write_document(classifier: Classifier, target: Path) -> None:
    """Write the metadata of a folder of OpenVINO models."""
    files = {path.name: sha256_file(path) for path in sorted(target.iterdir()) if path.name != DOCUMENT}
    document = {"format": FORMAT, "openvino": version("openvino"), "made_from": describe_origin(classifier)}
    write_json(target / DOCUMENT, document | {"files": files})
