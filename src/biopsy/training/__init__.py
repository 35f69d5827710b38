"""Training: from a recipe and a pack to a run with a classifier in it."""
