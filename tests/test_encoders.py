"""Encoders and probes: every architecture of the table, files of weights, cached features, the fit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import biopsy
from biopsy.core.errors import DataError, RecipeError
from biopsy.models.networks import build_network
from biopsy.models.networks.encoders import (
    Encoder,
    build_encoder,
    find_encoder,
    list_encoders,
    register_encoder,
)
from biopsy.models.weight_files import fill_network
from biopsy.models.weights import choose_weights, feed_as_encoder
from biopsy.recipes import load_recipe
from biopsy.training import probe as probing
from biopsy.training.probe import PENALTIES, fit_logistic, neighbour_votes
from command_line import call
from refusals import refuses

ALL = {encoder.name: encoder for encoder in list_encoders()}
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def register_tiny(name="tiny", **changes):
    """Register an encoder of one block, as a package of somebody else's would."""
    about = {"name": name, "hub": f"test/{name}", "architecture": "vit_tiny_patch16_224", "arguments": TINY}
    about |= {"n_features": 24, "millions": 0.1, "licence": "mit", "is_gated": False}
    return register_encoder(Encoder(**(about | changes)), function=register_tiny)


def save_weights(encoder, path, *, seed=0, input_px=128):
    network = build_network(encoder.tag, n_classes=2, input_px=input_px, seed=seed)
    save_file(network.body.vit.state_dict(), path)
    return path


@pytest.fixture
def tiny(own_registrations, tmp_path, monkeypatch):
    monkeypatch.setenv("BIOPSY_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    encoder = register_tiny()
    save_weights(encoder, tmp_path / "weights" / "test--tiny.safetensors")
    return encoder


# --- the table


def test_names_are_unique_and_the_wanted_ones_are_there():
    assert len({encoder.hub for encoder in ALL.values()}) == len(ALL)
    wanted = "h-optimus-0 hibou-l virchow midnight-12k openmidnight uni2-h virchow2 h0-mini gigapath-flash"
    wanted += " distillpath-is16-hopt0 kaiko-s16 kaiko-l14 lunit-s8 phikon dinov2-s14 dinov3-s16"
    assert set(wanted.split()) <= ALL.keys()
    assert all(find_encoder(alias) is e for e in ALL.values() for alias in (e.name, e.hub, e.tag))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ALL))
def test_every_architecture_has_its_published_size(name):
    encoder = ALL[name]
    with torch.device("meta"):
        network = encoder.build(encoder.input_px)
        features = network(torch.zeros(1, 3, encoder.input_px, encoder.input_px))
    assert features.shape == (1, encoder.n_features)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert n_parameters == pytest.approx(encoder.millions * 1e6, rel=0.01)


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_architecture_runs_with_random_weights(name):
    encoder = ALL[name]
    torch.manual_seed(0)
    network = encoder.build(4 * encoder.token_px, **TINY).eval()
    with torch.inference_mode():
        features = network(torch.rand(2, 3, 4 * encoder.token_px, 4 * encoder.token_px))
    assert features.shape == (2, 24 * (2 if encoder.pooling == "cls+mean" else 1))
    assert torch.isfinite(features).all() and features.std() > 0


def test_the_catalogue_lists_them():
    rows = {row["name"]: row for row in biopsy.list("encoders")}
    assert rows.keys() == ALL.keys()
    assert rows["uni2-h"]["gated"] and rows["uni2-h"]["licence"] == "cc-by-nc-nd-4.0"
    assert rows["h-optimus-0"]["model.name"] == "hf-hub:bioptimus/H-optimus-0"


def test_patches_are_brought_to_the_encoders_resolution():
    assert ALL["kaiko-s16"].fit_input(96 * 0.972) == 192  # 93 um at 0.5 um/px are 187 px
    assert ALL["h-optimus-0"].fit_input(96 * 0.972) == 182
    assert ALL["kaiko-s16"].fit_input(200) == 400
    assert ALL["kaiko-s16"].fit_input(2000) == 448  # at most twice its input
    assert ALL["kaiko-s16"].fit_input(10) == 112
    assert ALL["kaiko-s16"].fit_input(None) == 224
    assert (ALL["dinov2-b14"].fit_input(48), ALL["dinov3-b16"].fit_input(48)) == (224, 256)  # natural images


