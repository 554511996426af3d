"""The ops as torch.library sees them: between the public functions, which check, and the backends, which compute.

Each is opaque to torch.compile: one node of its graph, whatever the backend does. What can only be checked on data, the
choice of tokens and of a backend happen inside. Internal: the public functions are the contract.
"""
