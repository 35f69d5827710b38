"""Pixels and where they come from.

``decode`` turns the bytes of an image file into RGB by stated rules; ``reader`` opens slides and large images
at a resolution that ``resolution`` lets pass, over ``backends`` and ``tiles``; ``tissue`` says where a slide
has any; ``pyramids`` writes large images; ``stain`` separates haematoxylin from eosin, ``colour`` and
``nuclei`` describe patches; ``mosaic`` puts them back where they lay on the slide; ``annotations`` reads and
writes outlines, ``shares`` says how much of a patch they cover. Arrays in, arrays out: nothing here knows
patients, classes or packs. To read another format, teach ``decode.read_header`` its size and mode, or write a
backend.
"""
