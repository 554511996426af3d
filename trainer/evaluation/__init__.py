"""How good a policy is: playing a split, unbiased estimates with intervals, the `eval` command."""
