"""The C++ backend for CPU tensors: logits are made tile by tile and stay in the cache of a core.

No matrix of logits is written, but a loss that computes its gradient in the forward pass may keep tiles of e^(z - m) in
the memory of the weight's gradient and 48 MB beside it (csrc/, cached tiles).
"""
