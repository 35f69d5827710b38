"""WSInfer models: a TorchScript file and a ``config.json``, as in its model zoo and QuPath.

TorchScript is code, so it is only loaded if the user passes the hash of the file. Preprocessing (Resize,
ToTensor, Normalize) and output activation (softmax, or sigmoid of a single output) are applied here.
"""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from biopsy.core.errors import RunError, raising
from biopsy.core.files import sha256_file
from biopsy.core.loaders import load_json, refusing, validate
from biopsy.data.datasets.base import find_positive
from biopsy.models.classifier import Classifier, ClassifierInfo, default_thresholds
from biopsy.recipes.preprocessing import Preprocessing

CONFIG, SCRIPT = "config.json", "torchscript_model.pt"
MAX_PX = 1024  # side of a patch or input; the largest in WSInfer's zoo is 350
MAX_CONFIG_BYTES = 2**20
MAX_SPACING = 100  # um/px, at which a slide is a few hundred pixels


class Transform(BaseModel):
    """A preprocessing step."""

    name: Literal["Resize", "ToTensor", "Normalize"]
    arguments: dict[str, object] = {}


class HostConfig(BaseModel):
    """Content of ``config.json`` of a WSInfer model."""

    spec_version: str = "1.0"
    architecture: str
    num_classes: PositiveInt
    patch_size_pixels: PositiveInt = Field(le=MAX_PX)
    spacing_um_px: float = Field(gt=0, le=MAX_SPACING)
    class_names: list[str] = Field(min_length=1)
    transform: list[Transform]


class WSInferClassifier(Classifier):
    """A WSInfer model as a classifier, which cannot be saved."""

    def save(self, path: Path | str, *, precision: Literal["fp32", "fp16"] = "fp32") -> None:
        """Raise an error, since the weights are inside TorchScript code."""
        raise RunError(f"a WSInfer model cannot be saved as a classifier: copy its folder to {path}")


def is_wsinfer(path: Path | str) -> bool:
    """Return whether a folder has a file of a WSInfer model."""
    return (Path(path) / SCRIPT).is_file() or (Path(path) / CONFIG).is_file()


def open_wsinfer(path: Path | str, *, trust_model: str | None = None) -> WSInferClassifier:
    """Open the folder of a WSInfer model with any number of classes.

    A model with one output gets a second class, ``not <its name>``. The positive class of two is given by
    `find_positive`, else it is the second. Out-of-distribution patches are not flagged.

    Args:
        trust_model: SHA-256 of the TorchScript file, which permits running its code.

    Raises:
        RunError: If a file is missing or not readable, or the hash is missing or wrong.
    """
    path = Path(path)
    config = _read_config(path)
    script = path / SCRIPT
    if not script.is_file():
        raise RunError(f"{path} has a {CONFIG} but no {SCRIPT}: a WSInfer model has both")
    digest = sha256_file(script)
    if trust_model is None:
        raise RunError(
            f"{script} is TorchScript, which contains code: if you trust its source, "
            f"pass --trust-model {digest}"
        )
    if trust_model.strip().lower() != digest:
        raise RunError(f"{script} has the SHA-256 {digest}, not {trust_model}: it was not run")
    network = _HostedNetwork(load_script(script), config)
    names = config.class_names
    if len(names) == 1:
        names = [f"not {names[0]}", names[0]]
    info = ClassifierInfo(
        network=f"wsinfer:{config.architecture}",
        class_names=names,
        positive_class=(find_positive(names) or names[1]) if len(names) == 2 else None,
        patch_px=config.patch_size_pixels,
        mpp=config.spacing_um_px,
        preprocessing=Preprocessing(input_px=config.patch_size_pixels),
        thresholds=default_thresholds(names),
        licence="unknown: see the source of the model",
    )
    classifier = WSInferClassifier(info, network)
    classifier.info.weights_sha256 = digest
    return classifier


