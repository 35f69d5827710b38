"""What 8-bit weights and activations cost and bring: classifiers exported with ``--int8``.

For each classifier a bundle is written with ``export --int8`` (512 patches of the pack give the ranges), then
other patches are predicted in float32, bfloat16 and int8 in turns, by one thread on one core; rates are
patches per second of processor time. AUROC, the largest and the median difference of a probability from
float32, the share of calls that change and the share of patches out of distribution say what is lost.

    python benchmarks/int8.py pcam=PCAM_PACK idc=IDC_PACK RUN=IDC_PACK

Results: ``results/int8.csv``, a row per classifier and precision.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from biopsy.data.packs import Pack
from biopsy.data.predictions import decide
from biopsy.exporting.bundles import INT8_PATCHES, export
from biopsy.models.classifier import Classifier
from biopsy.models.out_of_distribution import out_of_distribution_scores
from biopsy.models.runtimes import open_runtime
from biopsy.training.open_model import open_classifier
from recording import append_rows
from training_speed import describe_machine

RESULTS = Path(__file__).parent / "results" / "int8.csv"
PRECISIONS = ("fp32", "bf16", "int8")


def choose_rows(pack: Pack, patch_px: int, n_patches: int) -> np.ndarray:
    """Return rows of whole patches that gave no range; of the official validation subset, if there is one."""
    table, whole = pack.table, np.flatnonzero((pack.sizes == patch_px).all(axis=1))
    given = whole[np.linspace(0, len(whole) - 1, 2 * INT8_PATCHES).astype(int)]
    rows = np.setdiff1d(whole, given)
    if "official_subset" in table and (table["official_subset"].iloc[rows] == "validation").any():
        rows = rows[(table["official_subset"].iloc[rows] == "validation").to_numpy()]
    return np.sort(np.random.default_rng(0).choice(rows, min(n_patches, len(rows)), replace=False))


def measure(model: str, pack: Pack, n_patches: int, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Export, predict in turns, and return a row per precision."""
    about = {} if open_classifier(model).info.mpp else {"mpp": 1.0}
    bundle = export(model, folder / "bundle", data=pack, int8=True, **about)
    whole = Classifier.load(bundle.path)
    classifier = whole.single_patch()
    rows = choose_rows(pack, classifier.info.patch_px, n_patches)
    patches, sizes, target = np.array(pack.patches[rows]), pack.sizes[rows], pack.target[rows]
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    outputs = {}
    for turn in range(turns + 1):
        for precision in PRECISIONS:
            with open_runtime(whole, "cpu", precision, n_threads=1) as runtime:  # type: ignore[arg-type]
                runtime.logits(patches[:16])
                started = time.process_time()
                outputs[precision] = runtime.logits_and_features(patches)
                if turn:
                    seconds[precision].append(time.process_time() - started)
    positive = classifier.positive_index
    assert positive is not None
    probs = {precision: classifier.probs(logits) for precision, (logits, _) in outputs.items()}
    calls = {name: decide(values, positive, classifier.threshold) for name, values in probs.items()}
    result = []
    for precision in PRECISIONS:
        ratios = [a / b for a, b in zip(seconds["fp32"], seconds[precision], strict=True)]
        difference = np.abs(probs[precision] - probs["fp32"])[:, positive]
        ood = out_of_distribution_scores(classifier, patches, sizes, outputs[precision][1])
        result.append(
            {
                "classifier": Path(model).name,
                "precision": precision,
                "patches": len(rows),
                "patches_per_cpu_s": round(len(rows) / statistics.median(seconds[precision])),
                "ratio_to_fp32": round(statistics.median(ratios), 2),
                "ratio_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "auroc": round(roc_auc_score(target == positive, probs[precision][:, positive]), 4),
                "largest_difference": round(float(difference.max()), 4),
                "median_difference": round(float(np.median(difference)), 5),
                "changed_calls": round(float((calls[precision] != calls["fp32"]).mean()), 4),
                "out_of_distribution": round(float(ood["out_of_distribution"].mean()), 4)
                if len(ood.columns)
                else "",
                "load": round(os.getloadavg()[0], 1),
            }
        )
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", metavar="MODEL=PACK")
    parser.add_argument("--patches", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for pair in arguments.pairs:
        model, _, path = pair.partition("=")
        with tempfile.TemporaryDirectory() as name:
            rows = measure(model, Pack.open(path), arguments.patches, arguments.turns, Path(name))
        append_rows(RESULTS, [row | describe_machine() for row in rows])
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
