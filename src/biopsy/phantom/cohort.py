"""A cohort of phantom patients as patches in the layout of IDC, generated slide by slide."""

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from biopsy.core.files import create_directory, replace_atomic
from biopsy.core.seeds import make_rng
from biopsy.data.archives import SYNTHETIC
from biopsy.phantom.slides import MPP, SlidePainter, plan_painter

logger = logging.getLogger(__name__)

PATCH_PX = 50  # Cruz-Roa et al. 2014: 50x50 px at about 2.5x
ROOT = "IDC_regular_ps50_idx5"  # the folder in Kaggle's archive
FIRST_PATIENT = 90001  # real IDC ids are 8863 to 16896
TUMOUR_SHARE = 0.5  # a patch is IDC when at least this share of its area lies in the tumour region
_BLOCK = 4  # patches painted at once, to a side: one tile of the painter
_TISSUE_SHARE = 0.12  # patches with less tissue are background, as good as absent from IDC
_NOTICE = "Drawn by biopsy.phantom: no patient, no tissue.\n"
_MEAN_TUMOUR_SHARE = 0.28  # 78,786 of 277,524 patches of the Kaggle release


class PhantomPatch(NamedTuple):
    """One patch with its coordinates (upper left pixel, counted from 1 as in IDC) and class."""

    patient_id: str
    x: int
    y: int
    target: int
    tumour_frac: float
    image: NDArray[np.uint8]  # (50, 50, 3) RGB

    @property
    def name(self) -> str:
        """Return the path IDC would use inside its root folder."""
        stem = f"{self.patient_id}_idx5_x{self.x}_y{self.y}_class{self.target}.png"
        return f"{self.patient_id}/{self.target}/{stem}"


def iter_patches(
    n_patients: int = 12, patches_per_patient: float = 250, seed: int = 0
) -> Iterator[PhantomPatch]:
    """Return every patch of a cohort, patient by patient, block by block of the slide.

    Args:
        n_patients: Number of patients, one slide each, 1 or more.
        patches_per_patient: Mean number of patches; the cohort has
            ``round(n_patients * patches_per_patient)``, a patient between about half and one and a half times
            the mean. At least 20.
        seed: Same seed and library versions, same pixels.

    Raises:
        ValueError: If a number is out of range.
    """
    for patient, n_patches, tumour_frac in plan_cohort(n_patients, patches_per_patient, seed):
        yield from _patient_patches(seed, patient, n_patches, tumour_frac)


