"""A classifier as one network for programs that apply only Resize, ToTensor and softmax.

WSInfer and QuPath read a patch, resize it, scale it to 0-1, call a network and apply softmax to its output.
All other steps are therefore part of `HostNetwork`: resizing to the network's input with its own filter,
channel order, scale, mean and standard deviation before the network; sigmoids and the calibrator after it.
"""

import cv2
import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import functional

from biopsy.models.classifier import Classifier
from biopsy.recipes.preprocessing import Preprocessing, nearest_index
from biopsy.statistics.calibrators import MIN_PROB, Calibrator, Isotonic, Scaling


class HostNetwork(nn.Module):
    """Map RGB patches ``(B, 3, patch_px, patch_px)`` in 0-1 to scores ``(B, n_classes)``.

    The softmax of the scores returns the calibrated probabilities. The network is shared, not copied.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        classifier = classifier.single_patch()
        info = classifier.info
        self.resize = make_resize(info.preprocessing, info.patch_px)
        self.normalise = _Normalise(info.preprocessing)
        self.network = classifier.network
        self.is_sigmoid = info.outputs == "sigmoid"
        self.calibrate = make_calibration(classifier.calibrator)
        self.eval()

    def forward(self, patches: Tensor) -> Tensor:
        logits = self.network(self.normalise(self.resize(patches)))
        return self.calibrate(functional.logsigmoid(logits) if self.is_sigmoid else logits)


def make_resize(preprocessing: Preprocessing, patch_px: int) -> nn.Module:
    """Return the module that resizes ``(B, 3, patch_px, patch_px)`` as preprocessing does 8-bit pixels."""
    if patch_px == preprocessing.input_px:
        return nn.Identity()
    kind = {"nearest": _Nearest, "bilinear": _Bilinear, "bicubic": _Bicubic}[preprocessing.resize]
    return kind(patch_px, preprocessing.input_px)


class _Nearest(nn.Module):
    """Nearest-neighbour resizing with the pixel indices of Pillow."""

    places: Tensor

    def __init__(self, patch_px: int, input_px: int) -> None:
        super().__init__()
        self.register_buffer("places", torch.from_numpy(nearest_index(patch_px, input_px)))

    def forward(self, patches: Tensor) -> Tensor:
        return patches.index_select(2, self.places).index_select(3, self.places)


class _Bilinear(nn.Module):
    """OpenCV's INTER_LINEAR for 8-bit pixels in integer arithmetic, with 11-bit weights.

    Along a row, OpenCV moves positions beyond the border onto it; along a column, it repeats the border,
    which differs in rounding.
    """

    first: Tensor
    second: Tensor
    row_first: Tensor
    row_second: Tensor
    column_first: Tensor
    column_second: Tensor

    def __init__(self, patch_px: int, input_px: int) -> None:
        super().__init__()
        places = (np.arange(input_px) + 0.5) * patch_px / input_px - 0.5
        first = np.floor(places).astype(np.int64)
        second_weight = (places - first).astype(np.float32)
        outside = (first < 0) | (first >= patch_px - 1)
        for name, weight in (
            ("row", np.where(outside, np.float32(0), second_weight)),
            ("column", second_weight),
        ):
            self.register_buffer(f"{name}_first", _fixed_point(1 - weight))
            self.register_buffer(f"{name}_second", _fixed_point(weight))
        self.register_buffer("first", torch.from_numpy(first.clip(0, patch_px - 1)))
        self.register_buffer("second", torch.from_numpy((first + 1).clip(0, patch_px - 1)))

    def forward(self, patches: Tensor) -> Tensor:
        levels = (patches * 255).round().int()
        left, right = levels.index_select(3, self.first), levels.index_select(3, self.second)
        sums = _divide(left * self.row_first + right * self.row_second, 4)
        top, bottom = sums.index_select(2, self.first), sums.index_select(2, self.second)
        top = _divide(top * self.column_first[:, None], 16)
        bottom = _divide(bottom * self.column_second[:, None], 16)
        return _divide(top + bottom + 2, 2).float() / 255


class _Bicubic(nn.Module):
    """OpenCV's INTER_CUBIC for 8-bit pixels, with weights computed by OpenCV."""

    weights: Tensor

    def __init__(self, patch_px: int, input_px: int) -> None:
        super().__init__()
        unit = np.eye(patch_px, dtype=np.float32)
        weights = cv2.resize(unit, (input_px, patch_px), interpolation=cv2.INTER_CUBIC)
        self.register_buffer("weights", torch.from_numpy(weights))

    def forward(self, patches: Tensor) -> Tensor:
        levels = (patches * 255).round()
        levels = torch.matmul(self.weights.T, torch.matmul(levels, self.weights))
        return levels.round().clamp(0, 255) / 255


