"""Networks that are only asked: what OpenVINO makes of them beside PyTorch, and when PyTorch runs them."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from biopsy.core.errors import RunError
from biopsy.models import compiling
from biopsy.models.classifier import Classifier
from biopsy.models.compiling import write_compiled, write_quantised
from biopsy.models.engine import Engine
from biopsy.models.hardware import pick_precision
from biopsy.models.networks import build_network
from biopsy.models.openvino_runtime import INT8_MODEL
from biopsy.models.runtimes import TorchRuntime, open_runtime
from biopsy.recipes.preprocessing import Preprocessing
from refusals import refuses
from slide_maps import make_classifier

RNG = np.random.default_rng(0)
PATCHES = (RNG.integers(0, 192, (21, 1, 1, 3)) + RNG.integers(0, 64, (21, 32, 32, 3))).astype(np.uint8)


def classifier_of(network, *, px=32, patches=PATCHES, **preprocessing):
    if isinstance(network, str):
        network = build_network(network, n_classes=2, input_px=px, seed=0)
    how = Preprocessing(input_px=px, **preprocessing)
    set_statistics(network, how.prepare(patches))
    return Classifier(
        make_classifier().info.model_copy(update={"patch_px": 32, "preprocessing": how}), network
    )


def set_statistics(network, batch):
    """Set statistics of normalisations to those of a batch, and random scales and shifts, as training does.

    The first convolution has a random bias, which is zero in a new network, if it has one at all.
    """
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            layer.momentum = 1.0
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.uniform_(-0.5, 0.5, generator=generator)
    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    if convolutions and convolutions[0].bias is not None:
        convolutions[0].bias.data.uniform_(-0.1, 0.1, generator=generator)
    with torch.no_grad():
        network.train()(batch)
    network.eval()


def off_by(found, wanted):
    """Return the largest difference, as a share of what differs from patch to patch."""
    assert np.ptp(wanted, axis=0).max() > 1e-5
    return np.abs(found - wanted).max() / np.ptp(wanted, axis=0).max()


def ask(classifier, patches, precision="fp32", n_threads=1):
    with open_runtime(classifier, "cpu", precision, n_threads=n_threads) as runtime:
        return runtime.software[0], runtime.logits(patches)


def run_torch(classifier):
    return TorchRuntime(classifier.network, classifier.info.preprocessing, Engine("cpu"))


def by_torch(classifier, patches=PATCHES):
    return run_torch(classifier).logits(patches)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A classifier's folder with its compiled network: change only a copy."""
    folder = tmp_path_factory.mktemp("compiled") / "bundle"
    classifier_of("cancernet").save(folder)
    write_compiled(Classifier.load(folder), folder)
    return folder


@pytest.mark.parametrize(
    "network",
    ["cancernet", "baruah", "dabydeen_hedges", "residual", pytest.param("vgg16", marks=pytest.mark.slow)],
)
def test_a_compiled_network_has_the_logits_and_features_of_pytorch(network):
    classifier = classifier_of(network)
    with open_runtime(classifier, "cpu", "fp32", n_threads=1) as runtime:
        assert runtime.software[0] == "openvino"
        logits, features = runtime.logits_and_features(PATCHES)
    assert off_by(logits, by_torch(classifier)) < 1e-4
    assert off_by(features, run_torch(classifier).logits_and_features(PATCHES)[1]) < 1e-4


def test_a_gpu_runs_pytorch_also_where_openvino_is_installed(monkeypatch):
    monkeypatch.setattr("biopsy.models.engine.Engine", lambda device, precision: Engine("cpu", precision))
    with open_runtime(classifier_of("cancernet"), "cuda", "fp32", n_threads=1) as runtime:
        assert runtime.software[0] == "torch" and not runtime.in_threads


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"channel_order": "bgr"},
        {"scale": 1.0, "std": (255.0, 200.0, 230.0)},
        {"mean": (0.7, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "channel_order": "bgr"},
        {"px": 28, "resize": "bilinear"},
        {"px": 40, "resize": "nearest"},
    ],
)
@pytest.mark.parametrize("network", ["cancernet", "baruah"])
def test_every_preprocessing_is_compiled(network, preprocessing):
    classifier = classifier_of(network, **preprocessing)
    software, logits = ask(classifier, PATCHES)
    assert software == "openvino" and off_by(logits, by_torch(classifier)) < 1e-4


