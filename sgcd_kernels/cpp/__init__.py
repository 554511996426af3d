"""The C++ backend for CPU tensors: logits live in cache, tile by tile, and nothing of size N x V is written."""
