"""One of each thing that can be added to biopsy from outside."""
