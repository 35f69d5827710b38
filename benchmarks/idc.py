"""Leave-one-slide-out of the recommended IDC recipes, with the gain of what is done after training.

Three whole slides hold both classes: 8863, 8865, 8867. Each is tested once by a run that has not seen it; six
patients of whom only fragments exist validate (threshold and calibration); all others train. The epoch is not
chosen: the averaged weights at the end are taken.

Of every run these are measured on the tested slide: the weights of the last update and the averaged ones; one
view and the mean over the eight symmetries; the patch by itself and with its neighbours.

Command::

    python benchmarks/idc.py idc.pack --recipe idc-small --seeds 0,1,2 --out runs/idc
    python benchmarks/idc.py idc.pack --set augmentation.cutout=0.3 --name "cutout .3"

The second one changes settings of the recipe, and NAME is what the rows are called.

Finished runs are not trained again, interrupted ones are gone on with. Writes a row per run to
``results/idc-loso.csv`` as soon as it is there.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.core.errors import DataError, SplitError
from biopsy.data.packs import Pack
from biopsy.data.splits import Split, find_split
from biopsy.models.classifier import average_neighbours
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits
from biopsy.recipes import load_recipe
from biopsy.training.checkpoints import LAST, _read, _tensors_of
from biopsy.training.runs import Run
from training_runs import make_parser, parse_arguments, train_once

RESULTS = Path(__file__).parent / "results" / "idc-loso.csv"
SLIDES = ("8863", "8865", "8867")
DECISION = ("balanced_accuracy", "sensitivity", "specificity", "ece")
FRAGMENTS = ("10253", "9175", "8918", "9177", "9259", "9037")


def find_or_make_split(pack: Pack, slide: str) -> Split:
    """Return the split that tests on one slide."""
    name = f"lo-{slide}"
    try:
        return find_split(pack, name)
    except (SplitError, DataError):
        return biopsy.split(
            pack, protocol="patients", test_patients=[slide], val_patients=list(FRAGMENTS), name=name, seed=0
        )


def measure(run: Run, name: str) -> dict[str, object]:
    """Return one row: AUROC at every step after training, decision and calibration on the tested slide."""
    pack, classifier, engine = run.open_pack(verify=False), run.classifier, Engine("cpu")
    rows = np.flatnonzero(run.subsets(pack) == "test")
    table, target = pack.table.iloc[rows], pack.target[rows]
    length = classifier.info.context or 1.5

    def rank(logits: np.ndarray) -> float:
        return float(roc_auc_score(target, logits[:, 1] - logits[:, 0]))

    def predict(network: object) -> np.ndarray:
        return predict_logits(
            engine.place(network),  # type: ignore[arg-type]
            classifier.info.preprocessing,
            pack.patches,
            pack.sizes,
            rows,
            engine=engine,
        )

    tensors, _ = _read(run.path / "checkpoints" / LAST)
    network = classifier.base_network
    averaged = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(_tensors_of(tensors, "network"))
    last = rank(predict(network))
    network.load_state_dict(averaged)
    one_view, symmetric = predict(network), predict(classifier.network)
    with_context = average_neighbours(symmetric, table, patch_px=classifier.info.patch_px, length=length)
    metrics = biopsy.evaluate(run)
    return {
        "recipe": name,
        "slide": "+".join(sorted(set(table["patient_id"]))),
        "seed": run.info["seed"],
        "n_patches": len(rows),
        "n_positive": int((target == 1).sum()),
        "auroc_last_weights": last,
        "auroc_averaged_weights": rank(one_view),
        "auroc_symmetries": rank(symmetric),
        "auroc_context": rank(with_context),
        "auroc_colour_alone": metrics["baseline"]["auroc"],
        **{name: metrics["patch"][name]["value"] for name in DECISION},
        "seconds": round(run.info["seconds"], 1),
    }


def main() -> None:
    parser = make_parser(__doc__.partition("\n")[0], "idc-small", "runs/idc")
    parser.add_argument("--slides", default=",".join(SLIDES))
    arguments = parse_arguments(parser)
    recipe, pack = load_recipe(arguments.recipe, arguments.set), Pack.open(arguments.pack)
    name = arguments.name or recipe.name
    for seed in map(int, arguments.seeds.split(",")):
        for slide in arguments.slides.split(","):
            path = arguments.out / f"{name.replace(' ', '-')}-lo-{slide}-s{seed}"
            run = train_once(recipe, pack, find_or_make_split(pack, slide), seed, path)
            row = measure(run, name)
            known = pd.read_csv(RESULTS, dtype={"slide": str}) if RESULTS.exists() else pd.DataFrame()
            if len(known):
                same = (
                    (known["recipe"] == row["recipe"]) & (known["slide"] == slide) & (known["seed"] == seed)
                )
                known = known[~same]
            pd.concat([known, pd.DataFrame([row])]).to_csv(RESULTS, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
