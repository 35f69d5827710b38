"""Arrays with JSON metadata in a safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from biopsy.core.errors import FileFormatError
from biopsy.core.files import plain, write_atomic
from biopsy.core.loaders import parse_json, read_tensors

_ABOUT = "about"


def write_arrays(path: Path | str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, object]) -> None:
    """Write arrays and JSON metadata atomically."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, save(contiguous, metadata={_ABOUT: json.dumps(plain(metadata), allow_nan=False)}))


def read_arrays(path: Path | str, *, format: str) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return the arrays and metadata written by `write_arrays`.

    Raises:
        FileFormatError: If the file is missing, damaged, or of another format.
    """
    arrays, texts = read_tensors(path)
    metadata = parse_json(texts.get(_ABOUT, "null"), path)
    if not isinstance(metadata, dict) or metadata.get("format") != format:
        raise FileFormatError(path, "format", f"is not of format {format!r}: make it again")
    return arrays, metadata
