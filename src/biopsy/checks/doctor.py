"""Checks of this machine: processor, memory, GPU, readers, disk, file locks, installed packages."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from filelock import FileLock

from biopsy.checks.results import Checklist, CheckReport, Status
from biopsy.core.errors import DataError, first_line
from biopsy.models.hardware import count_cores, has_nvidia_driver

GIB = 2**30
MIN_MEMORY, MIN_DISK = 2 * GIB, GIB
GOOD_MEMORY, GOOD_DISK = 8 * GIB, 20 * GIB
GOOD_WRITE_MB_S, MIN_FILES, GOOD_FILES = 30, 128, 1024
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
CODECS = ("jpeg", "jpeg2k", "lzw", "deflate", "zstd", "webp")
"""Compressions of slides and of written images."""


def doctor(*, path: Path | str = ".") -> CheckReport:
    """Check what this machine can do: hardware, slide readers, disk, file locks and installed packages.

    Args:
        path: Folder whose disk and file system are checked; it must exist.

    Returns:
        One row per check: PASS, WARN (works, slower or with less) or FAIL (a command would not work), with
        the remedy.

    Raises:
        DataError: If the folder does not exist.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name one that exists with --path")
    checks = Checklist()
    _check_processor(checks)
    _check_memory(checks)
    _check_packages(checks)
    _check_gpu(checks)
    _check_readers(checks)
    _check_disk(checks, folder)
    _check_locks(checks, folder)
    _check_open_files(checks)
    _check_temporary(checks)
    _check_extras(checks)
    return CheckReport.of(f"{platform.node()}, {folder.resolve()}", checks)


def _check_processor(checks: Checklist) -> None:
    text = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(match[1].split()) if (match := re.search(r"flags\s*:\s*(.+)", text)) else set()
    supported = [flag for flag in FLAGS if flag in flags]
    name = model[1] if model else platform.processor() or platform.machine()
    detail = f"{name}, {count_cores()} cores, {' '.join(supported) or 'no vector flags known'}"
    slow = platform.machine() in ("x86_64", "AMD64") and bool(flags) and "avx2" not in flags
    checks.add(
        "processor", "WARN" if slow else "PASS", detail, "use a processor with AVX2: it is much faster"
    )
    fast = {"avx512_bf16", "amx_bf16"} & flags
    bf16 = "multiplied in hardware: `biopsy slide` uses it" if fast else "not in hardware: float32 is used"
    checks.add("bfloat16", "PASS", bf16)


def _check_memory(checks: Checklist) -> None:
    total = _memory_limit()
    if total is None:
        checks.add("memory", "WARN", "cannot be read on this system", "have 8 GB or more")
        return
    status: Status = "FAIL" if total < MIN_MEMORY else "WARN" if total < GOOD_MEMORY else "PASS"
    remedy = f"have {GOOD_MEMORY // GIB} GB or more: with less, train with a smaller train.batch_size"
    checks.add("memory", status, f"{total / GIB:.1f} GB", remedy)


