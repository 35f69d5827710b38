"""How often do 95 % intervals hold the truth, and how often do paired comparisons find what is not there?

Cohorts come from the five populations of `simulated_cohorts` (both classes in every patient, rare positives,
patients of one class, Pareto sizes, Pareto sizes with the larger patients harder), 60 patches per patient on
average. Every cohort gets the interval of `biopsy.statistics` (Student's t with ``(sum n)² / sum n² - 1``
degrees of freedom) and the same with one degree of freedom less than the groups that carry the metric;
cohorts of the first kind also get the percentile bootstrap over patients and the textbook interval that takes
patches as independent (DeLong for AUROC, Wilson for shares). ECE is measured although no interval of it is
given. The truth comes from one cohort of 60,000 patients.

For the type I error, two models of equal performance in the population are compared on the same patches: the
share of cohorts with p < 0.05.

Command (one core):

    uv run python benchmarks/coverage.py --workers 1

It writes `results/interval-coverage.csv` and `results/type-one-error.csv`, which `docs/concepts/intervals.md`
shows. Seeds: cohort ``k`` of a row has seed ``k``, the truth seed 10**9, the bootstrap the cohort's own.
"""

import argparse
import csv
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from biopsy.statistics.intervals import replicate, summarise_groups
from biopsy.statistics.metrics import METRICS, measure
from biopsy.statistics.resampling import InformativeGroups, Interval, Resampler, divide, sum_groups
from biopsy.statistics.weighted_counts import SortedScores, sort_scores
from simulated_cohorts import POPULATIONS, Cohort

N_PATIENTS = (5, 10, 20, 50, 150)
N_PAIRED = (10, 15, 20)
PATCHES_PER_PATIENT = 60
NAMES = ("auroc", "sensitivity", "specificity", "brier", "ece", "calibration_slope")
PATIENT_MEAN = "sensitivity, mean over patients"
THRESHOLDS = {"rare": 0.05, "one class": 0.4}
LEVEL = 0.95
TRUTH_SEED = 10**9

Row = tuple[str, str, bool, bool, float]
"""Metric, method, interval given, holds the truth, width."""


def sort_cohort(cohort: Cohort, kind: str) -> SortedScores:
    return sort_scores(cohort.target, cohort.prob, THRESHOLDS.get(kind, 0.3), group_ids=cohort.patient_ids)


def patient_sensitivities(scores: SortedScores) -> np.ndarray:
    """Return the sensitivity within each patient, NaN without positive patches."""
    sums = sum_groups(scores.group, len(scores.groups), scores.y_true * scores.y_pred, scores.y_true)
    return divide(sums[:, 0], sums[:, 1])


def measure_truth(kind: str) -> dict[str, float]:
    """Return every metric on a cohort so large that its own error is about a hundredth of an interval's."""
    scores = sort_cohort(POPULATIONS[kind].draw(60_000, PATCHES_PER_PATIENT, seed=TRUTH_SEED), kind)
    within = float(np.nanmean(patient_sensitivities(scores)))
    return {**measure(scores.count(), NAMES), PATIENT_MEAN: within}


def wilson(n_right: float, n: float) -> Interval:
    """Return Wilson's interval of a share, which is right only if patches are independent."""
    found = stats.binomtest(int(n_right), int(n)).proportion_ci(LEVEL, method="wilson")
    return Interval(n_right / n, found.low, found.high)


def assume_independence(cohort: Cohort, scores: SortedScores) -> dict[str, Interval]:
    """Return the intervals that a textbook has for independent patches."""
    counts, z = scores.count(), stats.norm.ppf((1 + LEVEL) / 2)
    pos, neg = cohort.prob[cohort.target == 1], cohort.prob[cohort.target == 0]
    of_pos = (stats.rankdata(np.concatenate([pos, neg]))[: len(pos)] - stats.rankdata(pos)) / len(neg)
    of_neg = (stats.rankdata(np.concatenate([neg, pos]))[: len(neg)] - stats.rankdata(neg)) / len(pos)
    half = z * np.sqrt(of_pos.var(ddof=1) / len(pos) + of_neg.var(ddof=1) / len(neg))  # DeLong 1988
    auroc = of_pos.mean()
    return {
        "auroc": Interval(auroc, auroc - half, auroc + half),
        "sensitivity": wilson(counts.tp, counts.n_pos),
        "specificity": wilson(counts.tn, counts.n_neg),
    }