@pytest.mark.parametrize(
    ("mpp", "word"), [(4.0, "lack detail"), (0.1, "the field is smaller"), (None, "unknown")]
)
def test_a_resolution_far_from_the_encoders_is_reported(mpp, word, caplog):
    caplog.set_level("INFO", "biopsy")
    recipe = load_recipe("probe", {"model.name": ALL["kaiko-s16"].tag})
    fed = feed_as_encoder(recipe, 50, mpp)
    assert word in caplog.text
    assert fed.preprocessing.mean == (0.5, 0.5, 0.5) and fed.preprocessing.feed == "recipe"


def test_an_encoder_of_natural_images_has_no_resolution(caplog):
    caplog.set_level("INFO", "biopsy")
    fed = feed_as_encoder(load_recipe("probe", {"model.name": ALL["dinov2-s14"].tag}), 96, 0.972)
    assert "natural images" in caplog.text and fed.preprocessing.input_px == 224
    assert fed.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_recipe_feeds_weights_as_they_were_trained():
    settings = {"model.name": "torchvision:squeezenet1_1", "model.weights": "keras-squeezenet1_1"}
    fed = feed_as_encoder(load_recipe("probe", settings), 96, 0.972)
    assert (fed.preprocessing.channel_order, fed.preprocessing.scale) == ("bgr", 1.0)
    assert fed.model.params == {"head": "linear"}
    same = load_recipe("idc-small")
    assert feed_as_encoder(same, 50, 4.0) is same


# --- weights


def test_a_file_fills_an_encoder_at_another_input_size(tiny, tmp_path):
    network = build_network(tiny.tag, n_classes=2, input_px=128, seed=1)
    path = tmp_path / "weights" / "test--tiny.safetensors"
    assert fill_network(network, tiny.tag, path) is False  # the head stays random
    source = build_network(tiny.tag, n_classes=2, input_px=128, seed=0)
    patches = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(network.eval().features(patches), source.eval().features(patches))
    larger = build_network(tiny.tag, n_classes=2, input_px=160, seed=1)
    fill_network(larger, tiny.tag, path)
    assert torch.equal(larger.body.vit.blocks[0].attn.qkv.weight, source.body.vit.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["dinov2-s14", "dinov3-s16", "kaiko-l14"])
def test_a_file_of_timm_fills_an_encoder_at_another_input_size(name, own_registrations, tmp_path):
    known = ALL[name]
    encoder = register_tiny(architecture=known.architecture, arguments={**known.arguments, **TINY})
    path, px = save_weights(encoder, tmp_path / "model.safetensors", input_px=224), 4 * encoder.token_px
    network, other = (build_network(encoder.tag, n_classes=2, input_px=px, seed=seed) for seed in (1, 2))
    fill_network(network, encoder.tag, path)
    fill_network(other, encoder.tag, path)
    patches = torch.rand(2, 3, px, px)
    with torch.inference_mode():
        found, wanted = network.eval().features(patches), other.eval().features(patches)
    assert torch.equal(found, wanted) and found.std() > 0


