"""What this machine offers to a network, found out without loading PyTorch where that can be."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]


def pick_device(name: str) -> str:
    """Give the device that a name stands for: ``auto`` is a GPU where there is one, else the processor.

    Raises:
        RecipeError: If the device does not exist here.
    """
    if name == "cpu" or (name == "auto" and not _has_nvidia_driver()):
        return "cpu"
    from biopsy.models.engine import Engine

    return str(Engine(name).device)


def pick_precision(precision: Precision, device: str) -> Literal["fp32", "bf16"]:
    """Give the arithmetic: ``auto`` is bfloat16 where the device multiplies it in hardware."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if _multiplies_bf16() else "fp32"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported() else "fp32"


def count_cores() -> int:
    """Give the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: giving it back and faulting it in again is a third of a CPU step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another platform
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
