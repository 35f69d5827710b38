"""Peak memory of every command on large phantom inputs, and the bounds that a test holds them to.

A cohort of phantom patches (at most 2,000 drawn, each copied with its pixels moved round, under other
patients' ids) and a phantom slide go through every command that reads any, each a process of its own;
``serve`` until it answers, ``view`` until it has shown what its page shows first. ``fetch`` and ``publish``
talk to servers on this machine, one of which holds the cohort, packed, as the data set of a plug-in.
``peak_rss_mb`` is what the system counts (`os.wait4`), pages of memory-mapped files included;
``peak_anon_mb`` is without those, looked at 20 times a second.

    python benchmarks/memory.py [--patches 40000] [--slide-px 30000] [--commands train evaluate]

A command needs the results of those before it. Results: ``results/memory.csv``, a row per command, shown in
``docs/scaling.md``; ``tests/test_memory.py`` does the same with smaller inputs.
"""

import argparse
import gzip
import http.server
import json
import shutil
import socket
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import torchvision

from biopsy.phantom.cohort import write_archive
from biopsy.phantom.slides import make_phantom_slide
from recording import append_rows
from scaling import Usage, measure
from training_speed import describe_machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from hub_server import Hub
from keras_files import build, keras_layers, write_weights_h5

RESULTS = Path(__file__).parent / "results" / "memory.csv"
DRAWN = 2_000
SETTINGS = (
    "--set preprocessing.input_px=16 --set model.params.base_channels=4 --set train.epochs=1 "
    "--set train.precision=fp32 --set model.tta=none"
)
STUDY = f"idc-small --data in.pack --split patients --device cpu {SETTINGS}"


SOURCE = """
from biopsy.data.datasets import Dataset, register_dataset
from biopsy.data.datasets.base import RemoteFile

packed_bytes, unpacked_bytes = {sizes}
register_dataset(
    Dataset(
        name="phantom", title="phantom", licence="none", looks_for="nothing", recognise=lambda archive: False,
        list_patches=None, expected={{}}, mpp=None,
        files=(RemoteFile("{address}/cohort.zip.gz", packed_bytes, None, unpacked_bytes),),
    )
)
"""


class Command(NamedTuple):
    """A command with its bound in MB of resident memory: ``base_mb + mb_per_1000 * patches / 1000``."""

    words: str
    base_mb: float
    mb_per_1000: float = 0.0

    def bound(self, n_patches: int) -> float:
        """Return the bound in MB for a pack of some patches."""
        return self.base_mb + self.mb_per_1000 * n_patches / 1000


COMMANDS = {
    "list": Command("list encoders", 900),
    "doctor": Command("doctor", 900),
    "demo": Command("demo --out demo", 2200),
    "prepare": Command("prepare cohort.zip --out in.pack", 400, 5),
    "inspect": Command("inspect in.pack", 500, 15),
    "split": Command("split in.pack --protocol patients", 300, 5),
    "train": Command(f"train {STUDY} --out run", 1600, 10),
    "pretrain": Command(f"pretrain {STUDY} --epochs 1 --out pretrained", 1600, 10),
    "calibrate": Command("calibrate run", 1000, 5),
    "evaluate": Command("evaluate run", 1300, 15),
    "errors": Command("errors run", 1400, 10),
    "explain": Command("explain run --device cpu", 1200, 10),
    "label-issues": Command("label-issues run --out labels", 500, 5),
    "report": Command("report run", 1200, 10),
    "verify": Command("verify run", 1300, 15),
    "predict": Command("predict run in.pack cohort.zip --out predictions.csv --device cpu", 1500, 15),
    "next": Command("next run in.pack --out queue.csv --device cpu", 1400, 15),
    "export": Command("export run bundle", 1400, 5),
    "publish": Command("publish bundle lab/phantom", 500),
    "fetch": Command("fetch phantom --out fetched", 500),
    "import-keras": Command("import-keras cancernet.weights.h5 --model cancernet-2020 --out imported", 1200),
    "study": Command(f"study {STUDY} --seeds 0,1 --out study", 1700, 20),
    "compare": Command("compare run study --out comparison", 500, 5),
    "sweep": Command(f"sweep {STUDY} --grid train.lr=0.1,0.05 --out sweep", 1700, 20),
    "reproduce": Command(
        "reproduce cancernet-2020 --data in.pack --split patients --set preprocessing.input_px=16 "
        "--set train.epochs=1 --set train.precision=fp32 --seeds 0 --leak-seeds 0 "
        "--test-patients 90004,90009 --device cpu --out reproduction",
        1700,
        20,
    ),
    "probe": Command(
        "probe torchvision:squeezenet1_1=encoder.pth --data in.pack --split patients --out probe "
        "--set preprocessing.input_px=32 --device cpu",
        1700,
        20,
    ),
    "prepare slides": Command("prepare slides --out slides.pack --mpp 4 --patch-px 50 --rest other", 500),
    "slide": Command("slide run slides --out maps --device cpu", 1600),
    "serve": Command("serve run --port {port}", 1200),
    "view": Command("view slides --no-browser --port {port}", 700),
    "view pack": Command("view in.pack --no-browser --port {port}", 600, 10),
}


