"""A whole-slide image as DICOM, one file per level, uncompressed: enough of the standard for OpenSlide.

Explicit VR little endian (PS3.5, 7.1); VL Whole Slide Microscopy Image, TILED_FULL (PS3.3, A.32.8, C.8.12).
"""

import struct
from pathlib import Path

import numpy as np

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
ROOT = "1.2.826.0.1.3680043.10.99999"  # of identifiers, for tests only
LONG = ("OB", "SQ")


def element(group: int, tag: int, kind: str, value: bytes | str | int) -> bytes:
    """Return one data element."""
    if kind == "US":
        value = struct.pack("<H", value)
    elif kind == "UL":
        value = struct.pack("<I", value)
    elif isinstance(value, str):
        value = value.encode()
    assert isinstance(value, bytes)
    if len(value) % 2:
        value += b"\0" if kind in ("UI", "OB") else b" "
    head = struct.pack("<HH", group, tag) + kind.encode()
    size = struct.pack("<HI", 0, len(value)) if kind in LONG else struct.pack("<H", len(value))
    return head + size + value


def sequence(group: int, tag: int, item: bytes) -> bytes:
    """Return a sequence of one item."""
    return element(group, tag, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item)


def write_dicom(folder: Path, image: np.ndarray, *, mpp: float, tile_px: int = 64, levels: int = 2) -> Path:
    """Write an RGB image and its halves as a DICOM series; give the path of level 0."""
    folder.mkdir()
    for n in range(levels):
        pixels = image[: image.shape[0] >> n << n, : image.shape[1] >> n << n]
        pixels = pixels.reshape(pixels.shape[0] >> n, 1 << n, pixels.shape[1] >> n, 1 << n, 3).mean((1, 3))
        write_level(folder / f"level-{n}.dcm", np.rint(pixels).astype(np.uint8), mpp * 2**n, tile_px, n)
    return folder / "level-0.dcm"


def write_level(path: Path, image: np.ndarray, mpp: float, tile_px: int, n: int) -> None:
    height, width = image.shape[:2]
    rows, columns = -(-height // tile_px), -(-width // tile_px)
    padded = np.full((rows * tile_px, columns * tile_px, 3), 255, np.uint8)
    padded[:height, :width] = image
    tiles = padded.reshape(rows, tile_px, columns, tile_px, 3).swapaxes(1, 2)
    instance = f"{ROOT}.2.{n + 1}"
    meta = (
        element(2, 1, "OB", b"\0\1")
        + element(2, 2, "UI", WHOLE_SLIDE)
        + element(2, 3, "UI", instance)
        + element(2, 0x10, "UI", EXPLICIT_LITTLE_ENDIAN)
        + element(2, 0x12, "UI", f"{ROOT}.9")
    )
    spacing = element(0x28, 0x30, "DS", f"{mpp / 1000:.8f}\\{mpp / 1000:.8f}")
    content = [
        element(
            8, 8, "CS", "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED" if n else "ORIGINAL\\PRIMARY\\VOLUME\\NONE"
        ),
        element(8, 0x16, "UI", WHOLE_SLIDE),
        element(8, 0x18, "UI", instance),
        element(8, 0x60, "CS", "SM"),
        element(0x20, 0xD, "UI", f"{ROOT}.3"),
        element(0x20, 0xE, "UI", f"{ROOT}.1"),
        element(0x20, 0x9311, "CS", "TILED_FULL"),
        element(0x28, 2, "US", 3),
        element(0x28, 4, "CS", "RGB"),
        element(0x28, 6, "US", 0),
        element(0x28, 8, "IS", str(rows * columns)),
        element(0x28, 0x10, "US", tile_px),
        element(0x28, 0x11, "US", tile_px),
        element(0x28, 0x100, "US", 8),
        element(0x28, 0x101, "US", 8),
        element(0x28, 0x102, "US", 7),
        element(0x28, 0x103, "US", 0),
        element(0x48, 6, "UL", width),
        element(0x48, 7, "UL", height),
        element(0x48, 0x303, "UL", 1),
        sequence(0x5200, 0x9229, sequence(0x28, 0x9110, spacing)),
        element(0x7FE0, 0x10, "OB", tiles.tobytes()),
    ]
    path.write_bytes(b"\0" * 128 + b"DICM" + element(2, 0, "UL", len(meta)) + meta + b"".join(content))
