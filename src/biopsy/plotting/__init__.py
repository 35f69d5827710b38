"""Shared figures, as functions from arrays to a matplotlib ``Figure``.

``style`` has the common style and export to SVG, PNG and JPEG; ``patches`` and ``slides`` have figures shared
by several features. Figures have the width of a phone, so that a page can show two side by side on a laptop.
pyplot is not used.

To add a figure, write a function ``draw_<name>(arrays, *, ...) -> Figure`` decorated with ``@styled``.
"""
