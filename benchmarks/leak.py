"""The leak of a slide and its placebo, for models that are fitted in a second: many seeds, every arm.

For each of three slides and each seed the arms of `biopsy.experiments.leakage.make_leak_splits` are made. On
each a logistic regression is fitted to

* ``colour``: the statistics of the colour-only baseline (as it is in every evaluation);
* ``squeezenet``: the last features of SqueezeNet 1.1 with ImageNet weights, frozen,

with the inverse strength of the penalty at 1 and .01 on standardised features. AUROC is that of the tested
half; arms of one design, slide and seed test the same patches.

Command (about two minutes on one core)::

    python benchmarks/leak.py idc.pack --weights squeezenet_v1.1_imagenet_notop_tf.h5

Writes ``results/leak-arms.csv`` (a row per model, arm, slide and seed) and ``results/leak.csv``
(differences between arms: a row per model, comparison and slide, with mean, standard deviation and range over
seeds; the row ``all`` has the mean over slides of each seed).
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biopsy.data.packs import Pack
from biopsy.experiments.leakage import make_leak_splits
from biopsy.experiments.reproduction_summary import CONTRASTS
from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from biopsy.models.weights import make_network
from biopsy.recipes import load_recipe
from biopsy.slide_io.stain import colour_features

RESULTS = Path(__file__).parent / "results"
SLIDES = ("8863", "8865", "8867")
PENALTY = {"colour": 1.0, "squeezenet": 0.01}


def compute_features(pack: Pack, weights: Path) -> dict[str, np.ndarray]:
    """Return the features of every patch by model, ``(n_patches, n_features)``."""
    recipe = load_recipe("squeezenet-pcam", {"model.weights": str(weights)})
    network, _ = make_network(recipe, 2, seed=0)
    info = ClassifierInfo(
        network=recipe.model.name,
        class_names=pack.class_names,
        positive_class=pack.info.positive_class,
        patch_px=pack.info.patch_px,
        mpp=pack.info.mpp,
        preprocessing=recipe.preprocessing.fixed(),
    )
    classifier = Classifier(info, network)
    _, frozen = predict_with_features(classifier, pack.patches, pack.sizes, engine=Engine("cpu"))
    return {"colour": colour_features(pack.patches, pack.sizes), "squeezenet": frozen}


def measure_arms(pack: Pack, features: dict[str, np.ndarray], seeds: int) -> pd.DataFrame:
    """Return a row per model, arm, slide and seed."""
    rows = []
    for place, tested in enumerate(SLIDES):
        validates, placebo = (SLIDES[(place + step) % len(SLIDES)] for step in (1, 2))
        for seed in range(seeds):
            for arm, split in make_leak_splits(pack, tested, validates, seed, placebo_id=placebo).items():
                subsets = split.subsets(pack)
                train, test = np.flatnonzero(subsets == "train"), np.flatnonzero(subsets == "test")
                for model, values in features.items():
                    fitted = make_pipeline(
                        StandardScaler(), LogisticRegression(C=PENALTY[model], solver="newton-cholesky")
                    ).fit(values[train], pack.target[train])
                    score = fitted.decision_function(values[test])
                    rows.append(
                        {
                            "model": model,
                            "arm": arm,
                            "tested": tested,
                            "seed": seed,
                            "n_train": len(train),
                            "n_test": len(test),
                            "n_leaked": split.parameters.get("leaked", 0),
                            "touching": split.parameters["touching"],
                            "auroc": roc_auc_score(pack.target[test], score),
                        }
                    )
    return pd.DataFrame(rows)


def compare_arms(arms: pd.DataFrame) -> pd.DataFrame:
    """Return the differences between arms, paired by slide and seed."""
    rows = []
    wide = arms.pivot(index=["model", "tested", "seed"], columns="arm", values="auroc")
    for name, (arm, reference) in CONTRASTS.items():
        gained = (wide[arm] - wide[reference]).rename("gained").reset_index()
        whole = gained.groupby(["model", "seed"], as_index=False)["gained"].mean().assign(tested="all")
        for (model, tested), of_slide in pd.concat([gained, whole]).groupby(["model", "tested"]):
            values = of_slide["gained"]
            spread = {"mean": values.mean(), "sd": values.std(), "min": values.min(), "max": values.max()}
            rows.append({"model": model, "comparison": name, "tested": tested, "seeds": len(values)} | spread)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    pack = Pack.open(arguments.pack)
    arms = measure_arms(pack, compute_features(pack, arguments.weights), arguments.seeds)
    arms.to_csv(RESULTS / "leak-arms.csv", index=False, float_format="%.5f")
    table = compare_arms(arms)
    table.to_csv(RESULTS / "leak.csv", index=False, float_format="%.4f")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
