"""Judging: how good a run is, on patients it has not seen.

``evaluation`` writes the numbers of a run with their intervals and notes each opening of a test side,
``baseline`` says what colour alone would reach, ``subgroups`` repeats the numbers within joined columns.
May use learning and all rooms above it. To add a question to every evaluation, give it a module here and an
entry in `evaluation.evaluate`.
"""
