"""Conversion of batches of sRGB between colour spaces, on any device."""

from functools import lru_cache

import torch
from torch import Tensor

# CIE XYZ of linear sRGB (IEC 61966-2-1), each row divided by the value of its white, D65.
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)
# L, a and b of the compressed X, Y and Z; 16 is subtracted from L.
_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
_LINEAR_BELOW = 6 / 29  # of the cube root


def rgb_to_lab(batch: Tensor) -> Tensor:
    """Convert sRGB in 0-1 to CIE L*a*b* (D65): L in 0-100.

    Args:
        batch: ``(B, 3, H, W)`` float.
    """
    linear = torch.where(batch > 0.04045, ((batch + 0.055) / 1.055) ** 2.4, batch / 12.92)
    xyz = _combine(linear, "xyz")
    compressed = torch.where(xyz > _LINEAR_BELOW**3, xyz ** (1 / 3), xyz / (3 * _LINEAR_BELOW**2) + 4 / 29)
    lab = _combine(compressed, "lab")
    lab[:, 0] -= 16
    return lab


def lab_to_rgb(batch: Tensor) -> Tensor:
    """Convert CIE L*a*b* (D65) to sRGB; colours that sRGB lacks are clipped to 0-1."""
    shifted = torch.cat([batch[:, :1] + 16, batch[:, 1:]], dim=1)
    compressed = _combine(shifted, "lab", inverse=True)
    xyz = torch.where(compressed > _LINEAR_BELOW, compressed**3, 3 * _LINEAR_BELOW**2 * (compressed - 4 / 29))
    linear = _combine(xyz, "xyz", inverse=True).clamp_(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def rgb_to_hsv(batch: Tensor) -> Tensor:
    """Convert RGB to hue, saturation and value, all in 0-1."""
    red, green, blue = batch.split(1, dim=1)
    value = batch.amax(1, keepdim=True)
    chroma = value - batch.amin(1, keepdim=True)
    steep = chroma.clamp(min=1e-8)
    from_green = torch.where(green == value, (blue - red) / steep + 2, (red - green) / steep + 4)
    hue = torch.where(red == value, (green - blue) / steep, from_green) / 6 % 1
    return torch.cat([hue, chroma / value.clamp(min=1e-8), value], dim=1)


def hsv_to_rgb(batch: Tensor) -> Tensor:
    """Convert hue, saturation and value in 0-1 to RGB."""
    hue, saturation, value = batch.split(1, dim=1)
    sector = (torch.arange(5, 0, -2, device=batch.device).view(1, 3, 1, 1) + 6 * hue) % 6
    return value - value * saturation * torch.minimum(sector, 4 - sector).clamp(0, 1)


def _combine(batch: Tensor, name: str, *, inverse: bool = False) -> Tensor:
    """Multiply the channels of each pixel by a matrix."""
    return torch.einsum("ij,bjhw->bihw", _send_matrix(name, inverse, batch.dtype, batch.device), batch)


@lru_cache(maxsize=16)
def _send_matrix(name: str, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix on a device, and keep it: sending it synchronises."""
    matrix = torch.tensor(_LAB if name == "lab" else _XYZ, dtype=torch.float64)
    if name == "xyz":
        matrix /= torch.tensor(_WHITE, dtype=torch.float64)[:, None]
    return (torch.linalg.inv(matrix) if inverse else matrix).to(device, dtype)
