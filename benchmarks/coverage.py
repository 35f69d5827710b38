"""How often do intervals hold the truth? Nominal 95 %, by number of patients.

Cohorts are drawn from a population of patients who differ strongly (`simulated_cohorts`), pooled
AUROC .83, 60 patches each. For each cohort three intervals are made: ours, over patients; the percentile
bootstrap over patients; and the textbook interval that takes patches as independent (DeLong for AUROC, Wilson
for shares, the normal one for a mean). The truth comes from one cohort of 100,000 patients.

Command (two cores):

    uv run python benchmarks/coverage.py

It writes `results/interval-coverage.csv`, which `docs/concepts/intervals.md` shows. Seeds: cohort ``k`` of a
row has seed ``k``, the truth seed 10**9, the bootstrap the cohort's own.
"""

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from biopsy.statistics.intervals import Interval, estimate_metric, replicate
from biopsy.statistics.metrics import METRICS, measure
from biopsy.statistics.weighted_counts import SortedScores, sort_scores
from simulated_cohorts import Cohort, Population

N_PATIENTS = (5, 10, 20, 50, 100)
PATCHES_PER_PATIENT = 60
NAMES = ("auroc", "sensitivity", "specificity", "brier", "calibration_slope")
THRESHOLD = 0.3
LEVEL = 0.95
TRUTH_SEED = 10**9


def measure_truth(population: Population) -> dict[str, float]:
    """Give every metric on a cohort so large that its own error is about a hundredth of an interval's."""
    cohort = population.draw(100_000, PATCHES_PER_PATIENT, seed=TRUTH_SEED)
    return measure(sort_scores(cohort.target, cohort.prob, THRESHOLD).count(), NAMES)


def wilson(n_right: float, n: float) -> Interval:
    """Give Wilson's interval of a share, which is right only if patches are independent."""
    found = stats.binomtest(int(n_right), int(n)).proportion_ci(LEVEL, method="wilson")
    return Interval(n_right / n, found.low, found.high)


def assume_independence(cohort: Cohort, ranked: SortedScores) -> dict[str, Interval | None]:
    """Give the intervals that a textbook has for independent patches."""
    counts, z = ranked.count(), stats.norm.ppf((1 + LEVEL) / 2)
    pos, neg = cohort.prob[cohort.target == 1], cohort.prob[cohort.target == 0]
    of_pos = (stats.rankdata(np.concatenate([pos, neg]))[: len(pos)] - stats.rankdata(pos)) / len(neg)
    of_neg = (stats.rankdata(np.concatenate([neg, pos]))[: len(neg)] - stats.rankdata(neg)) / len(pos)
    squared = (cohort.prob - cohort.target) ** 2
    auroc_half = z * np.sqrt(of_pos.var(ddof=1) / len(pos) + of_neg.var(ddof=1) / len(neg))  # DeLong 1988
    brier_half = z * squared.std(ddof=1) / np.sqrt(len(squared))
    auroc, brier = of_pos.mean(), squared.mean()
    return {
        "auroc": Interval(auroc, auroc - auroc_half, auroc + auroc_half),
        "sensitivity": wilson(counts.tp, counts.n_pos),
        "specificity": wilson(counts.tn, counts.n_neg),
        "brier": Interval(brier, brier - brier_half, brier + brier_half),
    }


def draw_percentiles(ranked: SortedScores, seed: int, draws: int) -> dict[str, Interval]:
    """Give the percentile bootstrap over whole patients, by plain resampling of their patches' weights."""
    rng, n = np.random.default_rng(seed), len(ranked.groups)
    weights = (np.bincount(rng.integers(n, size=n), minlength=n).astype(float) for _ in range(draws))
    rows = [measure(ranked.count(weight), NAMES) for weight in weights]
    value, intervals = measure(ranked.count(), NAMES), {}
    for name in NAMES:
        low, high = np.nanquantile([row[name] for row in rows], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        intervals[name] = Interval(value[name], low, high)
    return intervals


def judge_cohort(
    seed: int, *, n_patients: int, population: Population, draws: int, truth: dict[str, float]
) -> list[tuple[str, str, bool, bool, float]]:
    """Make all intervals on one cohort: rows of metric, method, given, holds the truth, width."""
    cohort = population.draw(n_patients, PATCHES_PER_PATIENT, seed=seed)
    ranked = sort_scores(cohort.target, cohort.prob, THRESHOLD, group_ids=cohort.patient_ids)
    result = replicate(ranked, seed=seed, draws=draws, names=NAMES)
    ours = {
        name: estimate_metric(METRICS[name], ranked, result, level=LEVEL, unit="patient") for name in NAMES
    }
    methods = {
        "ours": ours,
        "percentile bootstrap": draw_percentiles(ranked, seed, draws),
        "patches as independent": assume_independence(cohort, ranked),
    }
    rows = []
    for method, intervals in methods.items():
        for name, interval in intervals.items():
            given = interval.low is not None
            holds = given and interval.low <= truth[name] <= interval.high
            rows.append((name, method, given, holds, interval.high - interval.low if given else np.nan))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, default=1000, help="cohorts per number of patients")
    parser.add_argument("--draws", type=int, default=400, help="bootstrap draws")
    parser.add_argument("--auroc", type=float, default=0.83, help="pooled AUROC of the population")
    parser.add_argument("--patients", type=int, nargs="+", default=N_PATIENTS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/interval-coverage.csv")
    options = parser.parse_args()
    population = Population(auroc=options.auroc)
    truth = measure_truth(population)
    lines = []
    with ProcessPoolExecutor(options.workers) as pool:
        for n_patients in options.patients:
            judge = partial(
                judge_cohort, n_patients=n_patients, population=population, draws=options.draws, truth=truth
            )
            rows = [row for rows in pool.map(judge, range(options.cohorts), chunksize=10) for row in rows]
            for name, method in dict.fromkeys(row[:2] for row in rows):
                given, holds, width = np.array([r[2:] for r in rows if r[:2] == (name, method)], float).T
                coverage = holds.sum() / given.sum()
                error = np.sqrt(coverage * (1 - coverage) / given.sum())
                lines.append(
                    {
                        "metric": name,
                        "truth": f"{truth[name]:.4f}",
                        "n_patients": n_patients,
                        "method": method,
                        "coverage": f"{coverage:.3f}",
                        "coverage_se": f"{error:.3f}",
                        "median_width": f"{np.nanmedian(width):.4f}",
                        "cohorts": options.cohorts,
                        "without_interval": int(len(given) - given.sum()),
                    }
                )
                print(*lines[-1].values(), sep="\t", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
