"""Patches and who they belong to.

``archives`` reads a zip or a folder alike, ``datasets/`` knows the layouts, ``packing`` writes what they hold
into a `packs.Pack` with the help of ``labels`` (corrections and folded classes) and ``columns`` (who is who,
joined csv files); ``cutting`` says where patches lie on annotated slides and what they are. Everything after
works from a pack: ``splits`` divides it, ``audit`` looks for what would spoil a result, ``predictions`` is
the table every number is computed from. Numpy and pandas, no torch.
"""
