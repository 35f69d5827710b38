"""Mutations of small valid files, for `fuzz.py`: of bytes, of tokens of text, and of the parts of a format.

`mutate` returns a mutated copy of a file's content. Around a mutated part of a format, lengths, checksums
and, often, the hash that a document holds of itself are made anew, so that it gets past the first check.
"""

import contextlib
import hashlib
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from biopsy.core.files import SEAL

DEEP, DIGITS = "@@deep@@", "@@digits@@"  # texts that stand for what no JSON writer gives
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 65536, 10**9, 2**31, 2**63, -(2**63) - 1, 10**30),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "NaN",
        "1",
        "1e999",
        "a\0b",
        "../../up",
        "/etc/passwd",
        "\ud800",
        "ä" * 300,
        "=1+1",
        "\n",
    ),
    *([], {}, [[]], [1, 2], [None], {"a": 1}, [[0, 0], [1, 1]], DEEP, DIGITS),
)
WORDS = (
    *("0", "-1", "1", "99999999999999999999", "1e308", "1e999", "NaN", "inf", "-0", "0x10", "7" * 5000),
    *("", '"', "'", ",", ";", "\t", "\n", "\r", "\0", "[", "]", "{", "}", "<", ">", "&", "=", "\\", "#", "%"),
    *("[" * 3000, "{" * 3000, '{"a":' * 2000, "<a>" * 2000, "true", "null", "None", "ä", "\ud83d", "\ufeff"),
    *("../..", "/etc/passwd", "C:\\x", "A" * 70_000, "<!DOCTYPE a [<!ENTITY b 'c'>]>", "=1+1", "é" * 300),
)  # fmt: skip
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+]?\d[\w.+-]*|\w+|\s+|.', re.DOTALL)
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(name: str, content: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Return a mutated copy of a file's content, and whether its own hash was made anew.

    Args:
        name: The file's name; its suffix says of what format it is.
        content: What the file holds.
        rng: Draws the mutation.
    """
    kinds = _KINDS.get(PurePath(name).suffix.lower(), ())
    kind = rng.choice((mutate_bytes, *kinds, *kinds))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        try:
            content = kind(content, rng)
        except Exception:  # what was mutated before may be of no format any more
            content = mutate_bytes(content, rng)
    resealed = kind is mutate_json and rng.random() < 0.7
    return (reseal(content) if resealed else content), resealed


def reseal(content: bytes) -> bytes:
    """Return a JSON document with the hash of what it holds now."""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(content)
        if isinstance(document, dict) and SEAL in document:
            document.pop(SEAL)
            text = json.dumps(document, sort_keys=True, separators=(",", ":"))
            document[SEAL] = hashlib.sha256(text.encode()).hexdigest()
            return json.dumps(document).encode()
    return content


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, remove, repeat or move bytes."""
    data, n = bytearray(content), len(content)
    start = rng.randint(0, n)
    if rng.random() < 0.3:  # most headers lie at the start, some at the end
        start = min(n, rng.choice((rng.randint(0, 64), max(0, n - rng.randint(0, 64)))))
    length = min(n - start, int(2 ** rng.uniform(0, 10)))
    part = data[start : start + length]
    match rng.randrange(8):
        case 0 if start < n:
            data[start] ^= 1 << rng.randrange(8)
        case 1 if start < n:
            data[start] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord("-"), ord('"'), ord("\n")))
        case 2:
            data[start : start + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(_NUMBERS))
        case 3:
            data[start:start] = rng.randbytes(rng.randint(1, 16))
        case 4:
            del data[start : start + length]
        case 5:
            data[start:start] = part * rng.choice((1, 1, 2, 50))
        case 6:
            del data[start:]
        case _:
            del data[start : start + length]
            place = rng.randint(0, len(data))
            data[place:place] = part
    return bytes(data)


