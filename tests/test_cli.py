"""The command line: exit codes, one-line errors, results on stdout, everything else on stderr."""

import errno
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import biopsy
from biopsy.cli.console import EpochLines, epoch_line, list_entries, print_json
from biopsy.core.errors import RunError
from biopsy.core.files import SEAL
from biopsy.core.results import Table, number, to_text
from biopsy.data.download import FetchResult
from biopsy.data.packs import Pack
from biopsy.evaluation.predict import Prediction
from biopsy.training.runs import Run
from biopsy.training.study import Study
from command_line import call

RECORD = {
    "epoch": 3,
    "loss": 0.51234,
    "accuracy": 0.8,
    "val_loss": 0.6,
    "val_accuracy": 0.75,
    "val_auroc": 0.9123,
    "lr": 0.00975,
    "images_per_s": 1234.5,
    "time_left_s": 151.2,
    "best": True,
    "run": "runs/one",
}


@pytest.fixture
def replace(monkeypatch):
    """``replace(name, function_or_error)``: what a verb calls; an error is raised."""

    def put(name, what):
        def raising(*args, **kwargs):
            raise what

        # put there without looking at the old one, which would load what it needs
        monkeypatch.setitem(vars(biopsy), name, raising if isinstance(what, BaseException) else what)

    return put


def predicted(skipped=()):
    """What `biopsy.predict` returns for three patches, two of them training patches."""
    names = ["non_idc", "idc"]
    frame = pd.DataFrame(
        {
            "patch_id": ["a", "b", "c"],
            "prob_non_idc": [0.2, 0.6, 0.1],
            "prob_idc": [0.8, 0.4, 0.9],
            "pred": [1, 0, 1],
            "abstained": [False, True, False],
            "out_of_distribution": [False, True, None],
        }
    )
    about = {"class_names": names, "n_training": 2, "skipped": list(skipped)}
    return Prediction(frame, Path("x.csv"), **about)


# --- errors and exit codes


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (biopsy.PackError("x.pack was altered:\n make it again"), "error: x.pack was altered: make it again"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.zip"), "error: a.zip: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "a.pack"), "error: a.pack: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (OSError("strange"), "error: strange"),
        (biopsy.DownloadError("the server refuses"), "error: the server refuses"),
    ],
)
def test_known_errors_are_one_line_and_exit_1(replace, error, said):
    replace("evaluate", error)
    result = call("evaluate", "some-run")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("give a pack with data=", "give a pack with --data"),
        ("split='a' needs data= of another pack", "--split 'a' needs --data of another pack"),
        ("subset='x' is unknown: data=a is not", "--subset 'x' is unknown: --data a is not"),
        ("split=1/run is no pack; train.data=2, run=3", "split=1/run is no pack; train.data=2, run=3"),
    ],
)
def test_arguments_in_errors_are_named_as_options(replace, message, printed):
    error = RunError(message, "code")

    def fail(run, **options):
        raise error

    replace("evaluate", fail)
    assert call("evaluate", "runs/one", "--data", "split=1/run").stderr == f"error: {printed}\n"
    assert error.reason == "code"


def test_a_defect_of_ours_is_not_hidden(replace):
    replace("evaluate", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        call("evaluate", "some-run")


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train", "cancernet-2020"],
        ["train"],
        ["train", "cancernet-2020", "--data", "x.pack", "--seed", "two"],
        ["study", "cancernet-2020", "--data", "x.pack", "--seeds", "0,one"],
        ["study", "cancernet-2020", "--data", "x.pack", "--seeds", ","],
        ["evaluate", "run", "--subset", "train"],
        ["predict", "run"],
        ["prepare", "x.zip"],
        ["split", "x.pack"],
        ["list", "weights"],
    ],
)
def test_wrong_usage_exits_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and result.stderr != ""


