"""Patients of a pack whom a model knows from its own training or that of models it learned from."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biopsy.core.errors import RunError
from biopsy.core.files import sha256_file
from biopsy.core.text import count
from biopsy.data.packs import Pack
from biopsy.models.classifier import DOCUMENT as CLASSIFIER
from biopsy.models.classifier import Classifier
from biopsy.models.shipped import FOLDER, is_shipped
from biopsy.models.weights import find_weights_file
from biopsy.recipes import Recipe
from biopsy.training.pretraining_record import DOCUMENT as PRETRAINING
from biopsy.training.pretraining_record import PretrainingInfo, read_pretraining
from biopsy.training.runs import DOCUMENT, Run, SeenPatients, hash_subsets

logger = logging.getLogger(__name__)


def check_start(recipe: Recipe, pack: Pack, subsets: np.ndarray) -> str | None:
    """Check that the initial weights of a recipe are not of a model that has seen its test patients.

    Weights of a run, classifier, bundle or pre-training are recognised by what lies beside their file.

    Args:
        subsets: Subset of every patch of the pack in the run to be trained.

    Returns:
        A warning if they are of a classifier whose training patients are not recorded, else None.

    Raises:
        RunError: As `refuse_seen`.
    """
    weights = recipe.model.weights
    folder = _find_start(recipe)
    if folder is None:
        return None
    name, run = f"the model of the weights {weights}", find_run(folder)
    if run is None and (folder / PRETRAINING).is_file():
        _refuse_earlier(name, read_pretraining(folder / PRETRAINING).get("seen", []), pack, subsets)
        return None
    if run is None and not (folder / CLASSIFIER).is_file():
        return None
    classifier = Classifier.load(folder) if (folder / CLASSIFIER).is_file() else None
    if refuse_seen(name, run, classifier, pack, subsets):
        return None
    if pack.info.is_synthetic and is_shipped(weights):  # which are of real tissue
        return None
    return (
        f"the training patients of the initial weights {weights} are not recorded: if they are among those "
        "tested, the results are optimistic"
    )


def record_seen(
    teachers: Sequence[str], recipe: Recipe, pack: Pack, subsets: np.ndarray
) -> list[SeenPatients]:
    """Return the patients whom the initial weights of a recipe and its teachers know, for ``run.json``.

    Args:
        teachers: Names of the teachers, as in ``run.json``.
        subsets: Subset of every patch of the pack in the run to be trained.
    """
    start = _find_start(recipe)
    records = [] if start is None else _describe_model(start, pack, subsets)
    for name in teachers:
        folder = FOLDER / name if is_shipped(name) else Path(name)
        records += _describe_model(folder, pack, subsets) or [SeenPatients(model=name)]
    return [record for index, record in enumerate(records) if record not in records[:index]]


def find_run(model: Path | str) -> Run | None:
    """Return the run that a folder is, or is in, None if there is none."""
    folders = [path for path in (Path(model), Path(model).parent) if (path / DOCUMENT).is_file()]
    return Run.open(folders[0]) if folders and not is_shipped(model) else None


def refuse_seen(
    name: str, run: Run | None, classifier: Classifier | None, pack: Pack, subsets: np.ndarray
) -> bool:
    """Refuse a model that has seen test patients; return whether its patients are recorded.

    A model that was trained on validation patients is named in the log. Models from which it started, and its
    teachers, count as itself.

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
        is_recorded = _refuse_earlier(name, _list_earlier(run, pack, subsets), pack, subsets)
        try:
            seen, trained = _find_seen(run, pack, subsets)
        except RunError:
            if classifier is None:
                raise
        else:
            _refuse_overlap(name, pack, subsets, seen, trained)
            return is_recorded
    assert classifier is not None
    if classifier.info.pack.get("content_sha256") == pack.info.content_sha256:
        raise RunError(
            f"{name} was trained on {pack.path.name} and does not record on which patients: name its run"
        )
    return False


