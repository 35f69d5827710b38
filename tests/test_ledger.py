import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from biopsy.data.ledger import FILE, count_openings, record_opening
from biopsy.data.packs import Pack

MakePack = Callable[..., Pack]
COUNTED = {"kept_with": "pack", "unreadable": 0}


def entry(run: str = "r0", **other: object) -> dict[str, object]:
    about = {
        "run": run,
        "recipe": "cancernet-2020",
        "seed": 0,
        "split": "patients",
        "fold": None,
        "subset": "test",
    }
    return {**about, "command": "biopsy evaluate r0", **other}


def test_openings_are_counted_by_split_fold_and_subset(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=1)
    nobody = COUNTED | {"times": 0, "runs": 0}
    assert count_openings(pack, split="patients") == nobody
    for run in ("r0", "r0", "r1"):
        record_opening(pack, tmp_path, entry(run))
    record_opening(pack, tmp_path, entry(subset="validation"))
    record_opening(pack, tmp_path, entry(split="folds", fold=1))
    assert count_openings(pack, split="patients") == COUNTED | {"times": 3, "runs": 2}
    assert count_openings(pack, split="patients", subset="validation")["times"] == 1
    assert count_openings(pack, split="folds", fold=1)["times"] == 1
    assert count_openings(pack, split="folds", fold=0) == nobody


def test_an_entry_records_time_and_subject(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=1)
    assert record_opening(pack, tmp_path, entry()) == pack.path / FILE
    found = json.loads((pack.path / FILE).read_text())
    assert found["time"].endswith("+00:00")
    assert found["pack_sha256"] == pack.info.content_sha256
    assert {key: found[key] for key in entry()} == entry()
    pack.verify()  # the ledger is no part of the pack's content


def test_a_read_only_pack_keeps_it_with_the_run(
    make_pack: MakePack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = make_pack(n_patients=1)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.setattr("biopsy.data.ledger.os.access", lambda path, _: path != pack.path)
    assert record_opening(pack, run_dir, entry()) == run_dir / FILE
    assert "recorded in the run" in caplog.text
    assert not (pack.path / FILE).exists()
    assert count_openings(pack, split="patients")["times"] == 0
    assert count_openings(pack, split="patients", run_dir=run_dir) == {
        "times": 1,
        "runs": 1,
        "kept_with": "run",
        "unreadable": 0,
    }


def test_a_line_cut_short_is_not_counted_and_spoils_no_other(
    make_pack: MakePack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = make_pack(n_patients=1)
    record_opening(pack, tmp_path, entry())
    with open(pack.path / FILE, "a") as file:
        file.write(json.dumps(entry())[:40])
    record_opening(pack, tmp_path, entry("r1"))
    assert count_openings(pack, split="patients") == COUNTED | {"times": 2, "runs": 2, "unreadable": 1}
    assert "line 2" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"7" * 5000,
        b"\xff\xfe",
        b"[]",
        b'{"kept_with": "pack"}',
        json.dumps({**entry(), "kept_with": "pack", "run": ["r"]}).encode(),
        json.dumps({**entry(), "kept_with": "pack", "fold": "x"}).encode(),
    ],
)
def test_a_line_that_is_no_opening_is_counted_apart(make_pack: MakePack, tmp_path: Path, line: bytes) -> None:
    pack = make_pack(n_patients=1)
    (pack.path / FILE).write_bytes(line + b"\n")
    record_opening(pack, tmp_path, entry())
    assert count_openings(pack, split="patients") == COUNTED | {"times": 1, "runs": 1, "unreadable": 1}


def test_no_one_writes_while_another_holds_the_lock(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=1)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(pack.path / f".{FILE}.lock"):
            waiting = pool.submit(record_opening, pack, tmp_path, entry())
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            assert not (pack.path / FILE).exists()
        assert waiting.result(timeout=10) == pack.path / FILE


def test_threads_lose_nothing(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: record_opening(pack, tmp_path, entry(f"r{number}")), range(40)))
    assert count_openings(pack, split="patients") == COUNTED | {"times": 40, "runs": 40}


@pytest.mark.slow
def test_processes_lose_nothing(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=1)
    code = (
        "import sys; from biopsy.data.packs import Pack; from biopsy.data.ledger import record_opening\n"
        "pack = Pack.open(sys.argv[1])\n"
        "for n in range(25):\n"
        "    record_opening(pack, '.', dict(run=sys.argv[2], split='patients', fold=None, subset='test'))"
    )
    command = [sys.executable, "-c", code, str(pack.path)]
    started = [subprocess.Popen([*command, f"r{number}"]) for number in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert count_openings(pack, split="patients") == COUNTED | {"times": 100, "runs": 4}