def _fixed_point(weight: np.ndarray) -> Tensor:
    return torch.from_numpy(np.rint(weight * 2048).astype(np.int32))


def _divide(values: Tensor, bits: int) -> Tensor:
    """Shift non-negative integers to the right; as a division, which ONNX supports for integers."""
    return torch.div(values, 2**bits, rounding_mode="trunc").int()


class _Normalise(nn.Module):
    """Channel order, scale, mean and standard deviation, as buffers that move with the network."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.is_bgr = preprocessing.channel_order == "bgr"
        self.factor = 255 * preprocessing.scale
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, batch: Tensor) -> Tensor:
        return ((batch.flip(1) if self.is_bgr else batch) * self.factor - self.mean) / self.std


def make_calibration(calibrator: Calibrator) -> nn.Module:
    """Return the module that maps scores to scores whose softmax is calibrated."""
    return _Isotonic(calibrator) if isinstance(calibrator, Isotonic) else _Scaling(calibrator)


class _Scaling(nn.Module):
    """Slope and intercepts."""

    slope: Tensor
    intercepts: Tensor

    def __init__(self, calibrator: Scaling) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor(calibrator.slope, dtype=torch.float32))
        self.register_buffer("intercepts", torch.tensor(calibrator.intercepts or [0.0], dtype=torch.float32))

    def forward(self, scores: Tensor) -> Tensor:
        return self.slope * scores + self.intercepts


class _Isotonic(nn.Module):
    """Linear interpolation between the knots of the calibrator.

    For precision in float32, probabilities above 0.5 are represented by their difference from 1.
    """

    logit: Tensor
    prob: Tensor
    missing: Tensor
    calibrated: Tensor
    intercepts: Tensor

    def __init__(self, calibrator: Isotonic) -> None:
        super().__init__()
        self.positive = calibrator.positive_index
        prob = np.array(calibrator.prob)
        with np.errstate(divide="ignore"):
            tables = {"logit": np.log(prob) - np.log1p(-prob), "prob": prob, "missing": 1 - prob}
        tables["calibrated"] = np.array(calibrator.calibrated)
        tables["intercepts"] = np.array(calibrator.intercepts or [0.0])
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def forward(self, scores: Tensor) -> Tensor:
        logit = scores[:, self.positive] - scores[:, 1 - self.positive]
        n_below = (logit[:, None] >= self.logit).int().sum(dim=1)
        lower, upper = (n_below - 1).clamp(min=0), n_below.clamp(max=len(self.logit) - 1)
        odds = torch.exp(-logit.abs())
        smaller = odds / (1 + odds)  # of the two probabilities; ONNX Runtime's sigmoid loses its digits
        rise = torch.where(logit > 0, self.missing[lower] - smaller, smaller - self.prob[lower])
        step = torch.where(
            logit > 0, self.missing[lower] - self.missing[upper], self.prob[upper] - self.prob[lower]
        )
        share = torch.where(step > 0, rise / step.clamp(min=1e-30), torch.zeros_like(rise)).clamp(0, 1)
        prob = self.calibrated[lower] + share * (self.calibrated[upper] - self.calibrated[lower])
        pair = [1 - prob, prob] if self.positive else [prob, 1 - prob]
        return torch.stack(pair, dim=1).clamp(min=MIN_PROB).log() + self.intercepts


def example_batch(classifier: Classifier) -> torch.Tensor:
    """Return a batch to trace `HostNetwork` with."""
    size = [classifier.info.patch_px] * 2
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def host_batches(patches: np.ndarray) -> list[torch.Tensor]:
    """Return patches in batches of different sizes, including a single patch, to test dynamic batch size."""
    batch = torch.from_numpy(patches).permute(0, 3, 1, 2).float().div(255).contiguous()
    return [part for part in (batch[:1], *batch[1:].split(64)) if len(part)]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the probabilities that a host program computes from scores."""
    return np.asarray(special.softmax(scores.astype(np.float64), axis=1))
