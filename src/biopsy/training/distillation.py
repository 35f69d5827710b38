"""Distillation (Hinton et al. 2015): ``train.teacher``, whose probabilities are learned beside the labels."""

import hashlib

import numpy as np
from scipy.special import softmax

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import expand_home
from biopsy.data.packs import Pack
from biopsy.models.classifier import Classifier, score_classes
from biopsy.models.engine import Engine
from biopsy.models.hub import is_on_hub
from biopsy.models.inference import predict_logits
from biopsy.models.shipped import is_shipped
from biopsy.training.distributed import Processes
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import RunInput
from biopsy.training.seen_patients import find_run, refuse_seen


def list_teachers(teachers: str) -> list[str]:
    """Return the teachers of ``train.teacher``, separated by commas, paths as absolute ones."""
    names = [name.strip() for name in teachers.split(",")]
    return [
        name if is_shipped(name) or is_on_hub(name) else str(expand_home(name).resolve())
        for name in names
        if name
    ]


def identify_teachers(teachers: str) -> RunInput:
    """Return names and hash of teachers, for ``run.json``."""
    names = list_teachers(teachers)
    hashes = [open_classifier(name).sha256 for name in names]
    joint = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return RunInput(source=",".join(names), sha256=joint)


def check_teachers(teachers: str, pack: Pack, subsets: np.ndarray) -> str | None:
    """Check that teachers fit a pack and have not seen its test patients.

    Teachers that were trained on validation patients are named in the log.

    Args:
        subsets: Subset of every patch of the pack in the run to be trained.

    Returns:
        A warning if the training patients of a teacher are unknown, else None.

    Raises:
        RunError: If a teacher has other classes, or as `refuse_seen`.
        DataError: If it needs patches of another size or resolution.
    """
    unknown = []
    for name in list_teachers(teachers):
        classifier = open_classifier(name)
        if classifier.info.class_names != pack.class_names:
            raise RunError(
                f"teacher {name} has the classes {classifier.info.class_names}, {pack.path.name} has "
                f"{pack.class_names}"
            )
        classifier.check_pack(pack)
        if not refuse_seen(f"teacher {name}", find_run(name), classifier, pack, subsets):
            unknown.append(name)
    if not unknown:
        return None
    return (
        f"the training patients of teacher {', '.join(unknown)} are not recorded: if they are among those "
        "tested, the results are optimistic"
    )


def predict_teachers(
    teachers: str, pack: Pack, rows: np.ndarray, *, engine: Engine, processes: Processes, temperature: float
) -> np.ndarray:
    """Return the mean probabilities of teachers, float32 ``(n_patches, n_classes)``; 0 outside of ``rows``.

    Each predicts without augmentation and calibration, with its own symmetries and, over the given rows, its
    own neighbours. Of several processes each computes its part and gets all.

    Args:
        rows: Training patches.
        temperature: Divides their logits.
    """
    names = list_teachers(teachers)
    table = pack.table.iloc[rows].reset_index(drop=True)
    probs = np.zeros((len(pack), len(pack.class_names)))
    for name in names:
        classifier: Classifier = open_classifier(name).for_patches(table)
        logits = predict_logits(
            engine.place(classifier.network),
            classifier.info.preprocessing,
            pack.patches,
            pack.sizes,
            rows[processes.part(len(rows))],
            engine=engine,
        )
        logits = classifier.add_context(processes.gather(logits, len(rows)), table)
        scores = score_classes(logits, classifier.info.outputs) / temperature
        if not np.isfinite(scores).all():
            raise DataError(f"teacher {name} predicts values that are not finite")
        probs[rows] += softmax(scores, axis=1) / len(names)
    return probs.astype(np.float32)
