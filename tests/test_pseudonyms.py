"""Ids become numbers everywhere, consistently, in an order that tells nothing."""

import re
import shlex

import numpy as np
import pandas as pd

from biopsy.reporting.pseudonyms import Pseudonymizer


def test_alias_numbers_do_not_follow_the_order_of_ids():
    names = [f"patient{i:03d}" for i in range(50)]
    pseudonymizer = Pseudonymizer({"patient": names})
    numbers = [int(pseudonymizer.of("patient", name)) for name in names]
    assert sorted(numbers) == list(range(1, 51))
    assert abs(np.corrcoef(numbers, range(50))[0, 1]) < 0.5
    again = Pseudonymizer({"patient": names[::-1]})
    assert [int(again.of("patient", name)) for name in names] == numbers


def test_aliases_reach_text_paths_nested_records_and_tables():
    ids = {
        "patient": ["8863", "8865", "7"],
        "slide": ["8863"],
        "patch": ["8863_x1_y51.png", "abc"],
        "other": ["z"],
    }
    pseudonymizer = Pseudonymizer(ids)
    number_of = {name: pseudonymizer.of("patient", name) for name in ids["patient"]}
    text = pseudonymizer.text("/data/ann/8863/8863_x1_y51.png, 8865-b and 88650 of 8,863; 7 epochs")
    assert text.startswith(
        f"patch-{pseudonymizer.of('patch', '8863_x1_y51.png')}, patient-{number_of['8865']}-b and 88650"
    )
    assert text.endswith("of 8,863; 7 epochs")
    nested = pseudonymizer.nested({"8865": [{"who": "8865", "n": 8865}], "path": r"C:\ann\8865.zip"})
    assert nested == {
        f"patient-{number_of['8865']}": [{"who": f"patient-{number_of['8865']}", "n": 8865}],
        "path": f"patient-{number_of['8865']}.zip",
    }
    table = pd.DataFrame(
        {"patient_id": ["8865", "8863", None], "fold": [8865, 8863, 8863], "prob": [0.1, 0.2, 0.3]}
    )
    hidden = pseudonymizer.table(table)
    assert dict(zip(hidden["prob"], hidden["patient_id"], strict=True))[0.1] == number_of["8865"]
    assert hidden["patient_id"].isna().sum() == 1 and hidden["fold"].str.contains("patient-").all()
    assert pseudonymizer.original("patient", number_of["7"]) == "7"


def test_ids_with_blanks_slashes_and_quotes_leave_no_part_behind():
    ids = {"patient": ["Anna' x", "P5<y", "a/2277", "Eva Maria Berg"], "slide": ["/mnt/b 12/s.svs"]}
    pseudonymizer = Pseudonymizer(ids)
    for name in [*ids["patient"], *ids["slide"]]:
        for text in (
            f"biopsy split x.pack --test-patients {shlex.quote(name)} --seed 3",
            f"biopsy split x.pack --test-patients={name}",
            f"--data /home/ann/{name}/x.pack",
            f"patient {name}, of 5",
            name,
        ):
            hidden = pseudonymizer.text(text)
            for part in re.split(r"[^A-Za-z0-9]", name):
                assert len(part) < 3 or part in ("mnt", "svs") or part not in hidden, (text, hidden)
    quoted = pseudonymizer.text("train --patients 'who knows.csv' --seed 3")
    assert quoted == "train --patients (hidden) --seed 3"
    assert pseudonymizer.text("--patients who.csv --seed 3") == "--patients (hidden) --seed 3"
