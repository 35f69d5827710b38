"""Pretrained weights: found offline, checked, filled in, recorded; and every reason to refuse them."""

import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models.vgg import cfgs, make_layers

from biopsy.core.errors import DataError, RecipeError
from biopsy.core.files import sha256_file
from biopsy.evaluation.provenance_sections import describe_training
from biopsy.experiments.catalogue import list as list_
from biopsy.models import weights as weights_module
from biopsy.models.networks import build_network, count_parameters
from biopsy.models.weight_files import fill_network
from biopsy.models.weights import (
    KNOWN_WEIGHTS,
    describe_weights,
    find_weights,
    find_weights_file,
    is_shipped_start,
    list_weights,
    locate,
    make_network,
)
from biopsy.recipes import load_recipe
from refusals import refuses
from tiny_runs import train_tiny


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Look for weights in an empty folder and nowhere else."""
    monkeypatch.setenv("BIOPSY_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("BIOPSY_ACCEPT_LICENCE", raising=False)
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def recipe_with(*settings, recipe="idc-small"):
    return load_recipe(recipe, ["preprocessing.input_px=64", "model.pretrained=true", *settings])


def write_keras(path, modules):
    """Write convolutions as Keras 2 writes them: kernels (height, width, in, out), one group a layer."""
    with h5py.File(path, "w") as file:
        convolutions = [(n, m) for n, m in modules if isinstance(m, torch.nn.Conv2d)]
        names = [name.rpartition(".")[2] for name, _ in convolutions]
        file.attrs["layer_names"] = [name.encode() for name in names]
        for name, (_, module) in zip(names, convolutions, strict=True):
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/kernel:0".encode(), f"{name}/bias:0".encode()]
            group[f"{name}/kernel:0"] = module.weight.detach().numpy().transpose(2, 3, 1, 0)
            group[f"{name}/bias:0"] = module.bias.detach().numpy()


def same_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_every_known_weight_has_source_licence_and_hash():
    for known in list_weights():
        assert find_weights(known.tag) == known
        assert known.file and known.page and known.licence and known.digest
        assert set(known.feed) == {"channel_order", "scale", "mean", "std"}
        assert load_recipe("idc-small", {f"preprocessing.{k}": v for k, v in known.feed.items()})
        assert locate(known) is None or known.package


def test_random_weights_are_those_of_the_seed():
    network, record = make_network(load_recipe("cancernet-2020"), 2, seed=4)
    assert same_states(network, build_network("cancernet", n_classes=2, input_px=48, seed=4))
    assert record == {
        "pretrained": False,
        "weights": None,
        "file": None,
        "sha256": None,
        "licence": None,
        "page": None,
        "trainable": "all",
        "note": None,
    }
    assert describe_weights(network, record) == "random weights; 1,235,133 parameters"


def test_a_file_of_this_package_fills_everything(tmp_path):
    source = build_network("residual", n_classes=2, input_px=64, seed=9)
    save_file({**source.state_dict(), "extra.mean": torch.zeros(3)}, tmp_path / "mine.safetensors")
    network, record = make_network(recipe_with(f"model.weights={tmp_path / 'mine.safetensors'}"), 2, seed=0)
    assert same_states(network, source)
    assert record["weights"] == record["file"] == "mine.safetensors" and record["note"] is None
    assert record["sha256"] == sha256_file(tmp_path / "mine.safetensors")
    assert record["licence"] == "not stated"


def test_a_folder_without_weights_is_refused(tmp_path):
    with refuses(RecipeError, tmp_path / "weights", "weights.safetensors", "model.pretrained=false"):
        make_network(recipe_with(f"model.weights={tmp_path / 'weights'}"), 2, seed=0)


def test_a_local_model_hides_the_classifier_that_ships_by_its_name(tmp_path, monkeypatch):
    source = build_network("residual", n_classes=2, input_px=64, seed=9)
    monkeypatch.chdir(tmp_path)
    Path("idc/classifier").mkdir(parents=True)
    save_file(source.state_dict(), "idc/classifier/weights.safetensors")
    assert find_weights_file("idc") is None
    Path("idc/run.json").touch()
    network, record = make_network(recipe_with("model.weights=idc"), 2, seed=0)
    assert same_states(network, source)
    assert record["sha256"] == sha256_file(Path("idc/classifier/weights.safetensors"))
    assert not is_shipped_start(record)


def test_a_head_of_other_classes_is_left_random_and_reported(tmp_path):
    source = build_network("residual", n_classes=2, input_px=64, seed=9)
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    network, record = make_network(recipe_with(f"model.weights={tmp_path / 'mine.pth'}"), 3, seed=0)
    assert same_states(network.blocks, source.blocks) and network.head.weight.shape == (3, 120)
    assert record["note"] == "the head is random"


@pytest.mark.slow
def test_keras_vgg16_without_top_fills_the_blocks(tmp_path):
    source = build_network("vgg16", n_classes=2, input_px=64, seed=5)
    path = tmp_path / KNOWN_WEIGHTS[0].file
    write_keras(path, source.named_modules())
    network, record = make_network(recipe_with(f"model.weights={path}", recipe="vgg16-pcam"), 2, seed=0)
    assert torch.equal(network.body.block5_conv3.weight, source.body.block5_conv3.weight)
    assert not torch.equal(network.body.dense.weight, source.body.dense.weight)
    assert record["weights"] == "keras-vgg16" and record["licence"] == "cc-by-4.0"
    assert "the head is random; they were trained with channel_order bgr, scale 1" in record["note"]
    assert record["trainable"] == "block5" and not network.body.block4_conv3.weight.requires_grad


def test_torchvisions_vgg16_fills_the_same_blocks(tmp_path):
    def write(depth, path):
        layers = make_layers(cfgs[depth], batch_norm=False).state_dict()
        torch.save({f"features.{key}": value for key, value in layers.items()}, path)
        return layers

    write("A", tmp_path / "vgg11.pth")  # of another depth
    with refuses(DataError, "vgg16"):
        make_network(recipe_with(f"model.weights={tmp_path / 'vgg11.pth'}", recipe="vgg16-pcam"), 2, seed=0)
    features = write("D", tmp_path / "vgg16.pth")
    path = tmp_path / "vgg16.pth"
    network, _ = make_network(recipe_with(f"model.weights={path}", recipe="vgg16-pcam"), 2, seed=0)
    assert torch.equal(network.body.block5_conv3.weight, features["28.weight"])
    assert torch.equal(network.body.block1_conv1.bias, features["0.bias"])


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit", "timm:test_resnet.r160_in1k"])
def test_timms_weights_by_tag(name, folder):
    source = timm.create_model(name.removeprefix("timm:"))
    full = f"{name.partition('.')[0]}.r160_in1k"
    save_file(source.state_dict(), folder / f"{full.removeprefix('timm:')}.safetensors")
    network, record = make_network(recipe_with(f"model.name={name}"), 2, seed=0)
    assert record["weights"] == full and record["licence"] == "apache-2.0"
    theirs = source.state_dict()
    differing = {
        key
        for key, value in network.body.state_dict().items()
        if value.shape != theirs[key].shape or not torch.equal(value, theirs[key])
    }
    assert differing == ({"pos_embed"} if "vit" in name else set())  # resampled to the input's size


def test_torchvisions_weights_by_tag(folder, monkeypatch):
    source = torchvision.models.resnet18(weights=None)
    path = folder / "resnet18-f37072fd.pth"
    torch.save(source.state_dict(), path)
    settings = ("model.name=torchvision:resnet18", "model.weights=torchvision:resnet18.IMAGENET1K_V1")
    with refuses(DataError, "f37072fd"):
        make_network(recipe_with(*settings), 2, seed=0)
    monkeypatch.setattr(weights_module, "require_digest", lambda path, digest: None)
    network, record = make_network(recipe_with(*settings), 2, seed=0)
    assert torch.equal(network.body.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(network.body.bn1.running_var, source.bn1.running_var)
    assert record["weights"] == "torchvision:resnet18.IMAGENET1K_V1"


def test_files_that_libraries_fetched_are_found(tmp_path):
    known = find_weights("torchvision:resnet18")
    cached = tmp_path / "torch" / "hub" / "checkpoints" / known.file
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    assert locate(known) == cached
    keras = tmp_path / ".keras" / "models" / KNOWN_WEIGHTS[0].file
    keras.parent.mkdir(parents=True)
    keras.write_bytes(b"x")
    assert locate(KNOWN_WEIGHTS[0]) == keras
    row = next(row for row in list_("models") if row["name"] == "keras-vgg16")
    assert row["at_hand"] == str(keras) and row["licence"] == "cc-by-4.0"


def test_weights_that_a_package_brings_along_are_found_and_renamed(folder, tmp_path, monkeypatch):
    known = find_weights("efficientnet-lite0")
    package = tmp_path / known.package / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    network = build_network("timm:tf_efficientnet_lite0", n_classes=2, input_px=32, seed=1)
    tensors = {f"_{key}": value for key, value in network.body.state_dict().items()}
    tensors |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    torch.save(tensors, package / known.file)
    assert locate(known) == package / known.file
    other = build_network("timm:tf_efficientnet_lite0", n_classes=2, input_px=32, seed=2)
    assert not fill_network(other, "timm:tf_efficientnet_lite0", package / known.file)
    for key, value in other.body.state_dict().items():
        assert torch.equal(value, network.body.state_dict()[key])
    torch.save(dict(list(tensors.items())[1:]), package / known.file)
    with pytest.raises(DataError):
        fill_network(other, "timm:tf_efficientnet_lite0", package / known.file)


@pytest.mark.data
def test_the_real_squeezenet_weights(folder, monkeypatch):
    data = Path(os.environ.get("BIOPSY_DATA", Path(__file__).parents[2] / "shared" / "data")) / "weights"
    known = find_weights("keras-squeezenet1_1")
    if not (data / known.file).is_file():
        pytest.skip("the file is not at hand")
    monkeypatch.setenv("BIOPSY_WEIGHTS", str(data))
    network, record = make_network(load_recipe("squeezenet-pcam"), 2, seed=0)
    assert record["sha256"] == known.digest.removeprefix("sha256:") and record["licence"] == "mit"
    assert sum(weight.numel() for weight in network.body.parameters()) == 722_496
    with h5py.File(data / known.file) as file:
        kernel = np.asarray(file["fire9/expand3x3/uniform25"])
    assert np.array_equal(network.body.features[12].expand3x3.weight.detach(), kernel.transpose(3, 2, 0, 1))


def test_a_missing_file_is_refused_with_what_to_do(folder):
    with pytest.raises(RecipeError) as caught:
        make_network(recipe_with(recipe="vgg16-pcam"), 2, seed=0)
    for part in (
        KNOWN_WEIGHTS[0].file,
        KNOWN_WEIGHTS[0].page,
        str(folder),
        "--set model.weights=PATH",
        "--set model.pretrained=false",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_them_the_record_and_the_report_say_so():
    recipe = load_recipe("vgg16-pcam", ["preprocessing.input_px=32", "model.pretrained=false"])
    _, record = make_network(recipe, 2, seed=0)
    assert record["note"] == (
        "the recipe starts from keras-vgg16, this run did not (model.pretrained=false); "
        "frozen stages are random"
    )

    facts = SimpleNamespace(run={"weights": record, "seconds": 1.0}, log=(), network=(), is_run=True)
    section = describe_training(facts)
    assert any("this run did not (model.pretrained=false)" in str(block) for block in section.blocks)


def test_a_run_starts_from_weights_and_goes_on_without_the_file(make_pack, tmp_path):
    source = build_network("residual", n_classes=2, input_px=16, seed=9, base_channels=4)
    path = tmp_path / "mine.safetensors"
    save_file(source.state_dict(), path)
    settings = ("preprocessing.input_px=16", "model.params.base_channels=4", "model.pretrained=true")
    settings += (f"model.weights={path}", "model.trainable=stage3", "train.epochs=1")
    pack = make_pack(n_patients=7, patches_per_patient=6)
    run = train_tiny(pack, tmp_path / "run", *settings, recipe="idc-small")
    assert run.info["weights"]["sha256"] == sha256_file(path)
    assert run.info["weights"]["trainable"] == "stage3"
    assert run.info["parameters"]["trainable"] < run.info["parameters"]["total"] - 100
    path.unlink()
    classifier = run.classifier
    assert same_states(classifier.base_network.stem, source.stem)
    assert not same_states(classifier.base_network.blocks[-1], source.blocks[-1])
    assert classifier.info.licence.endswith("the weights it began with: not stated")


def test_only_trained_parameters_are_counted_apart():
    network, record = make_network(load_recipe("idc-small"), 2, seed=0)
    total, _ = count_parameters(network)
    assert re.findall(r"[\d,]+(?= parameters)|[\d,]+(?= are trained)", describe_weights(network, record)) == [
        f"{total:,}"
    ]
    network, record = make_network(load_recipe("idc-small", ["model.trainable=head"]), 2, seed=0)
    trained = sum(weight.numel() for weight in network.head.parameters())
    assert f"{trained:,} are trained" in describe_weights(network, record)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        (["model.weights=keras-vgg16"], ["vgg16", "'residual'"]),
        (["model.weights=keras-vgg61"], ["'keras-vgg61'", "'keras-vgg16'"]),
        (["model.weights=gone.safetensors"], ["'gone.safetensors'", "model.pretrained=false"]),
        ([], ["model.pretrained", "model.weights", "'residual'"]),
        (["model.name=vgg16"], ["'vgg16'", "keras-vgg16"]),
        (
            ["model.name=torchvision:resnet18", "model.weights=torchvision:resnet18.IMAGENET1K_V7"],
            ["'IMAGENET1K_V7'", "resnet18", "'IMAGENET1K_V1'"],
        ),
        (["model.name=timm:test_resnet", "model.weights=timm:test_resnet.nope"], ["test_resnet.r160_in1k"]),
        (["model.name=timm:test_resnet"], ["test_resnet.r160_in1k.safetensors", "timm/test_resnet"]),
    ],
)
def test_weights_that_cannot_be_had_are_refused(settings, facts):
    with refuses(RecipeError, *facts):
        make_network(recipe_with(*settings), 2, seed=0)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("timm:vit_base_patch16_224.mae", "timm:vit_base_patch16_224.mae"),
        ("torchvision:vit_b_16", "torchvision:vit_b_16.IMAGENET1K_SWAG_LINEAR_V1"),
    ],
)
def test_a_licence_that_restricts_use_must_be_accepted(name, tag, monkeypatch):
    recipe = recipe_with(f"model.name={name}", f"model.weights={tag}")
    with refuses(RecipeError, "'cc-by-nc-4.0'", "BIOPSY_ACCEPT_LICENCE=cc-by-nc-4.0"):
        weights_module.choose_weights(recipe)
    monkeypatch.setenv("BIOPSY_ACCEPT_LICENCE", "other, CC-BY-NC-4.0")
    with refuses(RecipeError, tag):
        weights_module.choose_weights(recipe)


def test_a_file_with_another_hash_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(build_network("residual", n_classes=2, input_px=64).state_dict(), path)
    asked = [f"model.weights={path}", f"model.weights_sha256={sha256_file(path)}"]
    assert make_network(recipe_with(*asked), 2, seed=0)[1]["pretrained"]
    with refuses(DataError, path, sha256_file(path), "00ff"):
        make_network(recipe_with(asked[0], "model.weights_sha256=00ff"), 2, seed=0)


class Unwanted:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_are_not_weights_are_refused_and_never_executed(tmp_path):
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Unwanted(), protocol=2))
    torch.save({"state_dict": Unwanted()}, tmp_path / "zip.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:20])
    for name, fact in {
        "code.pth": "unpickled",
        "zip.pth": "unpickled",
        "list.pth": "named weights",
        "cut.safetensors": "safetensors: ",
        "other.safetensors": "residual",
    }.items():
        with refuses(DataError, tmp_path / name, fact):
            make_network(recipe_with(f"model.weights={tmp_path / name}"), 2, seed=0)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet"])
def test_weights_of_another_network_are_refused(name, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    with refuses(DataError, path, name):
        make_network(recipe_with(f"model.name={name}", f"model.weights={path}"), 2, seed=0)
