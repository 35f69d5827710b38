"""Do conformal sets keep their guarantee for patches of new patients? Patients as the unit, and patches.

* ``simulation``: cohorts of known truth (`simulated_cohorts.UnevenPatients`, 40 patches a
  patient on average), drawn anew for every repeat. ``even``: every patient has as many patches. ``uneven``:
  the logarithm of a patient's number of patches has sd .8 and correlates .5 with how easy the patient is. The
  coverage of new patients is exact, by a closed form. Results: ``results/conformal-simulation.csv``.
* ``phantom``: a phantom cohort of 60 patients, 100 patches each on average. The small residual network learns
  from 20 of them for few epochs, the last of which is taken, so that nothing is chosen on the other 40. Those
  are divided at random, many times, into patients to calibrate on (temperature, Youden's threshold, conformal
  sets) and patients to test. One row per guarantee, error rate, number of patients and method:
  ``results/conformal-phantom.csv``. Before that the run is calibrated on its own 20 validation patients and
  judged on its 20 test patients as any run is, which is printed.

Commands (one core; about two minutes and about six)::

    python benchmarks/conformal.py simulation
    python benchmarks/conformal.py phantom

Seeds: repeat ``k`` of a row has seed ``k``; cohort, split, training and divisions have ``--seed``.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from biopsy.core.seeds import make_rng
from biopsy.data.packs import is_pack
from biopsy.data.predictions import read_predictions
from biopsy.data.prepare import prepare
from biopsy.data.splits import split as make_split
from biopsy.evaluation.evaluate import evaluate
from biopsy.phantom.cohort import write_archive
from biopsy.statistics.abstention import (
    Guarantee,
    abstain,
    fit_conformal,
    groups_needed,
    hierarchical_quantile,
    predict_sets,
    score_targets,
)
from biopsy.statistics.calibrators import fit_calibrator
from biopsy.statistics.decisions import choose_threshold
from biopsy.training.runs import Run
from biopsy.training.train import train
from simulated_cohorts import UnevenPatients

RESULTS = Path(__file__).parent / "results"
ALPHAS = (0.10, 0.05)
POPULATIONS = {
    "even": UnevenPatients(),
    "uneven": UnevenPatients(size_sd=0.8, size_with_margin=0.5),
}
METHODS = ("patients as the unit", "patches as independent")
PATCHES = 40
SHARES = (
    "coverage",
    "coverage_of_not_idc",
    "coverage_of_idc",
    "abstained",
    "kept_and_wrong",
    "idc_kept_and_wrong",
    "wrong_among_kept",
)


def both(prob: np.ndarray) -> np.ndarray:
    """Return the probabilities of both classes from that of the positive one."""
    return np.stack([1 - prob, prob], axis=1)


def simulate(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Return one row per population, error rate, number of patients and method."""
    for population, alpha, n in (
        (name, alpha, n) for name in POPULATIONS for alpha in ALPHAS for n in options.patients
    ):
        found = np.empty((options.repeats, 2))
        for k in range(options.repeats):
            cohort = POPULATIONS[population].draw(n, PATCHES, seed=k)
            scores = score_targets(both(cohort.prob), cohort.target)
            units = (cohort.patient_ids, np.arange(len(scores)))
            quantiles = [hierarchical_quantile(scores, unit, alpha) for unit in units]
            found[k] = [POPULATIONS[population].coverage(quantile) for quantile in quantiles]
        for method, coverage in zip(METHODS, found.T, strict=True):
            refused = method == METHODS[0] and n < groups_needed(alpha)
            yield {
                "population": population,
                "promised": 1 - alpha,
                "calibration_patients": n,
                "method": method,
                "coverage": "refused" if refused else f"{coverage.mean():.4f}",
                "coverage_se": "" if refused else f"{coverage.std() / np.sqrt(len(coverage)):.4f}",
                "share_of_cohorts_below": "" if refused else f"{(coverage < 1 - alpha).mean():.3f}",
                "repeats": options.repeats,
            }


def train_on_phantom(folder: Path, options: argparse.Namespace) -> Run:
    """Train on 20 phantom patients, 20 validating and 20 testing."""
    pack, size = folder / "phantom.pack", {"n_patients": 60, "patches_per_patient": 100}
    if not is_pack(pack):
        prepare(write_archive(folder / "phantom.zip", **size, seed=options.seed), pack)
    split = make_split(pack, protocol="folds", name="thirds", folds=3, seed=options.seed, save=False)
    settings = [f"train.epochs={options.epochs}", "model.context=0"]
    return train(
        "idc-small",
        pack,
        split=split,
        fold=0,
        seed=options.seed,
        overrides=settings,
        out=folder / "run",
        device="cpu",
        on_epoch=lambda record: print({k: v for k, v in record.items() if isinstance(v, float)}, flush=True),
    )


