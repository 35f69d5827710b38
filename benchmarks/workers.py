"""Slides mapped by several processes: the same maps as of one process, also where some are killed?

Synthetic slides are mapped by the shipped classifier ``idc`` on the CPU

* by one process (``local``);
* on a Ray cluster of two nodes with one core each on this machine (``ray``), once undisturbed, and once with
  one node killed when at least 8 slides, and not yet half of them, are done;
* by four processes with ``--shard I/4``, two of which are killed (SIGKILL) in the same way.

Files of every map and ``status.csv`` are compared byte for byte with those of one process; claims and
temporary files that are left are counted. Seconds are those of the command, not of the cluster's start::

    python benchmarks/workers.py [--slides 64] [--px 2000]

Needs the extra ``ray``. Results: ``results/workers.csv``, shown in ``docs/scaling.md``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from ray.cluster_utils import Cluster

from biopsy.core.claims import FOLDER
from biopsy.core.files import LOCK
from biopsy.phantom.slides import make_phantom_slide
from recording import append_rows
from training_speed import describe_machine

RESULTS = Path(__file__).parent / "results" / "workers.csv"
N_BEFORE = 8


def start(folder: Path, out: str, *options: str) -> "subprocess.Popen[bytes]":
    """Start the mapping of all slides into a folder."""
    words = ["slide", "idc", str(folder / "slides"), "--out", str(folder / out), "--device", "cpu", "-q"]
    code = "from biopsy.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *words, *options], stdout=subprocess.DEVNULL)


def list_done(out: Path) -> list[Path]:
    """Return the summaries of the slides that are done."""
    return list(out.glob("*/summary.json"))


def read_files(out: Path) -> dict[str, bytes]:
    """Return all files of a folder of maps but locks and claims."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if FOLDER not in path.parts}


def measure(
    folder: Path,
    out: str,
    n_slides: int,
    begin: Callable[[], list[subprocess.Popen[bytes]]],
    kill: Callable[..., None] | None,
) -> None:
    """Map all slides, with processes killed on the way; compare with one process and append a row."""
    began, n_killed_at = time.perf_counter(), None
    processes = begin()
    while kill and len(list_done(folder / out)) < N_BEFORE:
        time.sleep(0.01)
    if kill:
        kill(processes)
        n_killed_at = len(list_done(folder / out))
        assert n_killed_at < n_slides / 2, f"{n_killed_at} slides were done when the processes were killed"
    codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - began
    found, whole = read_files(folder / out), read_files(folder / "local")
    status = pd.read_csv(folder / out / "status.csv")["status"]
    claims = folder / out / FOLDER
    row = {
        "engine": out,
        "slides": n_slides,
        "done_when_killed": n_killed_at,
        "done": int((status == "done").sum()),
        "files": len(found),
        "files_different": sum(found.get(name) != whole.get(name) for name in found.keys() | whole.keys()),
        "left_behind": len(list((folder / out).rglob("*.partial"))) + len(list(claims.glob("*.claim"))),
        "exit_codes": " ".join(map(str, codes)),
        "seconds": round(seconds, 1),
        "load": round(os.getloadavg()[0], 1),
    }
    append_rows(RESULTS, [row | describe_machine()])
    print(row, flush=True)


def measure_on_ray(folder: Path, out: str, n_slides: int, *, is_disturbed: bool) -> None:
    """Map all slides on a cluster of two nodes, one of which may be killed."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    options = ("--engine", "ray", "--address", cluster.address)
    try:
        measure(
            folder,
            out,
            n_slides,
            lambda: [start(folder, out, *options)],
            (lambda _: cluster.remove_node(second, allow_graceful=False)) if is_disturbed else None,
        )
    finally:
        cluster.shutdown()


def main() -> None:
    """Draw the slides and map them in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--slides", type=int, default=64)
    parser.add_argument("--px", type=int, default=2000)
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), arguments.slides
        (folder / "slides").mkdir()
        for seed in range(n):
            path = folder / "slides" / f"{seed:03}.tiff"
            make_phantom_slide(path, seed=seed, width=arguments.px, height=arguments.px, mpp=0.5)
            path.with_suffix(".geojson").unlink()
        measure(folder, "local", n, lambda: [start(folder, "local")], None)
        measure_on_ray(folder, "ray", n, is_disturbed=False)
        measure_on_ray(folder, "ray, a node killed", n, is_disturbed=True)
        measure(
            folder,
            "4 shards, 2 killed",
            n,
            lambda: [start(folder, "4 shards, 2 killed", "--shard", f"{i}/4") for i in (1, 2, 3, 4)],
            lambda processes: [process.kill() for process in processes[:2]],
        )


if __name__ == "__main__":
    main()