@pytest.mark.skipif(pick_precision("auto", "cpu") == "fp32", reason="this processor has no bfloat16")
def test_bytes_around_0_are_what_half_precision_needs(monkeypatch):
    bright = PATCHES // 6 + 170  # as tissue is; what patches differ by is small
    classifier = classifier_of("cancernet", patches=bright)
    network = classifier.network
    wanted = by_torch(classifier, bright)
    error = np.abs(ask(classifier, bright, "bf16")[1] - wanted).mean()
    monkeypatch.setattr(
        compiling, "_FromBytesCentred", lambda _, preprocessing: compiling._FromBytes(network, preprocessing)
    )
    assert error < 0.6 * np.abs(ask(classifier, bright, "bf16")[1] - wanted).mean()


def test_logits_do_not_depend_on_the_rest_of_the_batch(compiled):
    classifier = Classifier.load(compiled)
    _, together = ask(classifier, PATCHES, "bf16")
    assert np.array_equal(ask(classifier, PATCHES[::-1], "bf16", n_threads=2)[1][::-1], together)
    assert np.array_equal(ask(classifier, PATCHES[3:4], "bf16")[1][0], together[3])


def test_threads_that_share_a_network_get_the_same_logits(compiled):
    from concurrent.futures import ThreadPoolExecutor

    classifier = Classifier.load(compiled)
    _, alone = ask(classifier, PATCHES)
    with open_runtime(classifier, "cpu", "fp32", n_threads=4) as runtime, ThreadPoolExecutor(4) as pool:
        for found in pool.map(runtime.logits, [PATCHES] * 12):
            assert np.array_equal(found, alone)


def test_float64_is_run_by_pytorch():
    classifier = classifier_of(build_network("cancernet", n_classes=2, input_px=32, seed=0))
    classifier.network.register_buffer("table", torch.zeros(1, dtype=torch.float64))
    before = torch.get_num_threads()
    assert ask(classifier, PATCHES)[0] == "torch" and torch.get_num_threads() == before


class Sorted(torch.nn.Module):
    """Calls what OpenVINO has no translation of."""

    def forward(self, x):
        values = torch.linalg.svdvals(x.mean(dim=1))
        return values[:, :2]


def test_a_network_that_openvino_cannot_convert_is_run_by_pytorch(caplog):
    classifier = classifier_of(Sorted())
    software, logits = ask(classifier, PATCHES)
    assert software == "torch" and logits.shape == (21, 2)
    assert "OpenVINO cannot run this network, PyTorch is used" in caplog.text


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-4, 0), (1, 100)])
def test_a_network_whose_converted_logits_differ_is_run_by_pytorch(scale, offset, caplog, monkeypatch):
    """Whatever the size of its logits and the distance between those of two classes."""
    monkeypatch.setattr(compiling, "_split", lambda weight: (weight, weight))
    classifier = classifier_of("cancernet")
    *_, last = (layer for layer in classifier.network.modules() if isinstance(layer, torch.nn.Linear))
    last.weight.data *= scale
    last.bias.data = torch.tensor([0.0, offset])
    software, _ = ask(classifier, PATCHES)
    assert software == "torch" and "OpenVINO's logits differ by" in caplog.text


@pytest.fixture
def bundle(compiled, tmp_path):
    return shutil.copytree(compiled, tmp_path / "bundle")


