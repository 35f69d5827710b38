"""A plug-in that cannot be imported."""

raise RuntimeError("made to fail")
