"""A package outside this one adds one of each thing; a run of its network opens in a new process."""

import json
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from biopsy.core import plugins
from biopsy.core.plugins import Registry
from conftest import encode_png, write_pack
from refusals import refuses

EXAMPLE = Path(__file__).parent / "plugins" / "biopsy_example"

TRAIN = """
import sys
from pathlib import Path
import biopsy
from biopsy.data.packs import Pack
place = Path(sys.argv[1])
settings = ("model.name=example_mean", "model.params={}", "preprocessing.input_px=8", "train.epochs=1",
            "train.batch_size=8", "model.context=0")
biopsy.train("idc-small", Pack.open(place / "tiny.pack"), overrides=settings, out=place / "run",
             device="cpu")
"""

USE = """
import json, sys
from pathlib import Path
import numpy as np
import biopsy
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.exporting.formats import FORMATS
from biopsy.models.networks import build_network, list_networks
from biopsy.models.networks.encoders import find_encoder
from biopsy.reporting.registry import list_sections
from biopsy.slides.outputs import list_files
place = Path(sys.argv[1])
run = biopsy.Run.open(place / "run")
biopsy.evaluate(run)
evaluation = json.loads((place / "run" / "evaluation" / "metrics.json").read_text())
pack = biopsy.prepare(place / "patches", place / "dashed.pack")
maps = explain_patches(run.classifier, run.open_pack().patches[:2], method="example_gradient_times_input")
bundle = biopsy.export(run, place / "bundle")
encoder = find_encoder("example-vit")
encoder_network = build_network(encoder.tag, n_classes=2, input_px=32)
print(json.dumps({
    "network": run.classifier.info.network,
    "youden": evaluation["patch"]["example_youden"]["value"],
    "terms": [evaluation["patch"][name]["value"] for name in ("sensitivity", "specificity")],
    "dataset": [pack.info.dataset, len(pack), pack.class_names],
    "maps": bool(np.isfinite(maps.maps).all()),
    "sections": [compose.__module__ for compose in list_sections()],
    "outputs": list_files(),
    "parity": list(bundle.parity["largest_difference"]),
    "encoder": [encoder.hub, encoder_network.head.in_features],
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for PYTHONPATH in which the example is installed, as an installer leaves it."""
    site = tmp_path_factory.mktemp("site")
    (site / "biopsy_example").symlink_to(EXAMPLE / "src" / "biopsy_example")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    about = site / "biopsy_example-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {module}" for name, module in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


def run_code(code: str, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_additions_of_a_package_are_used_in_every_process(site, tmp_path):
    write_pack(
        tmp_path, n_patients=9, patches_per_patient=6, official_subsets=("train", "validation", "test")
    )
    (tmp_path / "patches").mkdir()
    for number, name in enumerate(("a-1-benign", "a-2-malignant", "b-1-malignant")):
        patch = np.full((16, 16, 3), 50 * number, np.uint8)
        (tmp_path / "patches" / f"{name}.png").write_bytes(encode_png(patch))
    trained = run_code(TRAIN, site, str(tmp_path))
    assert trained.returncode == 0, trained.stderr
    used = run_code(USE, site, str(tmp_path))
    assert used.returncode == 0, used.stderr
    found = json.loads(used.stdout.splitlines()[-1])
    assert found["network"] == "example_mean"
    assert found["youden"] == pytest.approx(sum(found["terms"]) - 1)
    assert found["dataset"] == ["example-dashed", 3, ["benign", "malignant"]]
    assert found["maps"]
    assert "biopsy_example.report_section" in found["sections"]
    assert "example-largest.csv" in found["outputs"]
    assert "PyTorch and exported program" in found["parity"]
    assert found["encoder"] == ["example/vit", 24]
    assert "broken (biopsy_example.broken, biopsy.metrics)" in trained.stderr + used.stderr


def test_a_plug_in_that_fails_is_named_and_the_others_are_loaded(site, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(site))
    with caplog.at_level(logging.WARNING):
        plugins.load_entry_points.__wrapped__("biopsy.metrics")
    try:
        from biopsy.statistics.metrics import METRICS

        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "biopsy_example.broken" in caplog.text and "made to fail" in caplog.text
        assert "example_youden" in METRICS
    finally:
        del METRICS["example_youden"]


def test_a_name_is_taken_once_and_a_module_may_register_again():
    registry: Registry[int] = Registry("biopsy.nothing")

    def ours() -> None: ...

    def theirs() -> None: ...

    theirs.__module__ = "elsewhere"
    registry.add("one", 1, ours)
    registry.add("one", 2, ours)
    with refuses(ValueError, "'one'", "biopsy.nothing"):
        registry.add("one", 3, theirs)
    assert dict(registry) == {"one": 2} and "two" not in registry