def write_cohort(path: Path, n_patches: int) -> None:
    """Write an archive in IDC's layout of phantom patches and of copies moved round by some pixels."""
    per_patient = min(DRAWN, n_patches // 4) / 20
    with tempfile.TemporaryDirectory() as name:
        source = write_archive(Path(name) / "drawn.zip", n_patients=20, patches_per_patient=per_patient)
        with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as target:
            drawn = [(entry, archive.read(entry)) for entry in archive.namelist() if entry.endswith(".png")]
            for number in range(n_patches):
                copy, index = divmod(number, len(drawn))
                entry, png = drawn[index]
                *_, class_name, file_name = entry.split("/")
                patient, rest = file_name.split("_", 1)
                patient = f"{int(patient) + 1000 * copy}"
                pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
                moved = np.roll(pixels, (copy % 50, copy // 50), axis=(0, 1))
                target.writestr(
                    f"{patient}/{class_name}/{patient}_{rest}", cv2.imencode(".png", moved)[1].tobytes()
                )


def write_inputs(folder: Path, n_patches: int, slide_px: int) -> None:
    """Write the cohort, an annotated slide, and an encoder's weights as they are drawn."""
    write_cohort(folder / "cohort.zip", n_patches)
    (folder / "slides").mkdir()
    make_phantom_slide(
        folder / "slides" / "large.tiff",
        seed=0,
        width=slide_px,
        height=3 * slide_px // 4,
        mpp=0.5,
        drawn_mpp=4.0,
        tissue_mm2=0.3 * (slide_px / 2000) ** 2 * 0.75,
    )
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "encoder.pth")
    write_weights_h5(folder / "cancernet.weights.h5", keras_layers(build(input_px=48)))


@contextmanager
def serve_inputs(folder: Path) -> Iterator[None]:
    """Serve the cohort as a data set to fetch, and a hub to publish to, both of which commands find."""
    served = folder / "served"
    served.mkdir()
    with open(folder / "cohort.zip", "rb") as cohort, gzip.open(served / "cohort.zip.gz", "wb", 1) as packed:
        shutil.copyfileobj(cohort, packed)
    files = partial(_QuietFiles, directory=str(served))
    hub = type("EmptyHub", (Hub,), {"repositories": {}})
    with _serve(files) as address, _serve(hub) as hub_address, pytest.MonkeyPatch.context() as patch:
        sizes = [path.stat().st_size for path in (served / "cohort.zip.gz", folder / "cohort.zip")]
        (folder / "phantom_source.py").write_text(SOURCE.format(address=address, sizes=sizes))
        about = folder / "phantom_source-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: phantom_source\nVersion: 1\n")
        (about / "entry_points.txt").write_text("[biopsy.datasets]\nphantom = phantom_source\n")
        for name, value in {"HF_ENDPOINT": hub_address, "HF_TOKEN": "none", "no_proxy": "127.0.0.1"}.items():
            patch.setenv(name, value)
        yield


class _QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _serve(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on this machine, and return the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def measure_command(name: str, folder: Path, before: str = "") -> Usage:
    """Run a command in a folder that `write_inputs` has filled, and return what it took.

    Args:
        name: Key of `COMMANDS`.
        folder: The folder.
        before: Code that is run before the command.
    """
    port = find_free_port()
    words = COMMANDS[name].words.format(port=port).split()
    is_view = name.startswith("view")
    is_served = is_view or name == "serve"
    return measure(words, folder, port if is_served else None, show_first if is_view else None, before)


def show_first(port: int) -> None:
    """Ask `view` for a page of every pack, and the overview and one tile a level of the first slides."""
    address = f"http://127.0.0.1:{port}/api"
    state = json.loads(read_address(f"{address}/state"))
    for entry in state["sheets"]:
        sheet = f"{address}/sheets/{entry['key']}"
        for patch in json.loads(read_address(sheet))["patches"]:
            read_address(f"{sheet}/patches/{patch['row']}.jpg")
    for entry in state["slides"][:10]:
        slide = f"{address}/slides/{entry['key']}"
        for level in range(json.loads(read_address(slide))["levels"]):
            read_address(f"{slide}/tiles/{level}/0_0.jpg")
        read_address(f"{slide}/thumbnail.jpg")


def read_address(address: str) -> bytes:
    """Return what a server on this machine answers."""
    with urllib.request.urlopen(address, timeout=60) as answer:
        return bytes(answer.read())


def find_free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=int, default=40_000)
    parser.add_argument("--slide-px", type=int, default=30_000)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), arguments.patches, arguments.slide_px)
        with serve_inputs(Path(name)):
            for command in arguments.commands:
                usage = measure_command(command, Path(name))
                bound = COMMANDS[command].bound(arguments.patches)
                size = {"patches": arguments.patches, "slide_px": arguments.slide_px}
                row = {"command": command} | size | {"bound_mb": bound} | usage.round() | describe_machine()
                append_rows(RESULTS, [row])
                print(
                    f"{command:>14} {usage.seconds:6.1f} s {usage.peak_rss_mb:6.0f} of {bound:6.0f} MB",
                    flush=True,
                )
