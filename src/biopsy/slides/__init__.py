"""Classification of whole slides, with outputs for QuPath.

``grids`` (patches over the tissue), ``inference`` (logits of slides, with read-ahead), ``mapping`` (logits
to maps), ``maps`` (the `SlideMap`, its regions and GeoJSON), ``stitching`` (slides reassembled from packs),
``outputs`` (files and summary of one slide) and ``cohorts`` (many slides, resumable).

To add an output, register a function of a `MappedSlide` in ``outputs``.
"""
