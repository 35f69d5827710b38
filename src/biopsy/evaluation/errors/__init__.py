"""Error analysis: misclassified patches, their positions, and properties associated with errors."""
