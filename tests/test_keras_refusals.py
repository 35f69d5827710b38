"""Keras files that are damaged, unsafe or of another network: refused in one line that says why."""

import logging
import zipfile

import h5py
import numpy as np
import pytest
import torch

from biopsy.core.errors import DataError, FileFormatError, RecipeError, RunError
from biopsy.models.importers.keras import import_keras, load_keras_into
from biopsy.models.importers.keras_files import read_keras
from keras_files import build, keras_layers, make_config, write_all, write_h5, write_keras, write_weights_h5
from refusals import refuses


@pytest.fixture
def cancernet_file(tmp_path):
    layers = keras_layers(build(input_px=48))
    return write_keras(tmp_path / "cancernet.keras", layers, make_config(layers, input_px=48)), layers


def test_another_architecture_is_refused_with_the_differing_layer(tmp_path):
    baruah, cancernet = (
        keras_layers(build(name, input_px=px)) for name, px in (("baruah", 50), ("cancernet", 48))
    )
    weights = write_weights_h5(tmp_path / "a.weights.h5", baruah)
    has, expected = "4 convolutions, 3 dense", "6 separable convolutions, 7 normalisations, 2 dense"
    with refuses(FileFormatError, has, expected, "baruah-2019", path=weights, reason="architecture"):
        import_keras(weights, model="cancernet-2020", out=tmp_path / "mine")
    whole = write_keras(tmp_path / "a.keras", cancernet, make_config(cancernet, input_px=48))
    facts = ("dabydeen_hedges", "step 1", "separable convolution", "cancernet-2019 or cancernet-2020")
    with refuses(FileFormatError, *facts, path=whole, reason="architecture"):
        import_keras(whole, model="dabydeen-hedges", out=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_layer_of_another_shape_is_named_and_nothing_is_carried(tmp_path):
    layers = keras_layers(build("dabydeen_hedges", widths=[3, 6], dense=4))
    path = write_h5(tmp_path / "a.h5", layers)
    network = build("dabydeen_hedges", widths=[3, 5], dense=4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    facts = ("convolution 2", "'conv2d_1'", "3x3x3x6 + 6", "3x3x3x5 + 5", "'body.conv2'")
    with refuses(FileFormatError, *facts, path=path, reason="architecture"):
        load_keras_into(path, network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "facts", "reason"),
    [
        ({"Activation": {"activation": "elu"}}, ("step 2", "elu", "relu"), "architecture"),
        ({"BatchNormalization": {"epsilon": 1e-5}}, ("epsilon 1e-05",), "architecture"),
        ({"Conv2D": {"activation": "relu"}}, (), None),
        ({"SeparableConv2D": {"activation": "relu"}}, ("step 3", "relu", "normalisation"), "architecture"),
        ({"Activation": {"activation": {"config": "mine"}}}, ("step 2", "{'config'"), "architecture"),
        ({"SeparableConv2D": {"data_format": "channels_first"}}, ("'separable_conv2d'",), "value"),
    ],
)
def test_settings_that_weights_do_not_show_are_read_from_the_configuration(tmp_path, changes, facts, reason):
    layers = keras_layers(build(input_px=48))
    path = write_keras(tmp_path / "a.keras", layers, make_config(layers, input_px=48, **changes))
    if reason is None:
        import_keras(path, model="cancernet", out=tmp_path / "mine")
        return
    with refuses(FileFormatError, *facts, path=path, reason=reason):
        import_keras(path, model="cancernet", out=tmp_path / "mine")


def test_further_steps_and_other_inputs_are_refused(tmp_path):
    layers = keras_layers(build(input_px=48))
    for number, (change, facts, reason) in enumerate(
        (
            (lambda nodes: nodes.insert(1, step("Rescaling")), ("step 1 ", "Rescaling"), "architecture"),
            (lambda nodes: nodes.append(step("Dense")), ("step 26", "softmax"), "architecture"),
            (lambda nodes: nodes.pop(), ("step 25", "dense layer"), "architecture"),
            (
                lambda nodes: nodes.__setitem__(4, step("AveragePooling2D")),
                ("AveragePooling2D", "max-pooling"),
                "architecture",
            ),
            (
                lambda nodes: nodes.insert(2, step("ReLU", max_value=6.0)),
                ("relu (max_value 6.0)", "expected relu"),
                "architecture",
            ),
            (
                lambda nodes: nodes[0]["config"].update(batch_shape=[None, 48, 40, 3]),
                ("48, 40, 3",),
                "value",
            ),
            (
                lambda nodes: nodes[0]["config"].update(batch_shape=[None, 9999, 9999, 3]),
                ("9999, 9999",),
                "value",
            ),
        )
    ):
        config = make_config(layers, input_px=48)
        change(config["config"]["layers"])
        path = write_keras(tmp_path / f"{number}.keras", layers, config)
        with refuses(FileFormatError, *facts, path=path, reason=reason):
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
        with refuses(FileFormatError, "'sneaky'", "code is not run", path=path, reason="value"):
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
    ("replace", "fact", "reason"),
    [
        (
            lambda f, p: f.create_dataset(p, data=np.full(256, "x", object), dtype=h5py.string_dtype()),
            "object",
            "value",
        ),
        (lambda f, p: f.create_dataset(p, data=np.zeros(256, int)), "int64 in 'dense/bias:0'", "value"),
        (lambda f, p: f.create_dataset(p, data=np.full(256, np.nan)), "finite", "value"),
        (lambda f, p: f.create_dataset(p, (256,), "f4", chunks=(9,)), "1,024 bytes", "too-large"),
        (lambda f, p: f.create_dataset(p, data=np.zeros(256), compression="gzip"), "compressed", "value"),
        (lambda f, p: f.create_group(p), "'dense/bias:0' as a group", "value"),
        (lambda f, p: None, "'dense/bias:0'", "columns"),
        (lambda f, p: f.attrs.modify("backend", "theano"), "Theano", "value"),
        (lambda f, p: f.attrs.pop("layer_names"), "layer_names", "value"),
        (lambda f, p: f.attrs.modify("model_config", "{"), "JSON", "syntax"),
        (lambda f, p: f.attrs.modify("model_config", "[1]"), "configuration", "value"),
        (lambda f, p: f.attrs.modify("model_config", "[" * 9999), "32 levels", "too-deep"),
    ],
)
def test_arrays_that_are_no_weights_are_refused(tmp_path, replace, fact, reason):
    path = write_h5(tmp_path / "a.h5", keras_layers(build()))
    with h5py.File(path, "a") as file:
        if "attrs" not in replace.__code__.co_names:
            del file["dense/dense/bias:0"]
        replace(file, "dense/dense/bias:0")
    with refuses(FileFormatError, fact, path=path, reason=reason):
        read_keras(path)


