"""Networks in the form that OpenVINO reads: made from PyTorch's, and kept in bundles."""

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

from biopsy.core.errors import MissingExtra, RunError
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
    read_compiled,
)
from biopsy.models.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

_CENTRE = 192.0  # between the tissue and the glass, in bytes
_TOLERANCE = 1e-4  # of what logits differ by from patch to patch


class _FromBytes(nn.Module):
    """Scaling, standardisation and the network in one: bytes ``(B, H, W, 3)`` to logits and features.

    A network without features, as those of others are, gives logits alone.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        one = torch.zeros(1, 3, *[preprocessing.input_px] * 2)
        self.has_features = cast(Network, network).features(one).shape[1] > 0

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        batch = self.preprocessing.standardise(pixels.permute(0, 3, 1, 2).float() * (1 / 255))
        logits = self.network(batch)
        return (logits, cast(Network, self.network).features(batch)) if self.has_features else (logits,)


class _FromBytesCentred(nn.Module):
    """The same for a row of layers, its first convolution so written that bfloat16 loses little of it.

    That is where most of a network's error arises: what pixels differ by is small beside the brightness that
    all have in common. So bytes are taken around 0; and every weight, and the bias, is the sum of two numbers
    of 8 bits. That needs the channels again and one that is 1 everywhere, and in the vectors of a processor
    next to no time. In 32 bits nothing changes.
    """

    weight: Tensor
    pointwise: Tensor | None
    bias: Tensor

    def __init__(self, network: SequentialNetwork, preprocessing: Preprocessing) -> None:
        super().__init__()
        first, *rest = (layer for layer in network.body if not isinstance(layer, nn.Dropout))
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
        one = torch.zeros(len(weight), 1, *weight.shape[2:])  # of the channel that is 1
        if separable:
            mixing = separable.pointwise.weight.detach()
            assert separable.pointwise.bias is not None
            bias, remainder = _split(separable.pointwise.bias.detach() + mixing[:, :, 0, 0] @ brightness)
            one[:, :, 0, 0] = 1
            self.weight = nn.Buffer(torch.cat([coarse, one[:1], fine, coarse]))
            often, seldom = _split(mixing)
            self.pointwise = nn.Buffer(torch.cat([often, remainder.view(-1, 1, 1, 1), mixing, seldom], dim=1))
        else:
            bias, remainder = _split(brightness if conv.bias is None else conv.bias.detach() + brightness)
            one[:, 0, 0, 0] = remainder
            self.weight = nn.Buffer(torch.cat([coarse, one, fine], dim=1))
            self.pointwise = None
        self.bias, self.groups = nn.Buffer(bias), len(self.weight) if separable else 1
        self.rest, self.head = nn.Sequential(*rest), network.head

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        values = functional.pad(pixels.permute(0, 3, 1, 2).float(), self.padding) - _CENTRE
        values = values.flip(1) if self.is_bgr else values
        one = torch.ones_like(values[:, :1])
        if self.pointwise is None:
            channels = torch.cat([values, one, values], dim=1)
            values = functional.conv2d(channels, self.weight, self.bias, self.stride)
        else:
            channels = torch.cat([values, one, values, values], dim=1)
            values = functional.conv2d(channels, self.weight, None, self.stride, groups=self.groups)
            values = functional.conv2d(values, self.pointwise, self.bias)
        features = self.rest(values)
        return self.head(features), features


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return what bfloat16 keeps of numbers, and what is left."""
    coarse = weight.bfloat16().float()
    return coarse, weight - coarse


