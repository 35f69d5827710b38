"""Pixels and where they come from.

``decode`` turns the bytes of an image file into RGB by stated rules; ``stain`` separates haematoxylin from
eosin; ``mosaic`` puts patches back where they lay on the slide. Arrays in, arrays out: nothing here knows
patients, classes or packs. To read another format, teach ``decode.read_header`` its size and mode.
"""
