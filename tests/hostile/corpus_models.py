"""Models and predictions of others and of our own, damaged and made to do harm."""

import json
import pickle
import zipfile
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from corpus_arrays import Code, cut, garble
from harness import Input

REPORT, EVALUATE = ("report", "in.run"), ("evaluate", "in.run")
PREDICTIONS, WEIGHTS = "in.run/predictions/test.parquet", "in.run/classifier/weights.safetensors"
NEW_WEIGHTS = ("--set", "model.pretrained=true", "--set", "model.weights=w.pth")


def keras(change, folder: Path) -> None:
    """Write an ``.h5`` of one dense layer, and change it."""
    with h5py.File(folder / "k.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": []}})
        file.attrs["layer_names"] = np.array(["dense"], "S")
        layer = file.create_group("dense")
        layer.attrs["weight_names"] = np.array(["kernel:0", "bias:0"], "S")
        layer["kernel:0"], layer["bias:0"] = np.ones((4, 2), np.float32), np.ones(2, np.float32)
        change(file)


def texts_without_end(folder: Path) -> None:
    keras(lambda file: None, folder)
    content = bytearray((folder / "k.h5").read_bytes())
    place = content.index(b"GCOL") + 16
    content[place : place + 16] = bytes(16)
    (folder / "k.h5").write_bytes(content)


def array_as_group(file) -> None:
    file.create_dataset("layers/dense", shape=(10**6, 10**6), dtype="f4", chunks=(100, 100))


def layer_as_link(file) -> None:
    del file["dense"]
    file["dense"] = h5py.ExternalLink("other.h5", "/dense")


def zip_of_texts(folder: Path) -> None:
    with zipfile.ZipFile(folder / "k.h5", "w") as archive:
        archive.writestr("config.json", "[" * 100_000)
        archive.writestr("model.weights.h5", "no HDF5")


def change_predictions(change, folder: Path) -> None:
    """Change the table and keep its metadata."""
    metadata = pq.read_schema(folder / PREDICTIONS).metadata
    changed = change(pd.read_parquet(folder / PREDICTIONS))
    table = pa.Table.from_pandas(changed, preserve_index=False).replace_schema_metadata(metadata)
    pq.write_table(table, folder / PREDICTIONS)


def pickled(content: object, folder: Path) -> None:
    torch.save(content, folder / "w.pth")


INPUTS = [
    *(
        Input(f"keras_{trick}", make, ("import-keras", "k.h5", "--model", "cancernet-2020", "--out", "c"))
        for trick, make in {
            "texts_without_end": texts_without_end,
            "array_as_group": partial(keras, array_as_group),
            "config_deep": partial(keras, lambda file: file.attrs.modify("model_config", "[" * 60_000)),
            "config_is_a_number": partial(keras, lambda file: file.attrs.create("model_config", 5)),
            "layer_is_a_link": partial(keras, layer_as_link),
            "zip_of_texts": zip_of_texts,
            "garbage": lambda folder: (folder / "k.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500)),
        }.items()
    ),
    *(
        Input(f"predictions_{trick}", make, REPORT)
        for trick, make in {
            "cut": partial(cut, PREDICTIONS, 900),
            "garbage": partial(garble, PREDICTIONS),
            "prob_changed": partial(change_predictions, lambda table: table.assign(prob=0.123)),
            "column_gone": partial(change_predictions, lambda table: table.drop(columns="pred")),
            "texts_for_numbers": partial(change_predictions, lambda table: table.assign(target="x")),
        }.items()
    ),
    Input("weights_cut", partial(cut, WEIGHTS, 900), EVALUATE),
    Input("weights_garbage", partial(garble, WEIGHTS), EVALUATE),
    *(
        Input(f"weights_{trick}", make, ("train", "idc-small", "--data", "in.pack", *NEW_WEIGHTS))
        for trick, make in {
            "pickle": lambda folder: (folder / "w.pth").write_bytes(pickle.dumps(Code(), protocol=2)),
            "code_in_torch_file": partial(pickled, {"a": Code()}),
            "no_tensors": partial(pickled, [1, 2, 3]),
        }.items()
    ),
]
