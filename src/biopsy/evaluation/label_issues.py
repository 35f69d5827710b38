"""Probable label errors, as a sheet for expert review; ``biopsy prepare --labels`` applies the decisions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import RunError
from biopsy.core.files import refuse_inputs, update_directory, write_atomic
from biopsy.core.results import Output
from biopsy.core.tables import write_csv
from biopsy.core.text import class_title
from biopsy.data.packs import Pack
from biopsy.data.tables import refuse_decided
from biopsy.evaluation.neighbours import SlideViews, count_neighbours, rank_label_issues
from biopsy.plotting.style import class_colour, jpeg
from biopsy.reporting.html import render
from biopsy.training.runs import Run
from biopsy.training.study import Study, is_study

SHEET, PAGE, PICTURES, WEIGHTS = "labels.csv", "labels.html", "pictures", "weights.csv"


@dataclass(frozen=True)
class LabelIssues(Output):
    """The result of `label_issues`.

    Attributes:
        table: The sheet: one row per probable label error, the most probable first.
        weights: The weights of patches for training.
        n_patches: Number of labels checked.
        n_issues: Number of probable label errors; the sheet may list fewer.
    """

    table: pd.DataFrame
    path: Path
    page: Path
    weights: Path
    n_patches: int
    n_issues: int

    def blocks(self) -> list[str]:
        return [
            f"{self.n_issues:,} of {self.n_patches:,} labels are doubtful; {len(self.table):,} are listed",
            str(self.path),
            str(self.page),
            str(self.weights),
            "fill in the column decision, then run: "
            f"biopsy prepare SOURCE --labels {self.path} --out NEW.pack",
        ]

    def to_json(self) -> dict[str, object]:
        counts = {"n_patches": self.n_patches, "n_issues": self.n_issues}
        paths = {"path": self.path, "page": self.page, "weights": self.weights}
        return {**paths, "n_listed": len(self.table), **counts}


@dataclass(frozen=True)
class _Models:
    """Out-of-sample predictions, and the patches that may be checked."""

    pack: Pack
    probs: np.ndarray  # mean over models, (n_patches, n_classes); NaN without models
    n_models: np.ndarray  # number of models per patch, (n_patches,)
    allowed: np.ndarray  # bool, (n_patches,)


def label_issues(run: Run | Study | Path | str, *, out: Path | str, n: int = 100) -> LabelIssues:
    """List probable label errors; write a sheet and a page of pictures for expert review.

    A label is compared with the labels of its eight neighbours on the slide, one vote each, and with the
    models that were not trained on the patch, one vote together. Labels are never changed: an expert fills in
    the column ``decision`` (``yes`` for the suggested class, ``no`` for the current label, or a class), and
    ``prepare --labels`` reads the sheet. Rows without a decision keep their label; a sheet with decisions is
    never overwritten.

    ``weights.csv`` has the probability of the current label of every patch, by the models that were not
    trained on it, for training with ``--set train.patch_weights=weights.csv``.

    Args:
        run: Run (its validation patches, and its test patches once evaluated) or study (the test patches
            of its runs).
        out: Output folder of ``labels.csv``, ``labels.html``, ``pictures/`` and ``weights.csv``.
        n: Maximum number of labels to list.

    Raises:
        UserFileError: If the existing sheet contains decisions, or was written by something else.
        RunError: If no label can be checked, or predictions are of patches that their run trained on.
    """
    if n < 1:
        raise RunError(f"n={n!r}: expected at least 1")
    folder = Path(out)
    refuse_inputs(folder, run.path if isinstance(run, Run | Study) else run)
    refuse_decided(folder / SHEET)
    with update_directory(folder, SHEET, PAGE, WEIGHTS, f"{PICTURES}/*", last=SHEET) as partial:
        sheet, n_patches, n_issues = _write_sheet(partial, _collect_predictions(run), n)
    return LabelIssues(sheet, folder / SHEET, folder / PAGE, folder / WEIGHTS, n_patches, n_issues)


def _write_sheet(folder: Path, models: _Models, n: int) -> tuple[pd.DataFrame, int, int]:
    """Write sheet, page and pictures into an empty folder; return sheet and counts of `LabelIssues`."""
    pack = models.pack
    counts = count_neighbours(pack.table, pack.target, len(pack.class_names))
    votes = rank_label_issues(counts, pack.target, models.probs).assign(row=np.arange(len(pack)))
    n_votes = np.nan_to_num(counts).sum(axis=1) + ~np.isnan(models.probs).any(axis=1)
    checked = votes[(n_votes > 0) & models.allowed]
    if checked.empty:
        raise RunError(
            f"cannot check labels of {pack.path}: patches have no coordinates and no cross-validated model "
            "covers them"
        )
    issues = checked[checked["doubt"] > 0.5]
    order = issues.assign(patch_id=pack.table["patch_id"].iloc[issues["row"]].to_numpy(str))
    chosen = order.sort_values(["doubt", "patch_id"], ascending=[False, True]).head(n)
    sheet = _tabulate(pack, chosen, models)
    views, shown = SlideViews(pack), []
    (folder / PICTURES).mkdir()
    for number, record in enumerate(sheet.to_dict("records"), start=1):
        row = chosen["row"].iloc[number - 1]
        patch, around = pack.pixels(row), views.surroundings(row)
        encoded = jpeg(patch if around is None else around, quality=75)
        (folder / record["picture"]).write_bytes(encoded)
        shown.append({**record, "number": number, "around": encoded, "patch": jpeg(patch)})
    page = {
        "pack": pack.path.name,
        "n_patches": len(checked),
        "n_issues": len(issues),
        "issues": shown,
        "colours": [(name, class_colour(index)) for index, name in enumerate(pack.class_names)],
        "placed": bool(pack.table[["x", "y"]].notna().all(axis=1).any()),
        "sheet": SHEET,
    }
    write_atomic(folder / PAGE, render("label_issues.html", page=page))
    write_csv(folder / SHEET, sheet)
    write_csv(folder / WEIGHTS, _weigh_labels(models))
    return sheet, len(checked), len(issues)


def _weigh_labels(models: _Models) -> pd.DataFrame:
    """Return the out-of-sample probability of each label, where there is one."""
    pack, rows = models.pack, np.flatnonzero((models.n_models > 0) & models.allowed)
    return pd.DataFrame(
        {
            "patch_id": pack.table["patch_id"].iloc[rows].to_numpy(str),
            "weight": models.probs[rows, pack.target[rows]].round(6),
            "n_models": models.n_models[rows],
        }
    )


def _collect_predictions(run: Run | Study | Path | str) -> _Models:
    """Return out-of-sample predictions: of test subsets, else of validation."""
    if isinstance(run, Study) or (not isinstance(run, Run) and is_study(run)):
        runs = Study.open(run).require_evaluated_runs()
    else:
        runs = [Run.open(run)]
    pack = runs[0].open_pack(verify=False)
    closed = np.full(len(pack), True)
    for member in runs:
        closed &= (member.subsets(pack) == "test") & (member.evaluated_subset != "test")
    tested = [_predictions(member, pack, "test") for member in runs if member.evaluated_subset == "test"]
    first, n_first = _average(pack, tested)
    validated = [_predictions(member, pack, member.validation_subset) for member in runs]
    second, n_second = _average(pack, validated)
    is_tested = n_first > 0
    probs = np.where(is_tested[:, None], first, second)
    return _Models(pack, probs, np.where(is_tested, n_first, n_second), ~closed)


def _predictions(run: Run, pack: Pack, subset: str) -> pd.DataFrame:
    """Return a run's predictions of patches that it was not trained on."""
    frame, _ = run.predictions(subset)
    trained = pack.table["patch_id"].astype(str)[run.subsets(pack) == "train"]
    if (seen := frame["patch_id"].astype(str).isin(trained)).any():
        raise RunError(f"{run.path} was trained on {frame['patch_id'][seen].iloc[0]}, which it predicts")
    return frame


