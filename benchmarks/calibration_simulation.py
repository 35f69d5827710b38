"""How well does a calibrator fitted on 1, 3, 10 or 25 validation patients serve new patients?

Validation patients are drawn from a population of patients who differ strongly
(`simulated_cohorts.Population`, pooled AUROC .9, 100 patches each), whose probabilities are about
right. Their scores are then distorted as training distorts them (too sure, class weights, too timid as after
focal loss, a spread of 1e-4 as before batch normalisation has settled), a calibrator is fitted, and judged on
200 new patients with the same distortion: mean negative log-likelihood and calibration error (ECE).

Command (three minutes on one core):

    uv run python benchmarks/calibration_simulation.py

It writes `results/calibration-simulation.csv`, which `docs/concepts/calibration.md` shows: one row a
distortion, number of patients and method, with means over 100 validation sides (seeds 0 to 99; the tested
side is one, seed 10**9) and the 90th percentile of the ECE.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit, softmax

from biopsy.statistics.calibration import calibration_error
from biopsy.statistics.calibrators import fit_calibrator, mean_nll
from simulated_cohorts import Cohort, Population

POPULATION = Population(auroc=0.90)
PATCHES_PER_PATIENT = 100
TEST_SEED = 10**9
DISTORTIONS = {
    "none": (1, 0),
    "3 times too sure": (3, 0),
    "classes weighed 1 to 9": (1, np.log(9)),
    "too sure, and weighed": (3, 3 * np.log(9)),
    "half as sure (focal loss)": (0.5, 0),
    "spread of 1e-4": (1e-4, 0.5),
}
"""Slope and intercept of the scores on the true logits."""
METHODS = {
    "none": ("none", None),
    "temperature": ("temperature", None),
    "intercept": ("intercept", None),
    "platt": ("platt", None),
    "isotonic": ("isotonic", None),
    "default": ("platt", "patients"),
}


def distort(cohort: Cohort, slope: float, intercept: float) -> np.ndarray:
    """Return the scores ``(n, 2)`` of a network that puts ``slope * logit + intercept`` out."""
    return np.stack([np.zeros(len(cohort.prob)), slope * logit(cohort.prob) + intercept], axis=1)


def measure_ece(prob: np.ndarray, target: np.ndarray) -> float:
    """Return the ECE over 15 bins of equal mass."""
    order = np.argsort(-prob, kind="stable")
    return calibration_error(prob[order], target[order].astype(float), 1.0 - target[order])


def measure(n_patients: int, n_sides: int) -> list[dict[str, object]]:
    """Return the rows of one number of validation patients."""
    test = POPULATION.draw(200, PATCHES_PER_PATIENT, seed=TEST_SEED)
    sides = [POPULATION.draw(n_patients, PATCHES_PER_PATIENT, seed=seed) for seed in range(n_sides)]
    rows = []
    for name, distortion in DISTORTIONS.items():
        tested = distort(test, *distortion)
        for method, (fit, groups) in METHODS.items():
            results = []
            for side in sides:
                n_groups = n_patients if groups else None
                scores = distort(side, *distortion)
                calibrated = fit_calibrator(scores, side.target, fit, n_groups=n_groups).scale(tested)
                prob = softmax(calibrated, axis=1)[:, 1]
                results.append((mean_nll(calibrated, test.target), measure_ece(prob, test.target)))
            nll, ece = np.array(results).T
            rows.append(
                {
                    "distortion": name,
                    "patients": n_patients,
                    "method": method,
                    "nll": nll.mean(),
                    "ece": ece.mean(),
                    "ece_90": np.quantile(ece, 0.9),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sides", type=int, default=100, help="validation sides per number of patients")
    parser.add_argument("--patients", type=int, nargs="+", default=(1, 3, 10, 25))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "calibration-simulation.csv"
    )
    asked = parser.parse_args()
    table = pd.DataFrame([row for n in asked.patients for row in measure(n, asked.sides)])
    table.to_csv(asked.out, index=False, float_format="%.4f", lineterminator="\n")
    for value in ("ece", "ece_90", "nll"):
        print(value)
        print(
            table.pivot(index=["distortion", "patients"], columns="method", values=value).round(3).to_string()
        )


if __name__ == "__main__":
    main()
