"""Models in WSInfer's form: they say here what they say there, and run only if they are trusted."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from biopsy.core.errors import RunError
from biopsy.core.files import sha256_file
from biopsy.evaluation.predict import predict
from biopsy.exporting.bundles import export
from biopsy.models.importers.wsinfer import load_script, open_wsinfer
from biopsy.training.open_model import open_classifier
from command_line import call
from conftest import encode_png
from host_models import draw, our_probs
from refusals import refuses


class Sums(torch.nn.Module):
    """Scores that say which pixels came: weighted sums of the channels' means."""

    def __init__(self, n_classes):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.linspace(-1, 1, 3 * n_classes).reshape(3, n_classes) * 5)

    def forward(self, patches):
        return patches.mean(dim=(2, 3)) @ self.weights


@pytest.fixture
def make_model(tmp_path):
    """``make_model(n_classes=2, **config)``: a folder as WSInfer's zoo has them."""

    def make(n_classes=2, *, transform=None, network=None, **config):
        folder = tmp_path / f"model{n_classes}"
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script = torch.jit.trace(network or Sums(n_classes), torch.rand(2, 3, 9, 9))
            torch.jit.save(script, str(folder / "torchscript_model.pt"))
        document = {
            "spec_version": "1.0",
            "architecture": "sums",
            "num_classes": n_classes,
            "patch_size_pixels": 16,
            "spacing_um_px": 0.5,
            "class_names": [f"class{n}" for n in range(n_classes)],
            "transform": transform
            or [
                {"name": "Resize", "arguments": {"size": 9}},
                {"name": "ToTensor"},
                {"name": "Normalize", "arguments": {"mean": [0.7, 0.6, 0.7], "std": [0.15, 0.15, 0.2]}},
            ],
        }
        (folder / "config.json").write_text(json.dumps(document | config))
        return folder, sha256_file(folder / "torchscript_model.pt")

    return make


@pytest.mark.parametrize("n_classes", [1, 2, 5])
def test_a_wsinfer_model_says_here_what_it_says_there(make_model, n_classes):
    folder, digest = make_model(n_classes)
    classifier = open_wsinfer(folder, trust_model=digest)
    patches = draw(12, 16)
    steps = transforms.Compose(
        [
            transforms.Resize(9),
            transforms.ToTensor(),
            transforms.Normalize([0.7, 0.6, 0.7], [0.15, 0.15, 0.2]),
        ]
    )
    batch = torch.stack([steps(Image.fromarray(patch)) for patch in patches])
    with torch.inference_mode():
        logits = load_script(folder / "torchscript_model.pt")(batch)
    wanted = torch.softmax(logits, 1) if n_classes > 1 else torch.sigmoid(logits)
    found = our_probs(classifier, patches)
    np.testing.assert_allclose(found[:, -n_classes:], wanted, atol=1e-5)
    assert len(classifier.info.class_names) == max(n_classes, 2) == found.shape[1]
    assert (classifier.info.mpp, classifier.info.patch_px) == (0.5, 16)


def test_of_one_or_two_classes_one_is_positive(make_model):
    folder, digest = make_model(1, class_names=["tumor"])
    assert open_wsinfer(folder, trust_model=digest).info.class_names == ["not tumor", "tumor"]
    folder, digest = make_model(2, class_names=["malignant", "benign"])
    assert open_wsinfer(folder, trust_model=digest.upper()).info.positive_class == "malignant"
    folder, digest = make_model(3)
    assert open_wsinfer(folder, trust_model=digest).info.positive_class is None


def test_a_wsinfer_model_predicts_images(make_model, tmp_path):
    folder, digest = make_model(3)
    (tmp_path / "patch.png").write_bytes(encode_png(draw(1, 16)[0]))
    found = predict(folder, tmp_path / "patch.png", out=tmp_path / "p.csv", device="cpu", trust_model=digest)
    assert found.frame.filter(like="prob_").sum(axis=1).iloc[0] == pytest.approx(1)
    assert "out_of_distribution" not in found.frame


def test_code_runs_only_if_its_hash_is_named(make_model, tmp_path):
    folder, digest = make_model()
    with refuses(RunError, f"--trust-model {digest}"):
        open_classifier(folder)
    with refuses(RunError, digest, "00ff"):
        open_classifier(folder, trust_model="00ff")
    Image.new("RGB", (8, 8)).save(tmp_path / "patch.png")
    done = call("predict", str(folder), str(tmp_path / "patch.png"), "--trust-model", "00ff")
    assert done.exit_code == 1 and "it was not run" in done.stderr


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"class_names": ["a", "b", "c"]}, ["['a', 'b', 'c']", "num_classes 2"]),
        ({"spacing_um_px": 0}, ["spacing_um_px", "0"]),
        ({"num_classes": "two"}, ["num_classes"]),
        ({"spacing_um_px": float("inf")}, ["Infinity"]),
        ({"patch_size_pixels": 10**6}, ["patch_size_pixels"]),
        ({"patch_size_pixels": 10**12}, ["patch_size_pixels"]),
        ({"transform": [{"name": "Resize", "arguments": {"size": 0}}]}, ["Resize", "{'size': 0}"]),
        ({"transform": [{"name": "CenterCrop"}]}, ["transform.0.name", "'Resize'"]),
        ({"transform": [{"name": "Resize", "arguments": {"size": [9, 8]}}]}, ["{'size': [9, 8]}"]),
        ({"transform": [{"name": "Normalize", "arguments": {"mean": [0.5]}}]}, ["{'mean': [0.5]}"]),
    ],
)
def test_a_malformed_configuration_is_refused(make_model, config, facts):
    folder, digest = make_model(**config)
    with refuses(RunError, "config.json", *facts):
        open_wsinfer(folder, trust_model=digest)


def test_an_incomplete_or_unreadable_model_is_refused(make_model, tmp_path):
    folder, _ = make_model()
    (folder / "torchscript_model.pt").write_bytes(b"not a zip")
    with refuses(RunError, "TorchScript"):
        open_wsinfer(folder, trust_model=sha256_file(folder / "torchscript_model.pt"))
    (folder / "torchscript_model.pt").unlink()
    with refuses(RunError, folder, "torchscript_model.pt"):
        open_classifier(folder)
    (folder / "torchscript_model.pt").touch()
    (folder / "config.json").unlink()
    with refuses(RunError, "config.json"):
        open_classifier(folder)


class Scalar(torch.nn.Module):
    """One number for all patches."""

    def forward(self, patches):
        return patches.mean()


class OneForAll(torch.nn.Module):
    """One row of scores for all patches."""

    def forward(self, patches):
        return patches.mean(dim=(0, 2, 3))[None, :2]


@pytest.mark.parametrize(
    ("network", "shape"), [(Sums(3), "(4, 3)"), (Scalar(), "()"), (OneForAll(), "(1, 2)")]
)
def test_outputs_of_another_shape_are_refused(make_model, network, shape):
    folder, digest = make_model(2, network=network)
    with refuses(RunError, shape, "4 patches", "2 classes"):
        our_probs(open_wsinfer(folder, trust_model=digest), draw(4, 16))


def test_a_wsinfer_model_is_neither_saved_nor_exported(make_model, tmp_path):
    folder, digest = make_model()
    with refuses(RunError, "WSInfer", folder):
        export(folder, tmp_path / "bundle")
    with refuses(RunError, "classifier"):
        open_wsinfer(folder, trust_model=digest).save(tmp_path / "classifier")
