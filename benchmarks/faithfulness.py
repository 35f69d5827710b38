"""Do maps mean anything: every method of `biopsy explain` against random and edge maps.

A run given by its folder is asked about the patches it was judged on; a copy is best, for
``explain/faithfulness.json`` is written into it. ``--phantom`` makes a cohort, trains CancerNet on it, and
also asks whether maps point at the tumour's cells, which on phantom are known pixel by pixel.

Commands, as they were run for ``results/faithfulness.csv``::

    python benchmarks/faithfulness.py cancernet-2020-f0-s0 cancernet-2020-f1-s0 cancernet-2020-f2-s0
    python benchmarks/faithfulness.py squeezenet-pcam-s0
    python benchmarks/faithfulness.py --phantom --seed 100

The runs are of the studies in ``docs/recipes/cancernet.md`` and ``docs/recipes/squeezenet-pcam.md``. Each
appends one row per method with sizes, seed, machine and time. Two cores; a minute or two of each for a run,
five for phantom.
"""

import argparse
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from biopsy.core.files import plain
from biopsy.data.prepare import prepare
from biopsy.evaluation.evaluate import evaluate
from biopsy.evaluation.explanation.faithfulness import (
    draw_patches,
    explain_all,
    find_edges,
    measure_faithfulness,
)
from biopsy.models.engine import Engine
from biopsy.phantom.cohort import write_archive
from biopsy.training.runs import Run
from biopsy.training.train import train
from pointing import find_tumour_cells, judge_pointing
from recording import append_rows

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "faithfulness.csv"
COHORT = {"n_patients": 30, "patches_per_patient": 120}
SETTINGS = ["augmentation.rot90=true", "train.epochs=8"]


def measure_run(path: Path) -> list[dict[str, object]]:
    """Test the maps of a run on the subset it was judged on."""
    run = Run.open(path)
    started = time.process_time()
    found = plain(measure_faithfulness(run))
    return tabulate(run, found, run.open_pack(verify=False).path.name, time.process_time() - started)


def measure_phantom(folder: Path, seed: int) -> list[dict[str, object]]:
    """Train on phantom, and test the maps there, with the tumour's cells known."""
    pack = prepare(write_archive(folder / "phantom.zip", **COHORT, seed=seed), folder / "phantom.pack")
    run = train(
        "cancernet-2020", pack, split="patients", seed=seed, overrides=SETTINGS, out=folder / "cancernet"
    )
    print("AUROC", evaluate(run)["patch"]["auroc"])

    started = time.process_time()
    found = plain(measure_faithfulness(run))
    pointing = measure_pointing(run, found["n_patches"], seed)
    for each in [*found["methods"], *found["baselines"]]:
        each["pointing"] = pointing.get(each["name"])
    return tabulate(run, found, "phantom", time.process_time() - started)


def measure_pointing(run: Run, n_patches: int, seed: int) -> dict[str, dict[str, Any]]:
    """Ask the maps of the patches that were tested, and edges, whether they point at tumour cells."""
    pack, classifier = run.open_pack(verify=False), run.classifier.single_patch()
    rows = draw_patches(run, pack, n_patches, seed=run.info["seed"])
    patches, table = pack.patches[rows], pack.table.iloc[rows]
    class_index = np.full(len(rows), classifier.positive_index)
    maps, _, _ = explain_all(classifier, patches, class_index, (), None, Engine("auto"))
    places = zip(table["patient_id"].astype(str), table["x"], table["y"], strict=True)
    truth = find_tumour_cells(places, **COHORT, seed=seed)
    options = {"seed": run.info["seed"], "unit": pack.unit}
    return {
        name: judge_pointing(each, truth, pack.group_ids[rows], **options)
        for name, each in {**maps, "edges": find_edges(patches)}.items()
    }


def tabulate(run: Run, found: dict[str, Any], data: str, seconds: float) -> list[dict[str, object]]:
    """Return one row per method, and print what it says."""
    rows = []
    for each in [*found["methods"], *found["baselines"]]:
        print(each.get("answer", ""))
        row: dict[str, object] = {
            "data": data,
            "run": run.path.name,
            "network": run.recipe.model.name,
            "method": each["name"],
            "layer": each.get("layer") or "",
            **{name: number(each[name]["value"]) for name in ("deletion", "insertion")},
        }
        for baseline in ("random", "edges"):
            gain = each.get("gain", {}).get(baseline, {})
            row |= {f"over_{baseline}{key}": number(gain.get(name)) for key, name in ENDS.items()}
            row[f"better_than_{baseline}"] = each.get("n_better", {}).get(baseline, "")
        last = (each.get("randomised") or [{}])[-1]
        row |= {name: number(last.get(name)) for name in ("rank_correlation", "ssim")}
        pointing = each.get("pointing") or {}
        row["pointing_patches"] = pointing.get("n_patches", "")
        for name in ("hit", "mass", "area", "hit_gain", "mass_gain"):
            estimate = pointing.get(name, {})
            row |= {f"{name}{key}": number(estimate.get(end)) for key, end in ENDS.items()}
        rows.append(
            row
            | {
                "n_patches": found["n_patches"],
                "n_groups": found["n_groups"],
                "unit": found["unit"],
                "prob_untouched": number(found["prob"]["untouched"]),
                "prob_blurred": number(found["prob"]["blurred"]),
                "seed": found["seed"],
                "cpu_seconds": round(seconds),
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "date": datetime.now(UTC).date().isoformat(),
            }
        )
    return rows


ENDS = {"": "value", "_low": "low", "_high": "high"}


def number(value: float | None) -> object:
    """Round for the table; nothing where there is none."""
    return "" if value is None else round(value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--phantom", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the phantom cohort and its training")
    parser.add_argument("--keep", type=Path, help="folder to leave the phantom run in")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    rows = [row for path in options.runs for row in measure_run(path)]
    if options.phantom:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_phantom(options.keep or Path(folder), options.seed)
    if not options.dry:
        append_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
