"""Calibration: measured, drawn, reported, and fitted again."""
