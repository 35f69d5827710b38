import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biopsy.core.errors import DataError, FileFormatError
from biopsy.data.packs import Pack
from biopsy.data.predictions import (
    class_columns,
    describe_patches,
    read_predictions,
    tabulate_predictions,
    write_predictions,
)
from refusals import refuses

MakePack = Callable[..., Pack]
ABOUT = {"split": "patients", "threshold": {"value": np.float64(0.1), "rule": "youden"}, "pack_sha256": "ab"}


def tabulate(pack: Pack, index: np.ndarray, logits: np.ndarray, probs: np.ndarray, **options) -> pd.DataFrame:
    patches = describe_patches(pack, index, subset="test", fold=options.pop("fold", None))
    return tabulate_predictions(patches, pack.class_names, pack.positive_index, logits, probs, **options)


def predict(pack: Pack, index: np.ndarray, **options: object) -> pd.DataFrame:
    logits = np.random.default_rng(0).normal(0, 3, (len(index), len(pack.class_names))).astype(np.float32)
    probs = np.exp(logits.astype(float))
    probs /= probs.sum(axis=1, keepdims=True)
    return tabulate(pack, index, logits, probs, **options)


def test_table_of_two_classes(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=3)
    index = np.array([30, 2, 17])
    frame = predict(pack, index, fold=1, threshold=0.3)
    assert list(frame.columns) == [
        *("patch_id", "patient_id", "slide_id", "x", "y", "subset", "fold", "target"),
        *("logit_non_idc", "logit_idc", "prob_non_idc", "prob_idc", "pred", "abstained", "prob"),
    ]
    assert frame["patch_id"].tolist() == pack.table["patch_id"].iloc[index].tolist()
    assert frame["target"].tolist() == pack.target[index].tolist()
    assert frame["fold"].tolist() == [1, 1, 1]
    assert (frame["pred"] == (frame["prob"] >= 0.3)).all()
    assert (frame["prob"] == frame["prob_idc"]).all()
    assert not frame["abstained"].any()


def test_threshold_belongs_to_the_positive_class_wherever_it_stands() -> None:
    about = pd.DataFrame({"patch_id": ["a", "b", "c"]})
    probs = np.array([[0.2, 0.8], [0.3, 0.7], [0.9, 0.1]])
    frame = tabulate_predictions(about, ["idc", "rest"], 0, np.log(probs), probs, threshold=0.3)
    assert frame["pred"].tolist() == [1, 0, 0]
    assert frame["prob"].tolist() == [0.2, 0.3, 0.9]
    assert frame["target"].isna().all() and frame["patient_id"].isna().all()
    likeliest = tabulate_predictions(about, ["idc", "rest"], 0, np.log(probs), probs, threshold=None)
    assert likeliest["pred"].tolist() == [1, 1, 0]


def test_three_classes_take_the_most_probable_class(make_pack: MakePack) -> None:
    frame = predict(make_pack(n_patients=2, n_classes=3), np.arange(24))
    assert class_columns(frame) == ["class_0", "class_1", "class_2"]
    assert "prob" not in frame
    probs = frame[[f"prob_{name}" for name in class_columns(frame)]].to_numpy()
    assert frame["pred"].tolist() == probs.argmax(axis=1).tolist()


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("columns", [{}, {"x": pd.NA, "y": pd.NA, "patient_id": None, "slide_id": None}])
def test_round_trip(make_pack: MakePack, tmp_path: Path, ending: str, columns: dict[str, object]) -> None:
    frame = predict(make_pack(n_patients=3, columns=columns), np.arange(36))
    path = write_predictions(tmp_path / f"test.{ending}", frame, ABOUT)
    again, about = read_predictions(path)
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    assert about == {
        **ABOUT,
        "threshold": {"value": 0.1, "rule": "youden"},
        "format": "biopsy-predictions/1",
    }


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_csv_keeps_every_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    probs = np.stack([1 - np.array(values), np.array(values)], axis=1)
    about = pd.DataFrame({"patch_id": [f"{number:03}" for number in range(len(values))]})
    frame = tabulate_predictions(about, ["rest", "idc"], 1, probs * 1e9 - 3e-9, probs)
    path = write_predictions(tmp_path_factory.mktemp("csv") / "all.csv", frame, {})
    pd.testing.assert_frame_equal(read_predictions(path)[0], frame, check_exact=True)


