"""The embedded cohort: its layout, its truth, and that colour alone does not give the answer away."""

import hashlib
import logging
import re
import zipfile

import cv2
import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biopsy.data.prepare import prepare
from biopsy.phantom.cells import stamp_nuclei
from biopsy.phantom.cohort import (
    PATCH_PX,
    TUMOUR_SHARE,
    iter_patches,
    paint_patient,
    plan_cohort,
    write_archive,
)
from biopsy.phantom.glands import _blobs, _ring, _shrink
from biopsy.phantom.noise import Field, Jitter
from biopsy.phantom.slides import make_slide, plan_painter
from biopsy.slide_io.stain import colour_features
from refusals import refuses

NAME = re.compile(
    r"IDC_regular_ps50_idx5/(?P<folder>\d+)/(?P<side>[01])/(?P<patient>\d+)_idx5_x(?P<x>\d+)_y(?P<y>\d+)_class(?P<class>[01])\.png"
)


@pytest.fixture(scope="module")
def slide():
    return make_slide(3, "90002", tissue_mm2=1.5, tumour_frac=0.3)


@pytest.fixture(scope="module")
def cohort():
    return list(iter_patches(16, 30, seed=0))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(
        tmp_path_factory.mktemp("phantom") / "p.zip", n_patients=2, patches_per_patient=20, workers=2
    )


def test_archive_has_idc_names_that_agree_with_their_folders(archive):
    with zipfile.ZipFile(archive) as zipped:
        note, *names = zipped.namelist()
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in zipped.infolist())
        image = cv2.imdecode(np.frombuffer(zipped.read(names[0]), np.uint8), cv2.IMREAD_UNCHANGED)
    assert note == "IDC_regular_ps50_idx5/SYNTHETIC.txt"
    assert image.shape == (PATCH_PX, PATCH_PX, 3) and image.dtype == np.uint8
    assert len(names) == len(set(names)) == 40
    parsed = [NAME.fullmatch(name) for name in names]
    assert all(parsed)
    assert all(match["folder"] == match["patient"] and match["side"] == match["class"] for match in parsed)
    assert all(int(match["x"]) % 50 == 1 and int(match["y"]) % 50 == 1 for match in parsed)
    assert {match["patient"] for match in parsed} == {"90001", "90002"}


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_workers_and_another_seed_differs(archive, tmp_path):
    arguments = {"n_patients": 2, "patches_per_patient": 20}
    again = write_archive(tmp_path / "again.zip", workers=1, **arguments)
    other = write_archive(tmp_path / "other.zip", seed=1, **arguments)
    digest = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (archive, again, other)]
    assert digest[0] == digest[1] != digest[2]


def test_folder_holds_the_same_files_as_the_zip(archive, tmp_path):
    folder = write_archive(tmp_path / "tree", n_patients=2, patches_per_patient=20)
    with zipfile.ZipFile(archive) as zipped:
        in_zip = {name: zipped.read(name) for name in zipped.namelist()}
    in_folder = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    assert in_folder == in_zip


def test_a_pack_of_it_is_known_as_synthetic_and_no_other(archive, make_pack, tmp_path):
    assert prepare(archive, tmp_path / "phantom.pack").info.is_synthetic
    assert not make_pack().info.is_synthetic


def test_patients_at_the_top_when_no_root_is_wanted(tmp_path):
    path = write_archive(tmp_path / "p.zip", n_patients=1, patches_per_patient=20, root="")
    with zipfile.ZipFile(path) as zipped:
        note, *names = zipped.namelist()
    assert note == "SYNTHETIC.txt" and all(name.startswith("90001/") for name in names)


def test_patches_are_the_slide_and_labels_its_mask():
    cohort = list(iter_patches(4, 24, seed=0))
    patient, n_patches, tumour_frac = plan_cohort(4, 24, 0)[0]
    painter, places = paint_patient(0, patient, n_patches, tumour_frac)
    patches = [patch for patch in cohort if patch.patient_id == patient]
    assert len(places) == len(patches) == n_patches
    for k, patch in enumerate(patches):
        corner = (patch.x - 1, patch.y - 1, PATCH_PX, PATCH_PX, 4.0)
        assert patch.tumour_frac == pytest.approx(painter.mask("tumour", *corner).mean())
        if k % 7 == 0:
            np.testing.assert_array_equal(painter.paint(*corner), patch.image)
    assert all(patch.target == (patch.tumour_frac >= TUMOUR_SHARE) for patch in cohort)
    assert any(0 < patch.tumour_frac < TUMOUR_SHARE for patch in cohort)


