"""What a run leaves: checkpoints, metrics, rollouts, and the page that shows them."""
