"""Keras files that are damaged, unsafe or of another network: refused in one line that says why."""

import logging
import zipfile

import h5py
import numpy as np
import pytest
import torch

from biopsy.core.errors import DataError, RecipeError, RunError
from biopsy.models.importers.keras import import_keras, load_keras_into
from biopsy.models.importers.keras_files import read_keras
from keras_files import build, keras_layers, make_config, write_all, write_h5, write_keras, write_weights_h5
from refusals import refuses


@pytest.fixture
def cancernet_file(tmp_path):
    layers = keras_layers(build(input_px=48))
    return write_keras(tmp_path / "cancernet.keras", layers, make_config(layers, input_px=48)), layers


def test_another_architecture_says_where_and_which(tmp_path):
    baruah, cancernet = (
        keras_layers(build(name, input_px=px)) for name, px in (("baruah", 50), ("cancernet", 48))
    )
    weights = write_weights_h5(tmp_path / "a.weights.h5", baruah)
    with pytest.raises(DataError) as error:
        import_keras(weights, model="cancernet-2020", out=tmp_path / "mine")
    assert str(error.value) == (
        f"{weights} does not fit cancernet: it has 4 convolutions, 3 dense layers, expected 6 separable "
        "convolutions, 7 normalisations, 2 dense layers; its layers are those of baruah-2019"
    )
    whole = write_keras(tmp_path / "a.keras", cancernet, make_config(cancernet, input_px=48))
    match = (
        "does not fit dabydeen_hedges: its step 1 is separable convolution, expected convolution; "
        "its layers are those of cancernet-2019 or cancernet-2020"
    )
    with pytest.raises(DataError, match=match):
        import_keras(whole, model="dabydeen-hedges", out=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_layer_of_another_shape_is_named_and_nothing_is_carried(tmp_path):
    layers = keras_layers(build("dabydeen_hedges", widths=[3, 6], dense=4))
    path = write_h5(tmp_path / "a.h5", layers)
    network = build("dabydeen_hedges", widths=[3, 5], dense=4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    match = (
        r"does not fit the network: its convolution 2, 'conv2d_1', has weights 3x3x3x6 \+ 6, "
        r"expected 3x3x3x5 \+ 5 for 'body.conv2'; no shipped recipe has such a network"
    )
    with pytest.raises(DataError, match=match):
        load_keras_into(path, network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Activation": {"activation": "elu"}}, "step 2 .*elu.*relu"),
        ({"BatchNormalization": {"epsilon": 1e-5}}, "epsilon 1e-05"),
        ({"Conv2D": {"activation": "relu"}}, None),
        ({"SeparableConv2D": {"activation": "relu"}}, "step 3 .*relu.*normalisation"),
        ({"Activation": {"activation": {"config": "mine"}}}, "its step 2 is activation {'config'"),
        ({"SeparableConv2D": {"data_format": "channels_first"}}, "channels first.*'separable_conv2d'"),
    ],
)
def test_what_weights_do_not_tell_the_configuration_does(tmp_path, changes, said):
    layers = keras_layers(build(input_px=48))
    path = write_keras(tmp_path / "a.keras", layers, make_config(layers, input_px=48, **changes))
    if said is None:
        import_keras(path, model="cancernet", out=tmp_path / "mine")
        return
    with pytest.raises(DataError, match=said):
        import_keras(path, model="cancernet", out=tmp_path / "mine")


def test_further_steps_and_other_inputs_are_refused(tmp_path):
    layers = keras_layers(build(input_px=48))
    for number, (change, said) in enumerate(
        (
            (lambda nodes: nodes.insert(1, step("Rescaling")), "its step 1 is Rescaling"),
            (lambda nodes: nodes.append(step("Dense")), "its step 26 is softmax, expected nothing more"),
            (lambda nodes: nodes.pop(), "its step 25 is nothing more, expected dense layer"),
            (
                lambda nodes: nodes.__setitem__(4, step("AveragePooling2D")),
                "is AveragePooling2D, expected max-pooling",
            ),
            (
                lambda nodes: nodes.insert(2, step("ReLU", max_value=6.0)),
                r"is relu \(max_value 6.0\), expected relu",
            ),
            (
                lambda nodes: nodes[0]["config"].update(batch_shape=[None, 48, 40, 3]),
                "input shape .48, 40, 3.",
            ),
            (
                lambda nodes: nodes[0]["config"].update(batch_shape=[None, 9999, 9999, 3]),
                "input shape .9999, 9999",
            ),
        )
    ):
        config = make_config(layers, input_px=48)
        change(config["config"]["layers"])
        path = write_keras(tmp_path / f"{number}.keras", layers, config)
        with pytest.raises(DataError, match=said):
            import_keras(path, model="cancernet", out=tmp_path / "mine")


def step(class_name, **settings):
    return {"module": "keras.layers", "class_name": class_name, "config": {"name": "extra", **settings}}


# --- what is not safe


@pytest.mark.parametrize(
    "node",
    [
        {"class_name": "Lambda", "config": {"name": "sneaky", "function": ["4wEAAAAAAAAA", None, None]}},
        {"module": "os", "class_name": "system", "config": {"name": "sneaky"}},
        {"module": None, "class_name": "Mine", "registered_name": "pkg>Mine", "config": {"name": "sneaky"}},
        {
            "class_name": "Sequential",
            "config": {"layers": [{"class_name": "Lambda", "config": {"name": "sneaky"}}]},
        },
    ],
)
def test_code_in_a_file_is_named_and_never_executed(tmp_path, node):
    layers = keras_layers(build())
    config = make_config(layers, input_px=8)
    config["config"]["layers"].insert(1, node)
    network = build(seed=1)
    for path in (
        write_keras(tmp_path / "a.keras", layers, config),
        write_h5(tmp_path / "a.h5", layers, config=config, root=False),
    ):
        with pytest.raises(DataError, match=rf"{path.name} .*'sneaky', a .* is not run"):
            load_keras_into(path, network)


@pytest.mark.parametrize("name", ["../config.json", "/etc/config.json", "a/../../b"])
def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path, name):
    layers = keras_layers(build())
    path = write_keras(tmp_path / "a.keras", layers, make_config(layers, input_px=8))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "{}")
    with refuses(DataError, name):
        read_keras(path)