def test_parquet_to_csv_to_parquet(make_pack: MakePack, tmp_path: Path) -> None:
    frame = predict(make_pack(n_patients=2), np.arange(24), abstained=np.arange(24) < 3)
    first, about = read_predictions(write_predictions(tmp_path / "a.parquet", frame, ABOUT))
    second, about = read_predictions(write_predictions(tmp_path / "a.csv", first, about))
    third, last = read_predictions(write_predictions(tmp_path / "b.parquet", second, about))
    pd.testing.assert_frame_equal(third, frame, check_exact=True)
    assert last == about


def test_impossible_predictions_are_refused(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=1)
    logits, probs = np.zeros((12, 2)), np.full((12, 2), 0.5)
    index = np.arange(12)
    for bad in (np.nan, 1.5, -0.1):
        wrong = probs.copy()
        wrong[3, 1] = bad
        with refuses(DataError, "[0, 1]"):
            tabulate(pack, index, logits, wrong)
    with refuses(DataError, "12 patches", "2 classes"):
        tabulate(pack, index, logits, probs[:, :1])
    with refuses(DataError, "a.xlsx", ".parquet", ".csv"):
        write_predictions(tmp_path / "a.xlsx", predict(pack, index), {})


def test_files_that_are_no_predictions_are_refused(make_pack: MakePack, tmp_path: Path) -> None:
    frame = predict(make_pack(n_patients=1), np.arange(12))

    def refuse(name: str, reason: str) -> None:
        with pytest.raises(FileFormatError) as caught:
            read_predictions(tmp_path / name)
        assert caught.value.reason == reason

    write_predictions(tmp_path / "a.csv", frame, {})
    beside = tmp_path / "a.csv.json"
    beside.write_text(json.dumps({"format": "biopsy-predictions/2"}))
    refuse("a.csv", "format")
    beside.unlink()
    refuse("a.csv", "missing")
    write_predictions(tmp_path / "b.csv", frame.drop(columns="target"), {})
    refuse("b.csv", "columns")
    write_predictions(tmp_path / "b.csv", frame.drop(columns=["prob_idc", "prob_non_idc"]), {})
    refuse("b.csv", "columns")
    pq.write_table(pa.table({"patch_id": ["a"]}), tmp_path / "c.parquet")
    refuse("c.parquet", "format")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 cut short")
    refuse("d.parquet", "syntax")
    refuse("absent.parquet", "missing")
    for change in ({"prob_idc": 1.5}, {"pred": 2}, {"target": -1}):
        refuse(write_predictions(tmp_path / "e.parquet", frame.assign(**change), {}).name, "value")


def test_predictions_changed_by_hand_are_refused(make_pack: MakePack, tmp_path: Path) -> None:
    frame = predict(make_pack(n_patients=1), np.arange(12))
    path = write_predictions(tmp_path / "a.csv", frame, {"threshold": 0.5})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace("test", "validation"), *lines[4:]]))
    with pytest.raises(FileFormatError) as caught:
        read_predictions(path)
    assert caught.value.reason == "altered"
    path = write_predictions(tmp_path / "prob.csv", frame, {"threshold": 0.5})
    changed = pd.read_csv(path)
    changed.loc[0, "prob"] = 0.123456
    changed.to_csv(path, index=False)
    with pytest.raises(FileFormatError) as caught:
        read_predictions(path)
    assert caught.value.reason == "altered"
    for change in (
        lambda text: text.replace("prob_", "p_", 1),
        lambda text: text.replace(",prob\n", ",pro\n", 1),
    ):
        path = write_predictions(tmp_path / "heading.csv", frame, {"threshold": 0.5})
        path.write_text(change(path.read_text()))
        with pytest.raises(FileFormatError):
            read_predictions(path)
    path = write_predictions(
        tmp_path / "a.parquet", frame.rename(columns={"prob": "pro"}), {"threshold": 0.5}
    )
    with pytest.raises(FileFormatError):
        read_predictions(path)
    known = frame.assign(out_of_distribution=False)
    path = write_predictions(tmp_path / "ood.parquet", known, {"threshold": 0.5})
    table = pq.read_table(path)
    column = table.column_names.index("out_of_distribution")
    pq.write_table(table.set_column(column, "out_of_distribution", pa.array([True] * len(table))), path)
    with pytest.raises(FileFormatError) as caught:
        read_predictions(path)
    assert caught.value.reason == "altered"
    path = write_predictions(tmp_path / "a.parquet", frame, {"threshold": 0.5})
    table = pq.read_table(path)
    metadata = {b"biopsy": table.schema.metadata[b"biopsy"].replace(b"0.5", b"0.1")}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(FileFormatError) as caught:
        read_predictions(path)
    assert caught.value.reason == "altered"
