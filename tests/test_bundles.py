"""Bundles: hosts that know Resize, ToTensor and softmax get our probabilities; WSInfer's models run here."""

import ast
import hashlib
import json
import subprocess
import sys
import zipfile

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import read_json
from biopsy.data.packs import Pack
from biopsy.evaluation.predict import predict
from biopsy.exporting import bundles
from biopsy.exporting.bundles import export, measure_parity, write_networks
from biopsy.exporting.host_network import HostNetwork
from biopsy.models.importers.wsinfer import load_script
from biopsy.training.open_model import open_classifier
from command_line import call
from conftest import encode_png
from host_models import ask_host, draw, list_network_cases, make_classifier, our_probs
from refusals import refuses

SLOW = ("vgg16", "residual_p4m", "torchvision:squeezenet1_1", "timm:resnet10t")  # large, or slow to import
NETWORKS = list_network_cases("torchvision:squeezenet1_1", "timm:resnet10t", slow=SLOW)


@pytest.fixture(scope="module")
def bundle(trained_run, tmp_path_factory):
    return export(trained_run, tmp_path_factory.mktemp("exported") / "bundle")


def test_a_host_gets_our_probabilities(bundle, trained_run):
    patches = np.array(trained_run.open_pack(verify=False).patches[:30])
    found = ask_host(load_script(bundle.path / "torchscript_model.pt"), patches)
    np.testing.assert_allclose(found, our_probs(trained_run.classifier, patches), atol=1e-5)
    assert found.std() > 500 * 1e-5  # far beyond the tolerance: not all the same


def list_files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_parity_is_reported(bundle):
    assert read_json(bundle.path / "parity.json") == bundle.parity
    assert all(known["probs"] < 1e-5 for known in bundle.parity["largest_difference"].values())
    assert len(bundle.parity["largest_difference"]) == 6 and bundle.parity["n_patches"] == 120


@pytest.mark.slow  # NNCF takes seconds to import
def test_int8_is_measured_and_recorded(trained_run, tmp_path):
    pytest.importorskip("nncf")
    whole = export(trained_run, tmp_path / "bundle", int8=True)
    known = whole.parity["int8"]
    assert 0 < known["median"] <= known["largest"] < 0.2 and 0 <= known["changed_predictions"] < 0.2
    predicted = {
        precision: predict(
            whole.path, trained_run.open_pack(verify=False).path, out=tmp_path / "p.csv", precision=precision
        )
        for precision in ("fp32", "int8")
    }
    assert read_json(tmp_path / "p.csv.json")["precision"] == "int8"
    name = f"prob_{trained_run.classifier.info.positive_class}"
    difference = np.abs(predicted["fp32"].frame[name] - predicted["int8"].frame[name])
    assert 0 < difference.mean() < 0.05
    with pytest.raises(DataError):
        export(trained_run.classifier, tmp_path / "other", int8=True, mpp=None)


def test_int8_needs_a_patch_to_measure_on(trained_run, tmp_path):
    """Two patches of full size are the fewest: one for the ranges, one for the difference."""
    info = trained_run.classifier.info
    whole = np.random.default_rng(0).integers(0, 255, (info.patch_px, info.patch_px, 3), dtype=np.uint8)
    pack = Pack.from_arrays(
        [whole, whole[1:, 1:]], [0, 1], class_names=info.class_names, mpp=info.mpp, out=tmp_path / "one.pack"
    )
    with pytest.raises(DataError):
        export(trained_run, tmp_path / "bundle", int8=True, data=pack)
    assert not (tmp_path / "bundle").exists()
    assert export(trained_run, tmp_path / "bundle", data=pack).parity["n_patches"] == 1


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
    subsets = other.frame["subset"]  # which a bundle, without the run, does not know
    assert (
        one.frame.assign(subset=subsets).equals(other.frame)
        and one.frame["out_of_distribution"].notna().all()
    )