def test_errors_of_the_installed_command_are_one_line(tmp_path):
    code = "import sys; from biopsy.cli import main; sys.argv[0] = 'biopsy'; main()"
    missing = str(tmp_path / "missing.pack")
    done = subprocess.run(
        [sys.executable, "-c", code, "split", missing, "--protocol", "patients"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {missing} is not a pack (it has no pack.json): make one with")
    assert done.stderr.count("\n") == 1


# --- Ctrl-C


def test_interrupted_training_states_how_to_go_on(replace):
    replace("train", KeyboardInterrupt("runs/one"))
    result = call("train", "--data", "x.pack", "cancernet-2020")
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "`biopsy train --resume runs/one`" in result.stderr


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("train", ["cancernet-2020", "--data", "x.pack"]),
        ("study", ["cancernet-2020", "--data", "x.pack"]),
        ("sweep", ["cancernet-2020", "--data", "x.pack", "--grid", "train.lr=1,2"]),
        ("reproduce", ["--data", "x.pack"]),
        ("prepare", ["x.zip", "--out", "x.pack"]),
        ("demo", []),
        ("predict", ["run", "x.png"]),
    ],
)
def test_an_interrupted_command_proposes_to_run_it_again(replace, verb, arguments):
    replace(verb, KeyboardInterrupt())
    result = call(verb, *arguments)
    assert result.exit_code == 130
    assert result.stderr.startswith("error: interrupted") and "run the same command again" in result.stderr


def test_an_interruption_outside_of_a_command_is_one_line(monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("biopsy.cli.app._run_command", interrupt)
    result = call("doctor")
    assert result.exit_code == 130 and result.stderr == "error: interrupted\n"


# --- what goes where


def test_training_prints_the_run_on_stdout_and_epochs_on_stderr(replace):
    asked = {}

    def train(recipe, data, *, on_epoch, **options):
        asked.update(options, recipe=recipe, data=data)
        for epoch in (9, 10):
            on_epoch(RECORD | {"epoch": epoch, "val_auroc": None if epoch == 10 else 0.5, "best": False})
        return Run(Path("runs/one"), {})

    replace("train", train)
    result = call(
        "train", "r", "--data", "p", "--set", "train.lr=0.1", "--set", "train.epochs=2", "--fold", 1
    )
    assert result.stdout == f"{Path('runs/one')}\n"
    head, *lines = result.stderr.splitlines()
    assert head == "run runs/one" and len(lines) == 2
    assert len(set(map(len, lines))) == 1, "lines of epochs are aligned"
    assert asked["overrides"] == ["train.lr=0.1", "train.epochs=2"]
    assert asked.keys() == {"recipe", "data", "fold", "overrides"}, "defaults are the function's own"
    assert (asked["recipe"], asked["data"], asked["fold"]) == ("r", Path("p"), 1)


def test_an_epoch_is_one_line_with_everything_in_it():
    assert epoch_line(RECORD) == (
        "epoch   3  loss  0.5123  accuracy 0.800  val loss  0.6000  accuracy 0.750  auroc 0.912  lr 9.75e-03"
        "    1,234 images/s  0:02:31 left  best so far"
    )


def test_a_logistic_regression_has_neither_epochs_nor_a_learning_rate():
    timing = ("lr", "time_left_s")
    record = {key: value for key, value in RECORD.items() if key not in timing}
    line = epoch_line(record | {"penalty": 0.01, "n_features": 1280, "images_per_s": 90.0})
    assert all(part in line for part in ("logistic regression", "1,280 features", "0.01", "loss  0.5123"))
    assert not any(word in line for word in ("epoch", "lr ", "images/s", "left", "best"))


def test_each_run_of_a_study_is_named_once(capsys):
    lines = EpochLines()
    for run in ("a", "a", "b"):
        lines(RECORD | {"run": run})
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("run")] == ["run a", "run b"]
    assert len(said) == 5


@pytest.mark.parametrize(("verb", "exit_code"), [("prepare", 3), ("predict", 3)])
def test_skipped_input_is_named_counted_and_exits_3(replace, verb, exit_code):
    skipped = [{"source": f"{number}.png", "reason": "is no image"} for number in range(25)]
    known = {"dataset": "idc", "patch_px": 50, "mpp": None, "positive_class": "idc"}
    info = SimpleNamespace(skipped=skipped, counts={"patches": 12_000, "per_class": {"idc": 5}}, **known)
    replace("prepare", lambda *args, **options: Pack(Path("x.pack"), info, None, None))
    replace("predict", lambda **options: predicted(skipped=skipped))
    result = call(verb, "a", *(["--out", "x.pack"] if verb == "prepare" else ["b"]))
    assert result.exit_code == exit_code
    assert "skipped 0.png: is no image" in result.stderr
    assert "5 more" in result.stderr and "25 inputs" in result.stderr
    assert ("x.pack" if verb == "prepare" else "x.csv") in result.stdout
    assert ("12,000" in result.stdout) == (verb == "prepare")


