"""Tests of published hypotheses about what networks rely on."""