def test_tumour_is_one_piece_of_the_wanted_size_inside_the_tissue(slide):
    assert slide.image.shape == (*slide.tumour.shape, 3)
    _, n_pieces = ndimage.label(slide.tumour, np.ones((3, 3)))
    assert n_pieces == 1
    assert slide.tumour.sum() / slide.tissue.sum() == pytest.approx(0.3, abs=0.05)
    assert (slide.tumour & slide.tissue).sum() > 0.95 * slide.tumour.sum()


def test_tumour_is_one_piece_on_every_slide():
    for patient in range(90001, 90007):
        tumour = plan_painter(0, str(patient), tissue_mm2=8.0, tumour_frac=0.35).anatomy.maps["tumour"] > 0
        assert tumour.any()
        assert ndimage.label(tumour)[1] == 1
        np.testing.assert_array_equal(ndimage.binary_fill_holes(tumour), tumour)


def test_background_is_glass_and_tumour_darker_than_the_rest(slide):
    grey = slide.image.mean(-1)
    outside = ~ndimage.binary_dilation(slide.tissue, iterations=12)
    assert grey[outside].min() > 215
    assert grey[slide.tumour].mean() < grey[slide.tissue & ~slide.tumour].mean() - 5


def test_any_part_of_a_slide_equals_the_whole(slide):
    painter = plan_painter(3, "90002", tissue_mm2=1.5, tumour_frac=0.3)
    part = painter.paint(137, 91, 150, 130, 4.0)
    np.testing.assert_array_equal(part, slide.image[91 : 91 + 130, 137 : 137 + 150])


def test_the_same_tissue_at_a_finer_pixel_size(slide):
    painter = plan_painter(3, "90002", tissue_mm2=1.5, tumour_frac=0.3)
    fine = cv2.resize(painter.paint(400, 400, 800, 800, 1.0), (200, 200), interpolation=cv2.INTER_AREA)
    coarse = slide.image[100:300, 100:300]
    # Tiles carry their own grain and blur: alike, not equal.
    r = np.corrcoef(fine.ravel().astype(float), coarse.ravel().astype(float))[0, 1]
    assert r > 0.9


@pytest.mark.slow
def test_cohort_has_the_requested_size_and_idc_balance(cohort):
    assert len(cohort) == 480
    targets = np.array([patch.target for patch in cohort])
    assert 0.2 <= targets.mean() <= 0.36
    by_patient = {p: [q.target for q in cohort if q.patient_id == p] for p in {q.patient_id for q in cohort}}
    assert len(by_patient) == 16
    rates = [np.mean(of_patient) for of_patient in by_patient.values()]
    assert min(rates) < 0.12 < 0.4 < max(rates)


@pytest.mark.slow
def test_every_patch_holds_tissue(cohort):
    assert all((patch.image.min(-1) < 225).mean() > 0.02 for patch in cohort)


@pytest.mark.slow
def test_colour_alone_does_not_solve_it(cohort):
    features = colour_features(np.stack([patch.image for patch in cohort]))
    target = np.array([patch.target for patch in cohort])
    model = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
    groups = [patch.patient_id for patch in cohort]
    score = cross_val_predict(
        model, features, target, groups=groups, cv=GroupKFold(4), method="predict_proba"
    )
    assert 0.6 < roc_auc_score(target, score[:, 1]) <= 0.85


def test_high_grade_keeps_the_outlines_and_enlarges_the_nuclei():
    plain, high = (
        plan_painter(3, "90002", tissue_mm2=0.6, tumour_frac=0.3, high_grade=g) for g in (False, True)
    )
    width, height = plain.size_px(4.0)
    assert (width, height) == high.size_px(4.0)
    for name in ("tumour", "tissue"):
        masks = [painter.mask(name, 0, 0, width, height, 4.0) for painter in (plain, high)]
        assert np.array_equal(*masks)
    assert high.anatomy.habit.nucleus_um > 2 * plain.anatomy.habit.nucleus_um
    assert not np.array_equal(plain.paint(0, 0, 50, 50, 4.0), high.paint(0, 0, 50, 50, 4.0))


