"""The Triton backend for CUDA tensors: logits live in registers, tile by tile, and nothing of size N x V is written.

Loaded on use: importing `sgcd_kernels` does not import Triton.
"""
