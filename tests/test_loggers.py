"""Loggers beside a run's own log: settings once, every epoch's numbers, one record for a resumed run."""

import sys
from types import SimpleNamespace

import pytest

from biopsy.core.errors import MissingExtra
from biopsy.training.train import train
from refusals import refuses
from tiny_runs import train_tiny


class Recorder:
    """Stands for MLflow and for Weights & Biases: notes what it is told."""

    def __init__(self):
        self.started, self.params, self.metrics, self.ended = [], [], {}, []

    # MLflow
    def start_run(self, run_id=None, run_name=None):
        self.started.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def log_params(self, params):
        self.params.append(params)

    def log_metrics(self, values, step):
        self.metrics[step] = values

    def end_run(self, status):
        self.ended.append(status)

    # Weights & Biases
    def init(self, *, id, config, **options):
        self.started.append((id, options["resume"]))
        self.params.append(config)
        return self

    def log(self, values, step):
        self.metrics[step] = values

    def finish(self, exit_code):
        self.ended.append(exit_code)


def train_with(pack, out, name, **options):
    return train_tiny(pack, out, "train.epochs=3", **{name: True}, **options)


def check_metrics(run, metrics):
    log = run.log()
    assert sorted(metrics) == [record["epoch"] for record in log] == [1, 2, 3]
    for record in log:
        assert metrics[record["epoch"]] == {k: v for k, v in record.items() if isinstance(v, float)}
        assert {"loss", "val_loss", "lr"} <= metrics[record["epoch"]].keys()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_settings_and_every_epoch_are_logged(make_pack, tmp_path, monkeypatch, name):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, name, recorder)
    run = train_with(make_pack(), tmp_path / "run", name)
    check_metrics(run, recorder.metrics)
    (params,) = recorder.params
    assert params["train.epochs"] == "3" and params["recipe"] == "cancernet-2020" and params["seed"] == 0
    assert not any(patient in str(params) for patient in set(run.open_pack().table["patient_id"]))
    assert recorder.ended == (["FINISHED"] if name == "mlflow" else [0])


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_resumed_run_goes_on_with_its_record(make_pack, tmp_path, monkeypatch, name):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, name, recorder)

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with(make_pack(), tmp_path / "run", name, on_epoch=stop)
    assert recorder.ended == (["KILLED"] if name == "mlflow" else [1])
    run = train(resume=tmp_path / "run", device="cpu", **{name: True})
    check_metrics(run, recorder.metrics)
    first, second = recorder.started
    if name == "mlflow":
        assert first == (None, run.info["id"]) and second == ("abc", None) and len(recorder.params) == 1
    else:
        assert first == second == (run.info["id"], "allow")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_one_that_is_not_installed_is_named(make_pack, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with refuses(MissingExtra, f"--{name}", extra=name):
        train_with(make_pack(), tmp_path / "run", name)


@pytest.mark.slow
def test_mlflow_itself_keeps_the_numbers(make_pack, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    run = train_with(make_pack(), tmp_path / "run", "mlflow")
    kept = mlflow.MlflowClient().get_run(run.info["mlflow_run"])
    assert kept.info.status == "FINISHED" and kept.data.params["train.epochs"] == "3"
    assert kept.data.metrics["loss"] == pytest.approx(run.log()[-1]["loss"])


@pytest.mark.slow
def test_weights_and_biases_itself_keeps_the_numbers_offline(make_pack, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train_with(make_pack(), tmp_path / "run", "wandb")
    assert list((run.path / "wandb").glob("offline-run-*/*.wandb"))
