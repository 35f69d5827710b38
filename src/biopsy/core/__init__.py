"""Base of all other packages: errors, atomic files, guarded loading, tables and seeds."""
