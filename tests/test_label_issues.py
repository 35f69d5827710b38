"""The whole loop of doubted labels: flipped on purpose, found, decided by a person, prepared anew."""

import re
import shutil
import zipfile

import cv2
import numpy as np
import pandas as pd
import pytest

import biopsy
from biopsy.core.errors import DataError, RunError
from biopsy.data.packs import Pack
from biopsy.data.predictions import describe_patches, tabulate_predictions, write_predictions
from biopsy.training.patch_weights import read_patch_weights
from biopsy.training.runs import Run
from command_line import call
from refusals import refuses
from report_facts import Page
from tiny_runs import copy_run

SIDE = 12  # patches to a side of each slide


def write_slides(path, rng, n_slides=3, flipped_frac=0.05):
    """Slides in IDC's layout, a round tumour in each, some labels flipped; gives the true class by file name.

    The names of the files carry the flipped label, as those of an archive with wrong labels would.
    """
    truth = {}
    with zipfile.ZipFile(path, "w") as archive:
        for slide in range(n_slides):
            y, x = (grid.ravel() for grid in np.mgrid[:SIDE, :SIDE])
            inside = (x - 5) ** 2 + (y - 6) ** 2 < 16
            label = inside ^ (rng.random(SIDE * SIDE) < flipped_frac)
            for column, row, true, said in zip(x * 50 + 1, y * 50 + 1, inside, label, strict=True):
                colour = (96, 62, 138) if true else (226, 165, 196)
                patch = np.clip(colour + rng.normal(0, 8, (50, 50, 3)), 0, 255).astype(np.uint8)
                name = f"{8863 + slide}_idx5_x{column}_y{row}_class{int(said)}"
                truth[name] = int(true)
                data = cv2.imencode(".png", patch[..., ::-1])[1].tobytes()
                archive.writestr(f"IDC_regular_ps50_idx5/{8863 + slide}/{int(said)}/{name}.png", data)
    return truth


@pytest.fixture(scope="module")
def noisy(tmp_path_factory, trained_run):
    """A pack with flipped labels, and a run whose model, not trained on two of the slides, is often right."""
    place, rng = tmp_path_factory.mktemp("noisy"), np.random.default_rng(5)
    truth = write_slides(place / "idc.zip", rng)
    pack = biopsy.prepare(place / "idc.zip", place / "idc.pack")
    run = Run.open(shutil.copytree(trained_run.path, place / "run"))
    about = {"path": str(pack.path), "content_sha256": pack.info.content_sha256}
    run.update(pack={**run.info["pack"], **about}, files={}, classifier_sha256="")
    subsets = pack.table["slide_id"].map({"8863": "train", "8864": "validation", "8865": "test"})
    pack.table[["patch_id"]].assign(subset=subsets).to_csv(run.path / "split.csv", index=False)
    true = pack.table["patch_id"].map(truth).to_numpy(int)
    logits = np.stack([np.zeros(len(pack)), 3 * (2 * true - 1) + rng.normal(0, 2, len(pack))], axis=1)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for subset in ("validation", "test"):
        rows = np.flatnonzero(subsets == subset)
        patches = describe_patches(pack, rows, subset=subset)
        about = pack.class_names, pack.positive_index
        frame = tabulate_predictions(patches, *about, logits[rows], probs[rows])
        write_predictions(run.path / "predictions" / f"{subset}.parquet", frame, {"classifier_sha256": ""})
    return run, truth, place


def test_flipped_labels_are_found_decided_and_prepared(noisy, tmp_path):
    run, truth, place = noisy
    pack = Pack.open(place / "idc.pack")
    before = pack.table.set_index("patch_id")["target"]
    flipped = before.index[before != before.index.map(truth)]
    found = biopsy.label_issues(run, out=tmp_path / "out", n=500)
    sheet = pd.read_csv(found.path, dtype=str)
    assert sheet["patch_id"].tolist() == found.table["patch_id"].tolist()
    listed = set(sheet["patch_id"])
    recall, precision = len(listed & set(flipped)) / len(flipped), len(listed & set(flipped)) / len(listed)
    assert len(flipped) > 15 and recall >= 0.9 and precision >= 0.6, (recall, precision)
    assert sheet["patch_id"].head(15).isin(flipped).mean() >= 0.9, "the surest come first"
    assert sheet["decision"].isna().all() and (found.table["doubt"].diff().dropna() <= 0).all()
    assert pack.table.equals(Pack.open(place / "idc.pack").table), "nothing is changed"

    # a person, who sees the truth, decides on all but the last
    names = np.array(["non_idc", "idc"])
    right = names[[truth[name] for name in sheet["patch_id"]]]
    sheet["decision"] = np.where(right == sheet["suggested"], "Yes ", "no")
    sheet.loc[0, "decision"] = right[0]
    sheet.loc[len(sheet) - 1, "decision"] = None
    sheet["who"] = "AB"
    sheet.to_csv(found.path, index=False)
    corrected = biopsy.prepare(place / "idc.zip", tmp_path / "new.pack", labels=found.path)
    after = corrected.table.set_index("patch_id")
    decided = sheet["patch_id"].iloc[:-1]
    assert (after.loc[decided, "target"].to_numpy() == [truth[name] for name in decided]).all()
    rest = after.index.difference(decided)
    assert (after.loc[rest, "target"] == before[rest]).all(), "undecided ones keep their label"
    assert (after.loc[decided, "label_by"] == "AB").all() and after.loc[rest, "label_by"].isna().all()
    record = corrected.info.origin["labels"]
    assert (record["named"], record["undecided"]) == (len(sheet) - 1, 1)
    wrong_before, wrong_after = ((of != of.index.map(truth)).sum() for of in (before, after["target"]))
    assert wrong_after <= wrong_before * 0.2

    with refuses(DataError, f"{len(sheet) - 1} decisions", "--out"):
        biopsy.label_issues(run, out=tmp_path / "out")
    assert pd.read_csv(found.path)["decision"].notna().sum() == len(sheet) - 1


