"""Apple's cut-cross-entropy: its Triton kernels on a GPU, its torch.compile implementation anywhere."""

from __future__ import annotations

from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Outputs, needs, provides

PACKAGE = "cut-cross-entropy"


def loss(i: Inputs, reduction: str, impl: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    value: Tensor = linear_cross_entropy(i.hidden, i.weight, i.targets, reduction=reduction, impl=impl)
    return value


def register(name: str, impl: str, gpu: bool) -> None:
    refuses = needs("cut_cross_entropy", gpu=gpu)

    @provides("logprob", name, package=PACKAGE, refuses=refuses, compiles=not gpu)
    def logprob(i: Inputs, mode: str) -> Outputs:
        return {"logp": -loss(i, "none", impl)}

    @provides("cross_entropy", name, package=PACKAGE, refuses=refuses, compiles=not gpu)
    def cross_entropy(i: Inputs, mode: str) -> Outputs:
        return {"loss": loss(i, "mean", impl)}


register("cce", "cce", gpu=True)
register("cce-compile", "torch_compile", gpu=False)
