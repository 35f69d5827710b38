"""Arrays and tables of packs, checkpoints and HDF5 files, damaged and lying."""

import os
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from harness import CANARY, Input

INSPECT = ("inspect", "in.pack")
NPY, PARQUET = "in.pack/patches.npy", "in.pack/patches.parquet"


class Code:
    def __reduce__(self):
        return (os.system, (f"touch {CANARY}",))


def cut(name: str, n_bytes: int, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


def garble(name: str, folder: Path) -> None:
    size = (folder / name).stat().st_size
    (folder / name).write_bytes(np.random.default_rng(0).bytes(size))


def save(array: np.ndarray, folder: Path) -> None:
    np.save(folder / NPY, array, allow_pickle=True)


def lie(shape: str, folder: Path) -> None:
    content = bytearray((folder / NPY).read_bytes())
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    content[10:128] = header.ljust(117) + b"\n"
    (folder / NPY).write_bytes(content)


def change_table(change, folder: Path) -> None:
    change(pd.read_parquet(folder / PARQUET)).to_parquet(folder / PARQUET, index=False)


def h5(write, folder: Path) -> None:
    place = folder / "pcam"
    place.mkdir()
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"], file["y"] = np.zeros((6, 8, 8, 3), np.uint8), np.zeros((6, 1, 1, 1), np.uint8)
    stem = "camelyonpatch_level_2_split_train_"
    with h5py.File(place / f"{stem}x.h5", "w") as x, h5py.File(place / f"{stem}y.h5", "w") as y:
        write(x, y)


def write_good(x, y) -> None:
    x["x"] = np.zeros((6, 8, 8, 3), np.uint8)
    y["y"] = np.zeros((6, 1, 1, 1), np.uint8)


def link_out(x, y) -> None:
    x["x"], y["y"] = h5py.ExternalLink("../other.h5", "x"), h5py.ExternalLink("../other.h5", "y")


def soft_link(x, y) -> None:
    write_good(x, y)
    x.move("x", "real")
    x["x"] = h5py.SoftLink("/real")


def group(x, y) -> None:
    write_good(x, y)
    del x["x"]
    x.create_group("x")


def declare(x, y) -> None:
    x.create_dataset("x", (5_000_000, 96, 96, 3), "u1", chunks=(1, 96, 96, 3))
    y.create_dataset("y", (5_000_000, 1, 1, 1), "u1", chunks=(1024, 1, 1, 1))


def store_out(x, y) -> None:
    write_good(x, y)
    del x["x"]
    x.create_dataset("x", (6, 8, 8, 3), "u1", external=[("../other.h5", 0, 6 * 8 * 8 * 3)])


def texts(x, y) -> None:
    write_good(x, y)
    del y["y"]
    y["y"] = np.array([b"a"] * 6)


PREPARE = ("prepare", "pcam", "--dataset", "pcam", "--out", "p.pack")
INPUTS = [
    Input("pack_npy_cut", partial(cut, NPY, 200), INSPECT),
    Input("pack_npy_empty", partial(cut, NPY, 0), INSPECT),
    Input("pack_npy_garbage", partial(garble, NPY), INSPECT),
    Input("pack_npy_2d", partial(save, np.zeros((4, 4), np.uint8)), INSPECT),
    Input("pack_npy_floats", partial(save, np.zeros((4, 4, 4, 3))), INSPECT),
    Input("pack_npy_pickle", partial(save, np.array([Code()], dtype=object)), INSPECT),
    Input("pack_npy_shape_1e15", partial(lie, "(1000000000000000, 16, 16, 3)"), INSPECT),
    Input("pack_npy_shape_negative", partial(lie, "(-1, 16, 16, 3)"), INSPECT),
    Input("pack_parquet_cut", partial(cut, PARQUET, 500), INSPECT),
    Input("pack_parquet_garbage", partial(garble, PARQUET), INSPECT),
    Input("pack_column_gone", partial(change_table, lambda table: table.drop(columns="target")), INSPECT),
    Input("pack_target_text", partial(change_table, lambda table: table.assign(target="x")), INSPECT),
    Input("pack_target_lists", partial(change_table, lambda t: t.assign(target=[[1]] * len(t))), INSPECT),
    Input("pack_label_turned", partial(change_table, lambda t: t.assign(target=1 - t["target"])), INSPECT),
    *(
        Input(f"h5_{write.__name__}", partial(h5, write), PREPARE)
        for write in (link_out, soft_link, group, declare, store_out, texts)
    ),
]
