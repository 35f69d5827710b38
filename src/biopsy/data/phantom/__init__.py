"""Synthetic H&E breast tissue: an embedded cohort for demos, tests and checks against a known truth.

``noise`` gives random fields and points that do not depend on where a picture is cut, ``looks`` how a patient's
slide was stained and scanned, ``anatomy`` where tissue, fat, tumour and glands lie (micrometres), ``tissue`` how
much stain lies at every point of a region, ``slides`` a slide as pixels, ``cohort`` the patches in IDC's layout.
Numpy, scipy and OpenCV only.
"""
