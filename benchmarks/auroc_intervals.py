"""Which 95 % interval of AUROC over patients holds the truth where the largest patients are the hardest?

Each cohort of `simulated_cohorts.POPULATIONS` gets

* ``student``: the interval of `biopsy.statistics` (jackknife with effective degrees of freedom, at any size);
* ``influence``: the same with ``(sum v)² / sum v²`` degrees of freedom, ``v`` the squared influences;
* ``skewed``: the first, its longer side stretched by the influences' skewness (first Edgeworth term);
* ``leverage``: each influence divided by one minus the patient's share of the patches (as CR3);
* ``bootstrap-t``: studentised by the influences within each of 250 draws of whole patients;
* ``BCa``: bias-corrected and accelerated percentiles of these draws;
* ``unbiased``: the first, shifted by the mean error of all cohorts of the cell, which nobody knows;
* ``known sd``: 1.96 times the standard deviation over these cohorts around the estimate, unknown as well.

All are made on the logit. With the number of pairs of patients' patches in the right order, the AUROC of any
weighting is a product of small matrices. Beside coverage stand the share of cohorts an evaluation warns of
(patients with more patches are harder, or few of very different size) and coverage with and without warning.

Command (one core, three minutes)::

    python benchmarks/auroc_intervals.py

Writes ``results/auroc-intervals.csv``: cohort ``k`` of a cell has seed ``k``, the truth seed 10**9.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.special import expit, logit, ndtr, ndtri, stdtrit

from biopsy.core.seeds import make_rng
from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.resampling import divide
from recording import append_rows
from simulated_cohorts import POPULATIONS, Cohort

RESULTS = Path(__file__).parent / "results" / "auroc-intervals.csv"
N_PATIENTS = (5, 10, 20, 50, 150)
PATCHES_PER_PATIENT = 60
DRAWS = 250
Z = 1.96


class PatientPairs:
    """AUROC under weights of patients.

    Attributes:
        ordered: Pairs of a positive patch of patient ``i`` above a negative one of ``j``, ``(n, n)``.
        pos: Positive patches of each patient, ``(n,)``.
        neg: Negative patches.
    """

    def __init__(self, cohort: Cohort, n_patients: int) -> None:
        order = np.argsort(cohort.prob, kind="stable")
        target, group = cohort.target[order], cohort.patient_ids[order]
        own = group[:, None] == np.arange(n_patients)
        below = np.cumsum(own & (target == 0)[:, None], axis=0, dtype=float)
        self.ordered = own[target == 1].T.astype(float) @ below[target == 1]
        self.pos = np.bincount(group, target, n_patients)
        self.neg = np.bincount(group, 1 - target, n_patients)

    def auroc(self, weight: np.ndarray) -> np.ndarray:
        """Return the AUROC of each row of weights, ``(k, n)``; NaN without pairs."""
        pairs = (weight @ self.pos) * (weight @ self.neg)
        return divide(((weight @ self.ordered) * weight).sum(axis=1), pairs)

    def influence(self, weight: np.ndarray, auroc: np.ndarray) -> np.ndarray:
        """Return the derivative of AUROC by each patient's weight, ``(k, n)``."""
        pos, neg = (weight @ self.pos)[:, None], (weight @ self.neg)[:, None]
        gained = (weight @ self.ordered.T + weight @ self.ordered) / (pos * neg)
        return gained - auroc[:, None] * (self.pos / pos + self.neg / neg)

    @property
    def effective(self) -> float:
        """Effective number of patients by the class where it is smaller."""
        return min(counts.sum() ** 2 / (counts**2).sum() for counts in (self.pos, self.neg))

    @property
    def share(self) -> np.ndarray:
        """Each patient's share of the patches of a class, the larger of the two."""
        return np.maximum(self.pos / self.pos.sum(), self.neg / self.neg.sum())


def student(effective: float) -> float:
    return float(stdtrit(max(effective - 1, 1.0), 0.975))


def make_intervals(pairs: PatientPairs, seed: int) -> tuple[float, dict[str, tuple[float, float]]] | None:
    """Return the logit of AUROC and its intervals; None where `biopsy.statistics` gives none."""
    n = len(pairs.pos)
    [auroc] = pairs.auroc(np.ones((1, n)))
    without = pairs.auroc(1 - np.eye(n))
    few = min(np.count_nonzero(pairs.pos), np.count_nonzero(pairs.neg)) < 5 or pairs.effective < 2
    if few or np.isnan(without).any() or auroc in (0, 1):
        return None
    value, slope = logit(auroc), 1 / (auroc * (1 - auroc))
    left = without * slope if np.isin(without, (0, 1)).any() else logit(without)
    squares = (left - left.mean()) ** 2
    error = np.sqrt(squares.sum() * (n - 1) / n)
    half = student(pairs.effective) * error
    [influence] = pairs.influence(np.ones((1, n)), np.array([auroc]))
    spread = (influence**2).sum()
    skewness = (influence**3).sum() / spread**1.5
    stretch = skewness / 6 * (2 * student(pairs.effective) ** 2 + 1) * error
    by_influence = student(squares.sum() ** 2 / (squares**2).sum() + 1) * error
    by_leverage = student(pairs.effective) * slope * np.sqrt(((influence / (1 - pairs.share)) ** 2).sum())
    low_t, high_t, low_bca, high_bca = bootstrap(pairs, auroc, influence, seed)
    return value, {
        "student": (value - half, value + half),
        "influence": (value - by_influence, value + by_influence),
        "skewed": (value - half + min(stretch, 0), value + half + max(stretch, 0)),
        "leverage": (value - by_leverage, value + by_leverage),
        "bootstrap-t": (value + low_t, value + high_t),
        "BCa": (low_bca, high_bca),
    }


