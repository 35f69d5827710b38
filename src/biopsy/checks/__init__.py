"""Checks of what was written (`verify`) and of this machine (`doctor`): PASS, WARN or FAIL."""
