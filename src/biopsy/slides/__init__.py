"""Slides: a classifier drawn on whole slides, and what QuPath opens.

``grids`` (where patches lie), ``inference`` (slides in, probabilities out, reading ahead), ``maps`` (the
`SlideMap`), ``regions`` (cells above a threshold as polygons), ``geojson`` (for QuPath), ``summaries``
(numbers of one slide), ``stitching`` (packs that know coordinates become slides again), ``outputs`` (the
files of one slide) and ``cohorts`` (many slides, one after another, safe to interrupt).

A new output of a slide is one function of a `SlideMap` and one line in ``outputs``.
"""