def _find_start(recipe: Recipe) -> Path | None:
    """Return the folder of the file with the initial weights of a recipe, None if it names no local one."""
    weights = recipe.model.weights
    if not recipe.model.pretrained:
        return None
    if is_shipped(weights):
        return FOLDER / weights
    path = find_weights_file(weights)
    return path.parent if path is not None and path.is_file() else None


def _list_earlier(run: Run, pack: Pack, subsets: np.ndarray) -> list[SeenPatients]:
    """Return the patients of the models of which a run took its initial weights or learned.

    Of a run of an older version, which does not record them, those of the initial weights are searched where
    they were.
    """
    if "seen" in run.info:
        return run.info["seen"]
    sha256, weights = run.info["weights"]["sha256"], run.recipe.model.weights
    file = find_weights_file(weights) if sha256 else None
    if file is None or not file.is_file() or sha256_file(file) != sha256:
        return []
    return _describe_model(file.parent, pack, subsets)


def _describe_model(folder: Path, pack: Pack, subsets: np.ndarray) -> list[SeenPatients]:
    """Return the patients whom the model of a folder knows; none if it is no model of this package."""
    if (run := find_run(folder)) is not None:
        return [_describe_run(run, pack), *_list_earlier(run, pack, subsets)]
    if (folder / PRETRAINING).is_file():
        info = read_pretraining(folder / PRETRAINING)
        return [_describe_pretraining(folder, info, pack, subsets), *info.get("seen", [])]
    if (folder / CLASSIFIER).is_file():
        record = SeenPatients(model=folder.name if folder.parent == FOLDER else str(folder.resolve()))
        if sha256 := Classifier.load(folder).info.pack.get("content_sha256"):
            record["content_sha256"] = sha256
        return [record]
    return []


def _describe_run(run: Run, pack: Pack) -> SeenPatients:
    used = run.info["pack"]
    record = SeenPatients(
        model=str(run.path.resolve()),
        dataset=used["dataset"],
        content_sha256=used["content_sha256"],
        unit=used["unit"],
    )
    try:
        theirs = pack if used["content_sha256"] == pack.info.content_sha256 else run.open_pack(verify=False)
        subsets = run.subsets(theirs)
    except RunError:
        return record
    record["subsets_sha256"] = hash_subsets(subsets)
    if theirs.unit != "patch":
        record["train"], record["validation"] = (
            np.unique(theirs.group_ids[subsets == subset]).tolist() for subset in ("train", "validation")
        )
    return record


def _describe_pretraining(
    folder: Path, info: PretrainingInfo, pack: Pack, subsets: np.ndarray
) -> SeenPatients:
    used = info["pack"]
    record = SeenPatients(
        model=str(folder.resolve()),
        dataset=used["dataset"],
        content_sha256=used["content_sha256"],
        unit=info["unit"],
    )
    if info["patients"] is not None:
        record["train"], record["validation"] = info["patients"], []
    elif used["content_sha256"] == pack.info.content_sha256:  # and so with the same split, or it is refused
        record["subsets_sha256"] = hash_subsets(subsets)
    return record


def _refuse_earlier(name: str, records: list[SeenPatients], pack: Pack, subsets: np.ndarray) -> bool:
    """Refuse a model that learned from one that has seen test patients; return whether all record theirs."""
    is_recorded = True
    for record in records:
        is_same = record.get("content_sha256") == pack.info.content_sha256
        if is_same and record.get("subsets_sha256") == hash_subsets(subsets):
            continue
        earlier = f"{name} learned from {record['model']}, which"
        is_same_dataset = record.get("dataset", pack.info.dataset) == pack.info.dataset
        if is_same_dataset and record.get("unit") == pack.unit and "train" in record:
            trained = np.isin(pack.group_ids, record["train"])
            seen = trained | np.isin(pack.group_ids, record.get("validation", []))
            _refuse_overlap(earlier, pack, subsets, seen, trained)
        elif is_same:
            raise RunError(
                f"{earlier} was trained on {pack.path.name} with another split and does not record on which "
                f"{pack.unit}s: train it with the split of this run"
            )
        elif is_same_dataset and not (pack.info.is_synthetic and is_shipped(record["model"])):
            is_recorded = False
    return is_recorded


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
