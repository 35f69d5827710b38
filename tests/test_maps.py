"""Maps: cells are the mean of their patches, files give the map back, reading in pieces changes nothing."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import biopsy
from biopsy.core.errors import DataError, FileFormatError, SlideError
from biopsy.models.engine import Engine
from biopsy.models.hardware import pick_precision
from biopsy.models.inference import open_predictor, predict_logits
from biopsy.models.out_of_distribution import fit_reference
from biopsy.slide_io.reader import open_slide
from biopsy.slides.grids import PatchGrid
from biopsy.slides.inference import N_CHECKED, open_view, predict_slides
from biopsy.slides.maps import SlideMap, check_probs, find_regions
from biopsy.slides.outputs import compare_with_target, draw, summarise
from biopsy.slides.sources import Source
from refusals import refuses
from slide_maps import make_classifier, make_map

CELLS = np.array([[0.95, 0.6, np.nan], [0.3, 0.05, 0.2]])


@pytest.mark.parametrize(("patch_px", "stride_px"), [(12, 12), (12, 6), (12, 3), (5, 1)])
def test_cells_are_the_mean_of_the_patches_over_them(patch_px, stride_px):
    rng = np.random.default_rng(0)
    row, column = np.nonzero(rng.random((6, 8)) < 0.6)
    probs = rng.dirichlet((1, 1, 1), len(row)).astype(np.float32)
    grid = PatchGrid(column, row, patch_px, stride_px, 1.0, 1.0, 500, 500)
    slide_map = SlideMap("a", grid, probs, np.zeros(len(row), bool), ["a", "b", "c"], None, None)
    cells = slide_map.cells()
    for i, j in np.ndindex(cells.shape[:2]):
        x, y = (j + 0.5) * stride_px, (i + 0.5) * stride_px
        over = (grid.x < x) & (x < grid.x + patch_px) & (grid.y < y) & (y < grid.y + patch_px)
        if over.any():
            assert cells[i, j] == pytest.approx(probs[over].mean(axis=0), abs=1e-6)
            assert slide_map.cells_pred()[i, j] == cells[i, j].argmax()
        else:
            assert np.isnan(cells[i, j]).all() and slide_map.cells_pred()[i, j] == -1


def test_classes_by_cell():
    abstained = np.zeros(CELLS.shape, bool)
    abstained[1, 0] = True
    slide_map = make_map(CELLS, abstained=abstained, threshold=0.6)
    assert slide_map.cells_pred().tolist() == [[1, 1, -1], [-2, 0, 0]]


def test_a_map_comes_back_from_its_file(tmp_path):
    abstained = CELLS == 0.3
    slide_map = make_map(CELLS, abstained=abstained, scale=7.93, about={"source": "ä.svs"})
    path = slide_map.to_parquet(tmp_path / "map.parquet")
    back = SlideMap.from_parquet(path)
    assert back.to_frame().equals(slide_map.to_frame())
    assert np.array_equal(back.cells(), slide_map.cells(), equal_nan=True)
    assert (back.name, back.class_names, back.threshold) == ("case", ["normal", "tumour"], 0.5)
    assert back.about == {"source": "ä.svs"} and back.grid.origin_px == (0, 0)
    assert list(back.to_frame()) == ["x", "y", "prob", "prob_normal", "prob_tumour", "abstained"]
    with refuses(DataError, "picture"):
        draw(back)


def test_files_that_are_no_map_are_refused(tmp_path):
    with refuses(DataError, "none.parquet", reason="missing"):
        SlideMap.from_parquet(tmp_path / "none.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with refuses(DataError, "a.parquet", "Parquet"):
        SlideMap.from_parquet(tmp_path / "a.parquet")
    make_map(CELLS).to_frame().to_parquet(tmp_path / "b.parquet")
    with refuses(DataError, "biopsy-map/1"):
        SlideMap.from_parquet(tmp_path / "b.parquet")


def test_a_map_that_was_changed_is_refused(tmp_path, caplog):
    path = make_map(CELLS).to_parquet(tmp_path / "map.parquet")
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"biopsy"])

    def rewrite(frame, **changes):
        kept = {key: value for key, value in (about | changes).items() if value is not None}
        new = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(new.replace_schema_metadata({b"biopsy": json.dumps(kept).encode()}), path)

    frame = table.to_pandas()
    other = frame.assign(prob_tumour=frame["prob_tumour"].to_numpy()[::-1])
    for changed, more in (
        (other, {}),
        (frame.assign(x=frame["x"] + 20), {}),
        (frame.assign(abstained=True), {}),
        (frame, {"threshold": 0.1}),
        (frame, {"grid": about["grid"] | {"slide_mpp": 1.0}}),
    ):
        rewrite(changed, **more)
        with pytest.raises(FileFormatError) as caught:
            SlideMap.from_parquet(path)
        assert caught.value.reason == "altered"
    for changed, more in (
        (frame, {"grid": about["grid"] | {"origin_px": [0, "x"]}}),
        (frame, {"positive_class": "nobody"}),
        (frame, {"class_names": ["normal", "normal"]}),
        (frame.assign(x=None), {}),
        (frame.assign(x=[10**15, *frame["x"][1:]]), {}),
    ):
        rewrite(changed, content_sha256=None, **more)
        with pytest.raises(DataError):
            SlideMap.from_parquet(path)
    rewrite(frame, content_sha256=None)  # as the first versions wrote it
    assert len(SlideMap.from_parquet(path)) == len(frame)
    assert "content_sha256" in caplog.text


def test_probabilities_that_are_no_numbers_are_refused():
    with refuses(SlideError, "case", "[0, 1]"):
        check_probs(np.array([[0.5, np.nan]]), "case")


def test_the_summary_of_a_map():
    abstained = CELLS == 0.2
    slide_map = make_map(CELLS, abstained=abstained)
    found = summarise(slide_map, find_regions(slide_map), is_calibrated=True)
    cell = 0.01**2
    assert found["n_cells"] == 5 and found["mapped_mm2"] == pytest.approx(5 * cell)
    assert found["classes"]["tumour"]["area_mm2"] == pytest.approx(2 * cell)
    assert found["classes"]["tumour"]["largest_region_mm2"] == pytest.approx(2 * cell)
    assert found["classes"]["normal"]["n_regions"] == 1
    assert found["abstained_share"] == pytest.approx(0.2)
    positive = found["positive"]
    assert positive["expected_mm2"] == pytest.approx(2.1 * cell)
    assert (positive["low_mm2"], positive["high_mm2"]) == (pytest.approx(cell), pytest.approx(4 * cell))
    uncalibrated = summarise(make_map(CELLS), [], is_calibrated=False)["positive"]
    assert uncalibrated["low_mm2"] is None and "not calibrated" in uncalibrated["reason"]


def test_a_map_against_annotated_classes():
    found = compare_with_target(make_map(CELLS, threshold=0.3), np.array([1, 1, 0, 0, 1]))
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (2, 1, 1, 1)
    assert found["auroc"] == pytest.approx(5 / 6)


@pytest.fixture
def asked(make_slide):
    """A slide, a classifier, and its logits patch by patch, each read alone."""
    path, classifier = make_slide(), make_classifier()
    view = open_view(Source("case", path), classifier, 8.0)
    view.slide.close()
    with open_slide(path) as slide:
        patches = [
            slide.read_at(x, y, 16, 16, mpp=1.0) for x, y in zip(view.grid.x, view.grid.y, strict=True)
        ]
    alone = predict_logits(
        classifier.network, classifier.info.preprocessing, np.stack(patches), engine=Engine("cpu")
    )
    return path, classifier, view, alone


@pytest.mark.parametrize("n_threads", [1, 3])
def test_reading_ahead_in_pieces_gives_what_each_patch_gives_alone(asked, n_threads):
    path, classifier, view, alone = asked
    seen = []
    answers = list(
        predict_slides(
            [Source("case", path), Source("case", path.with_name("none.svs")), Source("case", path)],
            classifier,
            stride_um=8.0,
            n_threads=n_threads,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    )
    assert [answer.source.path.name for answer in answers] == ["slide.tiff", "none.svs", "slide.tiff"]
    assert "does not exist" in str(answers[1].error) and answers[1].logits is None
    for answer in (answers[0], answers[2]):
        assert np.array_equal(answer.view.grid.x, view.grid.x)
        assert answer.logits == pytest.approx(alone, abs=1e-5)
    assert np.array_equal(answers[0].logits, answers[2].logits)
    assert seen[-1] == (len(view.grid), len(view.grid))
    assert torch.get_num_threads() >= 1


def test_half_precision_is_near(asked):
    path, classifier, _, alone = asked
    (answer,) = predict_slides([Source("case", path)], classifier, precision="bf16", stride_um=8.0)
    assert answer.logits == pytest.approx(alone, abs=0.05)
    assert not np.array_equal(answer.logits, alone)


def test_a_slide_of_other_colours_is_unlike_training(asked, make_slide):
    path, classifier, view, alone = asked
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, slide.width, slide.height)
        patches = np.stack(
            [slide.read_at(x, y, 16, 16, mpp=1.0) for x, y in zip(view.grid.x, view.grid.y, strict=True)]
        )
    sizes, rows = np.full((len(patches), 2), 16), np.arange(len(patches))
    with open_predictor(classifier, Engine("cpu"), 1) as predictor:
        fit_reference(classifier, predictor, patches, sizes, rows, rows, seed=0)
    other = make_slide("other.tiff", pixels=np.ascontiguousarray(pixels[..., ::-1]))
    same, swapped = predict_slides([Source("case", path), Source("case", other)], classifier, stride_um=8.0)
    assert len(same.is_ood) == min(len(alone), N_CHECKED) == same.view.checked.sum()
    assert same.is_ood.mean() < 0.05 and swapped.is_ood.mean() > 0.9
    assert biopsy.slide(classifier, path).about["out_of_distribution"]["share"] < 0.1
    plain = biopsy.slide(make_classifier(), path)
    assert plain.about["out_of_distribution"] is None


def test_precision_that_is_named_is_used():
    assert pick_precision("fp32", "cpu") == "fp32"
    assert pick_precision("bf16", "cpu") == "bf16"
    assert pick_precision("auto", "cpu") in ("fp32", "bf16")


def test_slides_that_cannot_be_mapped_are_refused(make_slide):
    white = np.full((100, 100, 3), 250, np.uint8)
    with refuses(SlideError, "tissue"):
        open_view(Source("case", make_slide("white.tiff", pixels=white)), make_classifier())
    with refuses(SlideError, "um/px"):
        open_view(Source("case", make_slide()), make_classifier(mpp=None))
    with refuses(SlideError, "2.00 um/px", "1.5x"):
        open_view(Source("case", make_slide(mpp=2.0)), make_classifier())
