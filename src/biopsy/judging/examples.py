"""Patches with maps of what a network looks at, as records, and the sheet that is drawn of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.figures.overlays import Overlay, draw_overlays
from biopsy.figures.style import shorten


@dataclass(frozen=True)
class Illustration:
    """The maps of one method, ready to be drawn.

    Attributes:
        method: Name of the method.
        layer: The layer it looked at, or None.
        titles: Of each map of a patch.
        maps: For each example values ``(n_maps, height, width)`` in 0-1, with a sign in -1 to 1.
        caption: What a map shows and what it does not, for a reader.
        signed: Whether values below 0 speak against the class.
    """

    method: str
    layer: str | None
    titles: list[str]
    maps: list[np.ndarray]
    caption: str
    signed: bool = False


@dataclass(frozen=True)
class Explained:
    """Examples with their illustrations.

    Attributes:
        examples: One row each: ``patch_id``, ``side`` (empty outside a run), ``class`` (empty where it is
            not known), ``called``, ``prob`` (of the positive class; of more than two classes that of the
            called one) and ``kind``: missed, false alarm, wrong, right, or unlabelled.
        patches: uint8 ``(height, width, 3)`` at their true sizes.
        illustrations: One a method.
    """

    examples: pd.DataFrame
    patches: list[np.ndarray]
    illustrations: list[Illustration]


def draw_sheet(explained: Explained, chosen: Sequence[int], parts: Sequence[Illustration]) -> Figure:
    """Draw some of the examples, by their places, with the maps of one or more methods beside each."""
    rows = []
    for place in chosen:
        example = explained.examples.iloc[place]
        name = shorten(example["patch_id"], 32)
        true = f": {example['class']}" if example["class"] else ""
        label = f"{example['kind']}{true}, p {example['prob']:.2f}, patch {name}"
        maps = np.concatenate([part.maps[place] for part in parts])
        rows.append(Overlay(label, explained.patches[place], maps))
    titles = [title for part in parts for title in part.titles]
    return draw_overlays(rows, titles, [part.signed for part in parts for _ in part.titles])
