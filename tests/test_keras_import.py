"""Keras files: what they hold arrives, whatever the layout; what is damaged, unsafe or another is refused."""

import json

import h5py
import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

import biopsy
from biopsy.models.classifier import Classifier
from biopsy.models.importers.keras import import_keras, load_keras_into
from biopsy.models.importers.keras_files import read_keras
from biopsy.models.networks import build_network
from command_line import call
from conftest import encode_png
from keras_files import (
    build,
    keras_layers,
    make_config,
    name_layers,
    write_all,
    write_h5,
    write_keras,
    write_weights_h5,
)


def predict_by_hand(layers, patches):
    """Send ``(B, H, W, 3)`` through layers given in Keras's layouts, in numpy."""
    x = patches.astype(np.float64)
    for kind, weights in layers:
        if kind in ("Conv2D", "SeparableConv2D"):
            x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))  # B, H, W, C, 3, 3
            if kind == "Conv2D":
                x = np.einsum("bhwcij,ijco->bhwo", windows, weights[0])
            else:
                x = np.einsum("bhwcij,ijcm->bhwc", windows, weights[0]) @ weights[1][0, 0]
            x += weights[-1]
        elif kind == "BatchNormalization":
            gamma, beta, mean, variance = weights
            x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        elif kind == "MaxPooling2D":
            height, width = (side // 2 * 2 for side in x.shape[1:3])
            x = x[:, :height, :width]
            x = x.reshape(len(x), height // 2, 2, width // 2, 2, -1).max(axis=(2, 4))
        elif kind == "Dense":
            x = x.reshape(len(x), -1) @ weights[0] + weights[1]
        else:
            x = np.maximum(x, 0)
    return x


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).random((6, 8, 8, 3), dtype=np.float32)


def ask(network, patches):
    with torch.inference_mode():
        return network(torch.from_numpy(patches).permute(0, 3, 1, 2)).numpy()


def test_every_layout_fills_a_network(tmp_path, patches):
    source = build()
    layers = keras_layers(source)
    wanted = predict_by_hand(layers, patches)
    assert np.ptp(wanted) > 0.05
    for path, format in write_all(tmp_path, layers, make_config(layers, input_px=8)):
        network = build(seed=1)
        assert not np.allclose(ask(network, patches), wanted, atol=1e-3)
        assert read_keras(path).format == format
        load_keras_into(path, network)
        np.testing.assert_allclose(ask(network, patches), wanted, atol=1e-5)
        assert all(map(torch.equal, network.state_dict().values(), source.state_dict().values()))


def test_plain_convolutions_and_half_precision(tmp_path, patches):
    network = build("dabydeen_hedges", widths=[3, 5], dense=4)
    layers = [(kind, [w.astype(np.float16) for w in weights]) for kind, weights in keras_layers(network)]
    load_keras_into(write_weights_h5(tmp_path / "half.weights.h5", layers), network)
    np.testing.assert_allclose(ask(network, patches), predict_by_hand(layers, patches), atol=1e-5)


def test_the_tenth_layer_follows_the_ninth(tmp_path):
    """Groups are stored by name, where conv2d_10 stands before conv2d_2."""
    widths = [2] * 12
    source = build("dabydeen_hedges", input_px=2**12, widths=widths, dense=2)
    path = write_weights_h5(tmp_path / "deep.weights.h5", keras_layers(source))
    network = build("dabydeen_hedges", input_px=2**12, widths=widths, dense=2, seed=1)
    load_keras_into(path, network)
    assert all(map(torch.equal, network.state_dict().values(), source.state_dict().values()))


@pytest.mark.parametrize("with_config", [True, False])
def test_a_model_within_the_model_keeps_its_order(tmp_path, with_config):
    """Keras writes the weights of its frozen layers after those of the trained ones."""
    widths = [4, 4, 4]
    source = build("dabydeen_hedges", widths=widths, dense=4)
    layers = keras_layers(source)
    named = [layer for layer in name_layers(layers) if layer[2]]
    inner, top = named[:3], named[3:]
    inner_written = [inner[1], inner[2], inner[0]]  # the first is frozen
    path = tmp_path / "nested.h5"
    config = make_config(layers, input_px=8)["config"]["layers"]
    with h5py.File(path, "w") as file:
        if with_config:
            base = {"class_name": "Functional", "config": {"name": "base", "layers": config[:10]}}
            document = {"class_name": "Sequential", "config": {"layers": [base, *config[10:]]}}
            file.attrs["model_config"] = json.dumps(document)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = ["base", *(name for name, _, _ in top)]
        for owner, members in (("base", inner_written), *((member[0], [member]) for member in top)):
            layer = group.create_group(owner)
            names = [f"{name}/{what}:0" for name, _, _ in members for what in ("kernel", "bias")]
            layer.attrs["weight_names"] = names
            arrays = [array for _, _, weights in members for array in weights]
            for name, array in zip(names, arrays, strict=True):
                layer[name] = array
    network = build("dabydeen_hedges", widths=widths, dense=4, seed=1)
    load_keras_into(path, network)
    assert all(map(torch.equal, network.state_dict().values(), source.state_dict().values()))


def test_vgg16_without_its_top_as_keras_publishes_it(tmp_path):
    """vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5, with random values."""
    rng = np.random.default_rng(0)
    path = tmp_path / "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    kernels, channels = {}, 3
    with h5py.File(path, "w") as file:
        names = [b"input_1"]
        for block, (count, width) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), start=1):
            for number in range(1, count + 1):
                name = f"block{block}_conv{number}"
                names.append(name.encode())
                kernels[name] = rng.random((3, 3, channels, width), dtype=np.float32)
                layer = file.create_group(name)
                layer.attrs["weight_names"] = [f"{name}_W_1:0".encode(), f"{name}_b_1:0".encode()]
                layer[f"{name}_W_1:0"] = kernels[name]
                layer[f"{name}_b_1:0"] = kernels[name][0, 0, 0]
                channels = width
            names.append(f"block{block}_pool".encode())
        for name in names:
            file.require_group(name.decode()).attrs.setdefault("weight_names", np.array([], "S"))
        file.attrs["layer_names"] = names
    network = build_network("vgg16", n_classes=2, input_px=96)
    before = network.head.weight.clone()
    base = torch.nn.Sequential(*(stage for _, stage in network.stages()[:-1]))
    assert sum(parameter.numel() for parameter in base.parameters()) == 14_714_688
    load_keras_into(path, base)
    for name, kernel in kernels.items():
        layer = getattr(network.body, name)
        assert np.array_equal(layer.weight.detach().numpy(), kernel.transpose(3, 2, 0, 1))
        assert np.array_equal(layer.bias.detach().numpy(), kernel[0, 0, 0])
    assert torch.equal(network.head.weight, before)