def write_archive(
    path: Path | str,
    *,
    n_patients: int = 12,
    patches_per_patient: float = 250,
    seed: int = 0,
    high_grade: bool = False,
    root: str = ROOT,
    workers: int | None = None,
) -> Path:
    """Write a cohort as IDC's PNG tree, a zip of stored entries or a folder, marked synthetic.

    Same arguments and library versions give the same bytes, whatever the number of workers. Memory is that of
    a few slides.

    Args:
        path: ``*.zip`` writes a zip, replacing an existing one; anything else a new folder.
        n_patients: Number of patients, named from 90001 on.
        patches_per_patient: Mean number of patches, at least 20; may be fractional, the total is exact.
        high_grade: As `plan_painter` takes it: morphology tells the tumour better than colour.
        root: Folder above the patients; ``""`` puts the patients at the top, as Kaggle's newer archive does.
        workers: Threads; None takes one per core.

    Raises:
        ValueError: If a number is out of range.
    """
    path = Path(path)
    plan = plan_cohort(n_patients, patches_per_patient, seed)
    prefix = f"{root}/" if root else ""
    is_zip = path.suffix.lower() == ".zip"
    with contextlib.ExitStack() as stack:
        if is_zip:
            partial = stack.enter_context(replace_atomic(path))
            archive = stack.enter_context(zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED))
            archive.writestr(_entry(prefix + SYNTHETIC), _NOTICE)
        else:
            folder = stack.enter_context(create_directory(path))
            (folder / root).mkdir(parents=True, exist_ok=True)
            (folder / root / SYNTHETIC).write_text(_NOTICE)
        for patient, files in _encoded(plan, seed, workers or os.cpu_count() or 1, high_grade):
            for name, png in files:
                if is_zip:
                    archive.writestr(_entry(prefix + name), png)
                else:
                    target = folder / (prefix + name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(png)
            logger.debug("phantom patient %s: %d patches", patient, len(files))
    return path


def paint_patient(
    seed: int, patient: str, n_patches: int, tumour_frac: float, *, high_grade: bool = False
) -> tuple[SlidePainter, NDArray[np.int64]]:
    """Plan one patient's slide and choose its patches.

    Returns:
        The painter of the slide, and row and column of the chosen patches, ``(n_patches, 2)``.
    """
    patch_mm2 = (PATCH_PX * MPP / 1000) ** 2
    tissue_mm2 = n_patches * patch_mm2
    while True:
        painter = plan_painter(
            seed, patient, tissue_mm2=tissue_mm2, tumour_frac=tumour_frac, high_grade=high_grade
        )
        share = _patch_shares(painter, "tissue")
        enough = np.argwhere(share >= _TISSUE_SHARE)
        if len(enough) >= n_patches:
            break
        tissue_mm2 *= 1.1
    # Surplus patches go from the least tissue up: the slide's rim.
    order = np.argsort(-share[enough[:, 0], enough[:, 1]], kind="stable")[:n_patches]
    return painter, enough[np.sort(order)]


def plan_cohort(n_patients: int, patches_per_patient: float, seed: int) -> list[tuple[str, int, float]]:
    """Return name, number of patches and tumour share of every patient."""
    if n_patients < 1 or patches_per_patient < 20:
        raise ValueError(
            f"a phantom cohort needs n_patients >= 1 and patches_per_patient >= 20; "
            f"got {n_patients!r} and {patches_per_patient!r}"
        )
    rng = make_rng(seed, "phantom", "cohort", n_patients)
    weight = rng.uniform(0.5, 1.5, n_patients)
    edges = np.rint(np.cumsum(weight) / weight.sum() * round(n_patients * patches_per_patient)).astype(int)
    counts = np.maximum(np.diff(edges, prepend=0), 1)
    # One patient from every slice of the distribution, so that a small cohort keeps the balance too.
    slices = (rng.permutation(n_patients) + rng.uniform(0.2, 0.8, n_patients)) / n_patients
    shares = stats.beta.ppf(slices, 1.3, 1.3 * (1 / _MEAN_TUMOUR_SHARE - 1))
    return [
        (str(FIRST_PATIENT + i), int(counts[i]), float(np.clip(shares[i], 0.02, 0.85)))
        for i in range(n_patients)
    ]


def _patient_patches(
    seed: int, patient: str, n_patches: int, tumour_frac: float, *, high_grade: bool = False
) -> Iterator[PhantomPatch]:
    painter, positions = paint_patient(seed, patient, n_patches, tumour_frac, high_grade=high_grade)
    tumour = _patch_shares(painter, "tumour")
    blocks = positions // _BLOCK
    for block in np.unique(blocks, axis=0):
        top, left = (int(corner) for corner in block * _BLOCK * PATCH_PX)
        painted = painter.paint(left, top, _BLOCK * PATCH_PX, _BLOCK * PATCH_PX, MPP)
        for row, column in positions[(blocks == block).all(1)].tolist():
            y, x = row * PATCH_PX, column * PATCH_PX
            share = float(tumour[row, column])
            yield PhantomPatch(
                patient_id=patient,
                x=x + 1,
                y=y + 1,
                target=int(share >= TUMOUR_SHARE),
                tumour_frac=share,
                image=painted[y - top : y - top + PATCH_PX, x - left : x - left + PATCH_PX].copy(),
            )


def _patch_shares(painter: SlidePainter, name: str) -> NDArray[np.float64]:
    """Return the share of each patch inside a mask, ``(rows, columns)`` in patches."""
    width, height = painter.size_px(MPP)
    rows, columns = height // PATCH_PX, width // PATCH_PX
    mask = painter.mask(name, 0, 0, columns * PATCH_PX, rows * PATCH_PX, MPP)
    return mask.reshape(rows, PATCH_PX, columns, PATCH_PX).mean((1, 3))


def _encoded(
    plan: list[tuple[str, int, float]], seed: int, workers: int, high_grade: bool
) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Return each patient's files in order; at most ``workers`` patients are held beside the one yielded."""

    def encode(patient: str, n_patches: int, tumour_frac: float) -> list[tuple[str, bytes]]:
        patches = _patient_patches(seed, patient, n_patches, tumour_frac, high_grade=high_grade)
        return [(patch.name, _png(patch.image)) for patch in patches]

    with ThreadPoolExecutor(workers) as pool:
        waiting: list[tuple[str, Future[list[tuple[str, bytes]]]]] = []
        for job in plan:
            waiting.append((job[0], pool.submit(encode, *job)))
            if len(waiting) > workers:
                patient, future = waiting.pop(0)
                yield patient, future.result()
        for patient, future in waiting:
            yield patient, future.result()


def _png(image: NDArray[np.uint8]) -> bytes:
    done, encoded = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])
    assert done
    return encoded.tobytes()


def _entry(name: str) -> zipfile.ZipInfo:
    """Describe a zip entry without the clock or the machine in it."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry
