"""Prediction: images, folders, zips and packs say the same; what cannot be read is named and counted."""

import json
import shutil
import zipfile

import cv2
import numpy as np
import pandas as pd
import pytest

import biopsy
from biopsy.core.errors import ArchiveError, DataError, RunError, SlideError
from biopsy.core.files import read_json
from biopsy.data.predictions import give_ids, read_predictions
from biopsy.evaluation.predict import predict
from biopsy.models.classifier import Classifier
from conftest import encode_png
from refusals import refuses

N = 20


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(trained_run, tmp_path):
    """The first patches of the pack, as images in two folders."""
    pack = trained_run.open_pack(verify=False)
    for index in range(N):
        path = tmp_path / "images" / f"{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pack.patches[index]))
    (tmp_path / "images" / "notes.csv").write_text("not,an,image\n")
    return tmp_path / "images"


@pytest.fixture
def archive(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))
    return tmp_path / "images.zip"


def ask(model, *paths, **options):
    return predict(model, paths, device="cpu", **options)


def numbers(frame):
    return frame.filter(regex="^(logit|prob)|_distance$").to_numpy(float)


def test_a_pack_is_predicted_as_training_left_it(trained_run):
    pack = trained_run.open_pack()
    found = ask(trained_run, pack.path)
    assert found.path.name == "predictions.csv" and found.skipped == []
    assert found.frame["patch_id"].tolist() == pack.table["patch_id"].tolist()
    assert found.frame["target"].tolist() == pack.target.tolist()
    before = trained_run.predictions("validation")[0].set_index("patch_id")
    now = found.frame.set_index("patch_id").loc[before.index]
    columns = ["logit_non_idc", "logit_idc", "prob_non_idc", "prob_idc", "prob"]
    np.testing.assert_allclose(now[columns], before[columns], rtol=1e-4, atol=1e-5)
    assert np.ptp(now["prob"]) > 0.01 and now["pred"].tolist() == before["pred"].tolist()
    called = found.frame["prob"] >= trained_run.info["threshold"]["value"]
    assert found.frame["pred"].tolist() == called.astype(int).tolist() and 0 < called.mean() < 1


def test_images_a_folder_a_zip_and_a_pack_say_the_same(trained_run, folder, archive):
    images = sorted(folder.rglob("*.png"))
    by_folder, by_zip, one_by_one = (ask(trained_run, *p) for p in ([folder], [archive], images))
    assert by_folder.frame["patch_id"].tolist() == [str(path.relative_to(folder)) for path in images]
    assert one_by_one.frame["patch_id"].tolist() == [path.name for path in images]
    for other in (by_zip, one_by_one):
        np.testing.assert_array_equal(numbers(other.frame), numbers(by_folder.frame))
    from_pack = ask(trained_run, trained_run.open_pack().path).frame.iloc[:N]
    order = [int(path.stem) for path in images]
    np.testing.assert_allclose(by_folder.frame["prob"], from_pack["prob"].iloc[order], atol=1e-5)
    assert by_folder.frame["target"].isna().all() and by_folder.frame["patient_id"].isna().all()


def test_every_row_says_where_it_came_from(trained_run, folder, archive):
    one, other = folder / "0" / "00.png", folder / "copy" / "00.png"
    other.parent.mkdir()
    shutil.copy(one, other)
    pack = trained_run.open_pack().path
    frame = ask(trained_run, one, other, archive, pack, one).frame
    sources = [one, other, *[archive] * N, *[pack] * 120, one]
    assert frame["source"].tolist() == list(map(str, sources))
    assert frame["patch_id"].iloc[[0, 1, -1]].tolist() == ["00.png"] * 3