def test_fields_and_points_do_not_depend_on_the_region():
    rng = np.random.default_rng(0)
    field, points = Field(rng, 20.0), Jitter(rng, 15.0)
    x, y = np.meshgrid(np.arange(0, 400, 2, dtype=np.float32), np.arange(0, 300, 2, dtype=np.float32))
    np.testing.assert_allclose(field.at(x, y)[40:90, 30:70], field.at(x[40:90, 30:70], y[40:90, 30:70]))
    large, small = points.within(0, 0, 600, 600), points.within(150, 150, 90, 90)
    places = set(zip(large.x_um.tolist(), large.y_um.tolist(), strict=True))
    assert set(zip(small.x_um.tolist(), small.y_um.tolist(), strict=True)) <= places


def test_a_stamped_nucleus_has_its_area_and_place():
    nucleus = np.array([[40.0, 60.0, 8.0, 4.0, 0.5, 1.0]], np.float32)
    canvas = stamp_nuclei((200, 200), (0.0, 0.0), 0.5, nucleus)
    assert canvas.sum() * 0.25 == pytest.approx(np.pi * 8 * 4, rel=0.03)
    row, column = ndimage.center_of_mass(canvas)
    assert ((column + 0.5) * 0.5, (row + 0.5) * 0.5) == pytest.approx((40, 60), abs=0.1)
    assert canvas.max() == 1.0


def test_glands_are_lined_inside_their_outlines_and_hollows_are_smaller():
    rng = np.random.default_rng(1)
    radius = np.array([20.0, 40.0, 60.0])
    outlines = _blobs(rng, np.array([[0, 0], [200, 0], [400, 50]]), radius, np.ones(3), 0.1)
    hollows = _shrink(outlines, np.array([8.0, 30.0, 10.0]))
    areas = [cv2.contourArea(outline) for outline in outlines]
    assert areas == pytest.approx(np.pi * radius**2, rel=0.25)
    assert all(0 < cv2.contourArea(hollow) < area for hollow, area in zip(hollows, areas, strict=True))
    nuclei = _ring(rng, outlines, 3.0, gap_um=6.0, radius_um=(3.1, 2.5), flat=False)
    depth = [
        max(cv2.pointPolygonTest(outline, (float(x), float(y)), True) for outline in outlines)
        for x, y in nuclei[:, :2]
    ]
    assert min(depth) > 1.0 and max(depth) < 5.0
    assert len(nuclei) == pytest.approx(
        sum(cv2.arcLength(outline, True) for outline in outlines) / 6, rel=0.2
    )


def test_glands_within_finds_all_that_touch_a_rectangle():
    anatomy = plan_painter(3, "90002", tissue_mm2=1.5, tumour_frac=0.3).anatomy
    assert len(anatomy.glands_within(-1e6, -1e6, 1e6, 1e6)) == len(anatomy.glands) > 0
    gland = anatomy.glands[0]
    x, y = gland.outlines[0].mean(0).tolist()
    assert any(found is gland for found in anatomy.glands_within(x - 1, y - 1, x + 1, y + 1))
    assert not anatomy.glands_within(-900.0, -900.0, -800.0, -800.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mpp", 0.0),
        ("tissue_mm2", -1.0),
        ("tumour_frac", 1.0),
    ],
)
def test_slide_refuses_numbers_out_of_range(name, value):
    with refuses(ValueError, name, value):
        make_slide(0, "90001", **{name: value})


@pytest.mark.parametrize("arguments", [{"n_patients": 0}, {"patches_per_patient": 5}])
def test_cohort_refuses_numbers_out_of_range(arguments, tmp_path):
    with refuses(ValueError, *arguments, *arguments.values()):
        write_archive(tmp_path / "p.zip", **arguments)
    assert not list(tmp_path.iterdir())


def test_only_real_patches_are_counted_against_the_complete_data_set(archive, tmp_path, make_idc_zip, caplog):
    caplog.set_level(logging.INFO)
    prepare(archive, tmp_path / "one")
    assert "277,524" not in caplog.text
    prepare(make_idc_zip(), tmp_path / "two")
    assert "277,524" in caplog.text
