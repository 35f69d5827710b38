"""Several processes on one output folder: claims, dead owners, and the same result as of one process."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from biopsy.core import claims as module
from biopsy.core.claims import FOLDER, Claims, first_of_shard
from biopsy.core.errors import DataError, SlideError
from biopsy.core.files import LOCK, machine_id
from biopsy.slides.cohorts import slide
from conftest import PROJECT
from refusals import refuses
from slide_maps import save_classifier


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def leave_claim(folder, name, *, pid, machine=None, age=0.0):
    """Leave the claim of another process."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.claim"
    path.write_text(json.dumps({"host": "node", "machine": machine or machine_id(), "pid": pid}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_process_at_a_time_has_a_claim(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a") and one.take("a") and not other.take("a") and other.take("b")
        assert other.list_others() == ["a"]
        one.release("a")
        assert other.take("a") and not one.take("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_of_many_that_find_an_abandoned_claim_one_gets_it(tmp_path):
    leave_claim(tmp_path, "a", pid=ended_pid())
    code = (
        "import sys, time\nfrom biopsy.core.claims import Claims\n"
        "with Claims(sys.argv[1]) as claims:\n"
        "    time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "    print(claims.take('a'), flush=True)\n    time.sleep(1)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(time.time() + 2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["False"] * 3 + ["True"]


@pytest.mark.parametrize(
    ("owner", "is_taken"),
    [
        ({"pid": os.getppid()}, False),
        ({"pid": 1, "machine": "elsewhere"}, False),
        ({"pid": 1, "machine": "elsewhere", "age": 1000}, True),
    ],
)
def test_a_claim_is_taken_over_from_the_dead_only(tmp_path, owner, is_taken):
    leave_claim(tmp_path, "a", **owner)
    with Claims(tmp_path) as claims:
        assert claims.take("a") is is_taken


@pytest.mark.parametrize(("moment", "n_left"), [("Path.write_text", 0), ("os.link", 1), ("files._remove", 2)])
def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path, moment, n_left):
    """Killed before its claim is written, before it is in place, and before its temporary name is removed."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom biopsy.core import files\n"
        "from biopsy.core.claims import Claims\n"
        f"{moment} = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with Claims(sys.argv[1]) as claims:\n    claims.take('a')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode < 0
    assert len(list((tmp_path / FOLDER).iterdir())) == n_left
    with Claims(tmp_path) as claims:
        assert claims.take("a")  # at once, not when it is stale
    assert list(tmp_path.iterdir()) == []


def test_claims_without_hard_links(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(module.os, "link", fail)
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a") and not other.take("a") and other.take("b")
        owner = json.loads((tmp_path / FOLDER / "a.claim").read_text())
        assert owner["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    with Claims(tmp_path) as claims, refuses(OSError, errno=errno.ENOSPC):
        claims.take("a")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_kept_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    with Claims(tmp_path) as claims:
        claims.take("a")
        path = tmp_path / FOLDER / "a.claim"
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 10


@pytest.fixture
def slides(make_slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed in range(4):
        shutil.move(make_slide(f"{seed}.tiff", seed=seed), folder)
    (folder / "broken.tiff").write_bytes(b"II*\0")
    return folder


@pytest.mark.slow
def test_shards_one_after_another_leave_what_one_process_leaves(slides, tmp_path):
    model = save_classifier(tmp_path / "c")
    slide(model, slides, out=tmp_path / "whole")
    first = slide(model, slides, out=tmp_path / "out", shard="2/3")
    assert first.status["status"].tolist() == ["done"] * 4 + ["failed"]  # nobody else has come
    slide(model, slides, out=tmp_path / "out", shard="1/3")
    assert {
        name: content for name, content in contents(tmp_path / "out").items() if FOLDER not in name
    } == contents(tmp_path / "whole")


@pytest.mark.slow
def test_slides_claimed_by_a_living_process_are_left_to_it(slides, tmp_path):
    model, out = save_classifier(tmp_path / "c"), tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    leave_claim(out, "1", pid=other.pid)
    with refuses(DataError, "--shard"):
        slide(model, slides, out=out)
    with ThreadPoolExecutor(1) as pool:
        mapping = pool.submit(slide, model, slides, out=out, shard="1/2")
        while len(list(out.glob("*/summary.json"))) < 3 and not mapping.done():
            time.sleep(0.05)
        assert not mapping.done() and not (out / "1").exists()
        other.communicate(b"\n")
        status = mapping.result().status.set_index("slide")["status"]
    assert status["1"] == "done" and (status == "done").sum() == 4


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_a_shard_that_is_none_is_refused(slides, tmp_path, shard):
    with refuses(DataError, "I/N"):
        slide(save_classifier(tmp_path / "c"), slides, out=tmp_path / "out", shard=shard)


def test_shards_need_a_folder_and_a_failed_slide_fails(slides, tmp_path):
    model = save_classifier(tmp_path / "c")
    with refuses(DataError, "out=DIR"):
        slide(model, slides / "0.tiff", shard="1/2")
    with pytest.raises(SlideError):
        slide(model, slides / "broken.tiff", out=tmp_path / "out", shard="1/2")


def test_shards_begin_at_their_part():
    assert [first_of_shard(f"{i}/3", 10) for i in (1, 2, 3)] == [0, 3, 6]


@pytest.mark.slow
def test_four_processes_two_of_them_killed_leave_what_one_leaves(slides, tmp_path, make_slide):
    for seed in range(4, 12):
        shutil.move(make_slide(f"{seed}.tiff", seed=seed, width=900, height=700), slides)
    model, out = save_classifier(tmp_path / "c"), tmp_path / "out"
    code = "from biopsy.cli import main; main()"
    command = [sys.executable, "-c", code, "slide", str(model), str(slides), "--device", "cpu", "--out"]
    assert (
        subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, check=False).returncode == 3
    )
    whole = contents(tmp_path / "whole")
    processes = [
        subprocess.Popen([*command, str(out), "--shard", f"{i}/4"], stderr=subprocess.PIPE)
        for i in (1, 2, 3, 4)
    ]
    for process in processes[:2]:
        while process.poll() is None and len(list(out.glob("*/summary.json"))) < 2:
            time.sleep(0.02)
        assert process.poll() is None  # killed with work in flight
        os.kill(process.pid, signal.SIGKILL)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes[2:]] == [3, 3], errors
    found = contents(out)
    assert {name: content for name, content in found.items() if FOLDER not in name} == whole
    assert not list((out / FOLDER).glob("*.claim"))
    assert (pd.read_csv(out / "status.csv")["status"] == "done").sum() == 12


@pytest.mark.slow
def test_the_array_script_of_the_docs_maps_all(slides, tmp_path):
    page = (PROJECT / "docs" / "how-to" / "map-with-many-processes.md").read_text()
    script = tmp_path / "maps.sh"
    script.write_text(re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1])
    shim = tmp_path / "bin" / "biopsy"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from biopsy.cli import main; main()" "$@"\n')
    shim.chmod(0o755)
    model, out = save_classifier(tmp_path / "c"), tmp_path / "out"
    known = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_COUNT": "2"}
    known |= {"MODEL": str(model), "SLIDES": str(slides), "MAPS": str(out)}
    tasks = [subprocess.Popen(["bash", script], env=known | {"SLURM_ARRAY_TASK_ID": str(i)}) for i in (1, 2)]
    assert [task.wait() for task in tasks] == [0, 0]  # exit code 3 of the broken slide is none of the job's
    assert sorted(pd.read_csv(out / "status.csv")["status"]) == ["done"] * 4 + ["failed"]
    script.write_text(script.read_text().replace("set -eu", "set -eu; MODEL=/nowhere"))
    assert subprocess.run(["bash", script], env=known | {"SLURM_ARRAY_TASK_ID": "1"}, check=False).returncode


def test_the_shell_of_the_nextflow_process_parses():
    page = (PROJECT / "docs" / "how-to" / "map-with-many-processes.md").read_text()
    text = re.search(r'"""\n(.*?)"""', page, re.DOTALL)[1].replace("\\$", "$")
    text = re.sub(r"\$\{\w+(\.\w+)?\}", "value", text)
    assert "--shard 'value/value'" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