def _memory_limit() -> int | None:
    """Return the memory limit of this process in bytes: of the machine or of its control group."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limits = (_read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return min([total, *(int(text) for text in limits if text.strip().isdigit())])


def _check_packages(checks: Checklist) -> None:
    """Import the main dependencies, which may be installed but fail to load."""
    for name, package in (("torch", "torch"), ("openvino", "openvino"), ("onnxruntime", "onnxruntime")):
        try:
            installed = version(package)
        except PackageNotFoundError:
            status: Status = "WARN" if name == "onnxruntime" else "FAIL"
            remedy = "uv sync --extra export" if name == "onnxruntime" else "install biopsy again"
            checks.add(name, status, "not installed", remedy)
            continue
        try:
            import_module(name)
        except Exception as error:  # whatever a broken installation raises
            checks.add(name, "FAIL", f"{installed} does not load: {error}", f"install {package} again")
        else:
            checks.add(name, "PASS", installed)


def _check_gpu(checks: Checklist) -> None:
    if not has_nvidia_driver():
        checks.add("GPU", "PASS", "none: everything runs on the processor")
        return
    import torch

    if not torch.cuda.is_available():
        remedy = "install a PyTorch that was built for this driver's CUDA"
        checks.add("GPU", "WARN", f"there is a driver, and PyTorch {torch.__version__} sees no GPU", remedy)
        return
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    checks.add("GPU", "PASS", f"{names}, {memory:.0f} GB, driver {_driver()}, CUDA {torch.version.cuda}")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0]


def _check_readers(checks: Checklist) -> None:
    try:
        import openslide
    except (ImportError, OSError) as error:
        remedy = "install openslide-bin: it brings the library"
        checks.add("OpenSlide", "FAIL", f"does not load: {first_line(error)}", remedy)
    else:
        checks.add("OpenSlide", "PASS", f"library {openslide.__library_version__}")
    try:
        import imagecodecs
        import tifffile
    except (ImportError, OSError) as error:
        checks.add("TIFF codecs", "FAIL", f"do not load: {error}", "install tifffile and imagecodecs again")
        return
    missing = [name for name in CODECS if not getattr(imagecodecs, name.upper()).available]
    detail = f"tifffile {tifffile.__version__}, imagecodecs {imagecodecs.__version__}: "
    detail += f"lacks {', '.join(missing)}" if missing else ", ".join(CODECS)
    checks.add("TIFF codecs", "WARN" if missing else "PASS", detail, "install imagecodecs again, as a wheel")


def _check_disk(checks: Checklist, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    status: Status = "FAIL" if free < MIN_DISK else "WARN" if free < GOOD_DISK else "PASS"
    checks.add(
        "disk space", status, f"{free / GIB:.1f} GB free", "make room, or name another place by --path"
    )
    try:
        speed = measure_write_speed(folder)
    except OSError as error:
        remedy = "name a folder you may write to by --path"
        checks.add("disk speed", "FAIL", f"cannot be written to: {error.strerror}", remedy)
        return
    slow = speed < GOOD_WRITE_MB_S
    remedy = "write to a local disk and copy afterwards"
    checks.add("disk speed", "WARN" if slow else "PASS", f"{speed:,.0f} MB/s written and synced", remedy)


def measure_write_speed(folder: Path) -> float:
    """Return the write speed in MB/s, from up to 64 MB written and synced within a second."""
    block, written, seconds = os.urandom(8 << 20), 0, 0.0
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".biopsy-doctor-") as file:
        started = time.perf_counter()
        while written < 64 << 20 and seconds < 1:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written, seconds = written + len(block), time.perf_counter() - started
    return written / 1e6 / seconds


_TRY_LOCK = """
import sys
from filelock import FileLock, Timeout
try:
    FileLock(sys.argv[1], timeout=0).acquire()
except Timeout:
    print("held")
else:
    print("free")
"""


def _check_locks(checks: Checklist, folder: Path) -> None:
    """Test that a lock excludes a second process, and is free after release."""
    remedy = "map slides with --shard, whose claims need no locks, and let one process at a time write here"
    path = folder / f".biopsy-doctor-{os.getpid()}.lock"
    try:
        with FileLock(path, timeout=5):
            while_locked = _try_lock(path)
        after_release = _try_lock(path)
    except (OSError, NotImplementedError, subprocess.SubprocessError) as error:
        checks.add("file locks", "WARN", f"cannot be tried: {error}", remedy)
        return
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    works = (while_locked, after_release) == ("held", "free")
    detail = (
        "a second process waits for the first"
        if works
        else f"when held: {while_locked}, when free: {after_release}"
    )
    checks.add("file locks", "PASS" if works else "WARN", detail, remedy)


def _try_lock(path: Path) -> str:
    command = [sys.executable, "-c", _TRY_LOCK, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


def _check_open_files(checks: Checklist) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    status: Status = "FAIL" if limit < MIN_FILES else "WARN" if limit < GOOD_FILES else "PASS"
    checks.add("open files", status, f"{limit:,} at once", f"ulimit -n {4 * GOOD_FILES}")


def _check_temporary(checks: Checklist) -> None:
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"biopsy")
    except OSError as error:
        checks.add("temporary folder", "FAIL", str(error), "set TMPDIR to a folder you may write to")
        return
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    remedy = "make room there, or set TMPDIR to another folder"
    checks.add(
        "temporary folder", "WARN" if free < MIN_DISK else "PASS", f"{folder}, {free / GIB:.1f} GB", remedy
    )


def _check_extras(checks: Checklist) -> None:
    """Report which optional dependencies are installed."""
    needed: dict[str, list[str]] = {}
    for line in requires("biopsy") or []:
        if match := re.match(r"([\w.-]+).*;\s*extra == ['\"](.+)['\"]", line):
            needed.setdefault(match[2], []).append(match[1])
    for extra, packages in needed.items():
        missing = [name for name in packages if not _is_installed(name)]
        detail = f"not installed (`uv sync --extra {extra}`)" if missing else "installed"
        checks.add(f"extra {extra}", "PASS", detail)


def _is_installed(package: str) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(version(package))
    return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
