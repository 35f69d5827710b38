"""Reading and writing of images, slides and annotations.

``images`` decodes image files to RGB; ``reader`` opens slides at a requested resolution (checked by
``resolution``) with ``backends``; ``tissue`` detects tissue; ``pyramids`` writes slides; ``stain`` separates
haematoxylin and eosin, and computes colour statistics and nuclei; ``mosaic`` reassembles slides of patches;
``annotations`` reads outlines, ``coverage`` measures how much of a patch they cover. Nothing here depends on
patients, classes or packs.
"""
