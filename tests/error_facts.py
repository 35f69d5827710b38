"""Facts of a report with mistakes looked at closely, for the tests of that chapter."""

from dataclasses import replace

import numpy as np
import pandas as pd

from biopsy.core.files import plain
from biopsy.core.loaders import validate
from biopsy.evaluation.errors.measure import (
    FORMAT,
    KINDS,
    CaseView,
    ErrorRecord,
    Errors,
    contrast_errors,
    find_unusual,
    pick_galleries,
)
from biopsy.evaluation.neighbours import count_neighbours, find_zones, measure_zones
from biopsy.evaluation.patch_properties import PROPERTIES
from biopsy.evaluation.scored import ScoredPatches
from report_facts import NAMES, THRESHOLD, make_facts

TRAINED = "16896"  # a patient only seen in training


def make_mistakes(predictions, *, unit="patient", n=4, seed=0):
    """Mistakes of made-up predictions: missed patches are pale."""
    rng = np.random.default_rng(seed)
    positive, called = predictions["target"] == 1, predictions["prob"] >= THRESHOLD
    kind = np.where(positive, np.where(called, "tp", "fn"), np.where(called, "fp", "tn"))
    properties = pd.DataFrame({name: rng.normal(1, 0.2, len(predictions)) for name in PROPERTIES})
    properties["stain"] -= 0.3 * (kind == "fn")
    target = predictions["target"].to_numpy(int)
    zones = find_zones(count_neighbours(predictions, target, 2), target)
    names = ["patch_id", "patient_id", "slide_id", "x", "y", "target", "prob"]
    table = pd.concat([predictions[names].assign(kind=kind, sampled=True), zones, properties], axis=1)
    groups = table["patient_id" if unit == "patient" else "patch_id"].to_numpy(str)
    prob = predictions["prob"].to_numpy(float)
    scored = ScoredPatches(
        target=target,
        probs=np.stack([1 - prob, prob], axis=1),
        pred=called.to_numpy(int),
        group_ids=groups,
        class_names=NAMES,
        positive_class=NAMES[1],
        unit=unit,
    )
    nearest = [
        {
            "patch_id": f"{TRAINED}_{i}",
            "patient_id": TRAINED,
            "slide_id": None,
            "class": NAMES[i % 2],
            "distance": 0.5 + i,
        }
        for i in range(3)
    ]
    about = {
        "format": FORMAT,
        "subset": "test",
        "n_patches": len(table),
        "classifier_sha256": "0" * 64,
        "seed": seed,
        "n": n,
        "positive_class": NAMES[1],
        "threshold": THRESHOLD,
        "n_measured": len(table),
        "unit": unit,
        "n_groups": len(np.unique(groups)),
        "counts": {name: int((kind == name).sum()) for name in KINDS},
        "properties": PROPERTIES,
        **contrast_errors(table, groups, seed=0, unit=unit),
        "zones": measure_zones(table["zone"].to_numpy(object), scored, THRESHOLD),
        "training_reference": {"n": 2000, "distance": "1 is the median distance"},
        "galleries": {
            name: [
                {
                    "patch_id": table["patch_id"].iloc[place],
                    "unusual": find_unusual(table.iloc[place], table),
                    "nearest": nearest,
                }
                for place in places
            ]
            for name, places in pick_galleries(table, THRESHOLD, n).items()
        },
    }
    return ErrorRecord(validate("errors.json", Errors, plain(about)), table)  # as it is read


def draw_case_views(mistakes, *, patch_px=50, overview=True, seed=0):
    """Noise in place of tissue: as large as JPEG can be."""
    rng = np.random.default_rng(seed)

    def noise():
        return rng.integers(0, 256, (patch_px, patch_px, 3), dtype=np.uint8)

    names = {one["patch_id"] for part in mistakes.document["galleries"].values() for one in part}
    views = {
        name: CaseView(noise(), noise(), False, noise() if overview else None, [noise() for _ in range(3)])
        for name in sorted(names)
    }
    return replace(mistakes, views=views, caption="Saliency shows this; it is not that.")


def make_error_facts(*arguments, unit="patient", n=4, patch_px=50, **changes):
    """Facts with mistakes and their pictures."""
    facts = make_facts(*arguments, **changes)
    mistakes = make_mistakes(facts.predictions, unit=unit, n=n)
    return replace(facts, results={"errors": draw_case_views(mistakes, patch_px=patch_px)})
