"""Evaluation of a policy: playing a split, unbiased estimates with intervals, the `eval` command."""
