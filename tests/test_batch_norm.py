"""Batch-norm statistics: unsettled ones are recognised, re-estimated alike each time, and said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from biopsy.evaluation.evaluate import evaluate
from biopsy.models.engine import Engine
from biopsy.models.networks import build_network
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.reporting.compose import warn_reader
from biopsy.training.batch_norm import reestimate_batch_norm
from biopsy.training.postprocessing import warn_of_spread
from biopsy.training.train import train
from report_facts import make_small_facts
from test_calibration import calibrate_stub
from tiny_runs import assert_same_run, train_tiny, weights

PREPROCESSING = Preprocessing(input_px=8)


@pytest.fixture
def pack(make_pack):
    return make_pack(n_patients=6, official_subsets=("train", "validation", "test"))


def fit_postprocessing(network, pack, **options):
    engine = Engine("cpu")
    return reestimate_batch_norm(
        engine.place(network), PREPROCESSING, pack, np.arange(len(pack)), engine=engine, seed=0, **options
    )


def inputs(pack):
    return PREPROCESSING.prepare(pack.patches[:], *pack.sizes.T, device="cpu")


def test_new_statistics_are_those_of_the_patches(pack):
    network = build_network("cancernet", n_classes=2, input_px=8)
    record = fit_postprocessing(network, pack)
    assert record["reestimated"] and not record["settled"] and record["n_patches"] == len(pack)
    seen = []
    first = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(inputs(pack))
    np.testing.assert_allclose(first.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(first.running_var, seen[0].var((0, 2, 3)), rtol=1e-3)
    assert first.momentum == 0.01 and not any(module.training for module in network.modules())
    again = fit_postprocessing(network, pack)  # settled now, so nothing moves
    assert again["settled"] and not again["reestimated"] and again["disagreement"] < 0.01


def test_looking_changes_nothing(pack):
    network = build_network("cancernet", n_classes=2, input_px=8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    record = fit_postprocessing(network, pack, reestimate=False)
    assert not record["settled"] and not record["reestimated"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_without_batch_normalisation_has_nothing_to_settle(pack):
    assert fit_postprocessing(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), pack) is None


def test_a_short_run_is_reported_everywhere_and_is_the_same_when_resumed(pack, tmp_path, monkeypatch):
    run = train_tiny(pack, tmp_path / "run")
    assert run.info["batch_norm"]["reestimated"]
    (said,) = (text for text in run.info["warnings"] if "batch normalisation" in text)
    metrics = evaluate(run)
    assert said in metrics["warnings"]
    facts = make_small_facts()
    facts = replace(facts, metrics=replace(facts.metrics, warnings=metrics["warnings"]))
    assert any(said[1:] in text for text in warn_reader(facts))

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("biopsy.training.finalize.reestimate_batch_norm", stop)
        train_tiny(pack, tmp_path / "stopped")
    resumed = train(resume=tmp_path / "stopped", device="cpu")
    assert_same_run(run, resumed)
    assert resumed.info["batch_norm"] == run.info["batch_norm"]


def test_as_published_the_statistics_stay(pack, tmp_path):
    run = train_tiny(pack, tmp_path / "run", split="as-published")
    record = run.info["batch_norm"]
    assert not record["settled"] and not record["reestimated"] and run.info["warnings"]
    checkpoint = run.path / "checkpoints" / "last.safetensors"
    from safetensors.torch import load_file

    kept = load_file(checkpoint)
    assert all(torch.equal(tensor, kept[f"network.{name}"]) for name, tensor in weights(run).items()
               if not name.startswith("extra."))  # fmt: skip


def test_scores_that_barely_differ_are_recognised():
    rng = np.random.default_rng(0)
    target, groups = rng.integers(0, 2, 400), np.repeat(np.arange(8), 50)
    logits = np.stack([np.zeros(400), rng.normal(target, 1)], axis=1)
    flat = (logits * 1e-4 + [0.3, 0.8]).astype(np.float32)
    assert warn_of_spread(calibrate_stub(logits, target, groups, "platt"), logits, "validation") is None
    classifier = calibrate_stub(flat, target, groups, "platt")
    assert warn_of_spread(classifier, flat, "validation")
    assert classifier.info.calibrator["method"] == "platt"  # and are calibrated all the same
    assert np.ptp(classifier.probs(flat)[:, 1]) > 0.5
