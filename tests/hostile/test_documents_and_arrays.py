"""Documents and arrays that were damaged, edited or made to do harm: refused in one line, soon."""

import shutil
from collections import Counter
from pathlib import Path

import corpus_arrays
import corpus_documents
import corpus_models
import pytest
from harness import Server, check

import biopsy
from conftest import encode_png, write_pack
from tiny_runs import LIVELY, train_tiny

INPUTS = [*corpus_documents.INPUTS, *corpus_arrays.INPUTS, *corpus_models.INPUTS]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with ``in.pack`` and ``in.run``, which finds its pack beside it, and ``tree`` of images."""
    place = tmp_path_factory.mktemp("made")
    pack = write_pack(
        place,
        "in.pack",
        n_patients=9,
        patches_per_patient=8,
        official_subsets=("train", "validation", "test"),
    )
    run = train_tiny(pack, place / "in.run", *LIVELY, recipe="idc-small")
    biopsy.evaluate(run)
    for row in pack.table.iloc[:24].itertuples():
        file = place / "tree" / ("benign", "malignant")[row.target] / f"{row.patch_id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(pack.patches[row.Index]))
    return Path(shutil.move(place, place.with_name("material")))


def test_the_corpus_is_large_and_its_names_are_unique():
    names = [entry.name for entry in INPUTS]
    assert len(set(names)) == len(names) >= 100
    counts = Counter(name.partition("_")[0] for name in names)
    assert min(counts.values()) >= 5, counts


@pytest.mark.parametrize("entry", INPUTS, ids=lambda entry: entry.name)
def test_input(entry, server, material, tmp_path):
    check(server, entry, material, tmp_path / "work")
