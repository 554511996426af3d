"""From divergences to token weights: SGCD's rule, its ablations and related methods."""
