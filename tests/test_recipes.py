"""Recipes: every value has a source, what is written reads back, typos are named, claims follow."""

import tomllib
from pathlib import Path

import pytest

import biopsy.recipes as recipes
from biopsy.core.errors import RecipeError
from biopsy.models.networks import count_parameters
from biopsy.models.weights import make_network, title_recipe
from biopsy.recipes import DEFINING_TABLES, Recipe, list_recipes, load_recipe, recipe_toml
from biopsy.recipes.schema import Augmentation
from refusals import refuses
from tiny_runs import train_tiny

SHIPPED = list_recipes()
LARGE = {"pcam", "probe", "vgg16-pcam"}  # seconds of training each
TOML = {name: Path(recipes.__file__).with_name(f"{name}.toml") for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_value_written_out_has_a_source(name):
    document = tomllib.loads(TOML[name].read_text(encoding="utf-8"))
    written = {f"{table}.{key}" for table in DEFINING_TABLES for key in document.get(table, {})}
    possible = {
        f"{table}.{key}"
        for table in DEFINING_TABLES
        for key in Recipe.model_fields[table].annotation.model_fields
    }
    assert written == set(document["sources"]) and written <= possible
    assert all(source.strip() for source in document["sources"].values())
    assert document["name"] == name


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_written_reads_back_equal(name, tmp_path):
    for recipe in (load_recipe(name), load_recipe(name, ["train.lr=1e-5", "decision.threshold=cost=5"])):
        path = tmp_path / "mine.toml"
        path.write_text(recipe_toml(recipe), encoding="utf-8")
        assert load_recipe(path) == load_recipe(str(path)) == load_recipe(recipe) == recipe


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in SHIPPED]
)
def test_trains_on_small_patches(name, make_pack, tmp_path):
    pack = make_pack(n_patients=7, patches_per_patient=6)
    small = ("preprocessing.input_px=32", "train.epochs=1", "train.lr=1e-4", "model.pretrained=false")
    few = ("train.steps_per_epoch=2",) if load_recipe(name).train.steps_per_epoch else ()
    run = train_tiny(pack, tmp_path / "run", *small, *few, recipe=name)
    assert run.info["status"] == "finished" and run.info["recipe"] == name
    assert run.recipe.train.optimiser == load_recipe(name).train.optimiser
    sigmoid = load_recipe(name).train.loss == "binary-cross-entropy"
    assert run.classifier.info.outputs == ("sigmoid" if sigmoid else "softmax")


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [
        ("cancernet-2019", 1_235_133, 1_233_533),
        ("cancernet-2020", 1_235_133, 1_233_533),
        ("baruah-2019", 2_010_946, 2_010_946),
        ("vgg16-pcam", 15_894_849, 8_259_585),
        ("dabydeen-hedges", 526_786, 526_786),
    ],
)
def test_published_networks_have_as_many_parameters_as_published(name, total, trainable):
    recipe = load_recipe(name, ["model.pretrained=false"])
    network, _ = make_network(recipe, n_classes=2, seed=0)
    assert count_parameters(network) == (total, trainable)


def test_the_vgg16_post_trains_as_long_as_it_says():
    recipe = load_recipe("vgg16-pcam")
    assert recipe.origin.updates == recipe.train.epochs * recipe.train.steps_per_epoch == 8000
    claim, rows = recipe.origin.claim, 154_017
    assert recipe.origin.updates * recipe.train.batch_size / rows == pytest.approx(3.3, abs=0.05)
    mean = (claim["sensitivity"] + claim["specificity"]) / 2
    assert recipe.origin.corrected == {**claim, "balanced_accuracy": pytest.approx(mean)}


