"""Facts of a small made-up run and study, and a page parser, for the tests of reports."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd

from biopsy.core.files import plain
from biopsy.reporting.facts import RunFacts, StudyFacts
from biopsy.statistics.intervals import describe_method, estimate_metrics, estimate_patient_metrics
from biopsy.statistics.multiclass import classification_report
from biopsy.statistics.reliability import estimate_reliability
from biopsy.statistics.weighted_counts import sort_scores

NAMES = ["not IDC", "IDC"]
THRESHOLD = 0.43
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


def make_predictions(patient_ids, patches_per_patient=64, seed=0):
    """Predictions of slides on a grid of IDC's coordinates, tumour in a corner; the last patient has none."""
    rng = np.random.default_rng(seed)
    side = int(np.sqrt(patches_per_patient))
    parts = []
    for index, name in enumerate(patient_ids):
        x, y = (grid.ravel() for grid in np.meshgrid(np.arange(side), np.arange(side)))
        target = (x + y < side * 0.8).astype(int) * (index < len(patient_ids) - 1)
        logit = 2 * target - 1 + rng.normal(0, 1.2, len(x))
        parts.append(
            pd.DataFrame(
                {
                    "patch_id": [f"{name}_x{a}_y{b}" for a, b in zip(x * 50 + 1, y * 50 + 1, strict=True)],
                    "patient_id": name,
                    "slide_id": f"{name}-slide",
                    "x": x * 50 + 1,
                    "y": y * 50 + 1,
                    "subset": "test",
                    "fold": 0,
                    "target": target,
                    "prob": 1 / (1 + np.exp(-logit)),
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    return table.assign(pred=(table["prob"] >= THRESHOLD).astype(int))


def estimate_patch_metrics(target, prob, group_ids, threshold=0.5, *, y_pred=None, **resampling):
    """Every metric of two classes pooled over patches, with its interval over groups."""
    sample = sort_scores(target, prob, threshold, group_ids=group_ids, y_pred=y_pred)
    return estimate_metrics(sample, **resampling)


def reliability_bins(target, prob, **options):
    """The bins of the calibration error, each patch its own group."""
    bins = estimate_reliability(target, prob, np.arange(len(prob)), seed=0, **options)
    return pd.DataFrame([{**vars(one), "observed": one.observed.value} for one in bins])


def make_metrics(table):
    target, prob, groups = table["target"], table["prob"], table["patient_id"]
    called = prob >= THRESHOLD
    counts = {
        "tp": int((called & (target == 1)).sum()),
        "fp": int((called & (target == 0)).sum()),
        "fn": int((~called & (target == 1)).sum()),
        "tn": int((~called & (target == 0)).sum()),
    }
    patch = estimate_patch_metrics(target, prob, groups, THRESHOLD, seed=0)
    patients = estimate_patient_metrics(target, prob, groups, THRESHOLD)
    metrics = {
        "subset": "test",
        "positive_class": "IDC",
        "n_patches": len(table),
        "n_patients": groups.nunique(),
        "split": {"name": "patients", "patients_overlap": False},
        "threshold": {"value": THRESHOLD, "rule": "youden", "chosen_on": "validation"},
        "confusion": counts,
        "at_half": counts,
        "classification_report": classification_report(
            [[counts["tn"], counts["fp"]], [counts["fn"], counts["tp"]]], NAMES
        ),
        "patch": patch,
        "patient": patients,
        "interval": describe_method(groups.nunique(), seed=0),
        "baseline": {"auroc": 0.612, "reason": None, "interval": {"value": 0.612, "low": 0.55, "high": 0.67}},
        "subgroups": {
            "scanner": {"A & B": {"n_patches": 9, "n_patients": 2, "patch": {"auroc": {"value": 0.777}}}}
        },
        "times_opened": {"times": 4, "runs": 2, "kept_with": "pack"},
    }
    return plain(metrics)


def make_facts(patient_ids=("10286", "11053", "12810", "13016", "14038", "15478"), **changes):
    table = changes.pop("predictions", None)
    table = make_predictions(patient_ids) if table is None else table
    first, second, third, fourth, fifth, *_ = (*patient_ids, *patient_ids, *patient_ids)
    facts = RunFacts(
        run={
            "id": "cancernet-2020-s0-run",
            "seed": 7,
            "split": {
                "name": "patients",
                "protocol": "patients",
                "sides": {"test": {"patches": 384, "groups": 6}},
            },
            "pack": {"dataset": "idc", "n_patches": 8151, "path": f"/home/ann/{first}.pack"},
            "command": f"biopsy train cancernet-2020 --data /home/ann/{first}.pack --test-patients "
            f"{second},{third}",
            "chosen_epoch": 2,
            "parameters": {"total": 1_235_133, "trainable": 1_233_533},
            "environment": {"biopsy": "0.1.0", "cpu": "some processor"},
        },
        metrics=changes.pop("metrics", None) or make_metrics(table),
        predictions=table,
        class_names=NAMES,
        log=[{"epoch": e, "loss": 1 / e, "val_loss": 2 / e, "val_auroc": 0.8, "lr": 0.01} for e in (1, 2, 3)],
        recipe={
            "title": "CancerNet, 2020",
            "origin": {
                "claim": {"accuracy": 0.837},
                "corrected": {"sensitivity": 0.853},
                "flaws": ["patches divided"],
            },
        },
        recipe_toml=f'name = "cancernet-2020"\n# tried on {fourth}\n',
        network=[("conv", "Conv2d", (8, 16, 16), 224), ("out", "Linear", (2,), 18)],
        input_shape=(3, 16, 16),
        get_patch=lambda patch_id: np.full((50, 50, 3), len(patch_id), np.uint8),
        patch_px=50,
        mpp=4.0,
        audit={"format": "biopsy-audit/1", "odd_sizes": {"count": 8, "items": [f"{fifth}_x1_y1"]}},
    )
    return replace(facts, **changes)


def make_small_facts(patient_ids=("8863", "8865", "8867", "8913", "8975"), **changes):
    """Facts without pictures, log and network: a report in a moment."""
    return make_facts(patient_ids, **{"get_patch": None, "log": (), "network": (), **changes})


def make_study(patient_ids=("8863", "8865", "8867")):
    parts = [make_predictions((*patient_ids, "none"), seed=seed).assign(seed=seed) for seed in range(3)]
    table = pd.concat(parts, ignore_index=True)
    table = table[table["patient_id"] != "none"].reset_index(drop=True)
    table["fold"] = table["patient_id"]
    runs = pd.DataFrame(
        [
            {
                "fold": fold,
                "seed": seed,
                "auroc": 0.7 + 0.05 * i + 0.01 * seed,
                "baseline_auroc": 0.65,
                "n_patches": 64,
            }
            for i, fold in enumerate(patient_ids)
            for seed in range(3)
        ]
    )
    return StudyFacts(
        study={"name": "left-out", "command": "biopsy study cancernet-2020", "seeds": [0, 1, 2]},
        table=runs,
        predictions=table,
        metrics=make_metrics(table),
        class_names=NAMES,
        baselines={name: 0.65 for name in patient_ids},
        recipe={"title": "CancerNet, 2020"},
        recipe_toml="x = 1",
    )


class Page(HTMLParser):
    """A parsed page: tags with attributes, visible text, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def sections(self):
        """Ids of the sections, in order."""
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def figures(text):
    """Return the source of every figure in a page."""
    return re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
