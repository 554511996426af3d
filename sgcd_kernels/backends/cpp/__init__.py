"""The C++ backend for CPU tensors: logits are computed tile by tile and stay in a core's cache.

No [N, V] matrix of logits is written. A loss that computes its gradient in the forward pass may cache tiles of
e^(z - m) in the buffer of the weight's gradient, and in 48 MB of its own (csrc/, cached tiles).
"""
