"""Files of annotations that people or programs got wrong, or that were made to do harm.

`INPUTS` names each, with a function that puts it beside (or apart from) a slide in a folder and returns the
arguments of ``biopsy prepare`` that are particular to it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

INPUTS: dict[str, Callable[[Path], list[str]]] = {}

SQUARE = [[300, 250], [700, 250], [700, 650], [300, 650], [300, 250]]
REGION = [[250, 200], [1250, 200], [1250, 1000], [250, 1000], [250, 200]]


def feature(coordinates, name="Tumor", kind="Polygon", **properties):
    about = {"objectType": "annotation", "classification": {"name": name}, **properties}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": about}


def collection(*features):
    whole = (feature([REGION], "Region*"), feature([SQUARE]), *features)
    return json.dumps({"type": "FeatureCollection", "features": whole})


def star(n, seed=0):
    ring = np.random.default_rng(seed).integers(300, 900, (n, 2)).tolist()
    return [*ring, ring[0]]


def strip(number):
    """Return a thin triangle that crosses most others."""
    top, bottom = 300 + number * 7 % 400, 301 + number % 390
    return [[top, 250], [bottom, 650], [bottom + 1, 650], [top, 250]]


def geojson(name):
    """Register what gives the text of ``case.geojson``."""

    def register(make):
        def put(folder):
            content = make()
            content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            (folder / "case.geojson").write_bytes(content)
            return []

        INPUTS[f"geojson_{name}"] = put
        return make

    return register


def xml(name, suffix=".xml"):
    """Register what gives the text of a file that ``--annotations`` names."""

    def register(make):
        def put(folder):
            path = folder.parent / f"case{suffix}"
            content = make()
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return ["--annotations", str(path)]

        INPUTS[f"xml_{name}"] = put
        return make

    return register


def _nest(depth):
    inner = "[]"
    text = '{"type":"Feature","geometry":null,"properties":{"childObjects":[' * depth
    return f"[{text}{inner}{']}}' * depth}]"


for _name, _features in {
    "4d": [feature([[[300, 250, 1, 2], [700, 250, 1, 2], [700, 650, 1, 2], [300, 250, 1, 2]]])],
    "mixed_dimensions": [feature([[[300, 250], [700, 250, 5], [700, 650], [300, 250]]])],
    "one_dimension": [feature([[[1], [2], [3], [1]]])],
    "not_a_number": [feature([[[float("nan"), 0], [1, 0], [1, 1], [0, 0]]])],
    "infinite": [feature([[[0, 0], [float("inf"), 0], [1, 1], [0, 0]]])],
    "far": [feature([[[0, 0], [1e300, 0], [1, 1], [0, 0]]])],
    "beyond_64_bits": [feature([[[0, 0], [10**30, 0], [1, 1], [0, 0]]])],
    "texts": [feature([[["0", "0"], ["1", "0"], ["1", "1"], ["0", "0"]]])],
    "booleans": [feature([[[True, True], [False, True], [True, False], [True, True]]])],
    "unclosed": [feature([SQUARE[:-1]])],
    "one_point": [feature([[[5, 5]] * 1000])],
    "line": [feature([[[300, 300], [400, 400], [500, 500], [300, 300]]])],
    "no_rings": [feature([])],
    "null_rings": [feature(None)],
    "object_rings": [feature({"a": SQUARE})],
    "self_crossing_1500": [feature([star(1500)])],
    "self_crossing_50000": [feature([star(50_000)])],
    "self_crossing_many": [feature([star(60, seed)]) for seed in range(400)],
    "holes_100000": [feature([SQUARE, *[[[400, 400], [401, 400], [401, 401], [400, 400]]] * 100_000])],
    "hole_outside": [feature([SQUARE, [[800, 800], [900, 800], [900, 900], [800, 800]]])],
    "strips_2000": [feature([strip(number)]) for number in range(2000)],
    "class_is_list": [feature([SQUARE], classification=[["Tumor"]])],
    "class_is_number": [feature([SQUARE], classification=3)],
    "class_is_long": [feature([SQUARE], name="T" * 1_000_000)],
    "class_of_controls": [feature([SQUARE], name="T\0u\x1bmor")],
    "class_no_text": [feature([SQUARE], name="T\ud800")],
    "children_are_text": [feature([SQUARE], childObjects="none")],
    "features_are_numbers": [1, 2, None],
    "unknown_geometry": [feature([SQUARE], kind="CircularString")],
    "outside": [feature([[[9e5, 9e5], [9.1e5, 9e5], [9e5, 9.1e5], [9e5, 9e5]]])],
}.items():  # fmt: skip
    geojson(_name)(lambda features=_features: collection(*features))

for _name, _text in {
    "deep_arrays": "[" * 200_000,
    "deep_children": _nest(20_000),
    "deep_collections": '{"type":"GeometryCollection","geometries":[' * 20_000,
    "digits_5000": collection().replace("300", "3" * 5000, 1),
    "cut_short": collection()[:-20],
    "empty": "",
    "null": "null",
    "latin_1": collection(feature([SQUARE], name="T\xfcmor")).encode().replace(rb"\u00fc", b"\xfc"),
    "utf_16": collection().encode("utf-16"),
    "numbers_10_million": "[" + "1," * 10_000_000 + "1]",
    "too_large": b" " * 135_000_000,
}.items():
    geojson(_name)(lambda text=_text: text)


def _pipe(folder):
    os.mkfifo(folder / "case.geojson")
    return []


def _named_pipe(folder):
    os.mkfifo(folder.parent / "case.xml")
    return ["--annotations", str(folder.parent / "case.xml")]


def _loop(folder):
    (folder / "case.geojson").symlink_to("case.geojson")
    return []


INPUTS |= {"geojson_pipe": _pipe, "xml_pipe": _named_pipe, "geojson_loop": _loop}

_HALO = '<Annotations><Annotation Name="Tumor"><Regions><Region Type="Polygon"><Vertices>{}</Vertices></Region></Regions></Annotation></Annotations>'  # noqa: E501
_ASAP = '<ASAP_Annotations><Annotations><Annotation PartOfGroup="Tumor" Type="Polygon"><Coordinates>{}</Coordinates></Annotation></Annotations></ASAP_Annotations>'  # noqa: E501


def _vertices(points):
    return "".join(f'<V X="{x}" Y="{y}"/>' for x, y in points)


_TWICE = ['<!ENTITY a0 "ha">', *(f'<!ENTITY a{n} "&a{n - 1};&a{n - 1};">' for n in range(1, 40))]
_LAUGHS = "".join(_TWICE)

for _name, _text in {
    "laughs": f"<!DOCTYPE x [{_LAUGHS}]><Annotations>&a39;</Annotations>",
    "outer_entity": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><Annotations>&e;</Annotations>',
    "remote_dtd": '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><Annotations/>',
    "deep": "<a>" * 300_000 + "</a>" * 300_000,
    "attributes_million": lambda: "<Annotations " + " ".join(f'a{n}="1"' for n in range(300_000)) + "/>",
    "cut_short": _HALO.format(_vertices(SQUARE))[:-30],
    "not_a_number": _HALO.format(_vertices([("nan", "nan"), *SQUARE])),
    "no_numbers": _HALO.format('<V X="1"/>' * 5),
    "self_crossing": _HALO.format(_vertices(star(1500))),
    "order_of_digits": _ASAP.format('<Coordinate Order="{}" X="1" Y="1"/>'.format("9" * 100_000) * 5),
    "no_region": "<Annotations/>",
    "other": "<html/>",
    "bytes": bytes(range(256)) * 100,
    "too_large": lambda: b"<Annotations>" + b" " * 70_000_000 + b"</Annotations>",
}.items():
    xml(_name)(_text if callable(_text) else lambda text=_text: text)
