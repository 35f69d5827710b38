"""Facts of a small made-up run and study, and a page parser, for the tests of reports."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd

from biopsy.data.packs import known_groups
from biopsy.evaluation.evaluate import measure
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.study_tables import measure_folds, measure_pooled, summarise_groups
from biopsy.recipes import Recipe
from biopsy.recipes.schema import Model, Origin
from biopsy.reporting.facts import RunFacts, StudyFacts
from biopsy.statistics.intervals import estimate_metrics
from biopsy.statistics.reliability import estimate_reliability
from biopsy.statistics.resampling import Interval
from biopsy.statistics.weighted_counts import sort_scores
from biopsy.training.metrics import ColourBaseline, SplitUse, Subgroup

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
    """The metrics of predictions, without calibrator, operating points and abstention."""
    table = table.assign(**{f"prob_{NAMES[0]}": 1 - table["prob"], f"prob_{NAMES[1]}": table["prob"]})
    scored = ScoredPatches.of_predictions(table, NAMES, "IDC", "patient")
    threshold = {"value": THRESHOLD, "rule": "youden", "chosen_on": "validation"}
    auroc = Interval(0.612, 0.55, 0.67)
    baseline = ColourBaseline(name="colours", features=[], C=1.0, n_train=9, auroc=0.612, interval=auroc)
    return replace(
        measure(scored, pd.DataFrame(index=table.index), [threshold], groups=known_groups(table, "patient")),
        subset="test",
        split=SplitUse("patients", patients_overlap=False),
        operating_points=None,
        decision_curve=None,
        baseline=baseline,
        subgroups={"scanner": {"A & B": Subgroup(9, 2, {"auroc": Interval(0.777)})}},
        warnings=[],
        times_opened=4,
        ledger={"times": 4, "runs": 2, "kept_with": "pack", "unreadable": 0},
    )


RECIPE = Recipe(
    name="cancernet-2020",
    title="CancerNet, 2020",
    model=Model(name="cancernet"),
    origin=Origin(claim={"accuracy": 0.837}, corrected={"sensitivity": 0.853}, flaws=["patches divided"]),
)


def make_facts(patient_ids=("10286", "11053", "12810", "13016", "14038", "15478"), **changes):
    table = changes.pop("predictions", None)
    table = make_predictions(patient_ids) if table is None else table
    first, second, third, fourth, fifth, *_ = (*patient_ids, *patient_ids, *patient_ids)
    facts = RunFacts(
        run={
            "id": "cancernet-2020-s0-run",
            "seed": 7,
            "recipe": "cancernet-2020",
            "status": "finished",
            "started": "2026-11-22T10:00:00+00:00",
            "seconds": 99.0,
            "weights": {"pretrained": False, "weights": None, "sha256": None},
            "split": {
                "name": "patients",
                "protocol": "patients",
                "fold": None,
                "unit": "patient",
                "as_published": False,
                "patients_overlap": False,
                "subsets": {},
                "used": {"patches": 4321, "groups": 9, "per_class": {}},
            },
            "pack": {
                "dataset": "idc",
                "n_patches": 8151,
                "path": f"/home/ann/{first}.pack",
                "content_sha256": "0" * 64,
            },
            "command": f"biopsy train cancernet-2020 --data /home/ann/{first}.pack --test-patients "
            f"{second},{third}",
            "chosen_epoch": 2,
            "parameters": {"total": 1_235_133, "trainable": 1_233_533},
            "environment": {"biopsy": "0.1.0", "cpu": "some processor"},
        },
        metrics=changes.pop("metrics", None) or make_metrics(table),
        positive_class="IDC",
        predictions=table,
        class_names=NAMES,
        log=[{"epoch": e, "loss": 1 / e, "val_loss": 2 / e, "val_auroc": 0.8, "lr": 0.01} for e in (1, 2, 3)],
        recipe=RECIPE,
        recipe_toml=f'name = "cancernet-2020"\n# tried on {fourth}\n',
        network=[("conv", "Conv2d", (8, 16, 16), 224), ("out", "Linear", (2,), 18)],
        input_shape=(3, 16, 16),
        get_patch=lambda patch_id: np.full((50, 50, 3), len(patch_id), np.uint8),
        patch_px=50,
        mpp=4.0,
        audit={"format": "biopsy-audit/1", "padded": {"count": 8, "items": [f"{fifth}_x1_y1"]}},
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
    table = table.assign(**{f"prob_{NAMES[0]}": 1 - table["prob"], f"prob_{NAMES[1]}": table["prob"]})
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
        study={
            "name": "left-out",
            "command": "biopsy study cancernet-2020",
            "seeds": [0, 1, 2],
            "pack": {"name": "tiny.pack", "content_sha256": "0" * 64},
            "split": None,
            "environment": {"biopsy": "0.1.0"},
        },
        table=runs,
        fold_results=measure_folds(runs),
        predictions=table,
        metrics=measure_pooled(
            [ScoredPatches.of_predictions(part, NAMES, "IDC", "patient") for _, part in table.groupby("seed")]
        ),
        positive_class="IDC",
        class_names=NAMES,
        groups=summarise_groups(table, runs.assign(tested=runs["fold"]), make_metrics(table)),
        recipe=RECIPE,
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
