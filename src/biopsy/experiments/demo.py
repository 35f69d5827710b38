"""The complete workflow on a synthetic cohort, without downloads."""

import logging
from pathlib import Path

from biopsy.core.errors import DataError
from biopsy.core.files import is_vacant, read_json, write_json
from biopsy.data.inspection import inspect
from biopsy.data.packs import Pack
from biopsy.data.prepare import prepare
from biopsy.evaluation.evaluate import evaluate
from biopsy.experiments.reports import report
from biopsy.phantom.cohort import FIRST_PATIENT, write_archive
from biopsy.phantom.slides import make_phantom_slide
from biopsy.slides.cohorts import slide
from biopsy.slides.section import MAPS
from biopsy.training.runs import DOCUMENT, OnEpoch, Run
from biopsy.training.train import train

logger = logging.getLogger(__name__)

MARK, FORMAT = "demo.json", "biopsy-demo/1"
N_PATIENTS, PATCHES_PER_PATIENT = 80, 45  # twelve patients in the test subset: enough for intervals
RECIPE, SHIPPED = "probe", "idc"
NEXT_PATIENT = str(FIRST_PATIENT + N_PATIENTS)
SLIDE, SLIDE_PX = "slide.tiff", (1600, 1200)  # at 2 um/px
SETTINGS = (
    "model.name=residual",
    f"model.weights={SHIPPED}",
    "preprocessing.feed=recipe",
    "preprocessing.input_px=112",
)
"""Logistic regression on features of the shipped classifier; patches are enlarged to resolve nuclei."""


def demo(*, out: Path | str = "biopsy-demo", on_epoch: OnEpoch | None = None) -> Path:
    """Run the complete workflow on a synthetic cohort: pack, training, evaluation, slide map and report.

    Takes minutes on two cores and downloads nothing. The same command continues an interrupted demonstration.

    Args:
        out: Output folder.
        on_epoch: Called with each epoch's record.

    Returns:
        The path of the report.

    Raises:
        DataError: If the folder contains something else.
    """
    folder = Path(out)
    _claim(folder)
    archive = folder / "cohort.zip"
    if not archive.exists():
        logger.info("synthetic cohort of %d patients in the layout of IDC: %s", N_PATIENTS, archive)
        write_archive(
            archive, n_patients=N_PATIENTS, patches_per_patient=PATCHES_PER_PATIENT, seed=0, high_grade=True
        )
    pack = prepare(archive, folder / "cohort.pack")
    logger.info("pack of %s patches: %s", f"{len(pack):,}", pack.path)
    inspect(pack, split="patients")
    run = _train(pack, folder / "run", on_epoch)
    metrics = evaluate(run).metrics
    assert metrics.baseline is not None
    auroc, baseline = metrics.patch["auroc"].value, metrics.baseline.auroc
    logger.info("test AUROC: %.3f; colour-only baseline: %.3f", auroc, baseline)
    path, (width, height) = folder / SLIDE, SLIDE_PX
    if not path.exists():
        logger.info("synthetic slide of a new patient: %s", path)
        make_phantom_slide(
            path, seed=0, patient=NEXT_PATIENT, width=width, height=height, mpp=2.0, high_grade=True
        )
    slide(run, path, out=run.path / MAPS)
    logger.info("same slide with the shipped classifier, trained on real tissue: %s", folder / SHIPPED)
    slide(SHIPPED, path, out=folder / SHIPPED)
    return report([run], complete=True)[0]


def _claim(folder: Path) -> None:
    """Check that a folder is new, empty or of an earlier demonstration, and mark it."""
    if (folder / MARK).is_file():
        read_json(folder / MARK, format=FORMAT)
    elif not is_vacant(folder):
        raise DataError(f"{folder} is not empty and not a demonstration: choose another folder with --out")
    else:
        write_json(folder / MARK, {"format": FORMAT})


def _train(pack: Pack, path: Path, on_epoch: OnEpoch | None) -> Run:
    """Train the recipe, or resume an interrupted training."""
    if (path / DOCUMENT).is_file() and Run.open(path).info["status"] != "finished":
        return train(resume=path, on_epoch=on_epoch)
    return train(RECIPE, pack, split="patients", overrides=SETTINGS, out=path, on_epoch=on_epoch)
