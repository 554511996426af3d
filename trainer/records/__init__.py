"""Outputs of a run: checkpoints, metrics, rollouts, and the page that shows them."""
