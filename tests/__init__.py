"""A package, because some wheels bring a top-level `tests` of their own, which would hide a plain folder."""
