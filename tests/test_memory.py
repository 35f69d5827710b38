"""Every command stays within its stated memory; `benchmarks/memory.py` measures larger inputs."""

import sys

import pytest

import memory
from biopsy.cli.app import COMMANDS

N_PATCHES, SLIDE_PX = 1_600, 4_000
SMALL_DEMO = "from biopsy.experiments import demo as d; d.N_PATIENTS, d.PATCHES_PER_PATIENT = 12, 20"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    memory.write_inputs(folder, N_PATCHES, SLIDE_PX)
    with memory.serve_inputs(folder):
        yield folder


def test_every_command_has_a_bound():
    bounded = {name.split()[0] for name in memory.COMMANDS}
    assert bounded == {name.replace("_", "-") for name in COMMANDS}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", memory.COMMANDS)  # each needs the results of those before it
def test_a_command_stays_within_its_bound(name, inputs, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # with as many threads as users have
    usage = memory.measure_command(name, inputs, SMALL_DEMO if name == "demo" else "")
    assert 0 < usage.peak_rss_mb < memory.COMMANDS[name].bound(N_PATCHES)
