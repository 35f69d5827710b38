"""What is named as slides: the endings that count are the same for maps and for packs."""

import pytest

from biopsy.core.errors import DataError
from biopsy.data.archives import open_archive
from biopsy.data.datasets import annotated_slides
from biopsy.imaging.backends import SLIDE_SUFFIXES
from biopsy.slides.sources import list_sources
from conftest import draw_slide
from dicom_files import write_dicom


@pytest.mark.parametrize("suffix", SLIDE_SUFFIXES)
def test_a_slide_to_be_mapped_is_one_to_be_cut(tmp_path, suffix):
    (tmp_path / f"case{suffix.upper()}").touch()
    (tmp_path / "case.geojson").touch()
    (tmp_path / "notes.txt").touch()
    assert [source.name for source in list_sources([tmp_path], None)] == ["case"]
    assert annotated_slides.recognise(open_archive(tmp_path))


def test_a_folder_without_slides_is_refused_with_what_is_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no slide: files ending in \.png .*\.svs .*\.czi"):
        list_sources([tmp_path], None)


def test_a_dicom_series_is_one_slide(tmp_path):
    folder = write_dicom(tmp_path / "series", draw_slide(120, 80, seed=0), mpp=1.0).parent
    (folder / "broken.dcm").write_bytes(b"no DICOM")
    assert len(list(folder.glob("level-*.dcm"))) == 2
    assert [source.path.name for source in list_sources([folder], None)] == ["broken.dcm", "level-0.dcm"]