@pytest.mark.data
def test_real_squeezenet_weights_fill_torchvisions_features(data_dir):
    from torchvision.models import squeezenet1_1

    path = data_dir / "weights" / "squeezenet_v1.1_imagenet_notop_tf.h5"
    features = squeezenet1_1(weights=None).features
    load_keras_into(path, features)
    assert sum(parameter.numel() for parameter in features.parameters()) == 722_496
    with h5py.File(path) as file:
        last = file["fire9/expand3x3/uniform25"][()]
        bias = file["fire9/expand3x3/fire9/expand3x3_b"][()]
    assert np.array_equal(features[12].expand3x3.weight.detach().numpy(), last.transpose(3, 2, 0, 1))
    assert np.array_equal(features[12].expand3x3.bias.detach().numpy(), bias)


@pytest.fixture
def cancernet_file(tmp_path):
    layers = keras_layers(build(input_px=48))
    return write_keras(tmp_path / "cancernet.keras", layers, make_config(layers, input_px=48)), layers


def test_an_imported_classifier_predicts_like_any_other(cancernet_file, make_pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, layers = cancernet_file
    made = call("import-keras", str(path), "--model", "cancernet-2020", "--out", "mine")
    assert made.exit_code == 0 and made.stdout == "mine\n", made.stderr
    pack = make_pack(patch_px=50)
    found = biopsy.predict("mine", pack.path, device="cpu")
    from biopsy.recipes.preprocessing import Preprocessing

    batch = Preprocessing(input_px=48).prepare(pack.patches[:8]).permute(0, 2, 3, 1).numpy()
    wanted = softmax(predict_by_hand(layers, batch), axis=1)
    np.testing.assert_allclose(found.frame[["prob_non_idc", "prob_idc"]][:8], wanted, atol=1e-5)
    assert found.frame["pred"].tolist() == (found.frame["prob"] >= 0.5).astype(int).tolist()
    assert not {"out_of_distribution", "colour_distance", "feature_distance"} & set(found.frame)
    (tmp_path / "patch.png").write_bytes(encode_png(pack.patches[0]))
    asked = call("predict", "mine", "patch.png", "--device", "cpu", "--json")
    assert asked.exit_code == 0 and json.loads(asked.stdout)["n_patches"] == 1, asked.stderr


def test_what_is_recorded(cancernet_file, tmp_path):
    from hashlib import sha256

    path, _ = cancernet_file
    import_keras(path, model="cancernet-2019", out=tmp_path / "mine")
    info = Classifier.load(tmp_path / "mine").info
    assert (info.network, info.recipe, info.outputs) == ("cancernet", "cancernet-2019", "softmax")
    assert (info.class_names, info.positive_class) == (["non_idc", "idc"], "idc")
    assert (info.mpp, info.patch_px, info.preprocessing.input_px) == (4.0, 50, 48)
    assert info.thresholds == [{"value": 0.5, "rule": "argmax", "chosen_on": "nothing"}]
    assert info.calibrator == {"method": "none"} and info.out_of_distribution is None
    assert info.imported == {
        "library": "keras",
        "format": "keras",
        "file": "cancernet.keras",
        "sha256": sha256(path.read_bytes()).hexdigest(),
    }


def test_what_the_recipe_says_can_be_said_otherwise(tmp_path):
    layers = keras_layers(build(input_px=16, n_classes=3))
    path = write_h5(tmp_path / "three.h5", layers, config=make_config(layers, input_px=16))
    names = ("benign", "in situ", "invasive")
    options = {"model": "cancernet", "class_names": names, "mpp": 0.5, "patch_px": 20}
    info = import_keras(path, out=tmp_path / "three", **options).info
    assert info.recipe == "cancernet-2019" and info.preprocessing.input_px == 16
    assert (info.class_names, info.positive_class, info.thresholds) == ([*names], None, [])
    assert (info.mpp, info.patch_px) == (0.5, 20)
    layers = keras_layers(build(input_px=16))
    path = write_h5(tmp_path / "two.h5", layers, config=make_config(layers, input_px=16))
    two = import_keras(path, model="cancernet", out=tmp_path / "two", positive="non_idc")
    assert two.info.positive_class == "non_idc" and two.positive_index == 0


@pytest.mark.parametrize(
    ("name", "model", "last", "outputs"),
    [
        ("baruah", "baruah-2019", "sigmoid", "sigmoid"),
        ("baruah", "baruah", None, "sigmoid"),  # weights alone: as the recipe
        ("baruah", "baruah-2019", "softmax", "softmax"),
        pytest.param(
            "vgg16", "vgg16-pcam", "sigmoid", "softmax", marks=pytest.mark.slow
        ),  # one logit, as two
        ("dabydeen_hedges", "dabydeen-hedges", "softmax", "softmax"),
        ("dabydeen_hedges", "dabydeen-hedges", "sigmoid", "sigmoid"),
        ("dabydeen_hedges", "dabydeen-hedges-baseline", None, "softmax"),
    ],
)
def test_heads_of_the_published_networks(tmp_path, name, model, last, outputs):
    params = {"widths": (64, 128, 128), "dropout": 0.0} if model.endswith("baseline") else {}
    input_px = {"vgg16": 32}.get(name, 50)
    layers = keras_layers(build(name, input_px=input_px, **params))
    path = (
        write_weights_h5(tmp_path / "a.weights.h5", layers)
        if last is None
        else write_keras(tmp_path / "a.keras", layers, make_config(layers, input_px=input_px, last=last))
    )
    classifier = import_keras(path, model=model, out=tmp_path / "mine")
    assert classifier.info.outputs == outputs
    assert classifier.info.preprocessing.mean == (0, 0, 0)  # nothing is standardised that Keras did not
    batch = np.random.default_rng(0).random((3, input_px, input_px, 3), dtype=np.float32)
    before = torch.nn.ReLU()(classifier.network.features(torch.from_numpy(batch).permute(0, 3, 1, 2)))
    kernel, bias = layers[-1][1]
    raw = before.detach().numpy() @ kernel + bias  # what Keras's last layer is given
    probs = classifier.probs(ask(classifier.network, batch))
    scores = softmax(raw, axis=1) if last == "softmax" or outputs == "softmax" else expit(raw)
    if raw.shape[1] == 1:
        scores = np.hstack([1 - expit(raw), expit(raw)])
    np.testing.assert_allclose(probs, scores / scores.sum(axis=1, keepdims=True), atol=1e-6)
