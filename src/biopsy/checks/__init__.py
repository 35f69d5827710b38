"""Checks of outputs (`verify`) and of this machine (`doctor`)."""
