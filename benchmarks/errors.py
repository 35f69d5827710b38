"""What goes with errors, where they lie, and whether doubted labels are the wrong ones.

* ``properties`` and ``border``: what `biopsy errors` records of finished runs, a row per contrast or zone;
* ``flipped``: labels of a study's tested slides are flipped on purpose, each with the same chance, and ranked
  by `evaluation.neighbours.rank_label_issues`;
  how many of them come first, by which witness. The models are as they
  were: trained on labels of other slides that nobody flipped.

Commands, as they were run for ``results/errors-*.csv``::

    python benchmarks/errors.py properties border --runs studies/cancernet-2020-loso/runs/*
    python benchmarks/errors.py properties --runs studies/transfer-imagenet/runs/squeezenet-pcam-s0
    python benchmarks/errors.py flipped --study studies/cancernet-2020-loso

A few seconds a run, one minute in all.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from biopsy.evaluation.errors.measure import measure_errors
from biopsy.evaluation.neighbours import count_neighbours, rank_label_issues
from biopsy.training.runs import Run
from biopsy.training.study import Study

RESULTS = Path(__file__).parent / "results"
SHARES = (0.02, 0.05, 0.1)
SEEDS = range(10)


def list_contrasts(run: Run) -> list[dict[str, Any]]:
    """Return what goes with the errors of a run."""
    found = measure_errors(run, device="cpu")
    rows = []
    for each in found.document["contrasts"]:
        estimate = each.within or each.auroc
        rows.append(
            {
                **_name(run, found.table),
                "errors": each.errors,
                "property": each.property,
                "n_errors": each.n_chosen,
                "n_others": each.n_others,
                "mean_errors": _round(each.mean_chosen),
                "mean_others": _round(each.mean_others),
                "chance_higher": _round(estimate.value),
                "low": _round(estimate.low),
                "high": _round(estimate.high),
                "level_each": _round(found.document["level_each"]),
                "unit": found.document["unit"],
                "reason": estimate.reason,
            }
        )
    return rows


def list_zones(run: Run) -> list[dict[str, Any]]:
    """Return the errors of a run at the border and deep inside."""
    found = measure_errors(run, device="cpu")
    return [
        {
            **_name(run, found.table),
            "zone": zone,
            **{key: getattr(part, key) for key in ("n_patches", "n_positive", "fn", "fp")},
            **{name: _round(part.patch[name].value) for name in ("sensitivity", "specificity")},
        }
        for zone, part in found.document["zones"].items()
    ]


def flip_labels(study: Study) -> list[dict[str, Any]]:
    """Flip labels of the tested slides, and see how high they rank."""
    pack = study.runs()[0].open_pack(verify=False)
    prob = study.predictions().groupby("patch_id")["prob"].mean().reindex(pack.table["patch_id"])
    tested = prob.notna().to_numpy()
    probs = np.stack([1 - prob, prob], axis=1)
    slide, rows = pack.table["slide_id"].to_numpy(str), []
    for share in SHARES:
        for seed in SEEDS:
            rng = np.random.default_rng(seed)
            flipped = tested & (rng.random(len(pack)) < share)
            label = np.where(flipped, 1 - pack.target, pack.target)
            counts = count_neighbours(pack.table, label, 2)
            witnesses = {
                "neighbours": (counts, np.full_like(probs, np.nan)),
                "model": (np.full_like(counts, np.nan), probs),
                "both": (counts, probs),
            }
            for witness, (voices, said) in witnesses.items():
                doubt = rank_label_issues(voices, label, said)["doubt"].to_numpy()
                for name in np.unique(slide[tested]):
                    on = tested & (slide == name)
                    listed = on & (doubt > 0.5)
                    rows.append(
                        {
                            "share": share,
                            "seed": seed,
                            "slide": name,
                            "witness": witness,
                            "n_flipped": int(flipped[on].sum()),
                            "n_listed": int(listed.sum()),
                            "precision": _round(flipped[listed].mean()),
                            "recall": _round(listed[on & flipped].mean()),
                            "average_precision": _round(average_precision_score(flipped[on], doubt[on])),
                        }
                    )
    return rows


def _name(run: Run, table: Any) -> dict[str, Any]:
    tested = sorted(table["patient_id"].dropna().unique())
    return {
        "recipe": run.info["recipe"],
        "tested": " ".join(tested) if tested else f"{len(table)} patches",
        "seed": run.info["seed"],
    }


def _round(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(f"{value:.4g}")


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to a table of results, in place of those of the same run."""
    path = RESULTS / f"errors-{name}.csv"
    keys = [key for key in ("recipe", "tested", "seed", "share", "witness") if key in rows[0]]
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("properties", "border", "flipped"))
    parser.add_argument("--runs", nargs="*", default=(), help="finished and evaluated runs")
    parser.add_argument("--study", help="of runs that leave slides out")
    arguments = parser.parse_args()
    runs = [Run.open(path) for path in arguments.runs]
    for name, function in (("properties", list_contrasts), ("border", list_zones)):
        if name in arguments.what:
            write(name, [row for run in runs for row in function(run)])
    if "flipped" in arguments.what:
        write("flipped", flip_labels(Study.open(arguments.study)))


if __name__ == "__main__":
    main()
