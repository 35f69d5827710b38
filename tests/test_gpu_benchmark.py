"""The benchmark of a GPU runs from end to end without one."""

import csv

import pytest

import gpu


@pytest.mark.slow
def test_every_task_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.csv")
    gpu.main(["--device", "cpu", "--small"])
    with open(tmp_path / "gpu.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    batches = [(size, precision) for size in gpu.SMALL_BATCH_SIZES for precision in ("fp32", "bf16")]
    tasks = [f"train cancernet, batch {size}, {precision}" for size, precision in batches]
    assert [row["task"] for row in rows] == [*tasks, "slide idc, bf16"]
    assert {row["device"] for row in rows} == {"cpu"}
    assert all(int(row["patches"]) > 0 and float(row["patches_per_s"]) >= 0 for row in rows)
    assert [int(row["patches"]) for row in rows[:-1]] == [gpu.SMALL_EPOCH] * 4
    assert all(float(row["epoch_s"]) > 0 and float(row["ratio_to_post"]) >= 0 for row in rows[:-1])