class _HostedNetwork(nn.Module):
    """Preprocessing of WSInfer and the script: patches ``(B, 3, H, W)`` in 0-1 to logits.

    Raises:
        RunError: If a step has unsupported arguments.
    """

    weights: Tensor | None
    mean: Tensor
    std: Tensor

    def __init__(self, script: nn.Module, config: HostConfig) -> None:
        super().__init__()
        self.script = script
        self.n_classes = config.num_classes
        patch_px = size_px = config.patch_size_pixels
        mean, std = [0.0] * 3, [1.0] * 3
        for step in config.transform:
            try:
                if step.name == "Resize":
                    size_px = _read_size(step.arguments["size"])
                elif step.name == "Normalize":
                    mean, std = (
                        _read_three(step.arguments["mean"]),
                        _read_three(step.arguments["std"], above=0),
                    )
            except (KeyError, TypeError, ValueError, OverflowError):
                raise RunError(
                    f"{CONFIG} has a step {step.name} with {str(step.arguments)[:200]}; Resize needs a "
                    f"square of 1 to {MAX_PX} px, Normalize mean and std (above 0) of three values"
                ) from None
        weights = None if size_px == patch_px else _pillow_weights(patch_px, size_px)
        self.register_buffer("weights", weights)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits ``(B, n_classes)``; a single output is converted to two."""
        if self.weights is not None:  # rows, then columns, rounded to 8 bits as in Pillow
            levels = torch.matmul((patches * 255).round().double(), self.weights)
            levels = torch.matmul(self.weights.T, (levels + 0.5).floor())
            patches = (levels + 0.5).floor().float() / 255
        try:
            logits = self.script(((patches - self.mean) / self.std).contiguous())
        except Exception as error:  # the script may raise any exception
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1][:200]
            raise RunError(f"the model fails on a batch of {tuple(patches.shape)}: {reason}") from None
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        fits = shape[:1] == (len(patches),) and logits.numel() == len(patches) * self.n_classes
        if not fits or not logits.is_floating_point():
            raise RunError(
                f"the model returns {shape} for {len(patches)} patches, but its {CONFIG} has "
                f"{self.n_classes} classes"
            )
        logits = logits.reshape(len(patches), self.n_classes)
        if self.n_classes == 1:
            logits = torch.cat([-logits / 2, logits / 2], dim=1)
        return logits

    def features(self, patches: Tensor) -> Tensor:
        """Return an empty tensor ``(B, 0)``, since the penultimate layer is unknown."""
        return patches.new_empty(len(patches), 0)


def _pillow_weights(source_px: int, target_px: int) -> Tensor:
    """Return the weight of each source pixel in each target pixel, ``(source_px, target_px)``.

    This is Pillow's BILINEAR, used by torchvision's Resize: a triangle kernel of two target pixels (at least
    two source pixels), in 22-bit fixed point.
    """
    scale = source_px / target_px
    radius = max(scale, 1.0)
    centres = (np.arange(target_px) + 0.5) * scale
    positions = np.arange(source_px)[:, None] + 0.5
    weights = np.clip(1 - np.abs(positions - centres) * (1 / radius), 0, None)
    weights *= 1 / weights.sum(axis=0)
    return torch.from_numpy(np.floor(weights * 2**22 + 0.5) / 2**22)


def _read_size(size: Any) -> int:
    (side,) = {int(side) for side in (size if isinstance(size, list) else [size])}
    if not 0 < side <= MAX_PX:
        raise ValueError
    return side


def _read_three(values: Any, *, above: float = -math.inf) -> list[float]:
    red, green, blue = map(float, values)
    if not all(above < value < math.inf for value in (red, green, blue)):
        raise ValueError
    return [red, green, blue]


def _read_config(path: Path) -> HostConfig:
    file = path / CONFIG
    if not file.is_file():
        raise RunError(f"{path} has a {SCRIPT} but no {CONFIG} with classes, patch size and um/px")
    with raising(RunError):
        config = validate(file, HostConfig, load_json(file, max_bytes=MAX_CONFIG_BYTES))
    if len(set(config.class_names)) != config.num_classes:
        raise RunError(f"{file} has the classes {config.class_names}, but num_classes {config.num_classes}")
    return config


def load_script(script: Path) -> nn.Module:
    """Load trusted TorchScript on the CPU, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", Warning)  # deprecated
        with raising(RunError):
            with refusing(script, "TorchScript"):
                return torch.jit.load(str(script), map_location="cpu").eval()  # noqa: TID251
