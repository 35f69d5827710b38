"""The tools of the Model Context Protocol, called by the protocol's own client over stdin and stdout."""

import os
import sys

import numpy as np
import pytest

import biopsy
from biopsy.core.errors import DataError
from conftest import encode_png
from slide_maps import make_classifier, save_classifier

pytest.importorskip("mcp")

import anyio
from mcp import ClientSession, StdioServerParameters, stdio_client


def call_tools(arguments, *calls):
    """Return the results of tools, called one after the other in one session."""
    program = ["-c", "from biopsy.cli import main; main()", "serve", *map(str, arguments), "--mcp"]

    async def run():
        results = []
        parameters = StdioServerParameters(command=sys.executable, args=program, env=dict(os.environ))
        async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
            await session.initialize()
            for name, options in calls:
                results.append(
                    await wait_for(session, name, options(results) if callable(options) else options)
                )
        return results

    async def wait_for(session, name, options):
        while True:
            result = await session.call_tool(name, options)
            answer = result.structured_content
            if name != "get_slide" or result.is_error or answer["status"] in ("done", "failed"):
                return result
            await anyio.sleep(0.2)

    return anyio.run(run)


@pytest.mark.slow
def test_tools_answer_as_predict_and_slide_do(make_slide, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    rng, classifier = np.random.default_rng(0), save_classifier(tmp_path / "classifier")
    images = [root / f"{n}.png" for n in range(3)]
    for path in images:
        path.write_bytes(encode_png(rng.integers(0, 256, (16, 16, 3), np.uint8)))
    case = make_slide("case.tiff", width=900, height=600).rename(root / "case.tiff")
    (root / "case.svs").write_bytes(b"II*\0")
    (root / "none.png").write_bytes(b"no image")
    models, predicted, outside, slide, started, mapped, unknown = call_tools(
        [classifier, "--root", root, "--out", tmp_path / "jobs", "--device", "cpu"],
        ("list_models", {}),
        ("predict_patches", {"paths": [*(path.name for path in images), "none.png", "case.tiff"]}),
        ("predict_patches", {"paths": ["../classifier"]}),
        ("predict_patches", {"paths": ["case.svs"]}),
        ("map_slide", {"path": "case.tiff"}),
        ("get_slide", lambda results: {"identity": results[-1].structured_content["id"]}),
        ("get_slide", {"identity": "0" * 16}),
    )
    assert [model["name"] for model in models.structured_content["result"]] == ["classifier"]
    expected = biopsy.predict(classifier, images, out=tmp_path / "p.csv", device="cpu").frame
    answer = predicted.structured_content
    assert answer["n_patches"] == 3
    assert [row["patch_id"] for row in answer["patches"]] == expected["patch_id"].tolist()
    assert [row["prob"] for row in answer["patches"]] == pytest.approx(expected["prob"].tolist(), abs=1e-6)
    assert outside.is_error and "leads out" in outside.content[0].text
    assert [item["source"] for item in answer["skipped"]] == ["none.png", "case.tiff"]
    assert "map_slide" in answer["skipped"][1]["reason"]
    assert (
        slide.is_error and "map_slide" in slide.content[0].text and str(tmp_path) not in slide.content[0].text
    )
    assert unknown.is_error and "map_slide" in unknown.content[0].text
    assert not started.is_error
    summary = mapped.structured_content["summary"]
    assert summary["n_patches"] == len(biopsy.slide(make_classifier(), case, device="cpu"))
    files = mapped.structured_content["files"]
    assert (tmp_path / "jobs" / files["map.parquet"]).is_file()
    assert not any(str(tmp_path) in str(result.content) for result in (models, predicted, started, mapped))


def test_a_root_is_needed_and_options_of_http_are_refused(tmp_path):
    classifier = save_classifier(tmp_path / "classifier")
    for options in ({}, {"root": tmp_path / "none"}, {"root": tmp_path, "port": 1}):
        with pytest.raises(DataError):
            biopsy.serve(classifier, mcp=True, out=tmp_path / "jobs", **options)
    assert not (tmp_path / "jobs").exists()