def test_csv_and_parquet_hold_the_same(trained_run, folder):
    tables = []
    for format in ("csv", "parquet"):
        found = ask(trained_run, folder, format=format)
        assert found.path.name == f"predictions.{format}"
        frame, about = read_predictions(found.path)
        assert about["classifier_sha256"] == trained_run.classifier.sha256
        assert about["threshold"] == trained_run.info["threshold"] and about["sources"] == [str(folder)]
        pd.testing.assert_frame_equal(frame, found.frame, check_exact=True)
        tables.append(frame)
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0]["out_of_distribution"].dtype == bool


def test_kaggles_csv_holds_the_probability_of_the_positive_class(trained_run, folder):
    whole = ask(trained_run, folder).frame
    found = ask(trained_run, folder, format="kaggle")
    assert found.path.name == "submission.csv"
    table = pd.read_csv(found.path, dtype={"id": str})
    assert found.path.read_text().startswith("id,label\n") and table.columns.tolist() == ["id", "label"]
    assert table["id"].tolist() == [name[2:-4] for name in whole["patch_id"]]  # 0/04.png is 04
    np.testing.assert_array_equal(table["label"], whole["prob"])
    assert found.frame["pred"].tolist() == whole["pred"].tolist()
    about = json.loads(found.path.with_name("submission.csv.json").read_text())
    assert about["format"] == "biopsy-submission/1" and about["skipped"] == []
    pack = trained_run.open_pack().path
    ids = pd.read_csv(ask(trained_run, pack, format="kaggle", out="pack.csv").path)["id"]
    assert ids.tolist() == trained_run.open_pack().table["patch_id"].tolist()


def test_kaggles_csv_keeps_the_order_and_names_what_was_skipped(trained_run, folder, tmp_path):
    images = sorted(folder.rglob("*.png"))[::-1]
    (tmp_path / "broken.tif").write_bytes(b"II*\0 and no more")
    found = ask(trained_run, *images[:3], tmp_path / "broken.tif", *images[3:], format="kaggle")
    assert pd.read_csv(found.path, dtype={"id": str})["id"].tolist() == [path.stem for path in images]
    assert [item["source"] for item in found.skipped] == [str(tmp_path / "broken.tif")]
    assert json.loads(found.path.with_name("submission.csv.json").read_text())["skipped"] == found.skipped


def test_what_kaggle_would_not_take_is_refused(trained_run, folder):
    (folder / "2").mkdir()
    shutil.copy(folder / "0" / "00.png", folder / "2" / "00.PNG")
    with refuses(DataError, "'00'", "Kaggle"):
        ask(trained_run, folder, format="kaggle")
    with refuses(DataError, "Kaggle", "csv", "'table.parquet'"):
        ask(trained_run, folder / "0", format="kaggle", out="table.parquet")
    assert give_ids(["a.b.tif", "v1.2", "x/.png", "d.JPG"]) == ["a.b", "v1.2", ".png", "d"]


