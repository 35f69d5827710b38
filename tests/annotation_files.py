"""Small annotation files of QuPath, ASAP, HALO and ImageScope."""

import json

from shapely import orient_polygons
from shapely.geometry import mapping


def element(name, *inside, **attributes):
    """Return an XML element; attributes are spelt as they are."""
    spelt = "".join(f' {key}="{value}"' for key, value in attributes.items())
    return f"<{name}{spelt}>{''.join(inside)}</{name}>"


def asap_annotation(group, corners, kind="Polygon"):
    """Return one annotation of ASAP."""
    places = [element("Coordinate", Order=n, X=x, Y=y) for n, (x, y) in enumerate(corners)]
    drawn = element("Coordinates", *places)
    return element("Annotation", drawn, Name="A 1", Type=kind, PartOfGroup=group, Color="#F4FA58")


def asap(*annotations):
    """Return a file of ``(group, corners[, type])``."""
    drawn = [asap_annotation(*annotation) for annotation in annotations]
    groups = element("AnnotationGroups", element("Group", Name="Tumor", PartOfGroup="None", Color="#64FE2E"))
    return element("ASAP_Annotations", element("Annotations", *drawn), groups)


def halo(*layers):
    """Return a file of ``(name, [(type, corners[, attributes]), ...])``."""
    plain = {"HasEndcaps": 0, "NegativeROA": 0}
    drawn = [
        element(
            "Annotation",
            element(
                "Regions",
                *(
                    element(
                        "Region",
                        element("Vertices", *(element("V", X=x, Y=y) for x, y in corners)),
                        Type=kind,
                        **(plain | (more[0] if more else {})),
                    )
                    for kind, corners, *more in regions
                ),
            ),
            Name=name,
            LineColor=65535,
        )
        for name, regions in layers
    ]
    return element("Annotations", *drawn)


def imagescope(*layers, mpp=0.25):
    """Return a file of ``(name, attribute, [(type, corners, hole[, text]), ...])``."""
    drawn = [
        element(
            "Annotation",
            element("Attributes", element("Attribute", Name=attribute, Id=0, Value="")),
            element(
                "Regions",
                *(
                    element(
                        "Region",
                        element("Vertices", *(element("Vertex", X=x, Y=y, Z=0) for x, y in corners)),
                        Type=kind,
                        NegativeROA=hole,
                        Text=text[0] if text else "",
                    )
                    for kind, corners, hole, *text in regions
                ),
            ),
            Id=number,
            Name=name,
            Type=4,
        )
        for number, (name, attribute, regions) in enumerate(layers, start=1)
    ]
    return element("Annotations", *drawn, MicronsPerPixel=mpp)


def write_annotations(path, annotations):
    """Write areas with their classes as QuPath does, outer rings counter-clockwise, and return the path."""
    features = [
        {
            "type": "Feature",
            "geometry": mapping(orient_polygons(area)),
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, area in annotations
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path
