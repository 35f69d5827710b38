"""The splits of publications, repeated: each a method that a recipe's ``[as_published.split]`` table names.

They divide patches, whoever they belong to, so that patients overlap. To add one, write a function as in
`biopsy.data.protocols` and name it in `PUBLISHED_METHODS`.
"""

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from biopsy.core.errors import SplitError, suggest
from biopsy.core.seeds import make_rng

if TYPE_CHECKING:
    from biopsy.data.protocols import Plan, Request


def follow_recipe(request: "Request") -> "Plan":
    """The split a recipe's authors used, by the method its ``[as_published.split]`` table names."""
    if not request.recipe:
        raise SplitError(
            "as-published follows a recipe's own split: name the recipe, such as --recipe cancernet-2020"
        )
    method = str(request.recipe.get("method"))
    if method not in PUBLISHED_METHODS:
        raise SplitError(
            f"the recipe asks for the split method {method!r}; {suggest(method, PUBLISHED_METHODS)}"
        )
    sides, parameters = PUBLISHED_METHODS[method](request)
    return sides, {"recipe": dict(request.recipe), **parameters}


def shuffle_paths(request: "Request") -> "Plan":
    """Shuffle the sorted paths with ``random``: train first, then test; the front of train validates."""
    seed, train, val = _read(request.recipe, "shuffled-paths", seed=int, train=float, val=float)
    order = list(_sort_paths(request))
    random.Random(seed).shuffle(order)
    n_train = int(len(order) * train)
    n_val = int(n_train * val)
    sides = np.full(len(order), "test", dtype="<U5")
    sides[order[:n_train]] = "train"
    sides[order[:n_val]] = "val"
    return sides, {}


def take_first_files(request: "Request") -> "Plan":
    """Divide the first files of a recursive glob at random, then undersample the sides the recipe names.

    A recursive glob gives paths in order of the folders; ours sorts them. Patches beyond the first ``count``,
    and those that undersampling does not draw, are on no side. With ``val_is_test`` no patch is on the side
    "val": what tests also validates, as was published.
    """
    count, share, seed = _read(request.recipe, "first-files", count=int, test=float, seed=int)
    recipe, target = request.recipe or {}, request.pack.target
    rng = make_rng(seed, "first-files")
    taken = rng.permutation(_sort_paths(request)[:count])
    n_test = round(len(taken) * share)
    sides = np.full(len(target), "", dtype="<U5")
    sides[taken[:n_test]] = "test"
    sides[taken[n_test:]] = "train"
    for side in recipe.get("undersample", ()):
        rows = rng.permutation(np.flatnonzero(sides == side))
        per_class = np.bincount(target[rows])
        n_rarest = per_class[per_class > 0].min(initial=len(rows))
        for class_index in np.flatnonzero(per_class > n_rarest):
            sides[rows[target[rows] == class_index][n_rarest:]] = ""
    return sides, {"taken": len(taken), "val_is_test": bool(recipe.get("val_is_test", False))}


def cut_rows(request: "Request") -> "Plan":
    """First 70, next 20 and last 10 % of the rows of Kaggle's csv, one row dropped at each border."""
    table = request.pack.table
    if "row" not in table.columns or table["row"].isna().any():
        raise SplitError(
            f"{request.pack.path.name} does not keep the rows of Kaggle's train_labels.csv; prepare it again"
        )
    rows = table["row"].to_numpy(np.int64)
    n_rows = int(rows.max()) + 1
    first, second = int(n_rows * 0.7), int(n_rows * 0.9)
    sides = np.select([rows < first, rows < second], ["train", "val"], "test")
    sides[(rows == first) | (rows == second)] = ""
    return sides, {"n_rows": n_rows, "dropped_rows": [first, second]}


def _read(recipe: Mapping[str, Any] | None, method: str, **kinds: Callable[[Any], Any]) -> list[Any]:
    """Give the recipe's values of a method's keys, in order."""
    try:
        return [kind((recipe or {})[key]) for key, kind in kinds.items()]
    except KeyError as error:
        *keys, last = kinds
        raise SplitError(
            f"the split method {method!r} needs {', '.join(keys)} and {last}; {error} is missing"
        ) from None


def _sort_paths(request: "Request") -> np.ndarray:
    """Give the rows of the pack in order of their paths in the archive."""
    return np.argsort(request.pack.table["source"].to_numpy(str), kind="stable")


PUBLISHED_METHODS: dict[str, Callable[["Request"], "Plan"]] = {
    "shuffled-paths": shuffle_paths,
    "first-files": take_first_files,
    "kaggle-rows": cut_rows,
}