def test_a_file_that_cannot_be_read_is_named_and_skipped(trained_run, folder, archive, make_patches):
    (folder / "0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "1" / "empty.jpg").write_bytes(b"")
    large = make_patches(n_patients=1, patches_per_patient=1, patch_px=24)[0][0]
    (folder / "1" / "large.png").write_bytes(encode_png(large))
    (folder / "1" / "slide.png").write_bytes(encode_png(np.tile(large, (4, 3, 1))))
    shutil.copy(archive, folder / "more.zip")
    progress = []
    found = ask(trained_run, folder, on_progress=lambda done, total: progress.append((done, total)))
    reasons = {item["source"]: item["reason"] for item in found.skipped}
    assert reasons.keys() == {
        f"{folder}/{name}"
        for name in ("0/broken.png", "1/empty.jpg", "1/large.png", "1/slide.png", "more.zip")
    }
    assert "biopsy slide" in reasons[f"{folder}/1/slide.png"]
    assert reasons[f"{folder}/1/large.png"] == "is 24x24 px where the classifier takes patches of 16x16"
    assert reasons[f"{folder}/1/empty.jpg"] == "is empty"
    assert reasons[f"{folder}/more.zip"] == "is a zip inside a folder: give it separately"
    assert len(found.frame) == N and progress[-1] == (N + 5, N + 5)
    assert json.loads((found.path.with_name("predictions.csv.json")).read_text())["skipped"] == found.skipped
    alone = ask(trained_run, folder / "0" / "broken.png", folder / "0" / "00.png")
    assert [item["source"] for item in alone.skipped] == [str(folder / "0" / "broken.png")]
    assert len(alone.frame) == 1


def test_smaller_patches_are_stretched_from_their_true_size(trained_run, tmp_path, make_patches):
    patch = make_patches(n_patients=1, patches_per_patient=1)[0][0]
    stretched = cv2.resize(patch[:, :9], (16, 16), interpolation=cv2.INTER_LINEAR)  # as the recipe does
    for name, image in (("small", patch[:, :9]), ("stretched", stretched), ("whole", patch)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(image))
    prob = ask(trained_run, tmp_path).frame.set_index("patch_id")["prob"]
    assert prob["small.png"] == pytest.approx(prob["stretched.png"], abs=1e-5)
    assert prob["small.png"] != pytest.approx(prob["whole.png"], abs=1e-3)


def test_what_is_unlike_training_is_flagged_not_refused(trained_run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    for index, patch in enumerate(noise):
        (tmp_path / f"{index}.png").write_bytes(encode_png(patch))
    found = ask(trained_run, tmp_path).frame
    assert found["out_of_distribution"].all() and (found["colour_distance"] > 1).all()
    known = ask(trained_run, trained_run.open_pack().path).frame
    assert known["out_of_distribution"].mean() < 0.25
    far = known["colour_distance"].gt(1) | known["feature_distance"].gt(1)
    assert known["out_of_distribution"].tolist() == far.tolist()


def test_the_augmentation_that_predicted_is_written_beside_the_predictions(trained_run, folder):
    own, turned = (
        ask(trained_run, folder, out="own.parquet"),
        ask(trained_run, folder, out="d4.parquet", tta="d4"),
    )
    assert read_predictions(own.path)[1]["tta"] == "none"
    about = read_predictions(turned.path)[1]
    assert about["tta"] == "d4" and about["classifier_sha256"] != trained_run.classifier.sha256
    assert not np.allclose(own.frame["prob"], turned.frame["prob"])


def test_a_run_its_folder_and_its_classifier_are_one_model(trained_run, folder):
    models = (trained_run, trained_run.path, trained_run.path / "classifier", trained_run.classifier)
    frames = [ask(model, folder).frame for model in models]
    assert all(frame.equals(frames[0]) for frame in frames[:3])
    assert frames[3].equals(frames[0].assign(subset=frames[3]["subset"])), (
        "which has no run: subsets are not known"
    )
    assert frames[3]["subset"].isna().all()


def test_patches_of_the_run_are_recognised_by_their_pixels(trained_run, tmp_path):
    """Whether they come from the pack or as images under other names; others have no subset."""
    pack = trained_run.open_pack()
    subsets, index = trained_run.subsets(pack), [0, 1, 2, len(pack) - 1]
    prediction = ask(trained_run, pack.path)
    assert prediction.frame["subset"].fillna("").tolist() == subsets.tolist()
    assert prediction.n_training == (subsets == "train").sum() > 0
    (tmp_path / "images").mkdir()
    for number in index:
        width, height = pack.sizes[number]
        (tmp_path / "images" / f"{number}.png").write_bytes(encode_png(pack.patches[number][:height, :width]))
    (tmp_path / "images" / "new.png").write_bytes(encode_png(255 - pack.patches[0]))
    named = ask(trained_run, tmp_path / "images").frame.set_index("patch_id")["subset"].fillna("")
    assert named.to_dict() == {f"{number}.png": subsets[number] for number in index} | {"new.png": ""}


def test_more_than_two_classes_take_the_most_probable_class(trained_run, folder, tmp_path):
    from biopsy.models.networks import build_network

    info = trained_run.classifier.info.model_copy(
        update={
            "class_names": ["a", "b", "c"],
            "positive_class": None,
            "thresholds": [],
            "calibrator": {"method": "none"},
            "out_of_distribution": None,
        }
    )
    Classifier(info, build_network("residual", n_classes=3, input_px=16, base_channels=4, seed=0)).save(
        tmp_path / "three"
    )
    found = ask(tmp_path / "three", folder, trained_run.open_pack().path).frame
    probs = found[["prob_a", "prob_b", "prob_c"]].to_numpy()
    assert found["pred"].tolist() == probs.argmax(axis=1).tolist()
    assert "prob" not in found and "out_of_distribution" not in found
    assert found["target"].isna().all()  # the pack's classes are not the classifier's
    with refuses(DataError, "3 classes", "csv", "parquet"):
        ask(tmp_path / "three", folder, format="kaggle")


def test_labels_of_other_classes_are_left_out_and_reported(trained_run, make_pack, tmp_path, caplog):
    pack = make_pack(n_classes=3)
    predicted = biopsy.predict(trained_run, pack.path, out=tmp_path / "p.csv", device="cpu")
    assert predicted.frame["target"].isna().all()
    assert "class_2" in caplog.text and "non_idc" in caplog.text
    with refuses(DataError, "p.csv", "target"):
        biopsy.evaluate(predicted.path)


def test_nothing_that_can_be_read_is_an_error(trained_run, tmp_path):
    (tmp_path / "no.png").write_text("text")
    with refuses(DataError, "no.png"):
        ask(trained_run, tmp_path / "no.png")
    assert not (tmp_path / "predictions.csv").exists()


def test_slides_are_refused_with_the_command_that_maps_them(tmp_path, caplog):
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "case.SVS").write_bytes(b"II*\0")
    for path in (slides / "case.SVS", slides):
        with caplog.at_level("INFO"), refuses(SlideError, path, "biopsy slide"):
            ask("idc", path)
    assert not caplog.records  # refused before the classifier is opened


def test_refusals(trained_run, folder, make_pack, tmp_path):
    with refuses(DataError, "gone.png"):
        ask(trained_run, tmp_path / "gone.png")
    (tmp_path / "patch.xyz").write_text("what is this")
    with refuses(ArchiveError, "patch.xyz", "zip"):
        ask(trained_run, tmp_path / "patch.xyz")
    with refuses(RunError, tmp_path):
        ask(tmp_path, folder)
    with refuses(DataError, "table.xlsx", ".parquet", ".csv"):
        ask(trained_run, folder, out="table.xlsx")
    with refuses(DataError, "20 px"):
        ask(trained_run, folder, make_pack(patch_px=20).path)


@pytest.mark.parametrize(
    ("has_bf16", "least", "used"), [(True, N, "bf16"), (True, N + 1, "fp32"), (False, N, "fp32")]
)
def test_the_precision_is_chosen_by_the_processor_and_the_number_of_patches(
    trained_run, folder, tmp_path, monkeypatch, has_bf16, least, used
):
    plain = ask(trained_run, folder, out=tmp_path / "plain.csv", precision="fp32")
    monkeypatch.setattr("biopsy.models.hardware._supports_bf16", lambda: has_bf16)
    for module in ("evaluation.predict", "models.runtimes"):
        monkeypatch.setattr(f"biopsy.{module}.MIN_PATCHES_TO_CONVERT", least)
    chosen = ask(trained_run, folder, out=tmp_path / "chosen.csv")
    assert read_json(tmp_path / "chosen.csv.json")["precision"] == used
    columns = [name for name in plain.frame if name.startswith("prob_")]
    difference = np.abs(plain.frame[columns].to_numpy() - chosen.frame[columns].to_numpy()).max()
    assert difference <= {"fp32": 1e-4, "bf16": 0.05}[used]