def test_the_script_runs_onnx_by_itself(bundle, trained_run, tmp_path):
    patch = np.array(trained_run.open_pack(verify=False).patches[7])
    (tmp_path / "patch.png").write_bytes(encode_png(patch))
    command = [sys.executable, str(bundle.path / "run_onnx.py"), str(tmp_path / "patch.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = ast.literal_eval(done.stdout.removeprefix(str(tmp_path / "patch.png")).strip())
    wanted = dict(zip(["non_idc", "idc"], our_probs(trained_run.classifier, patch[None])[0], strict=True))
    assert found == pytest.approx(wanted, abs=1e-5)
    code = (bundle.path / "run_onnx.py").read_text()
    assert "torch" not in code and "biopsy" not in code and len(code.splitlines()) <= 40


def test_the_script_refuses_what_predict_refuses(bundle, tmp_path):
    patch = draw(1, 16)[0]
    Image.fromarray(patch).save(tmp_path / "right.png")
    Image.fromarray(patch).save(tmp_path / "right.jpg", quality=95)
    Image.fromarray(np.tile(patch, (5, 5, 1))).save(tmp_path / "large.png")
    Image.fromarray(patch).save(tmp_path / "two.tif", save_all=True, append_images=[Image.fromarray(patch)])
    Image.fromarray(patch).convert("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(patch.astype(np.uint16) * 257))
    tifffile.imwrite(tmp_path / "deep.tif", patch.astype(np.uint16) * 257, photometric="rgb")
    (tmp_path / "cut.png").write_bytes((tmp_path / "right.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    names = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, str(bundle.path / "run_onnx.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["right.jpg", "right.png"]
    assert done.returncode == 3 and "large.png: is 80x80 px, the classifier takes 16x16" in done.stderr
    made = predict(bundle.path, tmp_path, out=tmp_path / "ours.csv", device="cpu")
    assert len(made.skipped) == len(done.stderr.splitlines()) == len(names) - 2
    assert made.frame["patch_id"].tolist() == ["right.jpg", "right.png"]


def test_nothing_in_a_bundle_names_a_folder_of_this_machine(bundle):
    home = str(bundles.__file__).partition("/src/")[0].encode()
    for file in list_files(bundle.path):
        assert home not in file.read_bytes()
    with zipfile.ZipFile(bundle.path / "torchscript_model.pt") as script:
        assert not any(home in script.read(name) for name in script.namelist())


def test_the_card_agrees_with_the_records(bundle, trained_run):
    card = (bundle.path / "README.md").read_text()
    for wanted in (
        "not a medical device",
        "## Intended use",
        "## Limits",
        "Not evaluated",
        "16 x 16 px at 4 um/px",
        "| classes | non-IDC (`non_idc`), IDC (`idc`) |",
    ):
        assert wanted in card
    assert trained_run.classifier.info.licence in card and "| test | 40 | 5 |" in card


def test_the_document_holds_the_hash_of_every_file(bundle):
    files = {file.relative_to(bundle.path).as_posix(): file for file in list_files(bundle.path)}
    del files["bundle.json"]
    assert read_json(bundle.path / "bundle.json")["files"] == {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()
    }


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
    with refuses(RunError, "PyTorch", "ONNX Runtime"):
        export(trained_run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_parity_that_is_no_number_is_refused():
    known = {"largest_difference": {"one and other": {"probs": float("nan")}}, "tolerance": 1, "n_patches": 2}
    with refuses(RunError, "nan"):
        bundles._require_parity(known)


def test_classifiers_that_cannot_be_exported_are_refused(trained_run, tmp_path, make_pack):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with refuses(RunError, full):
        export(trained_run, full)
    with refuses(RunError, "4.0 um/px", "--mpp 2.0"):
        export(trained_run, tmp_path / "bundle", mpp=2.0)
    with refuses(RunError, tmp_path / "nothing", "idc, pcam"):
        export(tmp_path / "nothing", tmp_path / "bundle")
    large = make_pack(patch_px=32, n_patients=2)
    with refuses(DataError, "32 px", "16 px"):
        export(trained_run, tmp_path / "bundle", data=large)
    small = make_pack("small.pack", patch_px=8, n_patients=2)
    with refuses(DataError, "16 px"):
        export(trained_run, tmp_path / "bundle", data=small)


def test_pixel_size_is_stated_where_it_is_not_known(trained_run, tmp_path):
    classifier = trained_run.classifier
    classifier.info = classifier.info.model_copy(update={"mpp": None})
    pack = trained_run.open_pack(verify=False)
    with refuses(RunError, "--mpp"):
        export(classifier, tmp_path / "bundle", data=pack)
    with refuses(RunError, "-1.0", "0 and 1000"):
        export(classifier, tmp_path / "bundle", data=pack, mpp=-1.0)
    with refuses(DataError, "4.0 um/px", "0.5"):
        export(classifier, tmp_path / "bundle", data=pack, mpp=0.5)
    export(classifier, tmp_path / "bundle", data=pack, mpp=4.1)
    assert read_json(tmp_path / "bundle" / "config.json")["spacing_um_px"] == 4.1
    assert open_classifier(tmp_path / "bundle").info.mpp == 4.1 and classifier.info.mpp is None


def test_the_command_prints_how_well_they_agree(trained_run, tmp_path):
    done = call("export", str(trained_run.path), str(tmp_path / "bundle"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "bundle")) and "ONNX Runtime and TorchScript" in done.stdout
    assert "120 patches" in done.stdout
