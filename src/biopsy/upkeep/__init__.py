"""The tool about itself: what is shipped (``catalogue``), and the main job on an embedded cohort (``demo``).

May use every room but the command line.
"""
