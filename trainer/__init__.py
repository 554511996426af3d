"""A lean trainer around `sgcd_kernels`: agents that learn multi-turn tool use by GRPO with sibling-guided credit."""
