"""Data: packs of labelled patches, splits, audits and tables of predictions, with numpy and pandas.

``archives`` reads zips and folders, ``datasets/`` recognises layouts, ``download`` fetches data sets.
``prepare`` adds the user's ``tables`` and writes a `packs.Pack` by ``packing``; ``building`` makes packs of
arrays, tables of files and data sets. ``protocols``
and ``splits`` divide a pack, ``audit`` checks it, ``predictions`` is the table of all reported numbers.
"""