def test_a_file_that_was_cut_short_is_one_line(tmp_path):
    layers = keras_layers(build())
    for path, _ in write_all(tmp_path, layers, make_config(layers, input_px=8)):
        content = path.read_bytes()
        for share in (0.01, 0.2, 0.5, 0.9, 0.999):
            path.write_bytes(content[: int(share * len(content))])
            with refuses(FileFormatError, path=path) as error:
                read_keras(path)
            assert error.value.reason in ("syntax", "columns")


def test_files_that_are_not_of_keras_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("conv2d")
    (tmp_path / "empty.keras").write_bytes(b"")
    (tmp_path / "saved_model").mkdir()
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    for name, fact, reason in (
        ("gone.h5", ".keras", "missing"),
        ("text.h5", "HDF5", "syntax"),
        ("empty.keras", "HDF5", "syntax"),
        ("saved_model", "folder", "not-regular"),
        ("other.keras", "model.weights.h5", "value"),
    ):
        with refuses(FileFormatError, fact, path=tmp_path / name, reason=reason):
            read_keras(tmp_path / name)
    layers = keras_layers(build())
    large = write_keras(tmp_path / "large.keras", layers, " " * (2**24 + 1))
    with refuses(FileFormatError, "config.json", "16,777,217 bytes", path=large, reason="too-large"):
        read_keras(large)
    odd = tmp_path / "two\nlines.h5"
    odd.write_text("text")
    with refuses(FileFormatError, path=odd, reason="syntax") as error:
        read_keras(odd)
    assert str(error.value).count("lines.h5") == 1


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
    with refuses(FileFormatError, "texts", path=path, reason="syntax"):
        read_keras(path)


def test_wrong_requests_are_refused(cancernet_file, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    path, _ = cancernet_file
    (tmp_path / "there").mkdir()
    for options, kind, *facts in (
        ({"model": "cancernett"}, RecipeError, "'cancernett'", "'cancernet"),
        ({"out": tmp_path / "there"}, RunError, tmp_path / "there"),
        ({"class_names": ["a"]}, RecipeError, "cancernet-2020", "class_names=['a']", "patch_px=50"),
        ({"class_names": ["a", "a"]}, RecipeError, "class_names=['a', 'a']"),
        ({"patch_px": 0}, RecipeError, "patch_px=0"),
        ({"positive": "cancer"}, RecipeError, "positive='cancer'", "non_idc, idc"),
        ({"model": "idc-small"}, RecipeError, "idc-small", "class_names=[]", "patch_px=None"),
        ({"class_names": ["a", "b", "c"]}, FileFormatError, "dense layer 2", "'dense_1'", "256x2 + 2"),
    ):
        arguments = {"model": "cancernet-2020", "out": tmp_path / "mine"} | options
        with refuses(kind, *facts):
            import_keras(path, **arguments)
    assert not (tmp_path / "mine").exists()
