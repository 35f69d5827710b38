"""Abstention from end to end: fitted with the run, refused in words, refitted, applied, judged, reported."""

import json

import numpy as np
import pytest

from biopsy.core.errors import RecipeError
from biopsy.core.files import write_json
from biopsy.data.predictions import read_predictions
from biopsy.evaluation.abstention.measure import BEFORE
from biopsy.evaluation.abstention.section import describe_abstention
from biopsy.evaluation.calibration.recalibrate import calibrate
from biopsy.evaluation.evaluate import evaluate
from biopsy.evaluation.predict import predict
from biopsy.models.classifier import Classifier
from biopsy.recipes import load_recipe
from biopsy.reporting.facts import RunFacts
from biopsy.statistics.abstention import fit_conformal, predict_sets
from biopsy.training.runs import Run
from refusals import refuses
from tiny_runs import copy_run

FEW = "an error rate of 0.1 needs at least 9 calibration patients; there are 5"


@pytest.fixture
def promising(trained_run, tmp_path):
    """The trained run, promising less: an error rate of .25 needs 3 patients, and 5 validate."""
    run = copy_run(trained_run, tmp_path)
    recipe = run.path / "recipe.toml"
    text = recipe.read_text(encoding="utf-8")
    assert "abstention_error = 0.1\n" in text
    recipe.write_text(text.replace("abstention_error = 0.1\n", "abstention_error = 0.25\n"), encoding="utf-8")
    run.update(files=run.hash_files("recipe.toml"))
    calibrate(run)
    return Run.open(run.path)


def test_a_run_with_few_validation_patients_has_no_guarantee_and_states_why(trained_run, tmp_path):
    known = trained_run.classifier.info.conformal
    assert known["quantiles"] is None and known["reason"] == FEW and known["per_patch_quantiles"] is not None
    run = copy_run(trained_run, tmp_path)
    metrics = evaluate(run)
    entry = metrics["abstention"]
    assert entry["reason"] == FEW and entry["n_calibration_patients"] == 5 and entry["verdict"] is None
    assert not run.predictions("test")[0]["abstained"].any()
    names, (table, _) = metrics["class_names"], run.predictions("test")
    facts = RunFacts(
        run=run.info,
        metrics=run.metrics(),
        positive_class=metrics["positive_class"],
        predictions=table,
        class_names=names,
    )
    section = describe_abstention(facts)
    assert FEW in section.blocks[0].text and section.blocks[1].tone == "note"


def test_calibrating_again_fits_the_sets_again(promising):
    info, (val, _) = promising.classifier.info, promising.predictions("validation")
    probs = val[[f"prob_{name}" for name in info.class_names]].to_numpy()
    fit = fit_conformal(probs, val["target"].to_numpy(int), val["patient_id"].to_numpy(str), 0.25)
    assert info.conformal["quantiles"] == fit["quantiles"] and info.conformal["reason"] is None
    assert (info.conformal["n_patients"], info.conformal["n_patches"]) == (5, 40)
    assert (info.conformal["unit"], info.conformal["chosen_on"]) == ("patient", "validation")
    assert Classifier.load(promising.path / "classifier").info.conformal == info.conformal


def test_what_is_evaluated_is_what_is_predicted(promising, tmp_path):
    entry, classifier = evaluate(promising)["abstention"], promising.classifier
    test, _ = promising.predictions("test")
    probs = test[[f"prob_{name}" for name in classifier.info.class_names]].to_numpy()
    sets = predict_sets(probs, classifier.info.conformal["quantiles"])
    alone = (sets.sum(axis=1) == 1) & sets[np.arange(len(test)), test["pred"].to_numpy(int)]
    assert (test["abstained"] == ~alone).all()
    assert entry["patch"]["abstained"]["value"] == pytest.approx(test["abstained"].mean())
    assert entry["verdict"] in ("met", "violated", "inconclusive") and entry["target_coverage"] == 0.75

    pack = promising.open_pack()
    found = predict(promising, pack.path, out=tmp_path / "new.parquet").frame.set_index("patch_id")
    assert found.loc[test["patch_id"], "abstained"].tolist() == test["abstained"].tolist()
    again, _ = read_predictions(tmp_path / "new.parquet")
    assert again["abstained"].tolist() == found["abstained"].tolist()


def test_a_classifier_of_an_older_version_predicts_without_abstention(trained_run, tmp_path):
    run = copy_run(trained_run, tmp_path)
    path = run.path / "classifier" / "classifier.json"
    document = json.loads(path.read_text())
    del document["conformal"]
    write_json(path, document)
    run.update(files={})
    classifier = Classifier.load(run.path / "classifier")
    assert classifier.info.conformal == {} and classifier.abstains(np.array([[0.5, 0.5]])) is None
    entry = evaluate(Run.open(run.path))["abstention"]
    assert entry["alpha"] is None and entry["reason"] == BEFORE


@pytest.mark.parametrize("setting", ["error=0", "error=1", "error=-0.1", "error=nan", "guarantee=none"])
def test_an_error_rate_or_guarantee_that_is_none_is_refused(setting):
    with refuses(RecipeError, f"abstention_{setting.partition('=')[0]}", reason="value"):
        load_recipe("cancernet-2020", [f"decision.abstention_{setting}"])