def test_nothing_skipped_exits_0(replace):
    replace("predict", lambda **options: predicted())
    result = call("predict", "a", "b", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "path": "x.csv",
        "n_patches": 3,
        "pred": {"non_idc": 1, "idc": 2},
        "n_training": 2,
        "skipped": [],
    }


def test_predicted_classes_are_named_and_training_patches_counted(replace):
    replace("predict", lambda **options: predicted())
    result = call("predict", "a", "b")
    assert "1 non-IDC, 2 IDC" in result.stdout
    shown = [line.split(maxsplit=3) for line in result.stdout.splitlines()[1:4]]
    assert shown[0] == ["a", "IDC", "0.800"] and shown[2] == ["c", "IDC", "0.900"]
    assert shown[1] == ["b", "non-IDC", "0.600", "abstains, out of distribution"]
    assert result.stderr.startswith("warning: 2 ") and "training" in result.stderr


@pytest.mark.parametrize(
    ("blocking_issues", "exit_code"), [([], 0), (["patient 8863 is in train and test"], 1)]
)
def test_inspect_exits_1_when_something_would_spoil_a_result(replace, blocking_issues, exit_code):
    audit = {
        "blocking_issues": blocking_issues,
        "paths": {"audit": Path("x.pack/audit.json"), "pictures": [Path("a.png")]},
    }
    replace("inspect", lambda *args, **options: biopsy.Inspection(audit))
    result = call("inspect", "x.pack", "--json")
    assert result.exit_code == exit_code
    assert ("patient 8863" in result.stderr) == bool(blocking_issues)
    assert json.loads(result.stdout)["blocking_issues"] == blocking_issues


def test_lists_in_flags_reach_the_function(replace):
    asked = {}

    def study(recipes, data, **options):
        asked.update(options, recipes=recipes)
        return Study(Path("s"), {"failed": {}})

    replace("study", study)
    assert call("study", "one", "two", "--data", "p", "--seeds", "3, 4").exit_code == 0
    assert asked == {"recipes": ("one", "two"), "seeds": (3, 4)} | {"on_epoch": asked["on_epoch"]}
    assert call("study", "one", "--data", "p", "--seeds", "3", "--seeds", "4,", "two").exit_code == 0
    assert asked["seeds"] == (3, 4) and asked["recipes"] == ("one", "two")


def test_lists_whose_values_hold_commas_are_repeated(replace):
    asked = {}
    replace("sweep", lambda **options: asked.update(options) or Study(Path("s"), {"failed": {}}))
    grid = ("--grid", "train.lr=1,2", "--grid", "a=[1,2]")
    assert call("sweep", "one", "--data", "p", *grid, "--set", "b=[1, 2]").exit_code == 0
    assert asked["grid"] == ["train.lr=1,2", "a=[1,2]"] and asked["overrides"] == ["b=[1, 2]"]


@pytest.mark.parametrize("verb", ["study", "sweep"])
def test_runs_that_failed_are_named(replace, verb):
    made = Study(Path("s"), {"failed": {"one-s0": "its loss is nan"}})
    replace(verb, lambda *asked, **options: made)
    result = call(verb, "one", "--data", "p", *(["--grid", "train.lr=1,2"] if verb == "sweep" else []))
    assert (result.exit_code, result.stdout) == (0, "s\n")
    assert result.stderr == "warning: failed: one-s0: its loss is nan\n"


def test_reports_are_named_one_a_line(replace):
    asked = {}
    replace("report", lambda runs, **options: asked.update(options) or [run / "report.html" for run in runs])
    result = call("report", "a", "b", "--hide-ids")
    assert result.stdout.split() == [str(Path("a/report.html")), str(Path("b/report.html"))]
    assert asked == {"hide_ids": True}


def fetch_and_log(name, out, **options):
    for _ in range(2):
        logging.getLogger("biopsy.somewhere").info("device: cpu (auto)")
    logging.getLogger("biopsy.somewhere").debug("details")
    logging.getLogger("biopsy.somewhere").warning("slow")
    return FetchResult("pcam", Path("there"), (), ())


