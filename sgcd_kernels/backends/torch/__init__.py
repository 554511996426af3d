"""The plain-PyTorch backend: runs anywhere, in bounded memory. `blocks` holds its tiling plan."""
