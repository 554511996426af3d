"""Where the tests of the Triton kernels run: on a GPU if there is one, else on the CPU by the interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