def mutate_text(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove, repeat, insert or exchange tokens of text, or repeat or remove a line."""
    if rng.random() < 0.15:
        lines = content.splitlines(keepends=True)
        index = rng.randrange(len(lines))
        lines[index : index + 1] = [] if rng.random() < 0.4 else [lines[index]] * rng.choice((2, 2, 1000))
        return b"".join(lines)
    tokens = _TOKEN.findall(content.decode("utf-8", "surrogateescape"))
    index, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    match rng.randrange(6):
        case 0:
            del tokens[index : index + rng.choice((1, 1, 5))]
        case 1:
            tokens[index:index] = tokens[index : index + rng.choice((1, 5, 20))]
        case 2:
            tokens[index:index] = [rng.choice(WORDS)]
        case 3:
            tokens[index], tokens[other] = tokens[other], tokens[index]
        case _:
            tokens[index] = rng.choice(WORDS)
    return "".join(tokens).encode("utf-8", "surrogatepass" if rng.random() < 0.3 else "replace")


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or repeat a value of a JSON document, at any depth."""
    document = json.loads(content)
    places: list[tuple[Any, Any]] = []
    level = [document]
    while level:
        node = level.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        level += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not places or rng.random() < 0.02:
        return _dump(rng.choice(VALUES))
    node, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(("", "x", f"{key} ", "format", "\ud800"))] = node.pop(key)
        case 1:
            node.insert(key, node[key])
        case 2:
            node[key] = rng.choice(places)[0] if rng.random() < 0.5 else [node[key]]
        case _:
            node[key] = rng.choice(VALUES)
    try:
        return _dump(document)
    except ValueError:  # a node was put into itself
        return content.replace(b"}", b"", 1)


def _dump(document: Any) -> bytes:
    text = json.dumps(document).replace(json.dumps(DEEP), "[" * 2000 + "]" * 2000)
    return text.replace(json.dumps(DIGITS), "7" * 5000).encode()


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """Mutate one line of a file that holds a JSON document a line."""
    lines = content.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = mutate_json(lines[index], rng)
    return b"\n".join(lines) + b"\n"


def mutate_npy(content: bytes, rng: random.Random) -> bytes:
    """Mutate the header of an ``.npy`` file and keep its length true."""
    length = struct.unpack_from("<H", content, 8)[0]
    header = mutate_text(content[10 : 10 + length].rstrip() + b"\n", rng)
    return content[:8] + struct.pack("<H", min(len(header), 65535)) + header + content[10 + length :]


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Mutate the header of a safetensors file, or the JSON in its texts, and keep its length true."""
    length = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8 : 8 + length])
    texts = header.get("__metadata__", {})
    inside = [key for key, text in texts.items() if text.startswith("{")]
    if inside and rng.random() < 0.6:
        texts[inside[0]] = mutate_json(texts[inside[0]].encode(), rng).decode()
        packed = json.dumps(header).encode()
    else:
        packed = mutate_json(json.dumps(header).encode(), rng)
    return struct.pack("<Q", len(packed)) + packed + content[8 + length :]


def mutate_parquet(content: bytes, rng: random.Random) -> bytes:
    """Mutate a column, the rows or the metadata of a Parquet table."""
    table = pq.read_table(pa.BufferReader(content))
    metadata = dict(table.schema.metadata or {})
    name = rng.choice(table.column_names)
    frame = table.to_pandas()
    key = next((key for key in metadata if key.startswith(b"biopsy")), None)
    if key and rng.random() < 0.4:
        metadata[key] = mutate_json(metadata[key], rng)
    else:
        match rng.randrange(9):
            case 0:
                frame = frame.drop(columns=name)
            case 1:
                frame[name] = frame[name].astype(str)
            case 2:
                frame[name] = None
            case 3:
                frame[name] = rng.choice((np.nan, np.inf, -1, 10**18, 1e300, 0.5, "x", True, b"x"))
            case 4:
                frame = frame.iloc[: rng.randrange(len(frame))]
            case 5:
                frame = pd.concat([frame, frame.iloc[: rng.randint(1, len(frame))]])
            case 6:
                frame = frame.sample(frac=1, random_state=rng.randrange(2**31))
            case 7:
                frame = frame.rename(columns={name: rng.choice(("", "x", "prob_", "ä"))})
            case _:
                row = rng.randrange(len(frame))
                column = frame[name].astype(object)
                column.iloc[row] = rng.choice((None, *(value for value in column if value is not None)))
                frame[name] = column
    mutated = pa.Table.from_pandas(frame, preserve_index=False)
    sink = io.BytesIO()
    pq.write_table(mutated.replace_schema_metadata({**(mutated.schema.metadata or {}), **metadata}), sink)
    return sink.getvalue()


def mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """Mutate, remove, repeat or rename an entry of a zip, whose checksums hold."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = rng.randrange(len(entries))
    name, data = entries[index]
    match rng.randrange(5):
        case 0:
            del entries[index]
        case 1:
            entries.append((name, mutate_bytes(data, rng)))
        case 2:
            entries[index] = (mutate_text(name.encode(), rng).decode("utf-8", "replace")[:60_000], data)
        case _:
            entries[index] = (name, mutate(name, data, rng)[0])
    sink = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name.replace("\0", "_") or "x", data)
    return sink.getvalue()