@pytest.mark.parametrize("link", ["soft", "external", "virtual", "stored elsewhere"])
def test_links_in_an_h5_are_not_followed(tmp_path, link):
    layers = keras_layers(build())
    other = write_h5(tmp_path / "other.h5", layers)
    path = write_h5(tmp_path / "a.h5", layers)
    place, shape = "dense/dense/bias:0", (256,)
    with h5py.File(path, "a") as file:
        del file[place]
        if link == "soft":
            file[place] = h5py.SoftLink("/dense_1/dense_1/bias:0")
        elif link == "external":
            file[place] = h5py.ExternalLink(other, place)
        elif link == "virtual":
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource(other, place, shape)
            file.create_virtual_dataset(place, layout)
        else:
            (tmp_path / "raw").write_bytes(bytes(1024))
            file.create_dataset(place, shape, "f4", external=[(tmp_path / "raw", 0, 1024)])
    with refuses(DataError, "links"):
        read_keras(path)


@pytest.mark.parametrize(
    ("replace", "said"),
    [
        (
            lambda f, p: f.create_dataset(p, data=np.full(256, "x", object), dtype=h5py.string_dtype()),
            "object",
        ),
        (lambda f, p: f.create_dataset(p, data=np.zeros(256, int)), "has int64 in 'dense/bias:0'"),
        (lambda f, p: f.create_dataset(p, data=np.full(256, np.nan)), "finite"),
        (lambda f, p: f.create_dataset(p, (256,), "f4", chunks=(9,)), "declares 1,024 bytes"),
        (lambda f, p: f.create_dataset(p, data=np.zeros(256), compression="gzip"), "compressed or in part"),
        (lambda f, p: f.create_group(p), "holds 'dense/bias:0' as a group"),
        (lambda f, p: None, "'dense/bias:0'"),
        (lambda f, p: f.attrs.modify("backend", "theano"), "by Keras on Theano"),
        (lambda f, p: f.attrs.pop("layer_names"), "weights"),
        (lambda f, p: f.attrs.modify("model_config", "{"), "JSON"),
        (lambda f, p: f.attrs.modify("model_config", "[1]"), "configuration"),
        (lambda f, p: f.attrs.modify("model_config", "[" * 9999), "nests deeper"),
    ],
)
def test_arrays_that_are_no_weights_are_refused(tmp_path, replace, said):
    path = write_h5(tmp_path / "a.h5", keras_layers(build()))
    with h5py.File(path, "a") as file:
        if "attrs" not in replace.__code__.co_names:
            del file["dense/dense/bias:0"]
        replace(file, "dense/dense/bias:0")
    with pytest.raises(DataError, match=said) as error:
        read_keras(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_that_was_cut_short_is_one_line(tmp_path):
    layers = keras_layers(build())
    for path, _ in write_all(tmp_path, layers, make_config(layers, input_px=8)):
        content = path.read_bytes()
        for share in (0.01, 0.2, 0.5, 0.9, 0.999):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(DataError, match=r"cut short|truncated") as error:
                read_keras(path)
            assert "\n" not in str(error.value)


def test_what_is_no_keras_file_is_refused(tmp_path):
    (tmp_path / "text.h5").write_text("conv2d")
    (tmp_path / "empty.keras").write_bytes(b"")
    (tmp_path / "saved_model").mkdir()
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    for name, said in (
        ("gone.h5", "does not exist"),
        ("text.h5", "text.h5 is no HDF5 file"),
        ("empty.keras", "empty.keras is no HDF5 file"),
        ("saved_model", "is a folder where a file was expected"),
        ("other.keras", "model.weights.h5"),
    ):
        with pytest.raises(DataError, match=said):
            read_keras(tmp_path / name)
    layers = keras_layers(build())
    large = write_keras(tmp_path / "large.keras", layers, " " * (2**24 + 1))
    with pytest.raises(DataError, match=r"has a config.json of 16,777,217 bytes"):
        read_keras(large)


def test_groups_that_hold_themselves_are_refused(tmp_path):
    path = write_weights_h5(tmp_path / "a.weights.h5", keras_layers(build()))
    with h5py.File(path, "a") as file:
        file["layers/again/layers"] = file["layers"]
    with refuses(DataError, "twice"):
        read_keras(path)


def test_an_array_in_the_place_of_a_group_is_refused(tmp_path):
    path = write_weights_h5(tmp_path / "a.weights.h5", keras_layers(build()))
    with h5py.File(path, "a") as file:
        name = next(iter(file["layers"]))
        del file[f"layers/{name}"]
        file.create_dataset(f"layers/{name}", shape=(10**6, 10**6), dtype="f4", chunks=(100, 100))
    with refuses(DataError, "array", "group"):
        read_keras(path)


@pytest.mark.parametrize("size", [0, 2**64 - 16])
def test_texts_that_have_no_end_are_refused(tmp_path, size):
    layers = keras_layers(build())
    path = write_h5(tmp_path / "a.h5", layers, config=make_config(layers, input_px=8), text=str, root=False)
    content = bytearray(path.read_bytes())
    place = content.index(b"GCOL") + 16
    content[place : place + 16] = (int(size > 0)).to_bytes(8, "little") + size.to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged texts"):
        read_keras(path)


def test_wrong_requests_are_refused(cancernet_file, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    path, _ = cancernet_file
    (tmp_path / "there").mkdir()
    for options, kind, said in (
        ({"model": "cancernett"}, RecipeError, "'cancernett': did you mean"),
        ({"out": tmp_path / "there"}, RunError, "there exists"),
        ({"class_names": ["a"]}, RecipeError, r"cancernet-2020 with class_names=\['a'\] and patch_px=50"),
        ({"class_names": ["a", "a"]}, RecipeError, "two or more"),
        ({"patch_px": 0}, RecipeError, "patch_px=0: pass two or more"),
        (
            {"positive": "cancer"},
            RecipeError,
            "positive='cancer' is not one of two classes: non_idc, idc",
        ),
        ({"model": "idc-small"}, RecipeError, r"idc-small with class_names=\[\] and patch_px=None"),
        (
            {"class_names": ["a", "b", "c"]},
            DataError,
            r"its dense layer 2, 'dense_1', has weights 256x2 \+ 2",
        ),
    ):
        arguments = {"model": "cancernet-2020", "out": tmp_path / "mine"} | options
        with pytest.raises(kind, match=said):
            import_keras(path, **arguments)
    assert not (tmp_path / "mine").exists()
