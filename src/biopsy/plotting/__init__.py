"""Figures: arrays in, a matplotlib ``Figure`` out.

``style`` is the one look of all figures; ``patches`` and ``slides`` draw what several features show, and each
feature keeps its own figures. A figure is about as wide as a phone, so that a page can put two side by side
on a laptop and one under the other on a phone without its text growing small. Nothing here touches pyplot,
files or a screen: ``style.svg`` and ``style.png`` turn a figure into text or bytes.

To add a figure, write a function ``draw_<what>(arrays, *, ...) -> Figure`` decorated with ``@styled`` in the
module of its theme, and test the data that stand in its axes.
"""
