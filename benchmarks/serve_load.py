"""How many patches a second `biopsy serve` answers under load, beside the inference engine by itself.

Command::

    python benchmarks/serve_load.py MODEL PACK [--clients 64] [--seconds 60] [--per-request 16]

MODEL is served by a process of its own; its clients are threads of this one, on the same machine: they take
processor time from the server. Each client sends requests of ``--per-request`` PNG patches of PACK, one after
another. Before and after, the same patches go through `predict_patches` in batches of 256 in a process of its
own: the bare engine, with nothing decoded or sent.

Then ten times the bound of the queue is sent at once: every answer must be 200 or 429, and the server must
answer afterwards.

A row is appended to ``results/serve-load.csv``.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np

from biopsy.app.service import Limits
from biopsy.data.packs import Pack
from recording import append_rows

RESULTS = Path(__file__).parent / "results" / "serve-load.csv"
N_PATCHES, BARE_S = 512, 6.0
BARE = """
import sys, time, numpy as np, pandas as pd
from biopsy.data.packs import Pack
from biopsy.evaluation.predict import predict_patches
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.models.runtimes import MIN_PATCHES_TO_CONVERT
from biopsy.training.open_model import open_classifier
classifier, pack = open_classifier(sys.argv[1]), Pack.open(sys.argv[2])
predictor = open_predictor(classifier, Engine("cpu"), MIN_PATCHES_TO_CONVERT).__enter__()
rows, about = np.arange(256), pd.DataFrame({"patch_id": np.arange(256).astype(str)})
run = lambda: predict_patches(classifier, about, pack.patches[rows], pack.sizes[rows], predictor=predictor)
run()
start, n = time.perf_counter(), 0
while time.perf_counter() - start < float(sys.argv[3]):
    run(); n += 256
print(n / (time.perf_counter() - start))
"""


def measure_bare(model: str, pack: str, seconds: float) -> float:
    """Return patches a second of the engine by itself."""
    command = [sys.executable, "-c", BARE, model, pack, str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def start_server(model: str, folder: str) -> tuple[subprocess.Popen[str], str]:
    """Start the server; return its process and address."""
    code = "import sys, biopsy; biopsy.serve(sys.argv[1], port=0, out=sys.argv[2], device='cpu')"
    process = subprocess.Popen([sys.executable, "-c", code, model, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def read_memory_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def encode_requests(address: str, images: list[bytes], n: int) -> list[tuple[bytes, dict[str, str]]]:
    """Return body and headers of requests that hold every image once; a client then has little to compute."""
    encoded = []
    for start in range(0, len(images) - n + 1, n):
        files = [("images", (f"{index}.png", images[index])) for index in range(start, start + n)]
        request = httpx.Request("POST", f"{address}/predict", files=files)
        encoded.append((request.read(), {"content-type": request.headers["content-type"]}))
    return encoded


def load(address: str, images: list[bytes], clients: int, seconds: float, n: int) -> dict[str, Any]:
    """Send requests from many clients; return their number, errors and latencies."""
    latencies: list[float] = []
    errors: list[str] = []
    lock, sessions = threading.Lock(), [httpx.Client(base_url=address, timeout=120) for _ in range(clients)]
    requests = encode_requests(address, images, n)
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        with sessions[number] as session:
            while time.perf_counter() < end:
                body, headers = requests[rng.integers(len(requests))]
                start = time.perf_counter()
                answer = session.post("/predict", content=body, headers=headers)
                taken = time.perf_counter() - start
                with lock:
                    latencies.append(taken)
                    if answer.status_code != 200 or len(answer.json()["predictions"]) != n:
                        errors.append(answer.text[:200])

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    taken = time.perf_counter() - start
    return {
        "requests": len(latencies),
        "errors": len(errors),
        "p50_s": float(np.percentile(latencies, 50)),
        "p99_s": float(np.percentile(latencies, 99)),
        "patches_per_s": len(latencies) * n / taken,
    }


def overflow(
    address: str, images: list[bytes], *, bound: int = Limits().waiting_patches, n: int = Limits().images
) -> dict[str, int]:
    """Send ten times what the queue holds at once; return how many requests got which status.

    Every 200 must hold all its predictions, and every 429 must say when to come back.
    """
    files = [("images", (f"{index}.png", images[index % len(images)])) for index in range(n)]

    def send(_: int) -> int:
        answer = httpx.post(f"{address}/predict", files=files, timeout=600)
        if answer.status_code == 200:
            assert [row["name"] for row in answer.json()["predictions"]] == [name for _, (name, _) in files]
        elif answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
        return answer.status_code

    with ThreadPoolExecutor(10 * bound // n) as pool:
        codes = list(pool.map(send, range(10 * bound // n)))
    assert httpx.get(f"{address}/health", timeout=60).status_code == 200
    return {str(code): codes.count(code) for code in sorted(set(codes))}


def main() -> None:
    """Measure and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("pack")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--per-request", type=int, default=16)
    parser.add_argument("--no-overflow", action="store_true")
    args = parser.parse_args()
    pack = Pack.open(args.pack)
    rows = np.random.default_rng(0).choice(len(pack), min(N_PATCHES, len(pack)), replace=False)
    images = [cv2.imencode(".png", pack.patches[row][..., ::-1])[1].tobytes() for row in rows]
    bare = [measure_bare(args.model, args.pack, BARE_S)]
    with tempfile.TemporaryDirectory() as folder:
        process, address = start_server(args.model, folder)
        try:
            load(address, images, 4, 3, args.per_request)  # warm
            memory = [read_memory_mb(process.pid)]
            early = threading.Timer(args.seconds / 5, lambda: memory.append(read_memory_mb(process.pid)))
            early.start()
            found = load(address, images, args.clients, args.seconds, args.per_request)
            memory.append(read_memory_mb(process.pid))
            print(found, memory, flush=True)
            codes = {} if args.no_overflow else overflow(address, images)
        finally:
            process.kill()
            process.wait()
    bare.append(measure_bare(args.model, args.pack, BARE_S))
    row = {
        "clients": args.clients,
        "seconds": args.seconds,
        "per_request": args.per_request,
        **{name: round(value, 3) for name, value in found.items()},
        "bare_patches_per_s": round(sum(bare) / 2, 1),
        "share_of_bare": round(found["patches_per_s"] / (sum(bare) / 2), 3),
        "memory_before_mb": round(memory[0]),
        "memory_fifth_mb": round(memory[1]),
        "memory_after_mb": round(memory[2]),
        "overflow": " ".join(f"{code}:{n}" for code, n in codes.items()),
        "model": Path(args.model).name,
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "cpu": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "fastapi": version("fastapi"),
    }
    append_rows(RESULTS, [row])
    for name, value in row.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