def _average(pack: Pack, frames: list[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean probabilities of each patch, NaN without predictions, and the number of models."""
    names = [f"prob_{name}" for name in pack.class_names]
    empty = pd.DataFrame(columns=["patch_id", *names]).astype(dict.fromkeys(names, float))
    predictions = pd.concat([frame[["patch_id", *names]] for frame in frames]) if frames else empty
    groups = predictions.groupby(predictions["patch_id"].astype(str))[names]
    patch_ids = pack.table["patch_id"].astype(str)
    n_models = groups.size().reindex(patch_ids, fill_value=0).to_numpy()
    return groups.mean().reindex(patch_ids).to_numpy(float), n_models


def _tabulate(pack: Pack, chosen: pd.DataFrame, models: _Models) -> pd.DataFrame:
    """Return the sheet of the chosen issues."""
    labels = pack.original_classes
    rows = chosen["row"].to_numpy(int)
    places = pack.table[["patient_id", "slide_id", "x", "y"]].iloc[rows].astype(object)
    places = places.where(places.notna(), None).reset_index(drop=True)
    suggested = [pack.class_names[index] for index in chosen["suggested"]]
    reasons = [
        _describe_votes(issue, name, int(models.n_models[issue.row]))
        for issue, name in zip(chosen.itertuples(), suggested, strict=True)
    ]
    sheet = pd.DataFrame(
        {
            "patch_id": pack.table["patch_id"].iloc[rows].to_numpy(),
            "label": labels.iloc[rows].to_numpy(),
            "suggested": suggested,
            **dict.fromkeys(("decision", "who", "when")),
            "reason": reasons,
            "doubt": chosen["doubt"].round(3).to_numpy(),
        }
    )
    pictures = [f"{PICTURES}/{number:04d}.jpg" for number in range(1, len(sheet) + 1)]
    return pd.concat([sheet, places], axis=1).assign(picture=pictures)


def _describe_votes(issue: Any, suggested: str, n_models: int) -> str:
    parts = ["no coordinates" if pd.isna(issue.n_neighbours) else "no neighbours"]
    if not pd.isna(issue.n_neighbours) and issue.n_neighbours:
        parts = [f"{issue.n_for} of {issue.n_neighbours} neighbours are {class_title(suggested)}"]
    models = "a model that was" if n_models == 1 else f"the mean of {n_models} models that were"
    prediction = f"{models} not trained on it gives {class_title(suggested)} {issue.prob:.2f}"
    return "; ".join([*parts, prediction if n_models else "every model was trained on it"])
