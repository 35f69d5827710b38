"""What to label next: informative, spread over patients, within the budget; a queue the page shows."""

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

import biopsy
from biopsy.app.queue import choose, read_queue
from biopsy.app.viewer import make_viewer
from biopsy.core.errors import DataError, UserFileError
from slide_maps import make_classifier


def candidates(n=60, patients=3, **columns):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "uncertainty": rng.uniform(size=n),
            "ood_score": np.nan,
            "patient_id": [f"p{index % patients}" for index in range(n)],
            "slide": [f"p{index % patients}" for index in range(n)],
            "x": np.arange(n) // patients % 5 * 100.0,
            "y": np.arange(n) // patients // 5 * 100.0,
            "side": 50.0,
        }
    )
    return frame.assign(**columns)


def test_the_most_uncertain_come_first_and_patients_take_turns():
    frame = candidates()
    chosen = frame.iloc[choose(frame, 9)]
    assert chosen["patient_id"].value_counts().tolist() == [3, 3, 3]
    for patient, rows in chosen.groupby("patient_id"):
        own = frame[frame["patient_id"] == patient]
        assert set(rows.index) == set(own["uncertainty"].nlargest(3).index)
    assert chosen.index[0] == frame["uncertainty"].idxmax()


def test_novel_patches_come_before_equally_uncertain_ones():
    ood_score = np.zeros(60)
    ood_score[7] = 5
    frame = candidates(uncertainty=0.5, ood_score=ood_score)
    assert choose(frame, 1).tolist() == [7]


def test_neighbours_are_not_chosen_together_while_there_are_others():
    frame = candidates(patients=1, n=25, x=np.arange(25) % 5 * 50.0, y=np.arange(25) // 5 * 50.0)
    chosen = frame.iloc[choose(frame, 4)]
    places = chosen[["x", "y"]].to_numpy()
    apart = np.abs(places[:, None] - places[None]).max(axis=2)
    assert (apart[~np.eye(4, dtype=bool)] > 50).all()
    assert sorted(choose(frame, 100)) == list(range(25))  # in the end all, each once


def test_random_is_the_default_and_follows_the_seed(trained_run, tmp_path):
    pack = trained_run.open_pack(verify=False)

    def ask(name, **options):
        out = tmp_path / f"{name}.csv"
        return (
            biopsy.next(trained_run, pack.path, budget=12, out=out, device="cpu", **options)
            .table["patch_id"]
            .tolist()
        )

    first = ask("first")
    assert first == ask("again", strategy="random", seed=0) and len(set(first)) == 12
    assert first != ask("other", seed=1) and first != ask("ranked", strategy="informative")


def test_the_queue_of_a_pack_leaves_out_what_was_trained_on(trained_run, tmp_path):
    pack = trained_run.open_pack(verify=False)
    queue = biopsy.next(
        trained_run,
        pack.path,
        budget=12,
        strategy="informative",
        out=tmp_path / "queue.csv",
        device="cpu",
    ).table
    assert len(queue) == 12 and queue["patch_id"].is_unique
    sides = trained_run.subsets(pack)[pack.rows_of(queue["patch_id"])]
    assert "train" not in sides
    assert queue["patient_id"].nunique() == 10  # of the validation and test patients
    again = read_queue(tmp_path / "queue.csv")
    assert again["patch_id"].tolist() == queue["patch_id"].tolist()
    client = TestClient(make_viewer(pack.path, queue=tmp_path / "queue.csv"))
    items = client.get("/api/state").json()["queue"]
    assert [item["patch_id"] for item in items] == queue["patch_id"].tolist()
    assert all(item["slide_key"] and item["reason"] for item in items)


def test_the_queue_of_slides_lies_on_their_grid(make_slide, tmp_path):
    path = make_slide("case.tiff", width=1400, height=900)
    queue = biopsy.next(make_classifier(), path, budget=5, out=tmp_path / "queue.csv", device="cpu").table
    slide_map = biopsy.slide(make_classifier(), path, device="cpu")
    places = set(zip(slide_map.grid.x.tolist(), slide_map.grid.y.tolist(), strict=True))
    assert set(zip(queue["x"].astype(int), queue["y"].astype(int), strict=True)) <= places
    client = TestClient(make_viewer(path, queue=tmp_path / "queue.csv"))
    assert len(client.get("/api/state").json()["queue"]) == 5


def test_a_queue_with_decisions_is_not_written_over(trained_run, tmp_path):
    pack = trained_run.open_pack(verify=False)
    out = tmp_path / "queue.csv"
    queue = biopsy.next(trained_run, pack.path, budget=3, out=out, device="cpu").table
    queue.assign(decision="yes").to_csv(out, index=False)
    with pytest.raises(UserFileError):
        biopsy.next(trained_run, pack.path, budget=3, out=out, device="cpu")
    with pytest.raises(DataError):
        biopsy.next(trained_run, pack.path, budget=0, out=tmp_path / "other.csv")
