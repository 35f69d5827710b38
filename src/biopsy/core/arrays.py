"""Arrays with a document about them in one file, read back without executing anything: safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from biopsy.core.errors import DataError
from biopsy.core.files import plain, write_atomic
from biopsy.core.loaders import open_regular

_ABOUT = "about"


def write_arrays(path: Path | str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays and a JSON document about them, whole or not at all."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, save(whole, metadata={_ABOUT: json.dumps(plain(about), allow_nan=False)}))


def read_arrays(path: Path | str, *, format: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the document that `write_arrays` wrote.

    Raises:
        DataError: If the file is missing, damaged, or of another format.
    """
    try:
        open_regular(path).close()
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable as arrays ({error}): make it again") from None
    if not isinstance(about, dict) or about.get("format") != format:
        raise DataError(f"{path} is not of format {format!r}: make it again")
    return arrays, about
