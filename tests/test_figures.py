"""Figures hold the data they were given, say so in their labels, and become clean, repeatable SVG."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import roc_auc_score

from biopsy.core.errors import DataError, MetricError, RecipeError
from biopsy.data.figures import draw_balance, draw_subsets
from biopsy.evaluation.figures import (
    draw_confusion,
    draw_confusion_matrix,
    draw_patient_metric,
    draw_patient_probs,
    draw_precision_recall,
    draw_roc,
)
from biopsy.experiments.study_page import draw_folds
from biopsy.plotting import style
from biopsy.plotting.patches import draw_class_sheet, lay_out_sheet
from biopsy.plotting.slides import draw_slide, round_length_um
from biopsy.training.figures import draw_network, draw_training, group_layers
from refusals import refuses

TARGET = np.array([0, 0, 0, 1, 0, 1, 1, 1, 0, 1])
PROB = np.array([0.05, 0.1, 0.3, 0.25, 0.5, 0.55, 0.7, 0.9, 0.6, 0.95])
LAYERS = [
    ("conv", "Conv2d", (8, 16, 16), 224),
    ("pool", "MaxPool2d", (8, 8, 8), 0),
    ("drop", "Dropout", (8, 8, 8), 0),
    ("conv2", "Conv2d", (16, 8, 8), 1168),
    ("flat", "Flatten", (1024,), 0),
    ("out", "Linear", (2,), 2050),
]


def words(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def line(axes, label):
    return next(found for found in axes.lines if found.get_label() == label).get_xydata()


def test_roc_holds_the_curve_whose_area_is_the_auroc():
    axes = draw_roc(TARGET, PROB, operating_point=(0.8, 0.6)).axes[0]
    x, y = line(axes, "this model").T
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(TARGET, PROB), abs=1e-12)
    np.testing.assert_allclose(line(axes, "decision threshold"), [[0.4, 0.8]])
    assert axes.get_xlabel() == "1 - specificity" and axes.get_ylabel() == "Sensitivity"


def test_precision_recall_shows_the_prevalence_floor():
    axes = draw_precision_recall(TARGET, PROB).axes[0]
    recall, precision = line(axes, "this model").T
    assert line(axes, "baseline: prevalence 0.50")[0, 1] == 0.5
    calls = [PROB >= threshold for threshold in PROB]
    possible = {(round(TARGET[called].sum() / 5, 9), round(TARGET[called].mean(), 9)) for called in calls}
    drawn = {(round(r, 9), round(p, 9)) for r, p in zip(recall, precision, strict=True)} - {(0.0, 1.0)}
    assert drawn <= possible and {r for r, _ in drawn} == {r for r, _ in possible}


def test_training_curves_hold_the_log_and_mark_the_chosen_epoch():
    records = [
        {"epoch": e, "loss": 1 / e, "val_loss": 2 / e, "val_accuracy": None, "accuracy": 0.5, "lr": 10.0**-e}
        for e in (1, 2, 3)
    ]
    loss, accuracy, lr = draw_training(records, chosen_epoch=2, quantities=["loss", "accuracy", "lr"]).axes
    np.testing.assert_allclose(line(loss, "training"), [[1, 1], [2, 0.5], [3, 1 / 3]])
    np.testing.assert_allclose(line(loss, "validation")[:, 1], [2, 1, 2 / 3])
    assert line(loss, "selected epoch 2")[0, 0] == 2
    assert "validation" not in [found.get_label() for found in accuracy.lines]
    assert lr.get_yscale() == "log" and loss.get_xlabel() == "epoch"


def test_a_learning_rate_of_zero_is_not_drawn_on_a_logarithmic_scale():
    (axes,) = draw_training([{"epoch": 1, "loss": 0.2, "lr": 0.0}], quantities=["lr"]).axes
    assert axes.get_yscale() == "linear"


def test_confusion_names_the_quadrants_where_they_stand():
    figure = draw_confusion(8, 3, 2, 27, negative="not IDC", positive="IDC")
    place = {t.get_text(): t.get_position() for t in figure.axes[0].texts}
    for name, count, share in (
        ("true positive", "8", "80.0% of IDC"),
        ("false negative", "2", "20.0% of IDC"),
        ("false positive", "3", "10.0% of not IDC"),
        ("true negative", "27", "90.0% of not IDC"),
    ):
        column, row = place[name]
        assert place[count][0] == column and abs(place[count][1] - row) < 0.5
        assert place[share][0] == column and abs(place[share][1] - row) < 0.6
    assert place["true positive"] == (0, -0.23) and place["false negative"][0] == 1
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["IDC", "not IDC"]


def test_confusion_without_one_class_reports_it():
    assert "no IDC patch" in words(draw_confusion(0, 3, 0, 4, negative="not IDC", positive="IDC"))


def test_confusion_matrix_of_three_classes():
    figure = draw_confusion_matrix(np.arange(9).reshape(3, 3), ["a", "b", "c"])
    place = {t.get_text(): t.get_position() for t in figure.axes[0].texts}
    assert place["5\n42%"] == (2, 1) and place["6\n29%"] == (0, 2)


@pytest.mark.parametrize("n_classes", [3, 8])
def test_no_label_of_a_confusion_matrix_lies_over_another(n_classes):
    names = [f"lobular_carcinoma_{k}" for k in range(n_classes)]
    figure = draw_confusion_matrix(np.full((n_classes, n_classes), 12_345), names)
    FigureCanvasAgg(figure).draw()
    cells = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for k, one in enumerate(cells) for other in cells[:k])
    labels = figure.axes[0].get_xticklabels()
    if n_classes == 3:
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    else:  # slanted: between anchors there is room for a line of text
        anchors = [label.get_transform().transform(label.get_position())[0] for label in labels]
        across = np.diff(anchors) * np.sin(np.radians(labels[0].get_rotation()))
        assert (across > labels[0].get_fontsize() * figure.dpi / 72).all()


def test_balance_sorts_by_patches_and_stacks_classes():
    axes = draw_balance(["a", "b"], np.array([[1, 2], [5, 4]]), ["not IDC", "IDC"]).axes[0]
    bars = [(bar.get_x(), bar.get_width()) for container in axes.containers for bar in container]
    assert bars == [(0, 5), (0, 1), (5, 4), (1, 2)]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a"]


def test_subsets_show_every_class_with_its_count_and_share():
    counts = np.array([[1500, 500], [0, 0], [30, 10]])
    figure = draw_subsets(["train", "validation", "test"], counts, ["not IDC", "IDC"])
    axes = figure.axes[0]
    bars = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
    assert bars == {"not IDC": [1500, 0, 30], "IDC": [500, 0, 10]}
    tops = np.array([[bar.get_y() for bar in container] for container in axes.containers]).T.ravel()
    assert (np.diff(tops) >= 0.35).all()  # side by side: the classes of a side, then the next side
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["train", "validation", "test"]
    assert axes.yaxis_inverted() and {"1,500 (75%)", "10 (25%)", "0"} <= set(words(figure))
    with refuses(MetricError, "(1, 2)", "2 subsets", "2 classes"):
        draw_subsets(["train", "test"], np.array([[1, 2]]), ["a", "b"])


def test_patient_metric_puts_the_best_first_and_the_undefined_last():
    figure = draw_patient_metric(
        ["a", "b", "c"], np.array([0.7, np.nan, 0.9]), np.array([10, 20, 1500]), metric="AUROC"
    )
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.9, 0], [0.7, 1]])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["c", "a", "b"]
    assert {"not defined", "1,500", "10"} <= set(words(figure)) and axes.get_xlabel() == "AUROC"


def test_many_patients_are_ranks_without_names():
    names = [f"patient{i}" for i in range(80)]
    figure = draw_patient_metric(names, np.linspace(0.5, 1, 80), np.full(80, 9), metric="AUROC")
    assert not any("patient1" in text for text in words(figure)) and figure.get_figheight() < 7


def test_patient_probs_hold_medians_and_quantiles():
    prob = np.concatenate([np.linspace(0, 1, 101), np.full(5, 0.3)])
    axes = draw_patient_probs(
        ["a"] * 101 + ["b"] * 5, np.array([0] * 101 + [1] * 5), prob, threshold=0.4
    ).axes[0]
    np.testing.assert_allclose(line(axes, "negative")[:, 0], [0.5])
    np.testing.assert_allclose(line(axes, "positive")[:, 0], [0.3])
    spans = [sorted(path[:, 0]) for lines in axes.collections for path in lines.get_segments()]
    np.testing.assert_allclose(spans[:2], [[0.05, 0.95], [0.25, 0.75]])
    assert line(axes, "threshold 0.40")[0, 0] == 0.4


def test_folds_show_every_seed_their_mean_and_the_baseline():
    axes = draw_folds(["x", "x", "y"], np.array([0.8, 0.6, 0.9]), baseline={"x": 0.75, "y": np.nan}).axes[0]
    np.testing.assert_allclose(line(axes, "one seed")[:, 0], [0.6, 0.8])
    np.testing.assert_allclose(line(axes, "mean of seeds")[:, 0], [0.7, 0.7])
    np.testing.assert_allclose(line(axes, "colour-only baseline"), [[0.75, 0]])


def test_sheet_lays_patches_row_by_row():
    patches = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)] + [
        np.full((2, 3, 3), 40, np.uint8)
    ]
    sheet = lay_out_sheet(patches, columns=3, gap_px=1)
    assert sheet.shape == (9, 14, 3)
    assert (sheet[:4, 10:] == 30).all() and (sheet[5:7, :3] == 40).all() and (sheet[7:, :4] == 255).all()


def test_class_sheet_shows_titles():
    patch = np.zeros((8, 8, 3), np.uint8)
    assert {"IDC", "none here"} <= set(words(draw_class_sheet([("IDC", [patch]), ("none here", [])])))


def test_layers_are_grouped_at_poolings_and_before_the_head():
    blocks = group_layers(LAYERS)
    assert [(block.title, len(block.rows), block.parameters) for block in blocks] == [
        ("stage 1", 3, 224),
        ("stage 2", 1, 1168),
        ("head", 2, 2050),
    ]
    dotted = [
        (f"{part}.{name}", kind, shape, n)
        for part, (name, kind, shape, n) in zip("aabbcc", LAYERS, strict=True)
    ]
    assert [block.title for block in group_layers(dotted)] == ["a", "b", "c"]


def test_network_diagram_names_shapes_and_parameters():
    shown = words(draw_network(LAYERS, input_shape=(3, 16, 16)))
    assert {"Conv2d", "1,168", "2,050", "16 × 8 × 8", "input  3 × 16 × 16"} <= set(shown)  # noqa: RUF001


def test_a_long_network_is_drawn_by_blocks():
    rows = [(f"block{i // 10}.{i}", "Conv2d", (8, 4, 4), 10) for i in range(200)]
    shown = words(draw_network(rows, input_shape=(3, 4, 4)))
    assert "Conv2d" not in shown and shown.count("100") == 20


def test_slide_panels_lie_on_one_grid_with_a_scale_bar():
    target = np.array([[0, 1, np.nan], [0, 0, 1]])
    figure = draw_slide(
        np.zeros((20, 30, 3), np.uint8), target, target * 0.5, um_per_cell=200, class_names=("n", "IDC")
    )
    tissue, classes, prob, _ = figure.axes
    assert all(list(axes.images[0].get_extent()) == [0, 3, 2, 0] for axes in (tissue, classes, prob))
    alpha = classes.images[0].get_array()[..., 3]
    assert np.array_equal(alpha, [[1, 1, 0], [1, 1, 1]])
    assert np.array_equal(prob.images[0].get_array()[..., 3] > 0, [[1, 1, 0], [1, 1, 1]])
    bar = tissue.lines[0].get_xdata()
    assert (bar[1] - bar[0]) * 200 == 100 and "100 µm" in words(figure)


@pytest.mark.parametrize(("span", "length"), [(9000.0, 2000.0), (8.0, 2.0), (4000.0, 1000.0), (790.0, 100.0)])
def test_scale_bars_have_round_lengths(span, length):
    assert round_length_um(span) == length


def test_svg_is_one_valid_repeatable_element_with_text_as_text():
    figure = draw_balance(["<script>$x_$", "日本\x07"], np.array([[1, 2], [5, 4]]), ["not & IDC", "IDC"])
    text = style.svg(figure, "balance")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and text.startswith("<svg")
    assert style.svg(figure, "balance") == text
    shown = "".join(root.itertext())
    assert "<script>$x_$" in shown and "日本" in shown and "not & IDC" in shown
    assert "<script" not in text and "metadata" not in text and len(text) < 12_000
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and not set(ids) & set(
        re.findall(r'\bid="([^"]*)"', style.svg(figure, "other"))
    )
    assert set(re.findall(r"(?:href=\"|url\()#([\w-]+)", text)) <= set(ids)


def test_opaque_pictures_in_svg_are_jpeg_and_maps_stay_sharp():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    grid = np.random.default_rng(0).random((8, 12))
    text = style.svg(draw_slide(noise, grid.round(), np.where(grid > 0.5, grid, np.nan)))
    kinds = re.findall(r"data:image/(\w+);base64", text)
    assert sorted(set(kinds)) == ["jpeg", "png"]
    ElementTree.fromstring(text)


def test_png_and_jpeg_are_what_they_say():
    image = np.zeros((5, 7, 3), np.uint8)
    assert style.png(image).startswith(b"\x89PNG") and style.jpeg(image).startswith(b"\xff\xd8")
    assert style.png(draw_roc(TARGET, PROB), dpi=50).startswith(b"\x89PNG")


def test_drawing_leaves_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    style.svg(draw_roc(TARGET, PROB))
    assert dict(matplotlib.rcParams) == before


def test_shorten_keeps_both_ends():
    assert style.shorten("TCGA-A1-A0SK-01Z-00-DX1", 12) == "TCGA-A…0-DX1"[:6] + "…" + "0-DX1"
    assert style.shorten("8863") == "8863"


@pytest.mark.parametrize(
    ("draw", "error", "reason", "facts"),
    [
        (lambda: draw_roc(np.ones(3), PROB[:3]), MetricError, "undefined", []),
        (lambda: draw_roc(np.array([0, 2]), PROB[:2]), MetricError, "target", []),
        (lambda: draw_roc(np.array([0, 1]), np.array([0.1, np.nan])), MetricError, "prob", ["1"]),
        (lambda: draw_training([]), MetricError, "empty", []),
        (lambda: draw_training([{"epoch": 1}], quantities=["los"]), MetricError, "name", ["'los'", "loss"]),
        (lambda: draw_confusion_matrix(np.eye(2), ["a"]), MetricError, "shape", ["(2, 2)"]),
        (lambda: draw_balance(["a"], np.ones((2, 2)), ["n", "p"]), MetricError, "shape", ["(2, 2)"]),
        (lambda: draw_patient_metric(["a"], np.ones(2), np.ones(1), metric="f1"), MetricError, "shape", []),
        (lambda: draw_folds([], np.array([])), MetricError, "shape", []),
        (lambda: lay_out_sheet([]), DataError, "", ["one patch"]),
        (lambda: draw_class_sheet([("IDC", [])]), DataError, "", ["class"]),
        (lambda: draw_network([], input_shape=(3, 4, 4)), RecipeError, "network", []),
        (lambda: draw_slide(np.zeros((2, 2, 3)), np.ones((1, 2)), np.ones((2, 1))), DataError, "", ["equal"]),
        (
            lambda: draw_slide(np.zeros((2, 2, 3)), np.ones((1, 1)), np.ones((1, 1)), panels=["err"]),
            DataError,
            "",
            ["'err'", "tissue"],
        ),
    ],
)
def test_refusals_name_the_fault(draw, error, reason, facts):
    with refuses(error, *facts, reason=reason):
        draw()
