"""From an archive to a report through the public functions, six patients."""

import re

import numpy as np
import pandas as pd

import biopsy
from tiny_runs import LIVELY

PATIENTS = [str(8863 + 2 * index) for index in range(6)]


def test_from_an_archive_to_a_report_without_names(make_idc_zip, tmp_path):
    source = make_idc_zip(n_patients=6, patches_per_patient=10)
    pack = biopsy.prepare(source, tmp_path / "idc.pack")
    assert len(pack) == 60 and pack.info.counts["patients"] == 6

    run = biopsy.train("idc-small", pack, seed=1, overrides=LIVELY, out=tmp_path / "run", device="cpu")
    metrics = biopsy.evaluate(run)
    assert metrics["times_opened"] == 1 and metrics["n_patches"] == 10

    (path,) = biopsy.report(run, hide_ids=True, complete=True)
    page = re.sub(r"base64,[^\"]*", "", path.read_text())
    assert not [patient for patient in PATIENTS if patient in page]
    assert "patient 1" in page and f"{metrics['patch']['auroc']['value']:.3f}" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert pack.table["patient_id"][run.subsets(pack) == "test"].nunique() == 1

    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert {
        "run.json",
        "recipe.toml",
        "split.csv",
        "log.jsonl",
        "checkpoints/last.safetensors",
        "classifier/classifier.json",
        "classifier/weights.safetensors",
        "predictions/validation.parquet",
        "predictions/test.parquet",
        "evaluation/metrics.json",
        "report.html",
    } <= files
    assert not [name for name in files if name.endswith(".partial")]

    split = pd.read_csv(run.path / "split.csv", dtype=str)
    assert split["patch_id"].tolist() == pack.table["patch_id"].tolist()
    assert split.groupby(pack.table["patient_id"].to_numpy())["subset"].nunique().max() == 1

    predicted = biopsy.predict(run, source, out=tmp_path / "patches.parquet", device="cpu")
    assert len(predicted.frame) == 60 and predicted.skipped == []
    by_file = predicted.frame["patch_id"].str.rsplit("/", n=1).str[1].str.removesuffix(".png")
    test = run.predictions("test")[0].set_index("patch_id")["prob"]
    again = pd.Series(predicted.frame["prob"].to_numpy(), by_file).loc[test.index]
    assert np.ptp(test) > 0.05
    np.testing.assert_allclose(again, test, atol=1e-4)
