"""Leica SCN files as OpenSlide reads them: what was scanned lies somewhere on a larger slide."""

from pathlib import Path

import numpy as np
import tifffile

_IMAGE = (
    '<image name="{name}" uuid="{name}"><creationDate>2012-01-01T00:00:00Z</creationDate>'
    '<device model="Leica SCN400" version="1"/><pixels sizeX="{width}" sizeY="{height}">'
    '<dimension sizeX="{width}" sizeY="{height}" r="0" ifd="{page}"/></pixels>'
    '<view sizeX="{nm_x}" sizeY="{nm_y}" offsetX="{left}" offsetY="{top}" spacingZ="0"/><scanSettings>'
    "<objectiveSettings><objective>{objective}</objective></objectiveSettings><illuminationSettings>"
    "<numericalAperture>0.1</numericalAperture><illuminationSource>brightfield</illuminationSource>"
    "</illuminationSettings></scanSettings></image>"
)


def write_scn(
    path: Path, image: np.ndarray, *, corner: tuple[int, int], size: tuple[int, int], mpp: float
) -> Path:
    """Write an image that lies at ``corner`` of a slide of ``size`` pixels."""
    nm = round(mpp * 1000)
    height, width = image.shape[:2]
    macro = _IMAGE.format(
        name="macro", width=125, height=100, page=0, nm_x=size[0] * nm, nm_y=size[1] * nm, left=0, top=0,
        objective=0.6,
    )  # fmt: skip
    main = _IMAGE.format(
        name="main", width=width, height=height, page=1, nm_x=width * nm, nm_y=height * nm,
        left=corner[0] * nm, top=corner[1] * nm, objective=10 / mpp,
    )  # fmt: skip
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="u" sizeX="{size[0] * nm}" sizeY="{size[1] * nm}">{macro}{main}'
        "</collection></scn>"
    )
    tiles = {"tile": (512, 512), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(np.full((100, 125, 3), 250, np.uint8), **tiles, description=xml, software="x")
        file.write(
            image,
            **tiles,
            compressionargs={"level": 98},
            resolution=(1e4 / mpp, 1e4 / mpp),
            resolutionunit="CENTIMETER",
        )
    return path
