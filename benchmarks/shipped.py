"""Build a classifier that ships with the package: weights in half precision, classifier.json, model card.

    python benchmarks/shipped.py idc --run RUN                       from a finished run
    python benchmarks/shipped.py idc --data idc.pack --split all     trains the recipe first

`idc` tests no patient (``biopsy split --protocol no-test``), so every whole slide trains: what its recipe
reaches on slides that were not seen is known from runs that left out a slide each (`Shipped.left_out`).

From one run the files are the same bit for bit. A training is the same bit for bit on one machine and
version; elsewhere its AUROC on validation patches may differ by TOLERANCE_AUROC. Rounding may move a
probability by TOLERANCE_PROB, and a distance from training by TOLERANCE_DISTANCE of its limit (beyond the
limit, of itself); files of more than MAX_BYTES are refused.

The recipe `pcam-small` does not fit: SqueezeNet's 723,000 weights take 1.4 MB in half precision. What ships
as `pcam` is that recipe with the first six of SqueezeNet's eight fire modules, trained for eight epochs.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.core.text import count, plural
from biopsy.exporting.model_card import card_of_run, gather_card, metadata_of_run
from biopsy.models.classifier import WEIGHTS, Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits, predict_with_features
from biopsy.models.out_of_distribution import out_of_distribution_scores
from biopsy.models.shipped import FOLDER

RESULTS = Path(__file__).parent / "results"
MAX_BYTES = 1_000_000
OOD_QUANTILE = 0.95
IDC_PREVALENCE = 0.284  # 78,786 of the 277,524 patches of the whole release; of the calibrating patches 45 %
TOLERANCE_PROB, TOLERANCE_AUROC, TOLERANCE_DISTANCE = 0.01, 0.01, 0.05


@dataclass(frozen=True)
class Shipped:
    """How a classifier is trained, and the data it stands on.

    Classes (the positive one last) and um/px are stated here: the pack of a run may number its classes and
    know no um/px.
    """

    recipe: str
    class_names: list[str]
    mpp: float
    data: str
    citation: str
    licence: str
    left_out: str = ""
    """Table in ``results/`` of runs of the recipe that left out a slide each."""
    overrides: dict[str, object] = field(default_factory=dict)


SHIPPED = {
    "idc": Shipped(
        recipe="idc-small",
        class_names=["non_idc", "idc"],
        mpp=4.0,
        data="the Kaggle release of IDC (breast, scans reduced to 4 um/px)",
        citation="Data: Cruz-Roa et al. 2014 (SPIE 9041, 904103); Janowczyk and Madabhushi 2016 (J Pathol "
        "Inform 7:29); Kaggle release by P. Mooney.",
        licence="Apache-2.0; the data are CC0, as their Kaggle page says",
        left_out="idc-loso.csv",
        overrides={"decision.prevalence": IDC_PREVALENCE},
    ),
    "pcam": Shipped(
        recipe="pcam-small",
        class_names=["normal", "tumour"],
        mpp=0.972,
        data="PCam (lymph nodes of breast-cancer patients, 0.972 um/px)",
        citation="Data: Veeling et al. 2018 (MICCAI), from Camelyon16 (Ehteshami Bejnordi et al. 2017, "
        "JAMA). First weights: SqueezeNet 1.1 (Iandola et al. 2016) from ImageNet, file of J. Wohlert (MIT).",
        licence="Apache-2.0; the data are CC0 1.0, the first weights MIT",
        overrides={"model.params.n_fire": 6, "train.epochs": 8},
    ),
}


def build(name: str, run: biopsy.Run, out: Path) -> Classifier:
    """Write the files of one classifier from a finished run, and check them."""
    known, original = SHIPPED[name], run.classifier
    if original.positive_index != 1 or original.info.mpp not in (None, known.mpp):
        raise SystemExit(f"{run.path} is of {original.info.class_names} at {original.info.mpp} um/px")
    original.info = original.info.model_copy(
        update={
            "class_names": known.class_names,
            "positive_class": known.class_names[-1],
            "mpp": known.mpp,
            "description": describe(known, run),
            "citation": known.citation,
            "licence": known.licence,
        }
    )
    tighten(original, run)
    rounded = Classifier(original.info, original.base_network, original.extras)
    rounded.save(out, precision="fp16")
    rounded = Classifier.load(out)
    facts = gather_card(rounded, run)
    (out / "README.md").write_text(f"{metadata_of_run(facts)}\n{card_of_run(facts)}", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"{out} has {size:,} bytes, {WEIGHTS} among them; at most {MAX_BYTES:,} ship")
    compare(original, rounded, run)
    print(f"{out}: {size:,} bytes\n{rounded.info.description}")
    return rounded


def tighten(classifier: Classifier, run: biopsy.Run) -> None:
    """Lower the out-of-distribution limits to the `OOD_QUANTILE` of validation patches.

    These are few, and some lie at slide edges: beyond their 99th percentile not even skin is found.
    """
    distances, about = measure_distances(classifier, run), classifier.info.out_of_distribution
    assert about is not None
    limits = {
        kind: limit * float(np.quantile(distances[f"{kind}_distance"], OOD_QUANTILE))
        for kind, limit in about["limits"].items()
    }
    classifier.info.out_of_distribution = about | {"quantile": OOD_QUANTILE, "limits": limits}


def measure_distances(classifier: Classifier, run: biopsy.Run) -> pd.DataFrame:
    """Return how far up to 1,000 validation patches are from training."""
    pack = run.open_pack()
    rows = np.flatnonzero(run.subsets(pack) == run.validation_subset)
    rows = np.sort(np.random.default_rng(0).choice(rows, min(len(rows), 1000), replace=False))
    patches, sizes = np.array(pack.patches[rows]), pack.sizes[rows]
    _, features = predict_with_features(classifier, patches, sizes, engine=Engine("cpu"))
    return out_of_distribution_scores(classifier, patches, sizes, features)


def describe(known: Shipped, run: biopsy.Run) -> str:
    """Return the sentences that say on how few patients a classifier stands, and how well its recipe does."""
    subsets, unit = run.info["split"]["subsets"], run.info["split"]["unit"]

    def count_of(subset: str) -> str:
        of = "" if unit == "patch" else f" of {count(subsets[subset]['groups'], unit)}"
        return f"{count(subsets[subset]['patches'], 'patch')}{of}"

    text = f"Trained on {count_of('train')} of {known.data}, calibrated on {count_of('validation')}"
    text += f", tested on {count_of('test')}" if run.has_test_patches else ", not tested"
    few = "slides and patients are not named, so their number is unknown"
    text += f"; {few if unit == 'patch' else f'too few {plural(unit)} to say how it does on the next one'}."
    return text + (f" {summarise_left_out(known)}" if known.left_out else "")


def summarise_left_out(known: Shipped) -> str:
    """Return the AUROC of the recipe on slides that its training left out, mean over seeds."""
    runs = pd.read_csv(RESULTS / known.left_out, dtype={"slide": str})
    of_slide = runs[runs["recipe"] == known.recipe].groupby("slide")
    single, context = (of_slide[name].mean() for name in ("auroc_symmetries", "auroc_context"))
    seeds = count(int(of_slide["seed"].nunique().min()), "seed")
    return (
        f"With each of {len(single)} slides left out of training, its recipe has an AUROC on that slide of "
        f"{list_values(single)}, with neighbouring patches {list_values(context)} (mean of {seeds})."
    )


def list_values(of_slide: pd.Series) -> str:
    """Return ``.939 (8863), .964 (8865)``."""
    return ", ".join(f"{value:.3f} ({slide})".lstrip("0") for slide, value in of_slide.items())


def compare(original: Classifier, rounded: Classifier, run: biopsy.Run) -> None:
    """Print what rounding changed on the validation patches, and refuse too much."""
    pack = run.open_pack()
    rows = np.flatnonzero(run.subsets(pack) == run.validation_subset)
    probs, positive = [], original.positive_index
    for classifier in (original, rounded):
        single = classifier.single_patch()
        logits = predict_logits(
            single.network, single.info.preprocessing, pack.patches, pack.sizes, rows, engine=Engine("cpu")
        )
        probs.append(single.probs(logits)[:, positive])
    difference = float(np.abs(probs[0] - probs[1]).max())
    aurocs = [roc_auc_score(pack.target[rows] == positive, prob) for prob in probs]
    print(
        f"{len(rows):,} validation patches, each by itself: largest difference of a probability "
        f"{difference:.1e}, AUROC {aurocs[0]:.4f} and {aurocs[1]:.4f} rounded"
    )
    exact, half = (
        measure_distances(classifier, run).drop(columns="out_of_distribution")
        for classifier in (original, rounded)
    )
    shift = float(((half - exact).abs() / exact.clip(lower=1)).max(axis=None))
    print(f"largest difference of a distance from training {shift:.1e} of its limit")
    if not difference <= TOLERANCE_PROB or not shift <= TOLERANCE_DISTANCE:
        raise SystemExit(
            f"rounding moves a probability by {difference:.2g} (at most {TOLERANCE_PROB}) and a distance by "
            f"{shift:.2g} of its limit (at most {TOLERANCE_DISTANCE})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHIPPED)
    parser.add_argument("--run", type=Path, help="finished run; without it, one is trained")
    parser.add_argument("--data", type=Path, help="pack to train on")
    parser.add_argument("--split", help="split of that pack")
    parser.add_argument("--out", type=Path, help="folder (default: the package's own)")
    given = parser.parse_args()
    if given.run is None:
        known = SHIPPED[given.name]
        run = biopsy.train(known.recipe, given.data, split=given.split, seed=0, overrides=known.overrides)
        if run.has_test_patches:
            biopsy.evaluate(run)
    else:
        run = biopsy.Run.open(given.run)
    build(given.name, run, given.out or FOLDER / given.name)


if __name__ == "__main__":
    main()
