"""A module of one's own as a classifier: every command takes it, and what does not fit is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import biopsy
from biopsy.core.errors import DataError, RunError
from biopsy.models.classifier import Classifier
from refusals import refuses

OPTIONS = {"class_names": ["normal", "tumour"], "input_px": 16, "mpp": 4.0}


def make_module(n_outputs=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, n_outputs),
        )


def test_the_hash_of_a_classifier_never_saved_covers_its_weights():
    first, same, other = (Classifier.wrap(make_module(seed=seed), **OPTIONS) for seed in (0, 0, 1))
    assert first.sha256 == same.sha256 != other.sha256


def test_the_map_of_one_module_is_not_taken_for_that_of_another(make_slide, tmp_path):
    slide = make_slide(mpp=4.0)
    first, other = (Classifier.wrap(make_module(seed=seed), **OPTIONS) for seed in (0, 1))
    maps = [biopsy.slide(one, slide, out=tmp_path / "maps", device="cpu") for one in (first, other)]
    assert maps[0].probs.shape == maps[1].probs.shape
    assert not np.array_equal(maps[0].probs, maps[1].probs)


@pytest.fixture
def classifier():
    return Classifier.wrap(make_module(), **OPTIONS)


def test_probabilities_are_the_modules_own(make_pack, classifier, tmp_path):
    pack = make_pack(n_patients=3, patches_per_patient=4, patch_px=16)
    found = biopsy.predict(classifier, pack.path, out=tmp_path / "p.csv", device="cpu").frame
    batch = torch.from_numpy(np.array(pack.patches)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        wanted = torch.softmax(make_module().eval()(batch), dim=1)[:, 1].numpy()
    assert found["prob"].to_numpy() == pytest.approx(wanted, abs=1e-5)


def test_mean_and_std_are_of_values_in_0_to_1(make_pack, tmp_path):
    pack, mean, std = (
        make_pack(n_patients=2, patches_per_patient=4, patch_px=16),
        (0.7, 0.5, 0.6),
        (0.2, 0.3, 0.1),
    )
    classifier = Classifier.wrap(make_module(), **OPTIONS, mean=mean, std=std)
    found = biopsy.predict(classifier, pack.path, out=tmp_path / "p.csv", device="cpu").frame
    batch = torch.from_numpy(np.array(pack.patches)).permute(0, 3, 1, 2).float() / 255
    batch = (batch - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.inference_mode():
        wanted = torch.softmax(make_module().eval()(batch), dim=1)[:, 1].numpy()
    assert found["prob"].to_numpy() == pytest.approx(wanted, abs=1e-5)


def test_one_output_is_the_logit_of_the_second_class(make_pack, tmp_path):
    pack = make_pack(n_patients=2, patches_per_patient=4, patch_px=16)
    classifier = Classifier.wrap(make_module(1), **OPTIONS)
    found = biopsy.predict(classifier, pack.path, out=tmp_path / "p.csv", device="cpu").frame
    batch = torch.from_numpy(np.array(pack.patches)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        wanted = torch.sigmoid(make_module(1).eval()(batch))[:, 0].numpy()
    assert found["prob"].to_numpy() == pytest.approx(wanted, abs=1e-5)


def test_evaluate_on_a_pack(make_pack):
    from sklearn.metrics import roc_auc_score

    pack = make_pack(n_patients=6, patches_per_patient=6, patch_px=16)
    classifier = Classifier.wrap(make_module(), **OPTIONS | {"class_names": pack.class_names})
    found = biopsy.evaluate(classifier, data=pack)
    frame = found.predictions
    assert found["n_patches"] == len(pack) and found["n_patients"] == 6
    assert found["patch"]["auroc"]["value"] == pytest.approx(roc_auc_score(frame["target"], frame["prob"]))
    assert (pack.path / "ledger.jsonl").read_text().count("\n") == 1
    with refuses(RunError, "data="):
        biopsy.evaluate(classifier)
    with refuses(RunError, "classes"):
        biopsy.evaluate(Classifier.wrap(make_module(), **OPTIONS), data=pack)


def test_explain(make_pack, classifier, tmp_path):
    pack = make_pack(n_patients=2, patches_per_patient=4, patch_px=16)
    found = biopsy.explain(classifier, data=pack.path, errors=1, out=tmp_path / "explain", device="cpu")
    assert found["patches"] and (tmp_path / "explain" / "explain.json").is_file()


def test_export_runs_elsewhere_and_is_wrapped_again_here(make_pack, classifier, tmp_path):
    pytest.importorskip("onnxruntime")
    pack = make_pack(n_patients=3, patches_per_patient=4, patch_px=16)
    bundle = biopsy.export(classifier, tmp_path / "bundle", data=pack)
    assert bundle.parity["largest_difference"]
    with refuses(RunError, "wrap"):
        biopsy.predict(bundle.path, pack.path, out=tmp_path / "p.csv")


class Odd(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, batch):
        return self.output(batch)


@pytest.mark.parametrize(
    ("module", "options", "facts"),
    [
        (make_module(3), {}, ["(2, 3)", "(2, 2)"]),
        (make_module(2), {"class_names": ["a", "b", "c"]}, ["(2, 2)", "(2, 3)"]),
        (Odd(lambda batch: batch), {}, ["(2, 3, 16, 16)"]),
        (Odd(lambda batch: [1, 2]), {}, ["list"]),
        (nn.Linear(7, 2), {}, ["Linear"]),
        (make_module(), {"class_names": ["a"]}, ["['a']"]),
        (make_module(), {"class_names": ["a", "a"]}, ["['a', 'a']"]),
        (make_module(), {"positive_class": "c"}, ["'c'"]),
        (make_module(), {"threshold": 3}, ["threshold=3"]),
    ],
)
def test_what_does_not_fit_is_refused(module, options, facts):
    with refuses(RunError, *facts):
        Classifier.wrap(module, **OPTIONS | options)


def test_a_slide_of_unknown_resolution_is_refused(make_slide):
    unknown = Classifier.wrap(make_module(), **OPTIONS | {"mpp": None})
    with pytest.raises((RunError, DataError)):
        biopsy.slide(unknown, make_slide(mpp=4.0), device="cpu")


@pytest.mark.parametrize(
    ("module", "changes", "named"),
    [
        (lambda batch: batch, {}, "function"),
        (make_module(), {"mpp": 0}, "mpp=0"),
        (make_module(), {"mpp": float("nan")}, "mpp=nan"),
        (make_module(), {"input_px": 0}, "input_px=0"),
        (make_module(), {"patch_px": -1}, "patch_px=-1"),
        (make_module(), {"patch_px": 0}, "patch_px=0"),
        (make_module(), {"resize": "bicubik"}, "resize='bicubik'"),
        (make_module(), {"std": (1, 0, 1)}, "std=0"),
        (make_module(), {"mean": (0.5,)}, "mean=(0.5,)"),
    ],
)
def test_impossible_arguments_are_named(module, changes, named):
    with refuses(RunError, named):
        Classifier.wrap(module, **{**OPTIONS, **changes})
