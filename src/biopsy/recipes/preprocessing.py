"""Preprocessing of patches, the same in training and in prediction.

:meth:`Preprocessing.resize_patches` resizes uint8 patches, :func:`to_unit` converts them to float in 0-1 on
the device (followed by augmentation in training), and :meth:`Preprocessing.normalise` normalises them.
:meth:`Preprocessing.prepare` does all three.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from biopsy.core.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Resize = Literal["nearest", "bilinear", "bicubic"]


class Preprocessing(BaseModel):
    """Preprocessing parameters of a classifier."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    input_px: PositiveInt = 48
    """Input size of the network in pixels."""
    resize: Resize = "nearest"
    """``nearest`` as in Pillow (and Keras's ``flow_from_directory``), the others as in OpenCV."""
    resize_mode: Literal["stretch", "pad"] = "stretch"
    """For padded patches: ``stretch`` crops and stretches the patch; ``pad`` keeps the padding."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the input; patches are RGB."""
    scale: PositiveFloat = 1 / 255
    """Factor on the 0-255 values."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted after scaling, one per channel in ``channel_order``."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    """Divisor after that."""

    def resize_patches(
        self, patches: np.ndarray, widths: np.ndarray | None = None, heights: np.ndarray | None = None
    ) -> np.ndarray:
        """Resize patches to the input size.

        Args:
            patches: ``(N, H, W, 3)`` uint8 RGB.
            widths: Width of each patch without padding, ``(N,)``; None if no patch is padded.
            heights: Height of each patch without padding.

        Returns:
            ``(N, input_px, input_px, 3)`` uint8 RGB.

        Raises:
            DataError: If shape or dtype of the patches is wrong, or a size is larger than the patches.
        """
        if patches.ndim != 4 or patches.shape[-1] != 3 or patches.dtype != np.uint8:
            raise DataError(f"patches are {patches.dtype} {patches.shape}; uint8 (N, H, W, 3) is needed")
        resized = self._resize(patches)
        if self.resize_mode == "pad" or widths is None or heights is None:
            return resized
        height_px, width_px = patches.shape[1:3]
        padded = np.flatnonzero((np.asarray(widths) != width_px) | (np.asarray(heights) != height_px))
        if len(padded):
            resized = resized.copy() if resized is patches else resized
        for i in padded:
            width, height = int(widths[i]), int(heights[i])
            if not (0 < width <= width_px and 0 < height <= height_px):
                raise DataError(f"patch {i} has size {width}x{height} px, larger than {width_px}x{height_px}")
            resized[i] = self._resize(patches[i : i + 1, :height, :width])[0]
        return resized

    def normalise(self, batch: "Tensor") -> "Tensor":
        """Normalise a batch ``(B, 3, H, W)`` of RGB in 0-1."""
        if self.channel_order == "bgr":
            batch = batch.flip(1)
        if (factor := 255 * self.scale) != 1:
            batch = batch * factor
        if any(self.mean):
            batch = batch - _send_channels(self.mean, batch.dtype, batch.device)
        if any(value != 1 for value in self.std):
            batch = batch / _send_channels(self.std, batch.dtype, batch.device)
        return batch

    def prepare(
        self,
        patches: np.ndarray,
        widths: np.ndarray | None = None,
        heights: np.ndarray | None = None,
        *,
        device: "torch.device | str" = "cpu",
    ) -> "Tensor":
        """Return the network's input of uint8 patches, for prediction."""
        return self.normalise(to_unit(self.resize_patches(patches, widths, heights), device))

    def _resize(self, patches: np.ndarray) -> np.ndarray:
        n, height, width, _ = patches.shape
        if (height, width) == (self.input_px, self.input_px):
            return patches
        if self.resize == "nearest":
            indices = _nearest_indices(width, height, self.input_px)
            return (
                patches.reshape(n, height * width, 3)
                .take(indices, axis=1)
                .reshape(n, *[self.input_px] * 2, 3)
            )
        import cv2  # not needed to read a recipe

        size = (self.input_px, self.input_px)
        interpolation = cv2.INTER_LINEAR if self.resize == "bilinear" else cv2.INTER_CUBIC
        resized = np.empty((n, *size, 3), np.uint8)
        for patch, out in zip(patches, resized, strict=True):
            cv2.resize(patch, size, dst=out, interpolation=interpolation)
        return resized


def to_unit(patches: np.ndarray, device: "torch.device | str" = "cpu") -> "Tensor":
    """Convert uint8 ``(B, H, W, 3)`` to float ``(B, 3, H, W)`` in 0-1 on a device, channels-last."""
    import torch  # slow import, not needed by compiled networks

    batch = torch.from_numpy(np.ascontiguousarray(patches))
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return scale_to_unit(batch.to(device))


def scale_to_unit(pixels: "Tensor") -> "Tensor":
    """Convert uint8 ``(B, H, W, 3)`` to float ``(B, 3, H, W)`` in 0-1, channels-last."""
    return pixels.permute(0, 3, 1, 2).float().mul_(1 / 255)


@lru_cache(maxsize=16)
def _send_channels(
    values: tuple[float, float, float], dtype: "torch.dtype", device: "torch.device"
) -> "Tensor":
    """Return a value per channel, ``(1, 3, 1, 1)``, on a device, and keep it: sending it synchronises."""
    import torch

    with torch.inference_mode(mode=False):
        return torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)


@lru_cache(maxsize=256)
def _nearest_indices(width: int, height: int, input_px: int) -> np.ndarray:
    rows, columns = nearest_index(height, input_px), nearest_index(width, input_px)
    return (rows[:, None] * width + columns).ravel()


def nearest_index(source_px: int, target_px: int) -> np.ndarray:
    """Return the source pixel of each target pixel as in Pillow, int64 ``(target_px,)``.

    Like Pillow, positions are accumulated in double precision from half a step, so that rounding at pixel
    borders is the same.
    """
    step = source_px / target_px
    steps = np.full(target_px, step)
    steps[0] = step * 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64), source_px - 1)
