"""What does calibration on validation do to the tested subset, and what becomes of thresholds chosen there?

For every run of the studies named, each method is fitted on the run's stored validation predictions as
`biopsy calibrate` does it, thresholds are fixed, and both are evaluated on the stored test predictions. No
network is asked and nothing is written into a run.

Command (a minute on one core):

    uv run python benchmarks/calibration.py studies/cancernet-2020-loso studies/transfer-imagenet

It writes `results/calibration.csv`, which `docs/concepts/calibration.md` shows: one row per run and method,
with ECE, its floor, Brier, slope and intercept before and after, and for every operating point sensitivity
and specificity where it was chosen and on test.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.files import plain
from biopsy.core.text import plural
from biopsy.data.predictions import decide
from biopsy.evaluation.calibration.measure import measure_calibration
from biopsy.evaluation.measure import measure_decisions
from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.classifier import Classifier
from biopsy.recipes import load_recipe
from biopsy.training.postprocessing import fit_run_postprocessing
from biopsy.training.runs import Run
from biopsy.training.study import Study

METHODS = ("temperature", "platt", "isotonic")
SHOWN = ("ece", "brier", "nll", "calibration_slope", "calibration_intercept")


def read_subset(run: Run, classifier: Classifier, subset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits, targets and groups of a subset's stored predictions."""
    frame, _ = run.predictions(subset)
    logits = frame[[f"logit_{name}" for name in classifier.info.class_names]].to_numpy(float)
    return logits, frame["target"].to_numpy(int), frame[f"{run.info['pack']['unit']}_id"].to_numpy(str)


def measure(run: Run, method: str) -> dict[str, Any]:
    """Return a run's row for one method."""
    classifier, unit = run.classifier, run.info["pack"]["unit"]
    recipe = load_recipe(run.recipe, [f"decision.calibration={method}"])
    fit_run_postprocessing(run, recipe, classifier, *read_subset(run, classifier, "validation"))
    logits, target, groups = read_subset(run, classifier, "test")
    probs, positive = classifier.probs(logits), classifier.positive_index
    assert positive is not None and classifier.threshold is not None
    scored = ScoredPatches(
        target=target,
        probs=probs,
        pred=decide(probs, positive, classifier.threshold),
        group_ids=groups,
        class_names=classifier.info.class_names,
        positive_class=classifier.info.positive_class,
        unit=unit,
        seed=run.info["seed"],
    )
    found = plain(measure_calibration(classifier, logits, scored))
    decisions = plain(measure_decisions(scored, classifier.info.thresholds))
    truth = scored.is_positive
    names = np.unique(groups)
    row: dict[str, Any] = {
        "run": run.path.name,
        "tested": names[0] if len(names) == 1 else f"{len(names)} {plural(unit)}",
        "seed": run.info["seed"],
        "method": method,
        "fitted": found["method"],
        "val_patches": found["n_patches"],
        "val_groups": found["n_patients"],
        "unit": unit,
        "test_patches": len(target),
        "test_prevalence": truth.mean(),
        "slope_fitted": found.get("slope"),
        "prior": found.get("prior") or found.get("reason"),
    }
    for subset in ("before", "after"):
        row |= {f"{name}_{subset}": found[subset][name]["value"] for name in SHOWN}
        row[f"ece_floor_{subset}"] = found[subset]["ece_floor"]
        row[f"brier_reliability_{subset}"] = found[subset]["brier_parts"]["reliability"]
    for point in decisions["operating_points"]:
        rule = point["rule"].replace("=", "_")
        for name in ("sensitivity", "specificity"):
            row[f"{rule}_{name}_chosen"] = point["where_chosen"][name]
            row[f"{rule}_{name}_test"] = point["achieved"][name]["value"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "calibration.csv")
    asked = parser.parse_args()
    rows = [
        {"study": folder.name, **measure(run, method)}
        for folder in asked.studies
        for run in Study.open(folder).runs()
        for method in METHODS
    ]
    with open(asked.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()}
            for row in rows
        )
    table = pd.DataFrame(rows)
    shown = ["tested", "method", "ece_before", "ece_after", "ece_floor_after", "calibration_slope_after"]
    print(table.groupby(["study", "tested", "method"])[shown[2:]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
