"""Implementations of the ops' heavy parts: the same four files (logprob, divergence, distill, credit) in each backend.

`protocol` states what a backend does, `registry` chooses one for a call.
"""
