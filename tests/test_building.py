"""Packs of arrays, tables of files and data sets: their pixels and labels come out; misfits are refused."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from biopsy.core.errors import DataError, PackError
from biopsy.data.building import index_labels, to_rgb
from biopsy.data.packs import Pack
from refusals import refuses

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
LABELS = [0, 1, 1, 0, 0, 1, 0, 1]
PATIENTS = ["a", "a", "b", "b", "c", "c", "d", "d"]
NAMES = ["normal", "tumour"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_arrays():
    pack = Pack.from_arrays(
        IMAGES, LABELS, PATIENTS, class_names=NAMES, mpp=0.5, columns={"scanner": list("xy") * 4}
    )
    assert np.array_equal(pack.patches, IMAGES) and pack.target.tolist() == LABELS
    assert (pack.class_names, pack.info.positive_class, pack.info.mpp) == (NAMES, "tumour", 0.5)
    assert pack.group_ids.tolist() == PATIENTS and pack.unit == "patient"
    assert pack.table["scanner"].tolist() == list("xy") * 4
    pack.verify()


def test_the_same_arrays_give_the_same_pack_and_others_another():
    first = Pack.from_arrays(IMAGES, LABELS, PATIENTS, class_names=NAMES)
    assert Pack.from_arrays(IMAGES, LABELS, PATIENTS, class_names=NAMES).path == first.path
    changes = [
        {"labels": LABELS[::-1]},
        {"patients": PATIENTS[::-1]},
        {"class_names": ["normal", "cancer"]},
        {"mpp": 1.0},
        {"columns": {"scanner": LABELS}},
    ]
    plain = {"images": IMAGES, "labels": LABELS, "patients": PATIENTS, "class_names": NAMES}
    assert len({first.path, *(Pack.from_arrays(**plain | change).path for change in changes)}) == 6
    named = Pack.from_arrays(**plain, out="mine.pack")
    assert Pack.from_arrays(**plain, out="mine.pack").path == named.path
    with refuses(PackError, "mine.pack", reason="exists"):
        Pack.from_arrays(**plain | {"mpp": 2.0}, out="mine.pack")


def test_a_users_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with refuses(DataError, "mine"):
        Pack.from_arrays(IMAGES, LABELS, out="mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not list(tmp_path.glob(".biopsy-*"))


def test_images_of_several_sizes_and_labels_by_name():
    images = [IMAGES[0], IMAGES[1][:8], IMAGES[2][:, :6]]
    pack = Pack.from_arrays(images, ["benign", "malignant", "benign"])
    assert pack.sizes.tolist() == [[12, 12], [12, 8], [6, 12]]
    assert (pack.class_names, pack.info.positive_class) == (["benign", "malignant"], "malignant")
    assert pack.unit == "patch"
    for row, image in enumerate(images):
        width, height = pack.sizes[row]
        assert np.array_equal(pack.patches[row, :height, :width], image)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_files(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    for row, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "images" / f"{row}.png")
    table = pd.DataFrame(
        {
            "File": [f"images/{row}.png" for row in range(8)],
            "Label": np.array(NAMES)[LABELS],
            "Patient": [" 1.0", "1", "2", "2", "3", "3", "4", "4"],
            "age": range(30, 38),
        }
    )
    path = tmp_path / f"list{suffix}"
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    pack = Pack.from_table(path, positive_class="tumour", mpp=0.25)
    assert np.array_equal(pack.patches, IMAGES) and pack.target.tolist() == LABELS
    assert pack.group_ids.tolist() == list("11223344") and pack.table["age"].tolist() == list(range(30, 38))
    assert pack.table["source"].tolist() == table["File"].tolist()


def test_files_that_cannot_be_read_are_named(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[1]).save(tmp_path / "b.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    pd.DataFrame({"path": ["a.png", "none.png", "bad.png", "b.png"], "label": [0, 1, 0, 1]}).to_csv(
        "l.csv", index=False
    )
    pack = Pack.from_table("l.csv")
    assert len(pack) == 2 and [item["source"] for item in pack.info.skipped] == ["none.png", "bad.png"]
    assert pack.target.tolist() == [0, 1] and np.array_equal(pack.patches[1], IMAGES[1])
    pd.DataFrame({"path": ["x.png"], "label": [0]}).to_csv("l.csv", index=False)
    with pytest.raises(DataError):
        Pack.from_table("l.csv", class_names=NAMES)
    pd.DataFrame({"where": ["x.png"], "label": [0]}).to_csv("l.csv", index=False)
    with refuses(DataError, "where", "label", "path"):
        Pack.from_table("l.csv")


class Torch(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return self.make(row)


def as_tensor(row):
    return torch.from_numpy(IMAGES[row].copy()).permute(2, 0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda row: (as_tensor(row), LABELS[row], PATIENTS[row]),
        lambda row: (as_tensor(row).float() / 255, torch.tensor(LABELS[row]), PATIENTS[row]),
        lambda row: {
            "image": Image.fromarray(IMAGES[row]),
            "label": LABELS[row],
            "patient_id": PATIENTS[row],
        },
        lambda row: (IMAGES[row], NAMES[LABELS[row]], PATIENTS[row]),
    ],
    ids=["bytes", "float", "mapping", "names"],
)
def test_a_torch_data_set(make):
    pack = Pack.from_dataset(Torch(make), class_names=NAMES)
    assert np.array_equal(pack.patches, IMAGES) and pack.target.tolist() == LABELS
    assert pack.group_ids.tolist() == PATIENTS


class HuggingFace:
    """What a data set of Hugging Face offers, as far as it is used."""

    column_names = ("image", "label", "patient")
    features = {"label": SimpleNamespace(names=NAMES), "image": SimpleNamespace()}  # noqa: RUF012

    def __len__(self):
        return 8

    def __getitem__(self, key):
        if key == "label":
            return LABELS
        if key == "patient":
            return PATIENTS
        return {"image": Image.fromarray(IMAGES[key]), "label": LABELS[key], "patient": PATIENTS[key]}


def test_a_hugging_face_data_set():
    pack = Pack.from_dataset(HuggingFace(), mpp=0.5)
    assert np.array_equal(pack.patches, IMAGES) and pack.class_names == NAMES
    assert pack.group_ids.tolist() == PATIENTS
    with refuses(DataError, "train"):
        Pack.from_dataset({"train": HuggingFace()})
    with refuses(DataError, "list_iterator", "__len__"):
        Pack.from_dataset(iter([]))


def test_a_pack_of_arrays_is_trained_on(tmp_path):
    from tiny_runs import train_tiny

    images = np.concatenate([IMAGES] * 3)
    patients = [f"{name}{k}" for k in range(3) for name in PATIENTS]
    pack = Pack.from_arrays(images, LABELS * 3, patients, class_names=NAMES, columns={"patch_id": range(24)})
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1")
    assert run.info["status"] == "finished" and run.info["pack"]["content_sha256"] == pack.info.content_sha256


REFUSED = {
    "no image": (([], []), {}, ["images"]),
    "labels": ((IMAGES, [0, 1]), {}, ["labels", "(2,)", "8 images"]),
    "patients": ((IMAGES, LABELS, ["a"]), {}, ["patient_id", "(1,)", "8 patches"]),
    "floats": ((IMAGES / 255, LABELS), {}, ["float64", "uint8"]),
    "channels first": ((np.moveaxis(IMAGES, -1, 1), LABELS), {}, ["(3, 12, 12)", "(height, width, 3)"]),
    "grey": ((IMAGES[..., 0], LABELS), {}, ["(8, 12, 12)", "(n, height, width, 3)"]),
    "unknown class": (
        (IMAGES, [0, 1, 2, 0, 0, 1, 0, 1]),
        {"class_names": NAMES},
        ["'2'", "row 2"],
    ),
    "missing label": ((IMAGES, [0, 1, None, 0, 0, 1, 0, 1]), {"class_names": NAMES}, ["1 labels", "row 2"]),
    "names": ((IMAGES, LABELS), {"class_names": ["a", "a"]}, ["['a', 'a']"]),
    "one class": ((IMAGES, [0] * 8), {}, ["['0']", "two"]),
    "positive": (
        (IMAGES, LABELS),
        {"class_names": NAMES, "positive_class": "tumor"},
        ["'tumor'", "'tumour'"],
    ),
    "mpp": ((IMAGES, LABELS), {"mpp": -1}, ["-1", "0 and 1000"]),
    "ids": ((IMAGES, LABELS), {"columns": {"patch_id": ["a"] * 8}}, ["7 patch ids", "'a'"]),
    "column": ((IMAGES, LABELS), {"columns": {"sha256": LABELS}}, ["sha256"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_make_no_pack_are_refused(case, tmp_path):
    arguments, options, facts = REFUSED[case]
    with refuses(DataError, *facts):
        Pack.from_arrays(*arguments, **options)
    assert not list(tmp_path.rglob("*.pack"))


def test_labels_are_names_first_and_indices_else():
    assert index_labels([1, 2, 1], ["1", "2"]).tolist() == [0, 1, 0]
    assert index_labels([1.0, 0.0], NAMES).tolist() == [1, 0]
    assert index_labels([True, False], NAMES).tolist() == [1, 0]


def test_colours_of_an_image_are_kept():
    assert np.array_equal(to_rgb(Image.fromarray(IMAGES[0]).convert("RGBA")), IMAGES[0])
    assert np.array_equal(to_rgb(torch.from_numpy(IMAGES[0])), IMAGES[0])
