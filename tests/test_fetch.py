"""Pretrained weights fetched by their tag, from a server on this machine."""

import hashlib
from dataclasses import replace

import pytest

from biopsy.core.errors import DataError, DownloadError, RecipeError
from biopsy.models import weights as fetching
from biopsy.models.fetch import fetch
from biopsy.models.weights import find_weights, locate
from local_server import BODY
from refusals import refuses


@pytest.fixture
def known(server, monkeypatch):
    """Let one tag mean the server's file."""
    url, _ = server
    weights = replace(
        find_weights("keras-vgg16"),
        file="data.bin",
        url=f"{url}/data.bin",
        digest=f"sha256:{hashlib.sha256(BODY).hexdigest()}",
    )
    monkeypatch.setattr(fetching, "find_weights", lambda tag: weights)
    return weights


def test_weights_come_once_and_are_found_by_their_tag(known, tmp_path, monkeypatch):
    result = fetch("weights:keras-vgg16", tmp_path)
    assert result.fetched == (tmp_path / "data.bin",)
    assert (tmp_path / "data.bin").read_bytes() == BODY
    monkeypatch.setenv("BIOPSY_WEIGHTS", str(tmp_path))
    assert locate(known) == tmp_path / "data.bin"
    assert fetch("weights:keras-vgg16", tmp_path).kept == (tmp_path / "data.bin",)


def test_another_file_than_was_published_is_refused(known, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "find_weights", lambda tag: replace(known, digest="sha256:00ff"))
    with refuses(DataError, "expected"):
        fetch("weights:keras-vgg16", tmp_path)


def test_a_licence_is_accepted_before_anything_is_fetched(known, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "find_weights", lambda tag: replace(known, licence="cc-by-nc-4.0"))
    with refuses(RecipeError, "--accept-licence cc-by-nc-4.0", reason="licence"):
        fetch("weights:keras-vgg16", tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_without_an_address_say_where_they_are(tmp_path):
    with refuses(DownloadError, "squeezenet_v1.1", "https://", reason="missing"):
        fetch("weights:keras-squeezenet1_1", tmp_path)


def test_an_unknown_tag_names_the_nearest(tmp_path):
    with refuses(RecipeError, "'keras-vgg16'"):
        fetch("weights:keras-vgg19", tmp_path)
