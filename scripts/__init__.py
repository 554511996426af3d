"""Commands that make what the repository ships or needs: weights, models, measured times."""
