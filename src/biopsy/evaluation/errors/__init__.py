"""Error analysis: which patches are wrong, where they lie, what goes with being wrong."""
