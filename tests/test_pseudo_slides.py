from pathlib import Path

import numpy as np
import pytest

from biopsy.core.errors import SplitError
from biopsy.core.results import Table
from biopsy.data.packs import Pack
from biopsy.data.protocols.pseudo_slides import cluster_appearance, describe_appearance, have_all_classes
from biopsy.data.splits import Split, load_split, save_split
from biopsy.data.splits import split as make_split
from refusals import refuses

N_STAINS, PER_STAIN = 12, 20


def draw_stained(target_of: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Draw patches of stains as far apart as slides of different laboratories, by stain and patch."""
    rng = np.random.default_rng(seed)
    grounds = np.array(
        [[90 + 13 * stain, 200 - 9 * stain, 60 + 70 * (stain % 3)] for stain in range(N_STAINS)]
    )
    images = grounds[:, None, None, None] + rng.normal(0, 2, (N_STAINS, PER_STAIN, 12, 12, 3))
    images[..., 4:8, 4:8, :] -= 4 * target_of.reshape(N_STAINS, PER_STAIN, 1, 1, 1)
    return np.clip(images, 0, 255).astype(np.uint8).reshape(-1, 12, 12, 3)


def make_stained(
    out: Path,
    *,
    target: np.ndarray | None = None,
    order: np.ndarray | None = None,
    columns: dict[str, np.ndarray] | None = None,
) -> Pack:
    target = np.arange(N_STAINS * PER_STAIN) % 2 if target is None else target
    order = np.arange(len(target)) if order is None else order
    names = np.array([f"s{row // PER_STAIN:02}-{row % PER_STAIN:02}" for row in range(len(target))])
    return Pack.from_arrays(
        draw_stained(target)[order],
        target[order],
        class_names=["normal", "tumour"],
        columns={"patch_id": names[order], **{key: value[order] for key, value in (columns or {}).items()}},
        out=out,
    )


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    sites = np.repeat(["train"] * 10 + ["valid", "other"], PER_STAIN)
    return make_stained(tmp_path / "stained.pack", columns={"site_id": sites})


def stains_of(pack: Pack) -> np.ndarray:
    return pack.table["patch_id"].str[:3].to_numpy(str)


def split_stained(pack: Pack, **options: object) -> Split:
    settings = {"protocol": "pseudo-slides", "n_groups": 10, "test_patients": ["valid"], "save": False}
    return make_split(pack, **(settings | options))  # type: ignore[arg-type]


def test_statistics_are_those_of_numpy(pack: Pack) -> None:
    rows = np.arange(0, len(pack), 7)
    for row, features in zip(rows, describe_appearance(pack, rows), strict=True):
        density = -np.log((pack.pixels(row).astype(float) + 1) / 256)
        channels = density.reshape(-1, 3)
        assert features[0:3] == pytest.approx(channels.mean(axis=0))
        assert features[3:6] == pytest.approx(channels.std(axis=0))
        assert features[6:9] == pytest.approx(np.percentile(channels, 10, axis=0, method="lower"))
        grey = density.mean(axis=2)
        steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)]
        assert features[9:] == pytest.approx(steps, rel=1e-4)


def test_padding_is_no_part_of_a_patch(tmp_path: Path) -> None:
    images = [np.full((8, 8, 3), 200, np.uint8), np.full((16, 16, 3), 200, np.uint8)]
    pack = Pack.from_arrays(images, [0, 1], out=tmp_path / "sizes.pack")
    small, large = describe_appearance(pack, np.arange(2))
    assert small == pytest.approx(large)


def test_patches_of_one_stain_are_one_group(pack: Pack) -> None:
    groups = cluster_appearance(describe_appearance(pack, np.arange(len(pack))), N_STAINS, seed=0)
    assert len(set(zip(groups, stains_of(pack), strict=True))) == N_STAINS


def test_groups_are_numbered_by_size() -> None:
    features = np.repeat([[0.0, 1.0], [9.0, 1.0], [4.0, 1.0]], [3, 12, 5], axis=0)
    features[:, 0] += np.linspace(0, 0.1, 20)
    assert cluster_appearance(features, 3, seed=0).tolist() == [2] * 3 + [0] * 12 + [1] * 5


def test_groups_with_too_little_of_a_class() -> None:
    counts = np.array([[90, 10], [91, 9], [10, 90], [0, 100]])
    assert have_all_classes(counts).tolist() == [True, False, True, False]
    assert have_all_classes(np.array([[94, 3, 3], [80, 7, 13]])).tolist() == [False, True]


def test_no_pseudo_slide_is_in_two_subsets_and_named_sites_test(pack: Pack) -> None:
    split = split_stained(pack)
    table, subsets = split.table, split.subsets(pack)
    assert ((subsets == "test") == (pack.table["site_id"] == "valid")).all()
    assert ((table["pseudo_slide"] == "") == (subsets == "test")).all()
    divided = table[table["subset"] != "test"]
    assert divided["pseudo_slide"].nunique() == 10
    assert (divided.groupby("pseudo_slide")["subset"].nunique() == 1).all()
    assert np.unique(pack.target[subsets == "validation"]).tolist() == [0, 1]
    assert 0.1 < (subsets == "validation").sum() / len(divided) < 0.3
    assert (split.unit, split.overlap) == ("patch", None)


def test_groups_are_recorded_with_their_classes(pack: Pack) -> None:
    split = split_stained(pack)
    table = split.table.assign(target=pack.target)
    for group in split.parameters["pseudo_slides"]:  # type: ignore[typeddict-item]
        rows = table[table["pseudo_slide"] == group["pseudo_slide"]]
        assert set(rows["subset"]) == {group["subset"]}
        assert list(group["per_class"].values()) == np.bincount(rows["target"], minlength=2).tolist()
    text, unknown, counts = split.blocks()[1:]
    assert "not slides" in str(text) and "--patients" in str(unknown) and isinstance(counts, Table)


def test_without_a_named_test_subset_all_three_are_drawn(pack: Pack) -> None:
    split = split_stained(pack, test_patients=(), n_groups=N_STAINS)
    stains = stains_of(pack)
    parts = {subset: set(stains[split.subsets(pack) == subset]) for subset in ("train", "validation", "test")}
    assert all(parts.values()) and sum(map(len, parts.values())) == N_STAINS


def test_official_subsets_may_be_named_and_others_are_left_out(tmp_path: Path) -> None:
    pack = make_stained(tmp_path / "plain.pack")
    pack.table["official_subset"] = np.repeat(["train"] * 10 + ["validation", "test"], PER_STAIN)
    subsets = split_stained(pack, test_patients=["validation"]).subsets(pack)
    official = pack.table["official_subset"].to_numpy(str)
    assert ((subsets == "test") == (official == "validation")).all()
    assert ((subsets == "") == (official == "test")).all()


def test_same_seed_same_split_whatever_the_order(pack: Pack, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(pack))
    sites = np.repeat(["train"] * 10 + ["valid", "other"], PER_STAIN)
    other = make_stained(tmp_path / "shuffled.pack", order=order, columns={"site_id": sites})
    first, shuffled = (split_stained(each, seed=3).table.set_index("patch_id") for each in (pack, other))
    assert first.equals(split_stained(pack, seed=3).table.set_index("patch_id"))
    assert first.equals(shuffled.loc[first.index])
    held_back = {tuple(split_stained(pack, seed=seed).subsets(pack) == "validation") for seed in range(4)}
    assert len(held_back) > 1


def test_round_trip(pack: Pack) -> None:
    split = split_stained(pack, name="pseudo")
    save_split(pack, split)
    again = load_split(pack, "pseudo")
    assert again.table.equals(split.table) and again.parameters == split.parameters


def test_refusals(pack: Pack, tmp_path: Path) -> None:
    with refuses(SplitError, "'vaild'", "valid"):
        split_stained(pack, test_patients=["vaild"])
    with refuses(SplitError, "--val-patients", "'site'"):
        split_stained(pack, val_patients=["valid"])
    with refuses(SplitError, "1000 pseudo-slides", "--n-groups"):
        split_stained(pack, n_groups=1000)
    with refuses(SplitError, "1 pseudo-slides", "--n-groups"):
        split_stained(pack, n_groups=1)
    with refuses(SplitError, "all patches"):
        split_stained(pack, test_patients=["train", "valid", "other"])
    separate = make_stained(tmp_path / "separate.pack", target=np.repeat(np.arange(N_STAINS) % 2, PER_STAIN))
    with refuses(SplitError, "0 of 12", "--n-groups"):
        split_stained(separate, test_patients=(), n_groups=N_STAINS)


def test_a_pack_with_patients_or_slides_is_refused(tmp_path: Path) -> None:
    slides = np.repeat([f"slide {index}" for index in range(N_STAINS)], PER_STAIN)
    pack = make_stained(tmp_path / "slides.pack", columns={"slide_id": slides})
    with refuses(SplitError, "slides", "'patients'", "'folds'"):
        split_stained(pack, test_patients=())
