"""The plain-PyTorch backend: runs anywhere, in bounded memory. `blocks` says how the work is cut."""
