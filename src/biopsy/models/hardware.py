"""Detection of devices, precision and cores, without importing PyTorch if possible."""

import contextlib
import ctypes
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from biopsy.core.errors import RecipeError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "int8"]


def pick_device(name: str) -> str:
    """Return the device of a name; ``auto`` is the GPU if available, else the CPU.

    Raises:
        RecipeError: If the device is not available.
    """
    if name == "cpu" or (name == "auto" and not has_nvidia_driver()):
        return "cpu"
    return str(torch_device(name))


def torch_device(name: str) -> "torch.device":
    """Return the PyTorch device of a name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        RecipeError: If the device is not available.
    """
    import torch

    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("device: %s (auto)", device)
        return device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(
            f"device={name!r} is not possible; try auto, cpu, cuda or cuda:0", "value"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError(
            f"device={name!r} is not available: PyTorch has {count} CUDA devices; use device='cpu'", "value"
        )
    return device


def pick_precision(precision: Precision, device: str) -> Literal["fp32", "bf16", "int8"]:
    """Return the precision; ``auto`` is bfloat16 if the device computes it in hardware."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if _supports_bf16() else "fp32"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def count_cores() -> int:
    """Return the number of cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Configure glibc to keep freed memory; page faults would take a third of a training step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another platform
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def has_nvidia_driver() -> bool:
    """Return whether the library of the NVIDIA driver is installed."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _supports_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
