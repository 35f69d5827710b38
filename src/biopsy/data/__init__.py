"""Patches and who they belong to.

``archives`` reads a zip or a folder alike, ``datasets/`` knows the layouts, ``download`` fetches them;
``prepare`` brings in a user's ``tables`` and ``packing`` writes all into a `packs.Pack`; ``building`` makes
one of arrays, tables of files and data sets. ``cutting`` says where patches lie on annotated slides and
what they are. Everything after works from a pack: ``protocols`` divide it and ``splits`` keep that,
``audit`` looks for what would spoil a result, ``predictions`` is the table every number is computed from.
Numpy and pandas, no torch.
"""