def bootstrap(
    pairs: PatientPairs, auroc: float, influence: np.ndarray, seed: int
) -> tuple[float, float, float, float]:
    """Return the limits of bootstrap-t, as differences to the value, and those of BCa, on the logit."""
    n, rng = len(influence), make_rng(seed, "auroc-intervals")
    weight = np.stack([np.bincount(drawn, minlength=n) for drawn in rng.integers(n, size=(DRAWS, n))])
    weight = weight[(weight @ pairs.pos > 0) & (weight @ pairs.neg > 0)].astype(float)
    drawn = pairs.auroc(weight)
    held = np.clip(drawn, 1e-4, 1 - 1e-4)
    errors = np.sqrt((weight * pairs.influence(weight, drawn) ** 2).sum(axis=1)) / (held * (1 - held))
    t = (logit(held) - logit(auroc))[errors > 1e-12] / errors[errors > 1e-12]
    error = np.sqrt((influence**2).sum()) / (auroc * (1 - auroc))
    low, high = np.quantile(t, [0.025, 0.975])
    below = np.clip((drawn < auroc).mean() + (drawn == auroc).mean() / 2, 1 / len(drawn), 1 - 1 / len(drawn))
    bias, acceleration = ndtri(below), (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    ends = bias + np.array([-Z, Z])
    limits = np.quantile(drawn, ndtr(bias + ends / (1 - acceleration * ends)))
    return -high * error, -low * error, *logit(np.clip(limits, 1e-6, 1 - 1e-6))


def warn(cohort: Cohort) -> bool:
    """Return whether an evaluation of the cohort warns of patients of different size."""
    probs = np.stack([1 - cohort.prob, cohort.prob], axis=1)
    scored = ScoredPatches(
        target=cohort.target,
        probs=probs,
        pred=probs.argmax(axis=1),
        group_ids=cohort.patient_ids,
        class_names=("normal", "tumour"),
        positive_class="tumour",
        unit="patient",
    )
    return scored.warn_unequal_groups() is not None


def measure_cell(kind: str, n_patients: int, cohorts: int, truth: float) -> list[dict[str, object]]:
    """Return a row for each kind of interval."""
    values, warned, intervals = [], [], defaultdict(list)
    for seed in range(cohorts):
        cohort = POPULATIONS[kind].draw(n_patients, PATCHES_PER_PATIENT, seed=seed)
        found = make_intervals(PatientPairs(cohort, n_patients), seed)
        if found:
            values.append(found[0])
            warned.append(warn(cohort))
            for name, limits in found[1].items():
                intervals[name].append(limits)
    bias, sd = np.mean(values) - truth, np.std(values)
    limits = {name: np.array(found) for name, found in intervals.items()}
    limits["unbiased"] = limits["student"] - bias
    limits["known sd"] = np.array(values)[:, None] + [-Z * sd, Z * sd]
    given, flagged = len(values), np.array(warned)
    return [
        {
            "cohort": kind,
            "n_patients": n_patients,
            "method": name,
            "coverage": f"{holds.mean():.3f}",
            "truth_below": f"{(truth < low).mean():.3f}",
            "median_width": f"{np.median(expit(high) - expit(low)):.4f}",
            "cohorts": given,
            "bias_in_sd": f"{bias / sd:.2f}",
            "warned": f"{flagged.mean():.3f}",
            "coverage_warned": f"{holds[flagged].mean():.3f}" if flagged.any() else "",
            "coverage_unwarned": f"{holds[~flagged].mean():.3f}" if not flagged.all() else "",
        }
        for name, (low, high) in ((name, found.T) for name, found in limits.items())
        for holds in [(low <= truth) & (truth <= high)]
    ]


def measure_truth(kind: str) -> float:
    """Return the logit of the AUROC of 60,000 patients."""
    cohort = POPULATIONS[kind].draw(60_000, PATCHES_PER_PATIENT, seed=10**9)
    target = cohort.target[np.argsort(cohort.prob, kind="stable")]
    n_pos = target.sum()
    return float(logit(np.cumsum(1 - target)[target == 1].sum() / (n_pos * (len(target) - n_pos))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cohorts", type=int, default=400, help="cohorts per cell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.unlink(missing_ok=True)
    for kind in POPULATIONS:
        truth = measure_truth(kind)
        for n_patients in N_PATIENTS:
            if (kind, n_patients) not in (("rare", 5), ("one class", 5)):  # hardly any has an interval
                append_rows(options.out, measure_cell(kind, n_patients, options.cohorts, truth))
                print(kind, n_patients, flush=True)


if __name__ == "__main__":
    main()