def test_baruah_breaks_the_rules_only_as_published():
    recipe = load_recipe("baruah-2019")
    assert recipe.preprocessing.standardise == "featurewise" and recipe.as_published.standardise == "none"
    assert recipe.as_published.split["test_is_validation"] and recipe.as_published.threshold == "argmax"
    n_train = 60_000 - round(60_000 * recipe.as_published.split["test"])
    balanced = 2 * n_train * 15_522 / 60_000  # as many of each class as IDC has
    steps = -(-balanced // recipe.train.batch_size)
    assert recipe.origin.updates == steps * 37


def test_the_two_dabydeen_hedges_differ_as_the_post_says():
    baseline, final = (load_recipe(f"dabydeen-hedges{end}") for end in ("-baseline", ""))
    assert len(baseline.model.params["widths"]) == 3 and baseline.model.params["dropout"] == 0
    assert baseline.augmentation == Augmentation() != final.augmentation
    tables = [
        recipe.model_dump(include=set(DEFINING_TABLES) - {"model", "augmentation"})
        for recipe in (baseline, final)
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("name", ["cancernet-2019", "cancernet-2020"])
def test_the_claim_and_its_correction_follow_from_the_confusion_matrix(name):
    origin = load_recipe(name).origin
    tp, fp, fn, tn = (origin.confusion[key] for key in ("tp", "fp", "fn", "tn"))
    sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
    counted = {
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "f1": 2 * tp / (2 * tp + fp + fn),
    }
    assert origin.corrected == pytest.approx(counted, abs=5e-5)
    swapped = {"sensitivity": specificity, "specificity": sensitivity, "accuracy": counted["accuracy"]}
    assert origin.claim == pytest.approx(swapped, abs=5e-5)


def test_the_two_cancernets_differ_where_the_posts_do():
    tables = [
        load_recipe(name).model_dump(include=set(DEFINING_TABLES))
        for name in ("cancernet-2019", "cancernet-2020")
    ]
    one, other = ({f"{t}.{k}": v for t, keys in table.items() for k, v in keys.items()} for table in tables)
    assert {key: (one[key], other[key]) for key in one if one[key] != other[key]} == {
        "train.optimiser": ("adagrad-keras2", "adagrad"),
        "train.class_weights": ("none", "largest"),
    }


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=0.005", 0.005),
        (" train.lr = 5e-3 ", 0.005),
        ("train.epochs=3", 3),
        ("train.drop_last=false", False),
        ("train.optimiser=sgd", "sgd"),
        ('train.optimiser="sgd"', "sgd"),
        ("train.schedule=plateau", "plateau"),
        ("decision.threshold=sensitivity=0.95", "sensitivity=0.95"),
        ("preprocessing.mean=[0.1, 0.2, 0.3]", (0.1, 0.2, 0.3)),
        ("model.params.dense_dropout=0.1", {"dense_dropout": 0.1}),
    ],
)
def test_a_setting_is_changed(override, value):
    table, key = override.partition("=")[0].strip().split(".")[:2]
    changed = load_recipe("cancernet-2020", [override])
    assert getattr(getattr(changed, table), key) == value
    before = load_recipe("cancernet-2020")
    assert changed != before == load_recipe(before)


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("train.lrr=1", ["'train.lrr'", "'train.lr'"]),
        ("preprocesing.resize=nearest", ["'preprocesing.resize'", "'preprocessing.resize'"]),
        ("train.epoch=3", ["'train.epoch'", "'train.epochs'"]),
        ("train.lr", ["'='", "--set"]),
        ("name=other", ["'name'"]),
        ("train.optimiser=adagradd", ["train.optimiser", "'adagrad'", "'adagradd'"]),
        ("train.lr=0", ["train.lr", "greater than 0", "found 0"]),
        ("train.lr=inf", ["--set train.lr", "inf"]),
        ("train.epochs=1.5", ["train.epochs", "integer", "found 1.5"]),
        ("train.momentum=1", ["train.momentum", "less than 1", "found 1"]),
        ("train.precision=fp16", ["train.precision", "'bf16'", "found 'fp16'"]),
        ("preprocessing.std=[1, 1]", ["preprocessing.std.2", "[1, 1]"]),
        ("preprocessing.std=[1, 0, 1]", ["preprocessing.std.1", "greater than 0", "found 0"]),
        (
            "decision.threshold=youdenn",
            ["decision.threshold", "'youdenn'", "'youden'"],
        ),
        ("decision.threshold=sensitivity=1.5", ["decision.threshold", "'sensitivity=1.5'", "0.95"]),
        ("as_published.threshold=cost=0", ["as_published.threshold", "'cost=0'", "cost=5"]),
    ],
)
def test_a_wrong_setting_is_refused(override, facts):
    with refuses(RecipeError, *facts):
        load_recipe("cancernet-2020", [override])


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("name = 'x'", ["x: model"]),
        ("name = 'a/b'\n[model]\nname = 'cancernet'", ["a/b: name"]),
        ("name = 'x'\n[model]\nname = 'cancernet'\n[train]\nlearn = 1", ["'train.learn'"]),
        (
            "format = 'biopsy-recipe/2'\nname = 'x'\n[model]\nname = 'cancernet'",
            ["'biopsy-recipe/1'", "/2'"],
        ),
        ("name = ", ["x.toml", "TOML"]),
    ],
)
def test_a_wrong_file_is_refused(text, facts, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with refuses(RecipeError, *facts):
        load_recipe(path)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with refuses(RecipeError, "'cancernet-2002'", "'cancernet-2020'"):
        load_recipe("cancernet-2002")
    with refuses(RecipeError, "none.toml"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with refuses(RecipeError, tmp_path / "folder.toml", ".toml file"):
        load_recipe(tmp_path / "folder.toml")


def test_a_users_own_file_needs_little(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("name = 'mine'\n[model]\nname = 'residual'\n[preprocessing]\ninput_px = 32\n")
    recipe = load_recipe(path, ["model.params.base_channels=8"])
    assert (recipe.name, recipe.model.params, recipe.train.epochs) == ("mine", {"base_channels": 8}, 10)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ([], "encoder `vit_small_patch16_224.dino`"),
        (["model.name=hf-hub:owner/weights", "model.weights=FILE"], "encoder `owner/weights`"),
        (["model.name=residual", "model.weights=idc"], "classifier `idc`"),
        (["model.name=timm:tf_efficientnet_lite0", "model.weights=pcam"], "classifier `pcam`"),
    ],
)
def test_title_of_a_probe_names_where_it_starts(settings, start):
    assert title_recipe(load_recipe("probe", settings)).endswith(f" the {start}")


def test_title_without_an_encoder_is_that_of_the_recipe():
    recipe = load_recipe("idc-small")
    assert title_recipe(recipe) == recipe.title
    assert title_recipe(recipe.model_copy(update={"title": ""})) == "idc-small"
