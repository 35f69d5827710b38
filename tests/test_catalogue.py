"""What `biopsy list` names: everything that is shipped, and how it is used."""

import json

import pytest

import biopsy
from biopsy.phantom.slides import make_phantom_slide
from command_line import call
from refusals import refuses


@pytest.mark.parametrize("kind", ["datasets", "models", "recipes"])
def test_list_names_what_is_shipped(kind):
    rows = json.loads(call("list", kind, "--json").stdout)
    assert len(rows) >= 2
    assert all(row.keys() == rows[0].keys() for row in rows)
    names = [row["name"] for row in rows]
    assert {"datasets": "idc", "models": "cancernet", "recipes": "cancernet-2020"}[kind] in names
    shown = call("list", kind).stdout
    assert all(name in shown for name in names)


def test_list_states_how_a_pack_is_made_of_each_data_set(make_idc_zip, tmp_path):
    rows = {row["name"]: row for row in biopsy.list("datasets")}
    assert all(row["looks_for"] and row["prepare"].startswith("biopsy prepare ") for row in rows.values())
    make_phantom_slide(tmp_path / "slides" / "a.tiff", seed=3, width=320, height=240, mpp=2.0, drawn_mpp=4.0)
    places = {"SOURCE": make_idc_zip(), "SLIDES": tmp_path / "slides", "UM": 4.0, "PIXELS": 16}
    for name, others in (("idc", []), ("annotated-slides", ["--classes", "tumour=Tumor", "--rest", "other"])):
        words = rows[name]["prepare"].replace("PACK", str(tmp_path / name)).split()[1:]
        done = call(*(places.get(word, word) for word in words), *others)
        assert done.exit_code == 0, done.stderr
        assert biopsy.Pack.open(tmp_path / name).info.dataset == name


def test_list_refuses_another_kind():
    with refuses(biopsy.BiopsyError, "'models'"):
        biopsy.list("model")