def mutate_h5(content: bytes, rng: random.Random) -> bytes:
    """Mutate, remove, retype or reshape a dataset or attribute of an HDF5 file."""
    sink = io.BytesIO(content)
    with h5py.File(sink, "r+") as file:
        nodes: list[Any] = [file]
        file.visititems(lambda _, node: nodes.append(node))
        node = rng.choice(nodes)
        attributes = list(node.attrs)
        if attributes and rng.random() < 0.7:
            name = rng.choice(attributes)
            value = node.attrs.pop(name)
            if isinstance(value, str | bytes) and rng.random() < 0.7:
                text = value.encode() if isinstance(value, str) else value
                value = (mutate_json if text.startswith(b"{") else mutate_text)(text, rng)
            choices = (value, np.asarray(value).ravel()[:1], 5, "x", np.zeros((2, 2)), np.bytes_(b"\xff"))
            if rng.random() < 0.8:
                node.attrs[name] = value if rng.random() < 0.5 else choices[rng.randrange(len(choices))]
        elif node.name != "/":
            name, parent = node.name, node.parent
            value = node[()] if isinstance(node, h5py.Dataset) else None
            del file[name]
            match rng.randrange(6):
                case 0:
                    parent.create_group(name)
                case 1:
                    file[name] = rng.choice((5, "x", np.nan, np.zeros(0), np.zeros((1, 1, 1, 1, 1))))
                case 2:
                    file.create_dataset(name, shape=(10**6, 10**6), dtype="f4", chunks=(100, 100))
                case 3 if value is not None:
                    file[name] = np.full_like(value, rng.choice((0, 1)), dtype=rng.choice(("f8", "i8", "S3")))
                case 4:
                    file[name] = h5py.SoftLink(rng.choice(("/", name, "/nowhere")))
                case _:
                    pass
    return sink.getvalue()


Mutator = Callable[[bytes, random.Random], bytes]
_KINDS: dict[str, tuple[Mutator, ...]] = {
    ".json": (mutate_json, mutate_text),
    ".geojson": (mutate_json, mutate_text),
    ".jsonl": (mutate_lines, mutate_text),
    ".csv": (mutate_text,),
    ".txt": (mutate_text,),
    ".toml": (mutate_text,),
    ".xml": (mutate_text,),
    ".annotations": (mutate_text,),
    ".npy": (mutate_npy,),
    ".safetensors": (mutate_safetensors,),
    ".parquet": (mutate_parquet,),
    ".zip": (mutate_zip,),
    ".keras": (mutate_zip,),
    ".h5": (mutate_h5,),
}
