"""Abstention: conformal sets and risk against coverage, measured, drawn and reported."""
