"""The ops: one file each, with its contract, its checks, its op of torch.library, fake kernel and backward pass."""
