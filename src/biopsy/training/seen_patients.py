"""Patients of a pack whom a model knows from its own training: of teachers and of initial weights."""

import logging
from pathlib import Path

import numpy as np

from biopsy.core.errors import RunError
from biopsy.core.text import count
from biopsy.data.packs import Pack
from biopsy.models.classifier import DOCUMENT as CLASSIFIER
from biopsy.models.classifier import Classifier
from biopsy.models.shipped import FOLDER, is_shipped
from biopsy.models.weights import find_weights_file
from biopsy.recipes import Recipe
from biopsy.training.runs import DOCUMENT, Run

logger = logging.getLogger(__name__)


def check_start(recipe: Recipe, pack: Pack, subsets: np.ndarray) -> str | None:
    """Check that the initial weights of a recipe are not of a model that has seen its test patients.

    Weights of a run, classifier or bundle are recognised by what lies beside their file.

    Args:
        subsets: Subset of every patch of the pack in the run to be trained.

    Returns:
        A warning if they are of a classifier whose training patients are not recorded, else None.

    Raises:
        RunError: As `refuse_seen`.
    """
    weights = recipe.model.weights
    if not recipe.model.pretrained:
        return None
    if is_shipped(weights):
        folder, run = FOLDER / weights, None
    elif (path := find_weights_file(weights)) is not None and path.is_file():
        folder, run = path.parent, find_run(path.parent)
    else:
        return None
    has_classifier = (folder / CLASSIFIER).is_file()
    if run is None and not has_classifier:
        return None
    classifier = Classifier.load(folder) if has_classifier else None
    if refuse_seen(f"the model of the weights {weights}", run, classifier, pack, subsets):
        return None
    if pack.info.is_synthetic and is_shipped(weights):  # which are of real tissue
        return None
    return (
        f"the training patients of the initial weights {weights} are not recorded: if they are among those "
        "tested, the results are optimistic"
    )


def find_run(model: Path | str) -> Run | None:
    """Return the run that a folder is, or is in, None if there is none."""
    folders = [path for path in (Path(model), Path(model).parent) if (path / DOCUMENT).is_file()]
    return Run.open(folders[0]) if folders and not is_shipped(model) else None


def refuse_seen(
    name: str, run: Run | None, classifier: Classifier | None, pack: Pack, subsets: np.ndarray
) -> bool:
    """Refuse a model that has seen test patients; return whether its patients are recorded.

    A model that was trained on validation patients is named in the log.

    Args:
        name: The model, as the first words of a message.
        run: Its run, if known.
        classifier: Its classifier, if it has one.
        subsets: Subset of every patch of the pack in the run to be trained.

    Raises:
        RunError: If it was trained or validated on test patients, or was trained on this pack and does not
            record on which patients.
    """
    if run is not None:
        try:
            seen, trained = _find_seen(run, pack, subsets)
        except RunError:
            if classifier is None:
                raise
        else:
            _refuse_overlap(name, pack, subsets, seen, trained)
            return True
    assert classifier is not None
    if classifier.info.pack.get("content_sha256") == pack.info.content_sha256:
        raise RunError(
            f"{name} was trained on {pack.path.name} and does not record on which patients: name its run"
        )
    return False


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
            f"{name} was trained or validated on {count(len(groups), f'tested {pack.unit}')}, first "
            f"{groups[0]}: train it with the split of this run"
        )
    validated = trained & (subsets == "validation")
    if validated.any():
        n_groups = len(np.unique(pack.group_ids[validated]))
        logger.warning(
            "%s was trained on %s: what is chosen on them is optimistic",
            *(name, count(n_groups, f"validation {pack.unit}")),
        )
