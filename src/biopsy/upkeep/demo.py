"""The main job from start to finish on an embedded synthetic cohort: nothing is downloaded."""

import logging
import shutil
from pathlib import Path

from biopsy.core.errors import DataError
from biopsy.core.files import write_json
from biopsy.data.packing import prepare
from biopsy.data.phantom.cohort import FIRST_PATIENT, write_archive
from biopsy.data.phantom.whole_slides import make_phantom_slide
from biopsy.judging.evaluation import evaluate
from biopsy.learning.fitting import OnEpoch
from biopsy.learning.training import train
from biopsy.sharing.inspection import inspect
from biopsy.slides.cohorts import slide
from biopsy.studies.reporting import MAPS, report

logger = logging.getLogger(__name__)

MARK = "demo.json"
N_PATIENTS, PATCHES_PER_PATIENT = 36, 100  # five patients on the test side, the fewest that allow an interval
RECIPE = "cancernet-2020"
NEXT_PATIENT = str(FIRST_PATIENT + N_PATIENTS)
SLIDE, SLIDE_PX = "slide.tiff", (1600, 1200)  # at 2 um/px
SETTINGS = ("train.epochs=12",)  # of 40: what two cores do in about a minute


def demo(*, out: Path | str = "biopsy-demo", on_epoch: OnEpoch | None = None) -> Path:
    """Write a synthetic cohort, prepare and inspect it, train CancerNet, judge it, map a slide and report.

    Args:
        out: The demonstration's folder; one that an earlier demonstration left is made anew.
        on_epoch: Called with each epoch's record.

    Returns:
        The path of the report.

    Raises:
        DataError: If the folder holds something else.
    """
    folder = Path(out)
    if folder.exists() and not (folder / MARK).is_file() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no demonstration: name another folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / MARK, {"format": "biopsy-demo/1"})
    logger.info("synthetic cohort of %d patients in the layout of IDC: %s", N_PATIENTS, folder / "cohort.zip")
    write_archive(
        folder / "cohort.zip", n_patients=N_PATIENTS, patches_per_patient=PATCHES_PER_PATIENT, seed=0
    )
    pack = prepare(folder / "cohort.zip", folder / "cohort.pack")
    logger.info("pack of %d patches: %s", len(pack), pack.path)
    inspect(pack, split="patients")
    run = train(RECIPE, pack, split="patients", overrides=SETTINGS, out=folder / "run", on_epoch=on_epoch)
    metrics = evaluate(run)
    auroc, baseline = metrics["patch"]["auroc"]["value"], metrics["baseline"]["auroc"]
    logger.info("AUROC on patients never seen: %.3f; colour alone: %.3f", auroc, baseline)
    logger.info("a synthetic slide of a patient never seen: %s", folder / SLIDE)
    make_phantom_slide(
        folder / SLIDE, seed=0, patient=NEXT_PATIENT, width=SLIDE_PX[0], height=SLIDE_PX[1], mpp=2.0
    )
    slide(run, folder / SLIDE, out=run.path / MAPS)
    return report([run])[0]
