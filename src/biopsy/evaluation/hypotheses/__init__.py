"""The published hypotheses about what networks rely on, tested."""
