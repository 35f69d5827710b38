"""Documents that runs and packs are read back from (JSON, TOML, JSON lines), damaged and edited."""

import json
import os
from functools import partial
from pathlib import Path

from harness import Input

EVALUATE = ("evaluate", "in.run")
DEEP = "[" * 100_000
DIGITS = "7" * 5000
BROKEN = {
    "deep": DEEP,
    "deep_objects": '{"a":' * 50_000,
    "digits": f'{{"format": {DIGITS}}}',
    "empty": "",
    "list": "[1, 2]",
    "nan": '{"format": NaN}',
    "twice": '{"format": "a", "format": "b"}',
    "not_utf8": b"\xff\xfe{}",
    "format_only": "{0}",
    "cut": '{"format": "biopsy',
    "nul": b"\0" * 100,
    "surrogate": '{"format": "\\ud800"}',
}
DOCUMENTS = {
    "pack": ("in.pack/pack.json", "biopsy-pack/1", ("inspect", "in.pack")),
    "run": ("in.run/run.json", "biopsy-run/1", EVALUATE),
    "classifier": ("in.run/classifier/classifier.json", "biopsy-classifier/1", EVALUATE),
    "metrics": ("in.run/evaluation/metrics.json", "biopsy-metrics/1", ("report", "in.run")),
}


def put(name: str, content: str | bytes, folder: Path) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def put_pipe(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def edit(name: str, old: str, new: str, folder: Path) -> None:
    text = (folder / name).read_text()
    assert old in text, f"{old} is not in {name}"
    (folder / name).write_text(text.replace(old, new, 1))


def set_keys(name: str, changes: dict, folder: Path) -> None:
    document = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(document))


def move_patch(folder: Path) -> None:
    path = folder / "in.run" / "split.csv"
    path.write_text(path.read_text().replace(",train", ",test", 1))


INPUTS = [
    Input(
        f"{kind}_{trick}",
        partial(put, file, json.dumps({"format": format}) if trick == "format_only" else content),
        words,
    )
    for kind, (file, format, words) in DOCUMENTS.items()
    for trick, content in BROKEN.items()
]
INPUTS += [
    Input(f"{kind}_edited_{key}", partial(set_keys, DOCUMENTS[kind][0], {key: value}), DOCUMENTS[kind][2])
    for kind, key, value in (
        ("pack", "class_names", ["idc", "idc"]),
        ("pack", "positive_class", "nobody"),
        ("pack", "patch_px", 10**9),
        ("pack", "mpp", float("nan")),
        ("run", "seed", 77),
        ("run", "status", "running"),
        ("run", "threshold", {"value": 0.0001, "rule": "youden", "chosen_on": "validation"}),
        ("classifier", "class_names", ["idc", "non_idc"]),
        ("classifier", "thresholds", [{"value": 0.0001, "rule": "youden", "chosen_on": "validation"}]),
        ("classifier", "calibrator", {"method": "isotonic", "prob": [0.1]}),
        ("classifier", "out_of_distribution", {"limits": {}}),
        ("metrics", "patch", {"auroc": {"value": 9.9}}),
    )
]
INPUTS += [  # a classifier apart from its run, whose hash of it would tell
    Input(
        f"classifier_apart_{trick}",
        partial(set_keys, DOCUMENTS["classifier"][0], changes),
        ("predict", "in.run/classifier", "in.pack", "--out", "p.csv"),
    )
    for trick, changes in {
        "positive": {"positive_class": "nobody"},
        "thresholds": {"thresholds": [{"rule": "youden"}]},
        "calibrator_in_part": {"calibrator": {"method": "platt", "slope": 1.0}},
        "conformal_texts": {"conformal": {"alpha": "x", "quantiles": ["a", "b"]}},
        "conformal_in_part": {"conformal": {"alpha": 0.1}},
        "limits_in_part": {"out_of_distribution": {"limits": {"feature": 1.0}}},
        "limits_of_none": {"out_of_distribution": {}},
    }.items()
]
INPUTS += [
    Input("run_split_altered", move_patch, EVALUATE),
    Input("run_split_nul", partial(put, "in.run/split.csv", b"\0\x82" * 50), EVALUATE),
    Input("run_recipe_altered", partial(edit, "in.run/recipe.toml", "lr = ", "lr = 1"), EVALUATE),
    Input("run_is_pipe", partial(put_pipe, "in.run/run.json"), EVALUATE),
    Input("pack_is_pipe", partial(put_pipe, "in.pack/pack.json"), ("inspect", "in.pack")),
]
INPUTS += [
    Input(f"ledger_{trick}", partial(put, "in.pack/ledger.jsonl", content + b"\n"), EVALUATE, (0,))
    for trick, content in {
        "deep": DEEP.encode(),
        "digits": DIGITS.encode(),
        "bytes": b"\xff\xfe\0",
        "half_a_line": b'{"run": "a", "spl',
        "types": b'{"run": [1], "split": 3, "fold": "x", "subset": null, "kept_with": "pack"}',
    }.items()
]
TRAIN = ("train", "r.toml", "--data", "in.pack")
INPUTS += [
    Input(f"toml_{trick}", partial(put, "r.toml", content), TRAIN)
    for trick, content in {
        "deep": "a = " + DEEP,
        "deep_800": "a = " + "[" * 800 + "]" * 800,
        "digits": f"a = {DIGITS}",
        "dotted": "a." * 9000 + "a = 1",
        "inf": "[train]\nlr = inf",
        "empty": "",
        "bytes": b"\xff\xfe",
        "large": "# " + "x" * 10**6,
    }.items()
]
INPUTS += [
    Input(
        f"toml_set_{trick}",
        lambda folder: None,
        ("train", "idc-small", "--data", "in.pack", "--set", f"train.lr={value}"),
    )
    for trick, value in {"deep": "[" * 5000, "digits": DIGITS, "nan": "nan", "table": "{a = {b = 1}}"}.items()
]
