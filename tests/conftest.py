"""Shared fixtures: synthetic patches, an archive and a pack made of them, and the place of the real data.

Each ``make_...`` fixture is a function: call it with what the test needs, the rest has small defaults. The
same arguments and seed always give the same pixels.
"""

import atexit
import gc
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import hypothesis
import numpy as np
import pandas as pd
import pytest

from biopsy.core import files
from biopsy.core.plugins import Registry
from biopsy.data.pack_files import PIXELS, finish_pack, patch_sha256
from biopsy.data.packs import Pack
from biopsy.slide_io.pyramids import write_pyramid
from kept_files import write_again

if TYPE_CHECKING:
    from biopsy.training.runs import Run

pytest_plugins = ["local_server"]

FAST = frozenset(
    "annotation_xml averaging clustered_mean columns decisions geojson grids labels metrics multiclass "
    "optimisers paired recipes resolution tables text thresholds".split()
)
"""Files of tests, without ``test_``, that ``-m fast`` runs: statistics, recipes, names and geometry."""

hypothesis.settings.register_profile("biopsy", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("biopsy")

PROJECT = Path(__file__).resolve().parents[1]
STEP_PX = 50  # of IDC's coordinates, whatever the size of the synthetic patches


def draw_patches(
    n_patients: int = 6,
    patches_per_patient: int = 12,
    *,
    patch_px: int = 16,
    n_classes: int = 2,
    noise: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Draw H&E-like patches: pink ground whose tint varies by patient, more dark dots the higher the class.

    Every patient has every class (the columns of a grid at the right are the higher classes), so that the
    classes are easy to tell apart and colour varies between patients. ``noise=30`` makes it hard.

    Returns:
        uint8 ``(n, patch_px, patch_px, 3)`` RGB, and a table with ``patch_id, patient_id, slide_id, site_id,
        x, y, target, width, height``.
    """
    rng = np.random.default_rng(seed)
    n_columns = int(np.ceil(np.sqrt(patches_per_patient)))
    place = np.arange(patches_per_patient)
    column, row = place // n_columns, place % n_columns
    target = np.sort(place * n_classes // patches_per_patient)
    rows_px, columns_px = np.mgrid[:patch_px, :patch_px]
    images, tables = [], []
    for patient in range(n_patients):
        patient_id = str(8863 + 2 * patient)
        ground = np.array([226, 165, 196]) + rng.normal(0, 6, 3)
        for class_index in target:
            image = ground + rng.normal(0, 4 * noise, (patch_px, patch_px, 3))
            for centre_x, centre_y in rng.uniform(0, patch_px, (3 + 5 * class_index, 2)):
                dot = (columns_px - centre_x) ** 2 + (rows_px - centre_y) ** 2 < (patch_px / 10) ** 2
                image[dot] = (96, 62, 138)
            images.append(np.clip(image, 0, 255).astype(np.uint8))
        x, y = column * STEP_PX + 1, row * STEP_PX + 1
        tables.append(
            pd.DataFrame(
                {
                    "patch_id": [
                        f"{patient_id}_idx5_x{x}_y{y}_class{c}" for x, y, c in zip(x, y, target, strict=True)
                    ],
                    "patient_id": patient_id,
                    "slide_id": patient_id,
                    "site_id": None,
                    "x": x,
                    "y": y,
                    "target": target,
                    "width": patch_px,
                    "height": patch_px,
                }
            )
        )
    return np.stack(images), pd.concat(tables, ignore_index=True).astype({"x": "Int64", "y": "Int64"})


def encode_png(patch: np.ndarray) -> bytes:
    """Encode an RGB patch as PNG."""
    done, encoded = cv2.imencode(".png", patch[..., ::-1])
    assert done
    return encoded.tobytes()


@pytest.fixture
def make_patches() -> Callable[..., tuple[np.ndarray, pd.DataFrame]]:
    """``make_patches(n_patients=6, patches_per_patient=12, **options)``: see `draw_patches`."""
    return draw_patches


def write_idc_zip(
    place: Path,
    name: str = "idc.zip",
    *,
    prefix: str | tuple[str, ...] = "IDC_regular_ps50_idx5/",
    **patches: int,
) -> Path:
    """Write an archive of drawn patches in IDC's layout into a folder."""
    images, table = draw_patches(**patches)  # type: ignore[arg-type]
    with zipfile.ZipFile(place / name, "w") as archive:
        for start in [prefix] if isinstance(prefix, str) else prefix:
            for image, row in zip(images, table.itertuples(), strict=True):
                path = f"{start}{row.patient_id}/{row.target}/{row.patch_id}.png"
                archive.writestr(path, encode_png(image))
    return place / name


@pytest.fixture
def make_idc_zip(tmp_path: Path) -> Callable[..., Path]:
    """``make_idc_zip(name="idc.zip", *, prefix="IDC_regular_ps50_idx5/", **patches)``: `write_idc_zip`."""
    return partial(write_idc_zip, tmp_path)


def write_pack(
    place: Path,
    name: str = "tiny.pack",
    *,
    official_subsets: tuple[str, ...] | None = None,
    columns: dict[str, object] | None = None,
    **patches: int,
) -> Pack:
    """Write a pack of drawn patches into a folder, for fixtures that live longer than `make_pack`'s."""
    folder = place / name
    folder.mkdir()
    if columns is None:
        key = "pack", official_subsets, sorted(patches.items())
        write_again(folder, key, lambda: _write_pack(folder, official_subsets, {}, patches))
    else:
        _write_pack(folder, official_subsets, columns, patches)
    return Pack.open(folder)


def _write_pack(
    folder: Path,
    official_subsets: tuple[str, ...] | None,
    columns: dict[str, object],
    patches: dict[str, int],
) -> None:
    images, table = draw_patches(**patches)  # type: ignore[arg-type]
    table["sha256"] = [patch_sha256(image) for image in images]
    table["source"] = (
        table["patient_id"] + "/" + table["target"].astype(str) + "/" + table["patch_id"] + ".png"
    )
    if official_subsets is not None:
        patients = table["patient_id"].factorize()[0]
        table["official_subset"] = [official_subsets[patient % len(official_subsets)] for patient in patients]
    for column, values in columns.items():
        table[column] = values
    n_classes = int(table["target"].max()) + 1
    class_names = ["non_idc", "idc"] if n_classes <= 2 else [f"class_{index}" for index in range(n_classes)]
    np.save(folder / PIXELS, images)
    finish_pack(
        folder,
        table,
        dataset="synthetic",
        class_names=class_names,
        positive_class="idc" if n_classes <= 2 else None,
        mpp=4.0,
        patch_px=images.shape[1],
        origin={"source": "tests/conftest.py"},
    )


@pytest.fixture
def make_pack(tmp_path: Path) -> Callable[..., Pack]:
    """``make_pack(name="tiny.pack", *, official_subsets=None, columns=None, **patches) -> Pack``.

    ``official_subsets`` gives the dataset's official subset by patient, cycling (``("train", "train",
    "validation", "test")``);
    ``columns`` replaces or adds columns of the table (such as ``{"patient_id": None}``).
    """
    return partial(write_pack, tmp_path)


def draw_slide(width: int = 600, height: int = 400, *, seed: int = 0) -> np.ndarray:
    """Draw a slide: a pink ellipse on white glass, with dark dots in its right half, the tumour.

    Returns:
        uint8 ``(height, width, 3)`` RGB. The ellipse fills four fifths of width and height.
    """
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 244, np.uint8)
    centre, axes = (width // 2, height // 2), (2 * width // 5, 2 * height // 5)
    cv2.ellipse(image, centre, axes, 0, 0, 360, (226, 165, 196), -1)
    for x, y in rng.uniform(
        (width / 2, 0.1 * height), (0.9 * width, 0.9 * height), (width * height // 400, 2)
    ):
        if ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 < 1:
            cv2.circle(image, (int(x), int(y)), 4, (96, 62, 138), -1)
    noise = rng.integers(-4, 5, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def write_slide(
    place: Path,
    name: str = "slide.tiff",
    *,
    pixels: np.ndarray | None = None,
    width: int = 600,
    height: int = 400,
    seed: int = 0,
    mpp: float = 0.5,
    **pyramid: object,
) -> Path:
    """Write ``pixels``, or else what `draw_slide` draws, as a small lossless pyramid into a folder."""
    options = {"tile_px": 64, "compression": "deflate", "mpp": mpp} | pyramid
    path = place / name

    def write(image: np.ndarray) -> Path:
        size = {"width": image.shape[1], "height": image.shape[0]}
        return write_pyramid(path, image, **size, **options)  # type: ignore[arg-type]

    if pixels is not None:
        return write(pixels)
    key = "slide", path.suffix, width, height, seed, sorted(options.items())
    return write_again(path, key, lambda: write(draw_slide(width, height, seed=seed)))


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """``make_slide(name="slide.tiff", *, pixels=None, width=600, height=400, seed=0, mpp=0.5, ...)``."""
    return partial(write_slide, tmp_path)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Leave out fsync, milliseconds a file: what tests write need not outlive a loss of power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def own_registrations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test itself registers: metrics, networks, data sets and so on."""
    added, add = [], Registry.add

    def record(registry: Registry[object], name: str, value: object, function: Callable[..., object]) -> None:
        add(registry, name, value, function)
        if not str(function.__module__).startswith("biopsy."):
            added.append((registry, name))

    monkeypatch.setattr(Registry, "add", record)
    yield
    for registry, name in added:
        registry.pop(name, None)


def pytest_configure() -> None:
    """Limit libraries to one thread in all processes: on inputs this small a second one only waits."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Collect no garbage during collection, and later seldom and without what was imported.

    A full garbage collection passes over the objects of every library, half a second each time.
    """
    gc.disable()
    result = yield
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)
    gc.enable()
    atexit.register(gc.unfreeze)  # what was imported is taken down in its order
    return result


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave other files unread where only the fast tests are asked for."""
    is_other = collection_path.suffix == ".py" and collection_path.stem.removeprefix("test_") not in FAST
    return True if is_other and config.getoption("markexpr") == "fast" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `FAST` that need nothing and are not slow."""
    for item in items:
        is_set_apart = any(item.get_closest_marker(name) for name in ("slow", "data", "peer", "gpu"))
        if item.path.stem.removeprefix("test_") in FAST and not is_set_apart:
            item.add_marker("fast")


def abandon(folder: Path, *, is_folder: bool = False) -> Path:
    """Leave in a folder what a process that was killed leaves there."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = folder / f".biopsy-{files.machine_id()}-{ended.pid}-0badcafe.partial"
    if is_folder:
        path.mkdir(parents=True)
        (path / "half").write_text("half")
    else:
        path.write_text("half")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data (``BIOPSY_DATA``, default ``../shared/data``); the test skips where there is none."""
    folder = Path(os.environ.get("BIOPSY_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set BIOPSY_DATA")
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> "Run":
    """A finished run on a pack of 15 patients, five a side, for all tests: change only a copy of it."""
    from tiny_runs import LIVELY, train_tiny

    place = tmp_path_factory.mktemp("trained")
    pack = write_pack(
        place, n_patients=15, patches_per_patient=8, official_subsets=("train", "validation", "test")
    )
    return train_tiny(pack, place / "run", *LIVELY, recipe="idc-small")