def test_only_models_that_were_not_trained_on_a_patch_speak(noisy, tmp_path):
    run, _, _ = noisy
    table = biopsy.label_issues(run, out=tmp_path / "a", n=500).table
    trained = table["patient_id"] == "8863"
    assert (
        trained.any() and (table.loc[trained, "reason"].str.endswith("every model was trained on it")).all()
    )
    assert table.loc[~trained, "reason"].str.contains("a model that was not trained on it gives").all()


def test_a_closed_test_subset_is_not_looked_at(noisy, tmp_path):
    run, _, _ = noisy
    closed = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    (closed.path / "predictions" / "test.parquet").unlink()
    table = biopsy.label_issues(closed, out=tmp_path / "out", n=500).table
    assert set(table["patient_id"]) == {"8863", "8864"}


def test_the_page_is_self_contained(noisy, tmp_path):
    run, _, _ = noisy
    called = call("label-issues", str(run.path), "--out", str(tmp_path / "out"), "--n", "4")
    assert called.exit_code == 0, called.output
    assert "4 are listed" in called.stdout and "biopsy prepare SOURCE --labels" in called.stdout
    text = (tmp_path / "out" / "labels.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "form"} & {tag for tag, _ in page.tags}
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 8 and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert not re.search(r"https?://", text)
    assert sum(attributes.get("class") == "issue" for _, attributes in page.tags) == 4
    assert "yes: " in page.text and "no: " in page.text
    sheet = pd.read_csv(tmp_path / "out" / "labels.csv")
    assert len(sheet) == 4 and all((tmp_path / "out" / name).is_file() for name in sheet["picture"])
    again = call("label-issues", str(run.path), "--out", str(tmp_path / "out"), "--n", "2", "--json")
    assert '"n_listed": 2' in again.stdout, "a sheet without decisions may be written anew"
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2


def test_without_coordinates_the_model_is_the_only_witness(trained_run, tmp_path, monkeypatch):
    run = copy_run(trained_run, tmp_path)
    biopsy.evaluate(run)
    pack = run.open_pack()
    monkeypatch.setattr(Run, "open_pack", lambda self, verify=True: pack)
    pack.table = pack.table.assign(x=pd.array([None] * len(pack), "Int64"))
    found = biopsy.label_issues(run, out=tmp_path / "out")
    frame = pd.concat([run.predictions(subset)[0] for subset in ("validation", "test")])
    against = frame[(frame["prob_idc"] > 0.5) != (frame["target"] == 1)]
    assert set(found.table["patch_id"]) == set(against["patch_id"])
    assert found.table["reason"].str.startswith("no coordinates; ").all()
    assert "have no coordinates" in Page(found.page.read_text()).text


def test_weights_are_the_probabilities_of_the_labels_by_models_that_were_not_trained_on_them(noisy, tmp_path):
    run, truth, place = noisy
    found = biopsy.label_issues(run, out=tmp_path / "out", n=3)
    weights = pd.read_csv(found.weights, dtype={"patch_id": str}).set_index("patch_id")
    frame = pd.concat([run.predictions(subset)[0] for subset in ("validation", "test")]).set_index("patch_id")
    assert set(weights.index) == set(frame.index) and (weights["n_models"] == 1).all()
    given = np.where(frame["target"] == 1, frame["prob_idc"], frame["prob_non_idc"])
    assert np.allclose(weights["weight"].reindex(frame.index), given, atol=1e-6)
    pack = Pack.open(place / "idc.pack")
    train = np.flatnonzero(np.isin(pack.table["slide_id"], ("8863", "8864")))
    read = read_patch_weights(found.weights, pack, train)
    assert read[train].mean() == pytest.approx(1, abs=1e-6)
    doubted = np.array([truth[name] for name in pack.table["patch_id"]]) != pack.target
    tested = (pack.table["slide_id"] == "8864").to_numpy()
    assert read[doubted & tested].mean() < 0.5 * read[~doubted & tested].mean()


def test_predictions_of_trained_patches_do_not_weigh(noisy, tmp_path):
    run = Run.open(shutil.copytree(noisy[0].path, tmp_path / "run"))
    split = pd.read_csv(run.path / "split.csv", dtype=str)
    split["subset"] = "train"
    split.to_csv(run.path / "split.csv", index=False)
    with refuses(RunError, "was trained on"):
        biopsy.label_issues(run, out=tmp_path / "out")


def test_refusals(noisy, tmp_path):
    with refuses(RunError, "n=0", "1"):
        biopsy.label_issues(noisy[0], out=tmp_path, n=0)
    with refuses(RunError, tmp_path / "nothing"):
        biopsy.label_issues(tmp_path / "nothing", out=tmp_path)
