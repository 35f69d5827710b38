"""Model comparison: paired differences over the same patients."""