def _take_bytes(network: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """Return a network that takes bytes instead of what the preprocessing makes of them."""
    if isinstance(network, SequentialNetwork) and not any(preprocessing.mean):
        first = network.body[0]
        if isinstance(first, SeparableConv2d) or (isinstance(first, nn.Conv2d) and first.groups == 1):
            return _FromBytesCentred(network, preprocessing)
    return _FromBytes(network, preprocessing)


def convert(classifier: Classifier) -> Any:
    """Return OpenVINO's model of a classifier's network: bytes ``(16, input_px, input_px, 3)`` to logits
    and features.

    Raises:
        RuntimeError: If PyTorch's tracing or OpenVINO cannot follow the network.
    """
    from openvino import PartialShape, Type
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    preprocessing = classifier.info.preprocessing
    pixels = torch.from_numpy(empty_batch(preprocessing.input_px))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and sizes become constants: they are
        network = _take_bytes(classifier.network, preprocessing).eval()
        script = torch.jit.trace(network, pixels, check_trace=False)
        decoder = TorchScriptPythonDecoder(script, example_input=pixels)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.inputs[0].get_node().set_element_type(Type.u8)
    model.reshape(PartialShape(list(pixels.shape)))
    model.validate_nodes_and_infer_types()
    return model


def try_to_convert(classifier: Classifier) -> Any:
    """Convert a classifier's network and try it out; None where OpenVINO does not compute the same."""
    network = classifier.network
    if any(tensor.dtype == torch.float64 for tensor in (*network.parameters(), *network.buffers())):
        return None  # it would compute with 32 bits
    try:
        model = convert(classifier)
        largest = _largest_difference(classifier, model)
    except Exception as error:  # whatever a converter meets in a model of somebody else's
        logger.warning("OpenVINO cannot run this network, PyTorch does: %s", str(error).splitlines()[0])
        return None
    if not largest <= _TOLERANCE:
        logger.warning("OpenVINO's logits are off by %.2g of their range, PyTorch runs this network", largest)
        return None
    return model


def _largest_difference(classifier: Classifier, model: Any) -> float:
    """Compare logits of noise in all colours with PyTorch's, as a share of their range."""
    preprocessing = classifier.info.preprocessing
    shape, rng = empty_batch(preprocessing.input_px).shape, np.random.default_rng(0)
    colours = rng.integers(0, 192, (shape[0], 1, 1, 3))
    noise = (colours + rng.integers(0, 64, shape)).astype(np.uint8)
    with torch.inference_mode():
        wanted = classifier.network(preprocessing.prepare(noise)).numpy()
    result = CompiledRuntime(classifier, model, "fp32", n_threads=1).logits(noise)
    return float(np.abs(result - wanted).max() / max(1e-9, np.ptp(wanted, axis=0).max()))


def write_compiled(classifier: Classifier, folder: Path) -> None:
    """Write OpenVINO's model of a network into its classifier's folder; nothing where it cannot be had."""
    model = try_to_convert(classifier) if find_spec("openvino") else None
    if model is None:
        return
    import openvino

    place = folder / FOLDER
    place.mkdir()
    openvino.save_model(model, place / MODEL, compress_to_fp16=False)
    _describe_files(classifier, place)


def write_quantised(classifier: Classifier, folder: Path, patches: np.ndarray) -> None:
    """Write a network of 8-bit weights and activations beside what `write_compiled` wrote.

    Args:
        patches: Reference patches, uint8 ``(n, patch_px, patch_px, 3)``: the ranges of activations are taken
            from them (post-training quantisation by NNCF; weights are not trained).

    Raises:
        RunError: If `write_compiled` wrote nothing, or NNCF cannot follow the network.
        MissingExtra: If NNCF is not installed.
    """
    place = folder / FOLDER
    if not place.is_dir():
        raise RunError(f"OpenVINO cannot run the network {classifier.info.network}: it cannot be quantised")
    os.environ.setdefault("NNCF_CI", "1")  # it would report its use to its makers
    try:
        import nncf
    except ImportError:
        raise MissingExtra("int8", "quantisation") from None
    import openvino

    nncf.set_log_level(logging.ERROR)
    pixels = classifier.info.preprocessing.resize_patches(patches)
    size = len(empty_batch(1))
    batches = [pixels[start : start + size] for start in range(0, len(pixels) - size + 1, size)]
    try:
        with redirect_stdout(StringIO()):  # its progress bars
            model = nncf.quantize(
                read_compiled(place, classifier), nncf.Dataset(batches), subset_size=len(batches)
            )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the network {classifier.info.network} cannot be quantised: {reason}") from error
    openvino.save_model(model, place / INT8_MODEL, compress_to_fp16=False)
    _describe_files(classifier, place)


def _describe_files(classifier: Classifier, place: Path) -> None:
    """Write the document of a folder of OpenVINO's files."""
    files = {path.name: sha256_file(path) for path in sorted(place.iterdir()) if path.name != DOCUMENT}
    about = {"format": FORMAT, "openvino": version("openvino"), "made_from": describe_origin(classifier)}
    write_json(place / DOCUMENT, about | {"files": files})