def measure_phantom(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Divide the 40 patients that the network has not learned from again and again."""
    with tempfile.TemporaryDirectory() as temporary:
        run = train_on_phantom(options.folder or Path(temporary), options)
        metrics = evaluate(run)
        print({"auroc": metrics["patch"]["auroc"], **metrics["abstention"]}, flush=True)
        subsets = [
            read_predictions(run.path / "predictions" / f"{subset}.parquet")[0]
            for subset in ("validation", "test")
        ]
        names = run.classifier.info.class_names
    logits = np.concatenate(
        [subset[[f"logit_{name}" for name in names]].to_numpy(float) for subset in subsets]
    )
    target = np.concatenate([subset["target"].to_numpy(int) for subset in subsets])
    patients = np.concatenate([subset["patient_id"].to_numpy(str) for subset in subsets])
    every = np.unique(patients)
    asked = [
        (guarantee, alpha, n)
        for guarantee in ("class-conditional", "marginal")
        for alpha in ALPHAS
        for n in (9, 19, 30)
    ]
    for guarantee, alpha, n in asked:
        if n < groups_needed(alpha):
            continue
        found = np.empty((options.divisions, 2, len(SHARES)))
        for k in range(options.divisions):
            chosen = make_rng(options.seed, "division", k).permutation(every)[:n]
            found[k] = divide(logits, target, patients, np.isin(patients, chosen), alpha, guarantee)
        for method, shares in zip(METHODS, found.swapaxes(0, 1), strict=True):
            coverage = shares[:, 1:3].min(axis=1) if guarantee == "class-conditional" else shares[:, 0]
            yield {
                "guarantee": guarantee,
                "promised": 1 - alpha,
                "calibration_patients": n,
                "test_patients": len(every) - n,
                "method": method,
                **{
                    name: f"{mean:.4f}" for name, mean in zip(SHARES, np.nanmean(shares, axis=0), strict=True)
                },
                "share_of_divisions_below": f"{(coverage < 1 - alpha).mean():.3f}",
                "divisions": options.divisions,
                "patches": len(target),
                "seed": options.seed,
                "epochs": options.epochs,
            }


def divide(
    logits: np.ndarray,
    target: np.ndarray,
    patients: np.ndarray,
    calibrates: np.ndarray,
    alpha: float,
    guarantee: Guarantee,
) -> np.ndarray:
    """Calibrate on some patients, test on the others: methods by `SHARES`, each patient weighing the same.

    Where sets are refused, all classes are in every set.
    """
    scores = fit_calibrator(logits[calibrates], target[calibrates]).scale(logits)
    probs = np.exp(scores - scores.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    known, new, truth = probs[calibrates], probs[~calibrates], target[~calibrates]
    threshold = choose_threshold(target[calibrates], known[:, 1], "youden").value
    pred, rows = (new[:, 1] >= threshold).astype(int), []
    for unit in (patients[calibrates], np.arange(len(known))):
        fitted = fit_conformal(known, target[calibrates], unit, alpha, guarantee=guarantee)
        sets = predict_sets(new, 1.0 if fitted["quantiles"] is None else fitted["quantiles"])
        covered, kept = sets[np.arange(len(truth)), truth], ~abstain(sets, pred)
        wrong = kept & (pred != truth)

        def share(of: np.ndarray, among: np.ndarray) -> float:
            each = np.unique(patients[~calibrates][among], return_inverse=True)[1]
            return float((np.bincount(each, of[among]) / np.bincount(each)).mean())

        every = np.ones(len(truth), bool)
        kept_share, error = share(kept, every), share(wrong, every)
        of_class = [share(covered, truth == k) for k in (0, 1)]
        missed = share(wrong, truth == 1)
        among_kept = error / kept_share if kept_share else np.nan
        rows.append([share(covered, every), *of_class, 1 - kept_share, error, missed, among_kept])
    return np.array(rows)


def write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    """Print every row as it comes, and write them all."""
    kept = []
    for row in rows:
        print(*row.values(), sep="\t", flush=True)
        kept.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kept[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["simulation", "phantom"])
    parser.add_argument("--patients", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--divisions", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="keep cohort and run here, or go on with those kept")
    parser.add_argument("--out", type=Path, help="another place for the results")
    options = parser.parse_args()
    rows = simulate(options) if options.what == "simulation" else measure_phantom(options)
    write(options.out or RESULTS / f"conformal-{options.what}.csv", rows)


if __name__ == "__main__":
    main()