@pytest.mark.slow
def test_a_bundle_predicts_without_pytorch(bundle):
    wanted = by_torch(Classifier.load(bundle), PATCHES)
    np.save(bundle / "patches.npy", PATCHES)
    code = f"""
import sys, numpy
sys.modules["torch"] = None
from biopsy.cli import main
from biopsy.slides import cohorts
from biopsy.training.open_model import open_classifier
from biopsy.models.runtimes import open_runtime
with open_runtime(open_classifier({str(bundle)!r}), "cpu", "fp32", n_threads=2) as runtime:
    numpy.save({str(bundle / "logits.npy")!r}, runtime.logits(numpy.load({str(bundle / "patches.npy")!r})))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert off_by(np.load(bundle / "logits.npy"), wanted) < 1e-4


def test_a_damaged_or_another_network_is_refused(bundle, tmp_path):
    other = tmp_path / "other"
    classifier_of(build_network("cancernet", n_classes=2, input_px=32, seed=5)).save(other)
    shutil.copytree(bundle / "openvino", other / "openvino")
    with refuses(RunError, "export", "again"):
        ask(Classifier.load(other), PATCHES)
    with open(bundle / "openvino" / "network.bin", "r+b") as file:
        file.write(b"\0" * 64)
    with refuses(RunError, "export", "again"):
        ask(Classifier.load(bundle), PATCHES)


def test_a_network_is_quantised_by_all_whole_batches(bundle, monkeypatch):
    taken = []

    def quantize(model, batches, *, subset_size):
        taken.extend(batches)
        assert subset_size == len(taken)
        return model

    nncf = SimpleNamespace(set_log_level=lambda level: None, Dataset=list, quantize=quantize)
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    patches = np.tile(PATCHES, (3, 1, 1, 1))[:47]  # two batches, and all but one of a third
    write_quantised(Classifier.load(bundle), bundle, patches)
    assert [len(batch) for batch in taken] == [16, 16]
    np.testing.assert_array_equal(np.concatenate(taken), patches[:32])
    assert (bundle / "openvino" / INT8_MODEL).is_file()


@pytest.fixture
def quantised(bundle):
    """The folder with a quantised network beside it."""
    pytest.importorskip("nncf")
    write_quantised(Classifier.load(bundle), bundle, np.tile(PATCHES, (8, 1, 1, 1)))
    return bundle


@pytest.mark.slow  # NNCF takes seconds to import
def test_a_quantised_network_is_close_to_the_original_and_damage_is_refused(quantised):
    classifier = Classifier.load(quantised)
    software, logits = ask(classifier, PATCHES, "int8", n_threads=2)
    assert software == "openvino"
    assert 1e-4 < off_by(logits, ask(classifier, PATCHES)[1]) < 0.5
    np.testing.assert_array_equal(logits[3:5], ask(classifier, PATCHES[3:5], "int8")[1])
    assert off_by(ask(classifier, PATCHES)[1], by_torch(classifier)) < 1e-4
    with open(quantised / "openvino" / INT8_MODEL.replace("xml", "bin"), "r+b") as file:
        file.write(b"\0" * 64)
    with pytest.raises(RunError):
        ask(classifier, PATCHES, "int8")


def test_int8_without_a_quantised_network_is_refused(bundle):
    for classifier in (Classifier.load(bundle), classifier_of("cancernet")):
        with refuses(RunError, "--int8"):
            ask(classifier, PATCHES, "int8")


@pytest.mark.slow
def test_telemetry_is_disabled(monkeypatch):
    import openvino_telemetry

    def tell(*_, **__):
        raise AssertionError("use was reported")

    monkeypatch.setattr(openvino_telemetry.Telemetry, "__init__", tell)
    monkeypatch.setattr(openvino_telemetry.Telemetry, "send_event", tell)
    assert ask(classifier_of("cancernet"), PATCHES)[0] == "openvino"
    code = """
import openvino_telemetry
def tell(*_, **__):
    raise SystemExit("use was reported")
openvino_telemetry.Telemetry.__init__ = openvino_telemetry.Telemetry.send_event = tell
from biopsy.models.openvino_runtime import import_openvino
import_openvino().Core()
import openvino.tools.ovc
import openvino_telemetry
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # importing it reports that it was imported


@pytest.mark.slow
def test_threads_that_use_openvino_first_at_once_do_not_wait_forever():
    code = """if True:
        import sys, threading
        import numpy as np
        from biopsy.models.openvino_runtime import import_openvino

        openvino, barrier = import_openvino(), threading.Barrier(4)

        def use():
            barrier.wait()
            openvino.Type.u8.to_dtype()
            openvino.Tensor(np.zeros(1, np.uint8), shared_memory=True).data

        threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
        sys.setswitchinterval(1e-6)  # threads take turns within an operation
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_interruption_while_a_network_is_converted_is_not_taken_for_a_failure(monkeypatch):
    """OpenVINO turns a KeyboardInterrupt in the Python code that it calls into a RuntimeError."""
    decoder = pytest.importorskip("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder

    def interrupt(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "num_of_outputs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiling.try_to_convert(classifier_of("cancernet"))
