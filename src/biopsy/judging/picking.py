"""Which patches are shown as examples: those that are named, or mistakes and some that were called right."""

from collections.abc import Sequence
from itertools import chain, zip_longest

import numpy as np
import pandas as pd

from biopsy.core.errors import RunError
from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.learning.classifiers import Classifier
from biopsy.learning.runs import Run


def find_named(run: Run, pack: Pack, sides: np.ndarray, patch: Sequence[str]) -> list[str]:
    """Check patches that were named: they exist, and are of no side that is still closed."""
    side_of = dict(zip(pack.table["patch_id"].astype(str), sides, strict=True))
    for name in patch:
        if name not in side_of:
            raise RunError(
                f"{pack.path.name} has no patch {name!r}; its ids are such as {next(iter(side_of))!r}"
            )
        if side_of[name] == "test" and run.judged_side != "test":
            raise RunError(
                f"patch {name!r} is of the test side, which has not been opened: "
                f"`biopsy evaluate {run.path}` opens it"
            )
    return list(dict.fromkeys(patch))


def pick_examples(frame: pd.DataFrame, errors: int, seed: int) -> list[str]:
    """Give the surest errors, of both kinds in turn, then right ones of each class, drawn by the seed."""
    probs = frame[[name for name in frame if name.startswith("prob_")]].to_numpy(float)
    sure = frame.assign(sure=probs[np.arange(len(frame)), frame["target"]]).sort_values(["sure", "patch_id"])
    wrong = sure[sure["pred"] != sure["target"]]
    kinds = [part["patch_id"] for _, part in wrong.groupby("target", sort=False)]
    shuffled = frame.sort_values("patch_id").sample(
        frac=1, random_state=make_rng(seed, "examples called right")
    )
    right = [
        part["patch_id"] for _, part in shuffled[shuffled["pred"] == shuffled["target"]].groupby("target")
    ]
    return _in_turn(kinds)[:errors] + _in_turn(right)[:errors]


def _in_turn(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in chain.from_iterable(zip_longest(*lists)) if name is not None]


def read_calls(classifier: Classifier, target: np.ndarray | None, probs: np.ndarray) -> pd.DataFrame:
    names, positive, threshold = classifier.info.class_names, classifier.positive_index, classifier.threshold
    called, prob = probs.argmax(axis=1), probs.max(axis=1)
    if positive is not None:
        prob = probs[:, positive]
        called = np.where(prob >= (0.5 if threshold is None else threshold), positive, 1 - positive)
    said = {"called": [names[i] for i in called], "prob": prob}
    if target is None:
        return pd.DataFrame({"class": "", **said, "kind": "unlabelled"})
    kinds = np.where(called == target, "right", "wrong").astype(object)
    if positive is not None:
        kinds[(kinds == "wrong")] = np.where(target == positive, "missed", "false alarm")[kinds == "wrong"]
    return pd.DataFrame({"class": [names[i] for i in target], **said, "kind": kinds})
