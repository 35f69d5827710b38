"""What this machine can do: every check gives a row, and what is broken is seen."""

import json
import os
import subprocess
import sys
import time

import pytest

from biopsy.checks import doctor as module
from biopsy.checks.doctor import doctor, measure_write_speed
from biopsy.core.errors import DataError
from command_line import call
from refusals import refuses


def statuses(report):
    return {row["name"]: row["status"] for row in report["checks"]}


def test_this_machine_is_described_and_nothing_is_left(tmp_path):
    started = time.monotonic()
    report = doctor(path=tmp_path)
    assert time.monotonic() - started < 15  # 5 on an idle machine
    names = {"processor", "memory", "torch", "openvino", "GPU", "OpenSlide", "TIFF codecs", "disk space"}
    names |= {"disk speed", "file locks", "open files", "temporary folder", "extra export"}
    assert names <= set(statuses(report)) and not list(tmp_path.iterdir())
    rows = {row["name"]: row for row in report["checks"]}
    assert (
        rows["torch"]["detail"] == __import__("torch").__version__.partition("+")[0]
        or "+" in rows["torch"]["detail"]
    )
    assert rows["OpenSlide"]["detail"].endswith(__import__("openslide").__library_version__)
    assert all(bool(row["remedy"]) == (row["status"] != "PASS") for row in report["checks"])


def test_the_write_speed_is_between_that_of_a_floppy_and_of_memory(tmp_path):
    assert 0.01 < measure_write_speed(tmp_path) < 1e5


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_try_lock", lambda path: "free")
    assert statuses(doctor(path=tmp_path))["file locks"] == "WARN"


def test_little_memory_and_disk_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_memory_limit", lambda: 2**30)
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: module.shutil._ntuple_diskusage(1, 1, 2**20)
    )
    report = doctor(path=tmp_path)
    assert {"memory", "disk space"} == {k for k, v in statuses(report).items() if v == "FAIL"}
    assert not report.passed and report["status"] == "FAIL"


def test_a_package_that_does_not_load_fails(tmp_path, monkeypatch):
    def broken(name):
        raise OSError(f"lib{name}.so: cannot open shared object file")

    monkeypatch.setattr(module, "import_module", broken)
    assert statuses(doctor(path=tmp_path))["torch"] == "FAIL"


@pytest.mark.skipif(os.name != "posix", reason="ulimit")
@pytest.mark.slow
def test_few_open_files_are_seen_from_the_command_line(tmp_path):
    code = "from biopsy.cli import main; main()"
    command = f"ulimit -n 100; exec {sys.executable} -c '{code}' doctor --path '{tmp_path}' --json"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert statuses(json.loads(done.stdout))["open files"] == "FAIL"


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with refuses(DataError, "--path"):
        doctor(path=tmp_path / "none")
    assert call("doctor", "--path", tmp_path / "none").exit_code == 1
