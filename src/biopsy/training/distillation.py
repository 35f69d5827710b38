"""Distillation (Hinton et al. 2015): ``train.teacher``, whose probabilities are learned beside the labels."""

import hashlib
import logging
from pathlib import Path

import numpy as np

from biopsy.core.errors import DataError, RunError
from biopsy.core.text import count
from biopsy.data.packs import Pack
from biopsy.models.classifier import Classifier, score_classes
from biopsy.models.engine import Engine
from biopsy.models.hub import is_on_hub
from biopsy.models.inference import predict_logits
from biopsy.models.shipped import is_shipped
from biopsy.training.distributed import Processes
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import DOCUMENT, Run, RunInput

logger = logging.getLogger(__name__)


def list_teachers(teachers: str) -> list[str]:
    """Return the teachers of ``train.teacher``, separated by commas, paths as absolute ones."""
    names = [name.strip() for name in teachers.split(",")]
    return [
        name if is_shipped(name) or is_on_hub(name) else str(Path(name).resolve()) for name in names if name
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
        RunError: If a teacher has other classes, was trained or validated on test patients, or was trained on
            this pack and does not record on which patients.
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
        if (run := _run_of(name)) is not None:
            try:
                seen, trained = _find_seen(run, pack, subsets)
            except RunError:
                run = None
            else:
                _refuse_overlap(name, pack, subsets, seen, trained)
        if run is None:
            if classifier.info.pack.get("content_sha256") == pack.info.content_sha256:
                raise RunError(
                    f"teacher {name} was trained on {pack.path.name} and does not record on which patients: "
                    "name its run"
                )
            unknown.append(name)
    if not unknown:
        return None
    return (
        f"the training patients of teacher {', '.join(unknown)} are not recorded: if they are among those "
        "tested, the results are optimistic"
    )


def _run_of(name: str) -> Run | None:
    folders = [path for path in (Path(name), Path(name).parent) if (path / DOCUMENT).is_file()]
    return Run.open(folders[0]) if folders and not is_shipped(name) else None


def _find_seen(run: Run, pack: Pack, subsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which patches of a pack a run knows from training or validation, and which from training.

    It knows a patch that is among its own, and those of its patients. Of patients whom ``subsets`` both train
    and hold out, as published splits do, it knows only its own patches.
    """
    is_same = run.info["pack"]["content_sha256"] == pack.info.content_sha256
    theirs = pack if is_same else run.open_pack(verify=False)
    their_subsets = run.subsets(theirs)
    is_divided = np.isin(pack.group_ids, pack.group_ids[subsets == "train"])
    masks = []
    for used in (np.isin(their_subsets, ("train", "validation")), their_subsets == "train"):
        if is_same:  # patches with equal pixels are different patches
            known = used
        else:
            known = np.isin(pack.table["sha256"].to_numpy(str), theirs.table["sha256"].to_numpy(str)[used])
        if (theirs.info.dataset, theirs.unit) == (pack.info.dataset, pack.unit):
            known = known | (np.isin(pack.group_ids, theirs.group_ids[used]) & ~is_divided)
        masks.append(known)
    return masks[0], masks[1]


def _refuse_overlap(
    name: str, pack: Pack, subsets: np.ndarray, seen: np.ndarray, trained: np.ndarray
) -> None:
    tested = seen & (subsets == "test")
    if tested.any():
        groups = np.unique(pack.group_ids[tested])
        raise RunError(
            f"teacher {name} was trained or validated on {count(len(groups), f'tested {pack.unit}')}, first "
            f"{groups[0]}: train it with the split of this run"
        )
    validated = trained & (subsets == "validation")
    if validated.any():
        n_groups = len(np.unique(pack.group_ids[validated]))
        logger.warning(
            "teacher %s was trained on %s: what is chosen on them is optimistic",
            *(name, count(n_groups, f"validation {pack.unit}")),
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
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        probs[rows] += exponentials / exponentials.sum(axis=1, keepdims=True) / len(names)
    return probs.astype(np.float32)
