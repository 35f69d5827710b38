"""Synthetic H&E breast tissue (phantoms) for demos, tests and checks against a known ground truth.

``noise`` has random fields and points; ``patients`` traits, stain and scanner of a patient; ``anatomy`` the
layout of tissue, fat and tumour, and ``glands`` of glands and vessels, in micrometres; ``region`` and
``tissue`` the amount of stain at every point, with ``cells``; ``slides`` slides as pixels and as pyramidal
TIFF with outlines; ``cohort`` patches in the layout of IDC.
"""