def as_transformers(state, *, swiglu, registers):
    """Name tensors as Hugging Face's Dinov2Model (with registers) and ViTModel do."""
    is_dino = "blocks.0.ls1.gamma" in state
    named = {"embeddings.cls_token": state["cls_token"], "embeddings.position_embeddings": state["pos_embed"]}
    if registers:
        zero = torch.zeros_like(state["cls_token"])
        named["embeddings.position_embeddings"] = torch.cat([zero, state["pos_embed"]], dim=1)
        named["embeddings.register_tokens"] = state["reg_token"]
    if is_dino:
        named["embeddings.mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    dino = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    if swiglu:
        dino |= {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
    vit = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    vit |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for kind in ("weight", "bias"):
        named[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        named[f"layernorm.{kind}"] = state[f"norm.{kind}"]
        layer = "encoder.layer.0."
        parts = state[f"blocks.0.attn.qkv.{kind}"].chunk(3)
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            named[f"{layer}attention.attention.{name}.{kind}"] = part.clone()
        named[f"{layer}attention.output.dense.{kind}"] = state[f"blocks.0.attn.proj.{kind}"]
        for ours, theirs in (dino if is_dino else vit).items():
            named[f"{layer}{theirs}.{kind}"] = state[f"blocks.0.{ours}.{kind}"]
    if is_dino:
        named |= {f"encoder.layer.0.layer_scale{i}.lambda1": state[f"blocks.0.ls{i}.gamma"] for i in (1, 2)}
    return named


@pytest.mark.parametrize(
    ("name", "swiglu", "registers"),
    [
        ("phikon", False, False),
        ("phikon-v2", False, False),
        ("hibou-b", True, True),
        ("midnight-12k", True, False),
    ],
)
def test_files_of_transformers_fill_an_encoder(name, swiglu, registers, own_registrations, tmp_path):
    known = ALL[name]
    arguments = {**known.arguments, **TINY}
    encoder = register_tiny(
        architecture=known.architecture,
        arguments=arguments,
        keys="transformers",
        pooling=known.pooling,
        n_features=24 * (2 if known.pooling == "cls+mean" else 1),
    )
    px = 4 * encoder.token_px
    source = build_network(encoder.tag, n_classes=2, input_px=px, seed=3).eval()
    state = {key: value.clone() for key, value in source.body.vit.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(
        {k: v.contiguous() for k, v in as_transformers(state, swiglu=swiglu, registers=registers).items()},
        path,
    )
    network = build_network(encoder.tag, n_classes=2, input_px=px, seed=4)
    fill_network(network, encoder.tag, path)
    patches = torch.rand(2, 3, px, px)
    with torch.inference_mode():
        found, wanted = network.eval().features(patches), source.features(patches)
    torch.testing.assert_close(found, wanted)


def test_a_file_of_another_network_is_refused(tiny, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, path)
    with refuses(DataError, "tiny", path.name):
        fill_network(build_network(tiny.tag, n_classes=2, input_px=128), tiny.tag, path)
    other = register_tiny("wider", arguments=TINY | {"embed_dim": 48}, n_features=48)
    with refuses(DataError, "wider"):
        fill_network(
            build_network(other.tag, n_classes=2, input_px=128),
            other.tag,
            tmp_path / "weights" / "test--tiny.safetensors",
        )


@pytest.mark.parametrize(
    ("fields", "found"), [({"n_features": 25}, 24), ({"pooling": "cls+mean", "n_features": 24}, 48)]
)
def test_an_encoder_of_another_output_size_is_refused(fields, found, own_registrations):
    encoder = register_tiny(**fields)
    with refuses(RecipeError, encoder.name, f"n_features={encoder.n_features}", f" {found} features"):
        build_network(encoder.tag, n_classes=2, input_px=128)


def test_names_gates_and_licences_are_refused_clearly(tmp_path, monkeypatch):
    monkeypatch.setenv("BIOPSY_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("BIOPSY_ACCEPT_LICENCE", raising=False)

    def ask(name, **settings):
        choose_weights(load_recipe("probe", {"model.name": name, **settings}))

    with refuses(RecipeError, "'h-optimus-0'"):
        find_encoder("h-optimus-1")
    with refuses(RecipeError, "gated", "Virchow"):
        ask("hf-hub:paige-ai/Virchow")
    with refuses(RecipeError, "--accept-licence cc-by-nc-nd"):
        ask("hf-hub:bioptimus/H0-mini")
    (tmp_path / "mine.safetensors").touch()
    with refuses(RecipeError, "--accept-licence lunit-nc"):  # a file of one's own has it too
        ask(ALL["lunit-s16"].tag, **{"model.weights": str(tmp_path / "mine.safetensors")})
    with refuses(DataError, "mine.safetensors", "00" * 32):
        ask(
            "hf-hub:bioptimus/H-optimus-0",
            **{"model.weights": str(tmp_path / "mine.safetensors"), "model.weights_sha256": "00" * 32},
        )
    with refuses(RecipeError, "16 px", "50x50"):
        build_encoder("hf-hub:owkin/phikon", n_classes=2, input_px=50)


# --- the fit


def test_the_fit_is_scikit_learns_on_standardised_features():
    rng = np.random.default_rng(0)
    features = rng.normal(3, [1, 10, 0.1, 5], (200, 4)).astype(np.float32)
    target = (features[:, 1] + rng.normal(0, 8, 200) > 3).astype(int)
    groups = np.repeat(np.arange(20), 10)
    coefficients, intercepts, penalty = fit_logistic(features, target, groups, n_classes=2)
    assert penalty in PENALTIES and coefficients.shape == (2, 4) and not coefficients[0].any()
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=penalty, max_iter=500).fit(scaler.transform(features), target)
    wanted = reference.decision_function(scaler.transform(features))
    np.testing.assert_allclose(features @ coefficients[1] + intercepts[1], wanted, atol=2e-3)


def test_the_penalty_is_chosen_between_patients_not_between_patches():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 20)
    identity = rng.normal(0, 3, (30, 40))[groups]  # tells patients apart and says nothing of the next one
    target = (np.arange(30) % 2)[groups]
    features = (identity + rng.normal(0, 0.1, identity.shape)).astype(np.float32)
    _, _, by_patient = fit_logistic(features, target, groups, n_classes=2)
    _, _, by_patch = fit_logistic(features, target, np.arange(len(target)), n_classes=2)
    assert by_patient < by_patch


def test_three_classes_and_class_weights():
    rng = np.random.default_rng(2)
    target = np.repeat([0, 1, 2], [200, 30, 30])
    features = (np.eye(3)[target] + rng.normal(0, 0.5, (260, 3))).astype(np.float32)
    groups = rng.integers(0, 12, 260)
    coefficients, intercepts, _ = fit_logistic(features, target, groups, n_classes=3)
    weighted, more, _ = fit_logistic(
        features, target, groups, n_classes=3, class_weight=np.array([1.0, 6.7, 6.7])
    )
    plain_calls = (features @ coefficients.T + intercepts).argmax(axis=1)
    calls = (features @ weighted.T + more).argmax(axis=1)
    assert (plain_calls == target).mean() > 0.85
    assert (calls[target > 0] == target[target > 0]).mean() > (
        plain_calls[target > 0] == target[target > 0]
    ).mean()


def test_neighbours_vote_by_the_direction_of_features():
    train = np.array([[1, 0], [2, 0.1], [0, 1], [0.1, 3]])
    votes = neighbour_votes(
        train, np.array([0, 0, 2, 2]), np.array([[9, 0], [0, 9]]), n_classes=3, n_neighbours=2
    )
    assert votes.tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "setting",
    ["model.trainable=all", "model.tta=d4", "augmentation.flip_vertical=true", "train.sampling=oversample"],
)
def test_settings_that_a_probe_cannot_have_are_refused(setting, tiny, make_pack, tmp_path):
    with refuses(RecipeError, "features"):
        biopsy.train(
            "probe",
            make_pack(n_patients=6),
            overrides=[f"model.name={tiny.tag}", setting],
            out=tmp_path / "run",
        )


# --- from a pack to a table


@pytest.mark.slow
def test_features_are_computed_once_and_again_when_changed(tiny, make_pack, tmp_path, monkeypatch):
    pack = make_pack(n_patients=12, patches_per_patient=6)
    settings = [f"model.name={tiny.tag}", "train.precision=fp32"]
    run = biopsy.train("probe", pack, overrides=settings, out=tmp_path / "run", device="cpu")
    record = run.log()[0]
    assert run.info["weights"]["weights"] == tiny.tag and run.info["weights"]["licence"] == "mit"
    assert run.recipe.preprocessing.input_px == 128  # 64 um at 0.5 um/px
    assert record["n_features"] == 24 and record["penalty"] in PENALTIES
    [features] = (pack.path / "features").glob("*.npy")
    kept, val = np.load(features), run.subsets(pack) == "validation"
    head = run.classifier.base_network.head
    wanted = kept[val] @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    frame, _ = run.predictions("validation")
    np.testing.assert_allclose(frame[["logit_non_idc", "logit_idc"]], wanted, atol=1e-3)

    def refuse(*arguments):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(probing, "_compute", refuse)
        again = biopsy.train("probe", pack, overrides=settings, out=tmp_path / "again", seed=5, device="cpu")
        assert again.log()[0]["feature_seconds"] == record["feature_seconds"]
        with pytest.raises(ZeroDivisionError):  # other weights are another encoder
            save_weights(tiny, tmp_path / "other.safetensors", seed=9)
            other = [*settings, f"model.weights={tmp_path / 'other.safetensors'}"]
            biopsy.train("probe", pack, overrides=other, out=tmp_path / "other", device="cpu")
        content = features.read_bytes()
        features.write_bytes(content[:-4] + b"\0\0\0\0")
        with pytest.raises(ZeroDivisionError):
            biopsy.train("probe", pack, overrides=settings, out=tmp_path / "third", seed=6, device="cpu")
    assert biopsy.Pack.open(pack.path).verify() is None


@pytest.mark.slow
def test_a_table_of_encoders(tiny, make_pack, tmp_path):
    pack = make_pack(n_patients=36, patches_per_patient=6, noise=100)
    other = register_tiny("second", pooling="cls+mean", n_features=48)
    path = save_weights(other, tmp_path / "second.safetensors", seed=7)
    names = ["tiny", f"second={path}"]
    made = biopsy.probe(names, pack, out=tmp_path / "probe", device="cpu")
    first, second = made["rows"]
    assert (first["encoder"], second["encoder"]) == ("tiny", "second")
    assert first["difference"] is None
    assert second["difference"] == pytest.approx(second["auroc"] - first["auroc"])
    assert second["difference_low"] <= second["difference"] <= second["difference_high"]
    assert first["auroc_low"] <= first["auroc"] <= first["auroc_high"]
    assert 0 <= first["knn_auroc"] <= 1 and first["ms_per_patch"] > 0
    assert (second["n_features"], second["um_per_px"], second["licence"]) == (48, 0.5, "mit")
    assert made.to_frame().shape[0] == 2
    called = call("probe", *names, "--data", pack.path, "--out", tmp_path / "probe", "--json")
    assert called.exit_code == 0, called.stderr
    again = json.loads(called.stdout)["rows"]
    assert [row["auroc"] for row in again] == [first["auroc"], second["auroc"]]  # nothing is trained again
    table = call("probe", *names, "--data", pack.path, "--out", tmp_path / "probe")
    assert "tiny" in table.stdout and f"{first['auroc']:.3f}" in table.stdout


def test_nothing_is_computed_where_one_encoder_lacks_its_weights(tiny, make_pack, tmp_path):
    pack = make_pack(n_patients=6)
    with refuses(RecipeError, "H-optimus-0", "this machine"):
        biopsy.probe(["tiny", "h-optimus-0"], pack, out=tmp_path / "probe")
    assert not (pack.path / "features").exists() and not (tmp_path / "probe").exists()


@pytest.mark.data
@pytest.mark.slow
def test_imagenet_weights_at_hand_are_probed(data_dir, tmp_path):
    pack = biopsy.prepare(data_dir / "idc" / "idc_kaggle_subset.zip", tmp_path / "idc.pack")
    file = data_dir / "weights" / "squeezenet_v1.1_imagenet_notop_tf.h5"
    settings = ["preprocessing.input_px=96"]
    made = biopsy.probe(
        [f"torchvision:squeezenet1_1={file}"],
        pack,
        split="patients",
        overrides=settings,
        out=tmp_path / "probe",
    )
    [row] = made["rows"]
    assert row["n_features"] == 512 and row["auroc"] > 0.7
