"""Judging: how good a run is, on patients it has not seen.

``evaluation`` writes the numbers of a run with their intervals and notes each opening of a test side,
``baseline`` says what colour alone would reach, ``subgroups`` repeats the numbers within joined columns.
``methods`` are ways to ask what a network looks at, ``explanation`` brings their maps to patches,
``illustration`` chooses patches and writes pictures (``examples`` are its records); ``properties`` measures
patches, ``colour`` takes colour out, and ``hypotheses`` puts numbers to what the posts guessed.
May use learning and all rooms above it. To add a question to every evaluation, give it a module here and an
entry in `evaluation.evaluate`.
"""
