"""Outputs of frozen stages computed once: equal results, bounded, resumable, and no file left."""

import logging

import numpy as np
import pytest
import torch

import biopsy.training.train as training
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits
from biopsy.models.networks import build_network
from biopsy.models.networks.stages import freeze
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.recipes.schema import Augmentation
from biopsy.training import cached_features
from biopsy.training.batches import Batches
from biopsy.training.cached_features import cache_backbone_features, predict_rest
from conftest import write_pack
from tiny_runs import interrupt_at, train_tiny, weights

ENGINE = Engine("cpu")
PLAIN = (  # no augmentation, and a rate at which the network moves
    "augmentation.rotation_deg=0",
    "augmentation.zoom=0",
    "augmentation.shift=0",
    "augmentation.shear_deg=0",
    "augmentation.flip_horizontal=false",
    "augmentation.flip_vertical=false",
    "preprocessing.input_px=16",
    "train.epochs=3",
)
FROZEN = (*PLAIN, "model.trainable=stage3")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("frozen"), n_patients=8, patches_per_patient=8)


def make_batches(pack, **settings):
    return Batches(
        patches=pack.patches,
        target=pack.target,
        preprocessing=Preprocessing(input_px=32),
        batch_size=8,
        **{"augmentation": Augmentation(), **settings},
    )


def make_network(name="dabydeen_hedges", trainable="stage3", **parameters):
    network = ENGINE.place(build_network(name, n_classes=2, input_px=32, seed=0, **parameters))
    freeze(network, trainable)
    return network


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("cancernet", "stage2"),
        ("cancernet", "head"),
        ("dabydeen_hedges", "stage3"),
        ("baruah", "dense"),
        ("residual", "stage2"),
        ("torchvision:squeezenet1_1", "head"),
    ],
)
def test_the_rest_gives_the_logits_of_the_whole(pack, tmp_path, name, trainable):
    network, batches = make_network(name, trainable), make_batches(pack)
    rows, order = np.arange(5, 60), np.random.default_rng(0).permutation(np.arange(5, 60))
    network.eval()
    with cache_backbone_features(network, batches, rows, 999, engine=ENGINE, folder=tmp_path) as (rest, fed):
        assert fed.cached_features is not None and fed.cached_features.values.dtype == np.float32
        for (patches, target), (outputs, same) in zip(
            batches.iterate(order), fed.iterate(order), strict=True
        ):
            assert torch.equal(target, same) and len(target) == len(outputs)
            wanted = ENGINE.predict(network, patches)
            assert torch.allclose(ENGINE.predict(rest, outputs), wanted, atol=1e-5)
        wanted = predict_logits(network, batches.preprocessing, pack.patches, index=order, engine=ENGINE)
        np.testing.assert_allclose(
            predict_rest(rest, fed.cached_features, order, engine=ENGINE), wanted, atol=1e-5
        )
    assert list(tmp_path.iterdir()) == []


def test_the_frozen_part_sees_every_patch_once(pack, tmp_path):
    network, seen = make_network(), []
    hook = network.body[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    rows = np.arange(3, 50)
    with cache_backbone_features(network, make_batches(pack), rows, 999, engine=ENGINE, folder=tmp_path) as (
        _,
        fed,
    ):
        for _ in range(3):
            list(fed.iterate(rows))
    hook.remove()
    assert sum(seen) == 1 + len(rows)  # one to learn the size


@pytest.mark.parametrize(
    ("trainable", "settings", "n_visits"),
    [
        ("all", {}, 999),
        ("stage3", {"augmentation": Augmentation(flip_vertical=True)}, 999),
        ("stage3", {}, 47),
    ],
    ids=["nothing is frozen", "augmentation draws", "each patch is seen once"],
)
def test_where_it_cannot_help_nothing_is_computed(pack, tmp_path, caplog, trainable, settings, n_visits):
    network, batches = make_network(trainable=trainable), make_batches(pack, **settings)
    with (
        caplog.at_level(logging.INFO),
        cache_backbone_features(
            network, batches, np.arange(47), n_visits, engine=ENGINE, folder=tmp_path
        ) as given,
    ):
        assert given == (network, batches)
    assert caplog.messages == []


@pytest.mark.parametrize("bound", ["bytes", "disk"])
def test_features_larger_than_the_limit_are_not_cached(pack, tmp_path, caplog, monkeypatch, bound):
    network, batches = make_network(), make_batches(pack)
    n_bytes = 47 * 128 * 8 * 8 * 4  # two poolings of 32 px
    if bound == "bytes":
        monkeypatch.setattr(cached_features, "LIMIT_BYTES", n_bytes - 1)
    else:
        usage = type("Usage", (), {"free": 2 * n_bytes - 2})
        monkeypatch.setattr(cached_features.shutil, "disk_usage", lambda folder: usage)
    with (
        caplog.at_level(logging.INFO),
        cache_backbone_features(
            network, batches, np.arange(47), 999, engine=ENGINE, folder=tmp_path
        ) as given,
    ):
        assert given == (network, batches)
    assert "for 47 patches: it is computed in every epoch" in caplog.text
    monkeypatch.undo()
    with cache_backbone_features(network, batches, np.arange(47), 999, engine=ENGINE, folder=tmp_path) as (
        _,
        fed,
    ):
        assert fed.cached_features.values.nbytes == n_bytes


def test_a_training_comes_out_as_without(pack, tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        once = train_tiny(pack, tmp_path / "once", *FROZEN)
    assert "computed once" in caplog.text
    monkeypatch.setattr(cached_features, "LIMIT_BYTES", 0)
    each = train_tiny(pack, tmp_path / "each", *FROZEN)
    for one, other in zip(once.log(), each.log(), strict=True):
        for name in ("loss", "accuracy", "val_loss", "val_auroc"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)
    assert once.info["chosen_epoch"] == each.info["chosen_epoch"]
    left, right = weights(once), weights(each)
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in right)
    logits = [run.predictions("validation")[0].filter(like="logit").to_numpy() for run in (once, each)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    files = [{path.name for path in run.path.rglob("*")} for run in (once, each)]
    assert files[0] == files[1]


def test_frozen_layers_do_not_change(pack, tmp_path):
    run = train_tiny(pack, tmp_path / "run", *FROZEN)
    start = build_network("cancernet", n_classes=2, input_px=16, seed=0).state_dict()
    trained = weights(run)
    for name, value in start.items():
        part = name.split(".")[1]
        still = part.startswith(("conv1", "conv2", "norm1", "norm2")) or name.endswith("num_batches_tracked")
        assert torch.equal(trained[name], value) == still, name
    assert run.info["parameters"]["trainable"] < run.info["parameters"]["total"]


def test_a_resumed_training_computes_it_again(pack, tmp_path, caplog):
    whole = train_tiny(pack, tmp_path / "whole", *FROZEN)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(pack, tmp_path / "cut", *FROZEN, on_epoch=interrupt_at(1))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resumed = training.train(resume=tmp_path / "cut", device="cpu")
    assert "computed once" in caplog.text
    left, right = weights(whole), weights(resumed)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert [r["val_loss"] for r in whole.log()] == [r["val_loss"] for r in resumed.log()]