def test_log_messages_go_to_stderr_once(replace):
    replace("fetch", fetch_and_log)
    result = call("fetch", "pcam", "--out", "there")
    assert result.stdout == "there\n"
    assert result.stderr.splitlines() == ["device: cpu (auto)", "warning: slow"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_options_that_all_commands_have(replace, place, tmp_path):
    """How much is printed is chosen; a file gets all of it."""

    def fetch(*options):
        command = ["fetch", "pcam", "--out", "there"]
        return call(*([*options, *command] if place == "before" else [*command, *options]))

    replace("fetch", fetch_and_log)
    assert fetch("-q").stderr == "warning: slow\n" and fetch("--quiet").stdout == "there\n"
    full = fetch("-v").stderr.splitlines()
    assert [line.partition("biopsy.")[2] for line in full[1:]] == [
        "somewhere: device: cpu (auto)",
        "somewhere: details",
        "somewhere: slow",
    ]
    assert fetch("--log-file", tmp_path / "log.txt").stdout == "there\n"
    text = (tmp_path / "log.txt").read_text()
    assert all(part in text for part in ("fetch pcam --out there", "device: cpu (auto)", "details", "slow"))
    assert json.loads(fetch("--json").stdout) == {"path": "there"}


def test_verbose_errors_show_where_they_come_from(replace):
    replace("evaluate", biopsy.PackError("altered"))
    assert "Traceback" in call("evaluate", "run", "-v").stderr
    assert call("evaluate", "run").stderr == "error: altered\n"


def test_a_log_file_that_cannot_be_written_is_an_error(replace, tmp_path):
    assert call("list", "models", "--log-file", tmp_path / "missing" / "log.txt").exit_code == 1


def test_a_log_is_appended_to_logs_only(replace, tmp_path):
    replace("fetch", lambda name, out, on_progress: logging.getLogger("biopsy").info("done"))
    log, notes = tmp_path / "log.txt", tmp_path / "notes.txt"
    for _ in range(2):
        assert call("fetch", "pcam", "--out", "there", "--log-file", log).exit_code == 0
    assert log.read_text().count("done") == 2
    for text in ("mine", '{"format": "biopsy-pack/1"}', "2026-11-29 my diary"):
        notes.write_text(text)
        assert call("fetch", "pcam", "--out", "there", "--log-file", notes).exit_code == 1
        assert notes.read_text() == text


def test_json_holds_no_nan_and_no_numpy(capsys):
    print_json(
        {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": Path("x"), "e": [np.inf, None]}
    )
    assert json.loads(capsys.readouterr().out) == {
        "a": 0.5,
        "b": [0, 1],
        "c": None,
        "d": "x",
        "e": [None, None],
    }


def test_tables_line_up():
    rows = [[number(cell) for cell in row] for row in (["auroc", 0.91234, 12_345], ["f1", None, 7])]
    assert to_text([Table(["metric", "value", "n"], rows)]).splitlines() == [
        "metric  value       n",
        "auroc   0.912  12,345",
        "f1          -       7",
    ]


def test_names_that_begin_with_digits_are_no_numbers():
    rows = [["8863_x1.png", "-1.5e-3", "0.9 (0.8 to 1.0)"], ["a", "3", "-"]]
    assert to_text([Table(["patch", "shift", "auroc"], rows)]).splitlines()[1:] == [
        "8863_x1.png  -1.5e-3  0.9 (0.8 to 1.0)",
        "a                  3                 -",
    ]


def test_blocks_leave_out_what_is_not_known():
    assert list_entries({"name": "idc", "mpp": 4.0, "counts": {"patches": 277_524}, "page": None}) == [
        "idc",
        "  mpp: 4.000",
        "  counts: patches 277,524",
    ]


# --- the real thing


@pytest.mark.slow
def test_from_archive_to_report(make_idc_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_idc_zip(n_patients=8, patches_per_patient=12, patch_px=50)

    prepared = call("prepare", source, "--out", "tiny.pack", "--json")
    assert prepared.exit_code == 0, prepared.stderr
    assert json.loads(prepared.stdout)["counts"]["patches"] == 96

    made = call("split", "tiny.pack", "--protocol", "patients", "--seed", 1, "--json")
    assert made.exit_code == 0, made.stderr
    counts = json.loads(made.stdout)["parameters"]["counts"]
    assert sum(counts[subset]["groups"] for subset in ("train", "validation", "test")) == 8
    folds = call("split", "tiny.pack", "--protocol", "folds", "--folds", 4)
    assert folds.exit_code == 0, folds.stderr
    assert folds.stdout.splitlines()[1].split()[:4] == ["fold", "subset", "patches", "patients"]
    published = call("split", "tiny.pack", "--protocol", "as-published", "--recipe", "cancernet-2020")
    assert "PATIENTS OVERLAP" in published.stdout

    inspected = call("inspect", "tiny.pack", "--split", "patients", "--json")
    assert inspected.exit_code == 0, inspected.stderr
    assert all(Path(path).is_file() for path in json.loads(inspected.stdout)["paths"]["pictures"])
    overlapping = call("inspect", "tiny.pack", "--split", "as-published")
    assert overlapping.exit_code == 0, overlapping.stderr
    assert "PATIENTS OVERLAP in split as-published" in overlapping.stdout

    options = ["--set", "train.epochs=1", "--set", "train.batch_size=16", "--device", "cpu", "--out", "run"]
    trained = call("train", "cancernet-2020", "--data", "tiny.pack", "--split", "patients", *options)
    assert trained.exit_code == 0, trained.stderr
    assert trained.stdout == "run\n" and "epoch   1" in trained.stderr

    judged = call("evaluate", "run", "--json")
    assert judged.exit_code == 0, judged.stderr
    metrics = json.loads(judged.stdout)
    written = json.loads(Path("run/evaluation/metrics.json").read_text())
    assert written.pop(SEAL) and metrics == written
    assert "evaluated 2 times, by 1 run" in call("evaluate", "run").stdout
    shown = call("evaluate", "run", "--subset", "validation")
    assert shown.exit_code == 0 and "AUROC" in shown.stdout

    made = call("predict", "run", "tiny.pack", "--out", "out.csv", "--json")
    assert made.exit_code == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["n_patches"] == sum(document["pred"].values()) == 96
    assert document["n_training"] == counts["train"]["patches"]

    evaluated = call("evaluate", "run", "--csv", "tables")
    assert evaluated.exit_code == 0, evaluated.stderr
    table = pd.read_csv("tables/metrics.csv").set_index("metric")
    assert table.loc["auroc", "value"] == metrics["patch"]["auroc"]["value"]
    assert len(pd.read_csv("tables/predictions.csv")) == counts["test"]["patches"]

    reported = call("report", "run", "--hide-ids")
    assert reported.exit_code == 0, reported.stderr
    assert Path(reported.stdout.strip()).read_text().lstrip().lower().startswith("<!doctype html")

    again = call("train", "--resume", "run")
    assert again.exit_code == 1 and "error: run is finished" in again.stderr


@pytest.mark.slow
def test_demo_ends_in_a_report_and_can_be_run_again(tmp_path, monkeypatch):
    from biopsy.experiments import demo

    monkeypatch.setattr(demo, "N_PATIENTS", 12)
    monkeypatch.setattr(demo, "PATCHES_PER_PATIENT", 20)
    monkeypatch.setattr(demo, "SLIDE_PX", (600, 450))
    folder = tmp_path / "demonstration"
    result = call("demo", "--out", folder)
    assert result.exit_code == 0, result.stderr
    shutil.rmtree(folder / "run" / "classifier")  # as an interruption just before the end leaves it
    Run.open(folder / "run").update(status="interrupted")
    result = call("demo", "--out", folder)
    assert result.exit_code == 0, result.stderr
    report = Path(result.stdout.strip())
    assert report.is_file() and folder in report.parents
    assert "test AUROC" in result.stderr
    assert (folder / "cohort.pack" / "inspection" / "classes.png").is_file()
    for maps in (folder / "run" / "slides", folder / "idc"):  # of the run, and of the classifier that ships
        assert (maps / "slide" / "overlay.png").is_file()
    assert "Whole-slide maps" in report.read_text()


def test_demo_leaves_another_folder_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 1 and "not a demonstration" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_module_runs_as_the_command_does():
    result = subprocess.run([sys.executable, "-m", "biopsy", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip() == f"biopsy {biopsy.__version__}"
