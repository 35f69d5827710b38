"""Label issues: labels that neighbours and model contradict."""
