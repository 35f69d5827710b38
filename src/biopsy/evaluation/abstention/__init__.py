"""Abstention: conformal prediction sets and risk-coverage curves, measured, drawn and reported."""
