"""Csv tables that are damaged, contradict the data or were made to do harm: `INPUTS` by name.

Each gives the option of ``biopsy prepare`` that reads the table and its content, for the sixteen patches of
class folders ``benign`` and ``malignant``, two each of P01 to P04: ``benign/P01_0`` and so on.
"""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

INPUTS: dict[str, tuple[str, bytes | Callable[[Path], None]]] = {}
ACCEPTED = {
    "patients_spaces", "patients_numbers_with_points", "patients_named_na", "patients_semicolons",
    "patients_gap", "patients_one_cell_of_30_mb",
    "patients_formulas", "patients_unicode", "labels_new_classes", "join_numbers_beyond_64_bits",
    "patients_rows_of_nobody", "join_nan_and_infinity", "patients_gzipped", "patients_quoted_lines",
}  # fmt: skip

KEYS = [
    f"{name}/P0{patient}_{n}" for patient in (1, 2, 3, 4) for name in ("benign", "malignant") for n in (0, 1)
]


def rows(head="patch_id,patient_id", value=lambda key: key.split("/")[1][:3]):
    return head + "\n" + "".join(f"{key},{value(key)}\n" for key in KEYS)


def add(name, option, content):
    INPUTS[name] = (option, content.encode() if isinstance(content, str) else content)


def write_cells(path):
    path.write_text(rows() + "\n" + "," * 60_000_000)


def write_long_cell(path):
    path.write_text(rows().replace("P02", "x" * (30 * 2**20), 1))


def write_bomb(path):
    path.write_bytes(gzip.compress(bytes(2**29)))


TABLES = {
    "empty": "",
    "only_a_heading": "patch_id,patient_id\n",
    "no_heading": "".join(f"{key},P\n" for key in KEYS),
    "columns_twice": rows("patch_id,patient_id,patient_id")
    .replace("\n", ",1\n")
    .replace("id,1\n", "id\n", 1),
    "columns_twice_by_alias": rows("patch_id,patient_id,Patient")
    .replace("\n", ",1\n")
    .replace("nt,1\n", "nt\n", 1),
    "columns_twice_but_for_a_space": rows("patch_id,patient_id, patient_id")
    .replace("\n", ",1\n")
    .replace("id,1\n", "id\n", 1),
    "rows_of_nothing": "patch_id,patient_id\nnobody,P01\n",
    "keys_twice": rows() + f"{KEYS[0]},P09\n",
    "keys_twice_but_for_a_space": rows() + f"{KEYS[0]} ,P09\n",
    "key_missing": rows() + ",P09\n",
    "ragged": rows() + "a,b,c,d\n",
    "short_row": rows() + "a\n",
    "quote_never_closed": rows() + 'a,"b\n',
    "nul": rows().replace("P02", "P\0"),
    "latin_1": rows().replace("P02", "M\u00fcller").encode("latin-1"),
    "utf_16": rows().encode("utf-16"),
    "columns_a_million": "patch_id,patient_id" + ",x" * 10**6 + "\n",
    "columns_a_million_empty": "," * 10**6 + "\n" + "," * 10**6 + "\n",
    "cells_60_million": write_cells,
    "one_cell_of_30_mb": write_long_cell,
    "spaces_only": " \n \n",
    "html": "<html><body>404</body></html>",
    "zip": b"PK\x03\x04" + bytes(500),
    "gzip_damaged": gzip.compress(rows().encode())[:-9],
    "gzip_bomb": write_bomb,
    "slides_of_two_patients": "patch_id,slide_id,patient_id\n" + "".join(f"{k},S,{k[-4:-2]}\n" for k in KEYS),
    "spaces": rows().replace("P02\n", " P02\u00a0\n"),
    "numbers_with_points": rows(value=lambda key: key[-3] + (".0" if key[-1] == "1" else "")),
    "named_na": rows().replace(",P02", ",NA").replace(",P03", ",None"),
    "semicolons": rows().replace(",", ";"),
    "gap": rows().replace(",P01", ",", 1),
    "formulas": rows().replace(",P02", ",=1+1"),
    "unicode": rows().replace(",P02", ",Mu\u0308ller", 1).replace(",P02", ",M\u00fcller"),
    "rows_of_nobody": rows() + "nobody,P05\n",
    "gzipped": gzip.compress(rows().encode()),
    "quoted_lines": rows().replace(",P02", ',"P\n02"'),
}
for _name, _content in TABLES.items():
    add(f"patients_{_name}", "--patients", _content)
for _name in (
    "columns_twice",
    "columns_twice_but_for_a_space",
    "rows_of_nothing",
    "nul",
    "quote_never_closed",
    "columns_a_million",
):
    _table = str(TABLES[_name])
    add(f"labels_{_name}", "--labels", _table.replace("patient_id", "label"))
    add(f"join_{_name}", "--join", _table.replace("patient_id", "age"))
for _label in ("Benign", "malignnt", "", "7", "9" * 5000):
    add(f"labels_{_label[:9] or 'empty'}", "--labels", f"patch_id,label\n{KEYS[0]},{_label}\n")
add("labels_new_classes", "--labels", rows("patch_id,label", lambda key: "grade " + key[-3]))
add("labels_decisions_of_nobody", "--labels", "patch_id,label,decision\nbenign/P01_0,benign,maybe\n")
add("join_reserved", "--join", rows("patch_id,target"))
add("join_reserved_case", "--join", rows("patch_id,sha256"))
add("join_numbers_beyond_64_bits", "--join", rows("patch_id,n", lambda key: "9" * 400))
add("join_nan_and_infinity", "--join", rows("patch_id,n", lambda key: "1e999" if key[-1] == "1" else "nan"))


def _make(name):
    def register(make):
        INPUTS[name] = ("--patients", make)
        return make

    return register


@_make("patients_pipe")
def _(path):
    os.mkfifo(path)


@_make("patients_folder")
def _(path):
    path.mkdir()


@_make("patients_link_in_a_circle")
def _(path):
    path.symlink_to(path)


@_make("patients_endless_device")
def _(path):
    path.symlink_to("/dev/zero")


OTHERS = {
    "missing": "absent.csv",
    "address": "http://127.0.0.1:9/patients.csv",
    "ftp_address": "ftp://127.0.0.1/patients.csv.gz",
    "pattern_unclosed": "(P[0-9",
    "pattern_of_nobody": "(zzz)",
    "pattern_without_group": "P[0-9]+",
}
"""Values of ``--patients`` that are no files."""
