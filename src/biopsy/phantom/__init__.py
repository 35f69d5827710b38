"""Synthetic H&E breast tissue: an embedded cohort for demos, tests and checks against a known truth.

``noise`` gives random fields and points, wherever a picture is cut; ``habits`` what sets a patient's tissue
apart, ``looks`` how the slide was stained and scanned; ``anatomy`` where tissue, fat and tumour lie, with
``glands``, in micrometres; ``tissue`` how much stain lies at every point of one of its ``regions``, with
``fat``, ``cells`` and ``stamps``; ``slides`` a slide as pixels; ``whole_slides`` one as a pyramidal TIFF with
its outlines; ``cohort`` patches in IDC's layout.
"""
