"""How pixels reach a network: size, filter, order, scale; the same in training and in prediction.

A patch passes three steps. :meth:`Preprocessing.resize_patches` brings uint8 patches to the network's size,
:func:`to_unit` makes them float in 0-1 on the device (here training augments), and
:meth:`Preprocessing.standardise` gives the numbers the network is fed. Prediction calls them in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import cv2
import numpy as np

from biopsy.core.errors import DataError, RecipeError, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Resize = Literal["nearest", "bilinear", "bicubic"]
OddSizes = Literal["stretch", "pad"]
ChannelOrder = Literal["rgb", "bgr"]
_CV2_FILTERS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a classifier keeps to be fed as it was trained.

    Attributes:
        input_px: Side of the square the network sees.
        resize: ``nearest`` is Pillow's (so Keras's ``flow_from_directory``); the other two are OpenCV's.
        resize_mode: ``stretch`` crops a patch back to its true width and height and stretches that to the
            square; ``pad`` keeps the padding at its right and bottom.
        channel_order: Order in which the network is fed; patches themselves are RGB.
        scale: Factor on the 0-255 values.
        mean: Subtracted after scaling, one per channel in ``channel_order``.
        std: Divides after that.

    Raises:
        RecipeError: If a value is none of these.
    """

    input_px: int
    resize: Resize = "nearest"
    resize_mode: OddSizes = "stretch"
    channel_order: ChannelOrder = "rgb"
    scale: float = 1 / 255
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name, options in (("resize", Resize), ("resize_mode", OddSizes), ("channel_order", ChannelOrder)):
            value = getattr(self, name)
            if value not in get_args(options):
                raise RecipeError(
                    f"{name}={value!r} is not possible; {suggest(str(value), get_args(options))}"
                )
        if self.input_px < 1:
            raise RecipeError(f"input_px={self.input_px!r} must be 1 or more")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
            if len(getattr(self, name)) != 3:
                raise RecipeError(f"{name}={getattr(self, name)!r} must have three values, one per channel")
        if min(self.std) <= 0:
            raise RecipeError(f"std={self.std!r} must be above 0 in every channel")

    def resize_patches(
        self, patches: np.ndarray, widths: np.ndarray | None = None, heights: np.ndarray | None = None
    ) -> np.ndarray:
        """Bring patches to the network's size.

        Args:
            patches: ``(N, H, W, 3)`` uint8 RGB.
            widths: True width of each patch, ``(N,)``; None where none is padded.
            heights: True height of each.

        Returns:
            ``(N, input_px, input_px, 3)`` uint8 RGB.

        Raises:
            DataError: If the patches are not of that shape and type, or a true size is not within them.
        """
        if patches.ndim != 4 or patches.shape[-1] != 3 or patches.dtype != np.uint8:
            raise DataError(f"patches are {patches.dtype} {patches.shape}; uint8 (N, H, W, 3) is needed")
        resized = self._resize(patches)
        if self.resize_mode == "pad" or widths is None or heights is None:
            return resized
        height_px, width_px = patches.shape[1:3]
        odd = np.flatnonzero((np.asarray(widths) != width_px) | (np.asarray(heights) != height_px))
        if len(odd):
            resized = resized.copy() if resized is patches else resized
        for i in odd:
            width, height = int(widths[i]), int(heights[i])
            if not (0 < width <= width_px and 0 < height <= height_px):
                raise DataError(
                    f"patch {i} says it is {width}x{height} px, it is kept in {width_px}x{height_px}"
                )
            resized[i] = self._resize(patches[i : i + 1, :height, :width])[0]
        return resized

    def standardise(self, batch: "Tensor") -> "Tensor":
        """Turn a batch ``(B, 3, H, W)`` of RGB in 0-1 into what the network is fed."""
        if self.channel_order == "bgr":
            batch = batch.flip(1)
        if (factor := 255 * self.scale) != 1:
            batch = batch * factor
        if any(self.mean):
            batch = batch - batch.new_tensor(self.mean).view(1, 3, 1, 1)
        if any(value != 1 for value in self.std):
            batch = batch / batch.new_tensor(self.std).view(1, 3, 1, 1)
        return batch

    def prepare(
        self,
        patches: np.ndarray,
        widths: np.ndarray | None = None,
        heights: np.ndarray | None = None,
        *,
        device: "torch.device | str" = "cpu",
    ) -> "Tensor":
        """Do all of it at once, for prediction: uint8 patches in, the network's batch out."""
        return self.standardise(to_unit(self.resize_patches(patches, widths, heights), device))

    def _resize(self, patches: np.ndarray) -> np.ndarray:
        n, height, width, _ = patches.shape
        if (height, width) == (self.input_px, self.input_px):
            return patches
        if self.resize == "nearest":
            places = _nearest_places(width, height, self.input_px)
            return (
                patches.reshape(n, height * width, 3).take(places, axis=1).reshape(n, *[self.input_px] * 2, 3)
            )
        size = (self.input_px, self.input_px)
        resized = np.empty((n, *size, 3), np.uint8)
        for patch, out in zip(patches, resized, strict=True):
            cv2.resize(patch, size, dst=out, interpolation=_CV2_FILTERS[self.resize])
        return resized


def to_unit(patches: np.ndarray, device: "torch.device | str" = "cpu") -> "Tensor":
    """Turn uint8 ``(B, H, W, 3)`` into float ``(B, 3, H, W)`` in 0-1 on a device, in channels-last memory."""
    import torch  # not above: its loading takes seconds, and a compiled network is fed without it

    batch = torch.from_numpy(np.ascontiguousarray(patches))
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device).permute(0, 3, 1, 2).float().mul_(1 / 255)


@lru_cache(maxsize=256)
def _nearest_places(width: int, height: int, input_px: int) -> np.ndarray:
    rows, columns = nearest_index(height, input_px), nearest_index(width, input_px)
    return (rows[:, None] * width + columns).ravel()


def nearest_index(source_px: int, target_px: int) -> np.ndarray:
    """Return the source pixel of each target pixel as Pillow takes it, int64 ``(target_px,)``.

    Pillow steps through the source by repeated addition in double precision, starting half a step in; where
    a step lands on a pixel's border the rounding of that sum decides, so the sum is repeated here.
    """
    step = source_px / target_px
    steps = np.full(target_px, step)
    steps[0] = step * 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64), source_px - 1)
