"""Bundles: hosts that know Resize, ToTensor and softmax get our probabilities; WSInfer's models run here."""

import ast
import json
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from typer.testing import CliRunner

from biopsy.cli import app
from biopsy.errors import DataError, RunError
from biopsy.files import read_json, sha256_file
from biopsy.learning.classifiers import Classifier, ClassifierInfo
from biopsy.learning.engine import Engine
from biopsy.learning.foreign.wsinfer import load_script, open_wsinfer
from biopsy.learning.inference import predict_logits
from biopsy.learning.networks import build_network, list_networks
from biopsy.learning.opening import open_classifier
from biopsy.learning.preprocessing import Preprocessing
from biopsy.sharing import bundles
from biopsy.sharing.bundles import check_bundle, export, measure_parity, write_networks
from biopsy.sharing.host_network import HostNetwork, make_resize
from biopsy.statistics.calibrators import Isotonic, Scaling
from biopsy.studies.prediction import predict
from conftest import encode_png

SLOW = ("vgg16", "timm:resnet10t")  # large, or slow to import
NETWORKS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in [*list_networks(), "torchvision:squeezenet1_1", "timm:resnet10t"]
]


def ask_host(network, patches):
    """Do with patches what WSInfer does: Resize, ToTensor, the network, softmax."""
    steps = transforms.Compose([transforms.Resize(patches.shape[1]), transforms.ToTensor()])
    batch = torch.stack([steps(Image.fromarray(patch)) for patch in patches])
    with torch.inference_mode():
        return torch.softmax(network(batch), dim=1).numpy()


def make_classifier(network="cancernet", patch_px=20, n_classes=2, calibrator=None, **preprocessing):
    settings = {"input_px": 18, **preprocessing}
    names = ["benign", "malignant", "stroma", "fat"][:n_classes]
    info = ClassifierInfo(
        network=network,
        class_names=names,
        positive_class="malignant" if n_classes == 2 else None,
        patch_px=patch_px,
        mpp=1.0,
        preprocessing=Preprocessing(**{k: v for k, v in settings.items() if k != "outputs"}),
        outputs=settings.get("outputs", "softmax"),
    )
    if calibrator is not None:
        info.calibrator = calibrator.to_dict()
    return Classifier(
        info, build_network(network, n_classes=n_classes, input_px=settings["input_px"], seed=0)
    )


def draw(n, patch_px, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, patch_px, patch_px, 3), dtype=np.uint8)


def our_probs(classifier, patches):
    info = classifier.info
    return classifier.probs(
        predict_logits(classifier.network, info.preprocessing, patches, engine=Engine("cpu"))
    )


@pytest.fixture(scope="module")
def bundle(trained_run, tmp_path_factory):
    return export(trained_run, tmp_path_factory.mktemp("exported") / "bundle")


def test_a_host_gets_our_probabilities(bundle, trained_run):
    patches = np.array(trained_run.open_pack(verify=False).patches[:30])
    found = ask_host(load_script(bundle.path / "torchscript_model.pt"), patches)
    np.testing.assert_allclose(found, our_probs(trained_run.classifier, patches), atol=1e-5)
    assert found.std() > 0.03


def test_parity_is_reported(bundle):
    assert read_json(bundle.path / "parity.json") == bundle.parity
    assert all(known["probs"] < 1e-5 for known in bundle.parity["largest_difference"].values())
    assert len(bundle.parity["largest_difference"]) == 3 and bundle.parity["n_patches"] == 120


def test_the_configuration_is_wsinfers(bundle, trained_run):
    info = trained_run.classifier.info
    assert json.loads((bundle.path / "config.json").read_text()) == {
        "spec_version": "1.0",
        "architecture": "residual",
        "num_classes": 2,
        "patch_size_pixels": info.patch_px,
        "spacing_um_px": 4.0,
        "class_names": ["non_idc", "idc"],
        "transform": [{"name": "Resize", "arguments": {"size": info.patch_px}}, {"name": "ToTensor"}],
    }


def test_a_bundle_is_predicted_as_its_run(bundle, trained_run, tmp_path):
    pack = trained_run.open_pack(verify=False).path
    one, other = (
        predict(model, pack, out=tmp_path / f"{n}.csv", device="cpu")
        for n, model in enumerate([trained_run, bundle.path])
    )
    assert one.frame.equals(other.frame) and one.frame["unlike_training"].notna().all()


