"""Whether labelling the patches that `biopsy next` chooses teaches more than as many at random.

Command::

    python benchmarks/next_to_label.py ENCODER PACK [--seeds 3] [--tests 8863,8865,8867]

ENCODER is a classifier of other data (here `pcam`, which ships), whose penultimate layer gives the features;
PACK is IDC. On these features a logistic regression is trained: 50 labels at random to begin with, then
rounds of 50 more, up to 300, from all patients but the tested one. Three ways to choose: at random; the
patches nearest to the threshold; the strategy `informative` of `biopsy next`, which also takes novelty
(Mahalanobis distance from what is labelled), lets patients take turns and keeps neighbours apart. The measure
is AUROC on the whole slide left out; mean over slides and seeds, and in how many of these pairs a way beats
random.

Rows go to ``results/next-to-label.csv``.
"""

import argparse
import csv
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biopsy.app.queue import choose
from biopsy.data.packs import Pack
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from biopsy.training.open_model import open_classifier

RESULTS = Path(__file__).parent / "results" / "next-to-label.csv"
START, STEP, ROUNDS = 50, 50, 5
WAYS = ("random", "uncertain", "informative")


def compute_features(encoder: str, pack: Pack) -> np.ndarray:
    """Return the encoder's penultimate layer of every patch, resized to the patches it was trained on."""
    classifier = open_classifier(encoder)
    side = classifier.info.patch_px
    patches = np.stack(
        [
            cv2.resize(np.asarray(patch), (side, side), interpolation=cv2.INTER_LINEAR)
            for patch in pack.patches
        ]
    )
    return predict_with_features(classifier, patches, engine=Engine("cpu"))[1]


def select(
    way: str,
    pool: np.ndarray,
    labelled: np.ndarray,
    probs: np.ndarray,
    features: np.ndarray,
    pack: Pack,
    seed: int,
) -> np.ndarray:
    """Return `STEP` rows of the pool."""
    if way == "random":
        return np.random.default_rng(seed).choice(pool, STEP, replace=False)
    uncertainty = 1 - 2 * np.abs(probs[pool] - 0.5)
    if way == "uncertain":
        return pool[np.argsort(-uncertainty, kind="stable")[:STEP]]
    scaled = StandardScaler().fit(features[labelled])
    known, others = scaled.transform(features[labelled]), scaled.transform(features[pool])
    precision = np.linalg.pinv(ledoit_wolf(known)[0], hermitian=True)
    table = pack.table.iloc[pool]
    candidates = pd.DataFrame(
        {
            "uncertainty": uncertainty,
            "ood_score": ((others @ precision) * others).sum(axis=1),
            "patient_id": table["patient_id"].to_numpy(str),
            "slide": table["slide_id"].fillna(table["patient_id"]).to_numpy(str),
            "x": table["x"].to_numpy(float),
            "y": table["y"].to_numpy(float),
            "side": float(pack.info.patch_px),
        }
    )
    return pool[choose(candidates, STEP)]


def learn(way: str, test: str, seed: int, features: np.ndarray, pack: Pack) -> list[float]:
    """Return AUROC on the tested patient after each round."""
    patients = pack.table["patient_id"].to_numpy(str)
    rng = np.random.default_rng(seed)
    available, tested = np.flatnonzero(patients != test), np.flatnonzero(patients == test)
    labelled = rng.choice(available, START, replace=False)
    curve = []
    for number in range(ROUNDS + 1):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        model.fit(features[labelled], pack.target[labelled])
        probs = model.predict_proba(features)[:, 1]
        curve.append(float(roc_auc_score(pack.target[tested], probs[tested])))
        pool = np.setdiff1d(available, labelled)
        chosen = select(way, pool, labelled, probs, features, pack, seed=1000 * seed + number)
        labelled = np.concatenate([labelled, chosen])
    return curve


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("pack")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tests", default="8863,8865,8867")
    args = parser.parse_args()
    pack = Pack.open(args.pack)
    features = compute_features(args.encoder, pack)
    pairs = [(test, seed) for test in args.tests.split(",") for seed in range(args.seeds)]
    curves = {way: np.array([learn(way, *pair, features, pack) for pair in pairs]) for way in WAYS}
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["way", "labels", "auroc_mean", "auroc_sd", "better_than_random", "pairs"])
        for way, curve in curves.items():
            for number in range(ROUNDS + 1):
                values = curve[:, number]
                better = int((values > curves["random"][:, number]).sum())
                mean, spread = f"{values.mean():.4f}", f"{values.std(ddof=1):.4f}"
                writer.writerow([way, START + STEP * number, mean, spread, better, len(pairs)])
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
