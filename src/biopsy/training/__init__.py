"""Training of a recipe on a pack, resulting in a run with a classifier."""