def test_the_script_runs_onnx_by_itself(bundle, trained_run, tmp_path):
    patch = np.array(trained_run.open_pack(verify=False).patches[7])
    (tmp_path / "patch.png").write_bytes(encode_png(patch))
    command = [sys.executable, str(bundle.path / "run_onnx.py"), str(tmp_path / "patch.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = ast.literal_eval(done.stdout.removeprefix(str(tmp_path / "patch.png")).strip())
    wanted = dict(zip(["non_idc", "idc"], our_probs(trained_run.classifier, patch[None])[0], strict=True))
    assert found == pytest.approx(wanted, abs=1e-5)
    code = (bundle.path / "run_onnx.py").read_text()
    assert "torch" not in code and "biopsy" not in code and len(code.splitlines()) <= 16


def test_nothing_in_a_bundle_names_a_folder_of_this_machine(bundle):
    home = str(bundles.__file__).partition("/src/")[0].encode()
    for file in bundle.path.iterdir():
        assert home not in file.read_bytes()
    with zipfile.ZipFile(bundle.path / "torchscript_model.pt") as script:
        assert not any(home in script.read(name) for name in script.namelist())


def test_the_card_says_what_the_records_say(bundle, trained_run):
    card = (bundle.path / "README.md").read_text()
    for wanted in (
        "not a medical device",
        "## Intended use",
        "## Limits",
        "Not evaluated",
        "16 x 16 px at 4 um/px",
    ):
        assert wanted in card
    assert trained_run.classifier.info.licence in card and "| test | 40 | 5 |" in card


def test_files_altered_after_the_export_are_found(bundle, tmp_path):
    assert set(check_bundle(bundle.path)["files"]) == {p.name for p in bundle.path.iterdir()} - {
        "bundle.json"
    }
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json is missing or was altered"):
        check_bundle(copy)
    (copy / "config.json").unlink()
    with pytest.raises(RunError, match=r"config\.json is missing or was altered"):
        check_bundle(copy)
    with pytest.raises(RunError, match="is not a bundle"):
        check_bundle(tmp_path)


def test_the_weights_are_the_runs(bundle, trained_run):
    ours = load_file(trained_run.path / "classifier" / "weights.safetensors")
    theirs = load_file(bundle.path / "weights.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_exports(name, tmp_path):
    classifier = make_classifier(name, patch_px=50, n_classes=3, input_px=48)
    write_networks(classifier, tmp_path)
    parity = measure_parity(classifier, tmp_path, draw(5, 50))
    assert max(known["probs"] for known in parity["largest_difference"].values()) < 1e-5


@pytest.mark.parametrize(("patch_px", "input_px"), [(50, 48), (20, 50), (33, 16), (24, 24), (7, 20)])
@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
def test_resizing_inside_the_network_is_the_preprocessings(patch_px, input_px, resize):
    patches = draw(20, patch_px)
    settings = Preprocessing(input_px=input_px, resize=resize)
    batch = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    found = (make_resize(settings, patch_px)(batch) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    wanted = settings.resize_patches(patches)
    differing = found != wanted
    assert differing.mean() < (1e-4 if resize == "bicubic" else 1e-12)
    assert np.abs(found.astype(int) - wanted).max() <= 1


CALIBRATORS = {
    "none": None,
    "temperature": Scaling("temperature", 0.3, (0.0, 0.0)),
    "platt": Scaling("platt", 1.7, (0.4, -0.4)),
    "isotonic": Isotonic(1, (0.0, 0.2, 0.3, 0.5, 0.999999), (0.05, 0.05, 0.4, 0.45, 1.0)),
    "isotonic-first": Isotonic(0, (0.1, 0.6, 1.0), (0.0, 0.7, 0.9)),
}


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_calibration_is_inside(name, outputs):
    classifier = make_classifier(calibrator=CALIBRATORS[name], outputs=outputs)
    head = list(classifier.network.parameters())[-1]
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 6, (400, 2))).float()
    classifier.network.forward = lambda batch: logits
    assert head is not None
    with torch.inference_mode():
        scores = HostNetwork(classifier)(torch.zeros(400, 3, 20, 20))
    wanted = classifier.probs(logits.numpy())
    np.testing.assert_allclose(torch.softmax(scores, 1).numpy(), wanted, atol=2e-6)


def test_isotonic_steps_near_one_keep_their_digits():
    table = Isotonic(1, (0.5, 1 - 3e-8, 1 - 1e-8), (0.2, 0.5, 0.9))
    classifier = make_classifier(calibrator=table)
    prob = 1 - np.array([3e-8, 2e-8, 1.5e-8, 1e-8])
    logit = np.log(prob) - np.log1p(-prob)
    logits = torch.from_numpy(np.stack([0 * logit, logit], axis=1)).float()
    classifier.network.forward = lambda batch: logits
    scores = HostNetwork(classifier)(torch.zeros(4, 3, 20, 20))
    np.testing.assert_allclose(torch.softmax(scores, 1)[:, 1].detach(), [0.5, 0.7, 0.8, 0.9], atol=1e-5)


def test_order_scale_mean_and_deviation_are_inside(tmp_path):
    settings = {"channel_order": "bgr", "scale": 1.0, "mean": (103.9, 116.8, 123.7), "std": (57, 58, 59)}
    classifier = make_classifier(resize="bicubic", **settings)
    patches = draw(6, 20)
    write_networks(classifier, tmp_path)
    script = load_script(tmp_path / "torchscript_model.pt")
    np.testing.assert_allclose(ask_host(script, patches), our_probs(classifier, patches), atol=1e-5)


def test_no_bundle_is_left_where_parity_fails(trained_run, tmp_path, monkeypatch):
    forward = HostNetwork.forward
    monkeypatch.setattr(HostNetwork, "forward", lambda self, patches: forward(self, patches.flip(1)))
    with pytest.raises(RunError, match=r"PyTorch and TorchScript differ by .* no bundle was written"):
        export(trained_run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_parity_that_is_no_number_is_refused():
    known = {"largest_difference": {"one and other": {"probs": float("nan")}}, "tolerance": 1, "n_patches": 2}
    with pytest.raises(RunError, match="differ by nan"):
        bundles._require_parity(known)


def test_what_cannot_be_exported_is_refused(trained_run, tmp_path, make_pack):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(RunError, match="exists already"):
        export(trained_run, full)
    with pytest.raises(DataError, match="names no pack: pass --data PACK"):
        export(trained_run.path / "classifier", tmp_path / "bundle")
    with pytest.raises(RunError, match=r"trained at 4\.0 um/px"):
        export(trained_run, tmp_path / "bundle", mpp=2.0)
    with pytest.raises(RunError, match="neither a run nor a classifier nor a bundle"):
        export(tmp_path / "nothing", tmp_path / "bundle")
    large = make_pack(patch_px=32, n_patients=2)
    with pytest.raises(DataError, match="patches of 32 px"):
        export(trained_run, tmp_path / "bundle", data=large)
    small = make_pack("small.pack", patch_px=8, n_patients=2)
    with pytest.raises(DataError, match="has no whole patch of 16 px"):
        export(trained_run, tmp_path / "bundle", data=small)


def test_pixel_size_is_stated_where_it_is_not_known(trained_run, tmp_path):
    classifier = trained_run.classifier
    classifier.info = classifier.info.model_copy(update={"mpp": None})
    pack = trained_run.open_pack(verify=False)
    with pytest.raises(RunError, match="pass --mpp"):
        export(classifier, tmp_path / "bundle", data=pack)
    with pytest.raises(RunError, match="lie between 0 and 1000"):
        export(classifier, tmp_path / "bundle", data=pack, mpp=-1.0)
    with pytest.raises(DataError, match=r"has 4\.0 um/px"):
        export(classifier, tmp_path / "bundle", data=pack, mpp=0.5)
    export(classifier, tmp_path / "bundle", data=pack, mpp=4.1)
    assert read_json(tmp_path / "bundle" / "config.json")["spacing_um_px"] == 4.1
    assert open_classifier(tmp_path / "bundle").info.mpp == 4.1 and classifier.info.mpp is None


def test_the_command_prints_how_well_they_agree(trained_run, tmp_path):
    done = CliRunner().invoke(app, ["export", str(trained_run.path), str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "bundle")) and "TorchScript and ONNX Runtime" in done.stdout
    assert "on 120 patches" in done.stderr


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
    assert "unlike_training" not in found.frame


def test_code_runs_only_if_its_hash_is_named(make_model, tmp_path):
    folder, digest = make_model()
    with pytest.raises(RunError, match=f"is code that would run here.* --trust-model {digest}"):
        open_classifier(folder)
    with pytest.raises(RunError, match=f"has the SHA-256 {digest}, not 00ff: it was not run"):
        open_classifier(folder, trust_model="00ff")
    done = CliRunner().invoke(app, ["predict", str(folder), str(folder), "--trust-model", "00ff"])
    assert done.exit_code == 1 and "it was not run" in done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_names": ["a", "b", "c"]}, "names the classes .* and counts 2"),
        ({"spacing_um_px": 0}, "spacing_um_px: Input should be greater than 0"),
        ({"num_classes": "two"}, "num_classes"),
        ({"transform": [{"name": "CenterCrop"}]}, "name: Input should be 'Resize'"),
        ({"transform": [{"name": "Resize", "arguments": {"size": [9, 8]}}]}, "a step Resize with"),
        ({"transform": [{"name": "Normalize", "arguments": {"mean": [0.5]}}]}, "a step Normalize with"),
    ],
)
def test_a_malformed_configuration_is_refused(make_model, config, message):
    folder, digest = make_model(**config)
    with pytest.raises(RunError, match=message):
        open_wsinfer(folder, trust_model=digest)


def test_an_incomplete_or_unreadable_model_is_refused(make_model, tmp_path):
    folder, _ = make_model()
    (folder / "torchscript_model.pt").write_bytes(b"not a zip")
    with pytest.raises(RunError, match="is not readable as TorchScript"):
        open_wsinfer(folder, trust_model=sha256_file(folder / "torchscript_model.pt"))
    (folder / "torchscript_model.pt").unlink()
    with pytest.raises(RunError, match=r"but no torchscript_model\.pt"):
        open_classifier(folder)
    (folder / "torchscript_model.pt").touch()
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match=r"but no config\.json"):
        open_classifier(folder)


def test_more_outputs_than_classes_are_refused(make_model):
    folder, digest = make_model(2, network=Sums(3))
    with pytest.raises(RunError, match=r"gives 3 outputs where its config\.json names 2"):
        our_probs(open_wsinfer(folder, trust_model=digest), draw(2, 16))


def test_a_wsinfer_model_is_not_saved_as_a_classifier(make_model, tmp_path):
    folder, digest = make_model()
    with pytest.raises(RunError, match="cannot be saved as a classifier"):
        open_wsinfer(folder, trust_model=digest).save(tmp_path / "classifier")