def percentile_bootstrap(scores: SortedScores, seed: int, draws: int) -> dict[str, Interval]:
    """Return the percentile bootstrap over whole patients."""
    resampler = Resampler(len(scores.groups), seed, draws=draws, bootstrap_from=0)
    result = replicate(scores, resampler, NAMES)
    return {
        name: Interval(result.value[name], *np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        for name, values in result.replicates.items()
    }


def estimate(scores: SortedScores, seed: int, draws: int) -> dict[str, dict[str, Interval]]:
    """Return intervals with effective degrees of freedom, and with those of the number of groups."""
    resampler = Resampler(len(scores.groups), seed, draws=draws)
    result = replicate(scores, resampler, NAMES)
    methods: dict[str, dict[str, Interval]] = {"effective": {}, "groups": {}}
    for name in NAMES:
        metric, groups = METRICS[name], scores.informative_groups(METRICS[name].needs)
        plain = InformativeGroups((groups.n_patches > 0).astype(float), groups.description)
        for method, informative in (("effective", groups), ("groups", plain)):
            methods[method][name] = resampler.interval(
                result.value[name],
                result.replicates[name],
                informative,
                bounds=metric.bounds,
                share=metric.share,
            )
    methods["effective"][PATIENT_MEAN] = summarise_groups(
        METRICS["sensitivity"], patient_sensitivities(scores), LEVEL, "patient"
    )
    return methods


def judge_cohort(seed: int, *, kind: str, n_patients: int, draws: int, truth: dict[str, float]) -> list[Row]:
    """Make all intervals on one cohort."""
    cohort = POPULATIONS[kind].draw(n_patients, PATCHES_PER_PATIENT, seed=seed)
    scores = sort_cohort(cohort, kind)
    methods = estimate(scores, seed, draws)
    if kind == "mixed":
        methods["percentile bootstrap"] = percentile_bootstrap(scores, seed, draws)
        methods["patches as independent"] = assume_independence(cohort, scores)
    rows = []
    for method, intervals in methods.items():
        for name, interval in intervals.items():
            given = interval.low is not None
            holds = given and interval.low <= truth[name] <= interval.high
            width = interval.high - interval.low if given else np.nan
            rows.append((name, method, given, holds, width))
    return rows


def judge_pair(seed: int, *, kind: str, n_patients: int) -> list[tuple[str, str, bool, bool]]:
    """Compare two equal models on one cohort: metric, method, p given, p < 0.05."""
    pair = POPULATIONS[kind].draw_pair(n_patients, PATCHES_PER_PATIENT, seed=seed)
    first, second = (sort_cohort(cohort, kind) for cohort in pair)
    resampler, rows = Resampler(len(first.groups)), []
    one, other = (replicate(scores, resampler, ("auroc", "sensitivity")) for scores in (first, second))
    for name in ("auroc", "sensitivity"):
        groups = first.informative_groups(METRICS[name].needs)
        replicates = one.replicates[name] - other.replicates[name]
        given = groups.n >= 5 and groups.effective >= 2 and not np.isnan(replicates).any()
        value = abs(one.value[name] - other.value[name])
        t = value / resampler.standard_error(replicates) if given and np.ptp(replicates) > 0 else 0.0
        for method, freedom in (("effective", groups.freedom), ("groups", groups.n - 1)):
            rows.append((name, method, given, given and 2 * stats.t.sf(t, freedom) < 1 - LEVEL))
    return rows


def count_coverage(rows: list[Row], truth: dict[str, float], **about: Any) -> Iterator[dict[str, Any]]:
    for name, method in dict.fromkeys(row[:2] for row in rows):
        chosen = np.array([row[2:] for row in rows if row[:2] == (name, method)], float)
        given, holds, width = chosen.T
        coverage = holds.sum() / given.sum() if given.any() else np.nan
        yield {
            **about,
            "metric": name,
            "truth": f"{truth[name]:.4f}",
            "method": method,
            "coverage": f"{coverage:.3f}",
            "coverage_se": f"{np.sqrt(coverage * (1 - coverage) / max(given.sum(), 1)):.3f}",
            "median_width": f"{np.nanmedian(width):.4f}" if given.any() else "nan",
            "cohorts": len(given),
            "without_interval": int(len(given) - given.sum()),
        }


def count_type_one(rows: list[tuple[str, str, bool, bool]], **about: Any) -> Iterator[dict[str, Any]]:
    for name, method in dict.fromkeys(row[:2] for row in rows):
        given, found = np.array([row[2:] for row in rows if row[:2] == (name, method)], float).T
        share = found.sum() / given.sum() if given.any() else np.nan
        yield {
            **about,
            "metric": name,
            "method": method,
            "type_one_error": f"{share:.3f}",
            "se": f"{np.sqrt(share * (1 - share) / max(given.sum(), 1)):.3f}",
            "cohorts": len(given),
            "without_p": int(len(given) - given.sum()),
        }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, default=400, help="cohorts per cell")
    parser.add_argument("--pairs", type=int, default=1000, help="cohorts per cell of the type I error")
    parser.add_argument("--draws", type=int, default=200, help="bootstrap draws")
    parser.add_argument("--kinds", nargs="+", default=list(POPULATIONS), choices=list(POPULATIONS))
    parser.add_argument("--patients", type=int, nargs="+", default=N_PATIENTS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    coverage, type_one = [], []
    with ProcessPoolExecutor(options.workers) as pool:
        for kind in options.kinds:
            for n in N_PAIRED:
                judge = partial(judge_pair, kind=kind, n_patients=n)
                rows = [row for rows in pool.map(judge, range(options.pairs), chunksize=20) for row in rows]
                type_one += count_type_one(rows, cohort=kind, n_patients=n)
            write_rows(options.out / "type-one-error.csv", type_one)
        for kind in options.kinds:
            truth = measure_truth(kind)
            for n in options.patients:
                judge = partial(judge_cohort, kind=kind, n_patients=n, draws=options.draws, truth=truth)
                rows = [row for rows in pool.map(judge, range(options.cohorts), chunksize=5) for row in rows]
                coverage += count_coverage(rows, truth, cohort=kind, n_patients=n)
                write_rows(options.out / "interval-coverage.csv", coverage)
                print(kind, n, flush=True)


if __name__ == "__main__":
    main()
