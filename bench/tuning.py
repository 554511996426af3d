"""`python -m bench tune`: times each configuration of the Triton kernels' tables, in the op that uses it.

On a GPU every candidate of `sgcd_kernels.backends.triton.configs` for that device is timed, interleaved, inside the
whole op; the tables are edited by hand, from its output. Without a GPU the candidates are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.cases import Case
from bench.inputs import Inputs, make
from bench.timing import Prepare, time_interleaved
from sgcd_kernels import linear_distill_loss, linear_divergence, linear_logprob, linear_policy_loss
from sgcd_kernels.backends.triton.configs import HALF, Config
from sgcd_kernels.backends.triton.launch import column_of

CASE = Case("divergence", "forward", "qwen3-8b", 8192, "bf16", "cuda")


def calls(i: Inputs) -> dict[str, Callable[[], object]]:
    """The op in which each kernel is timed."""
    leaves = i.leaves()
    with torch.no_grad():
        lse = linear_logprob(i.hidden, i.weight, i.targets, impl="triton").lse

    def policy() -> None:
        options: dict[str, Any] = {"cu_seqlens": i.cu_seqlens, "loss_type": "dapo", "lse": lse, "impl": "triton"}
        linear_policy_loss(leaves.hidden, leaves.weight, i.targets, i.advantages, **options)

    def distill() -> None:
        loss = linear_distill_loss(leaves.hidden, leaves.weight, i.teacher, mask=i.mask, impl="triton")
        torch.autograd.grad(loss, (leaves.hidden, leaves.weight))

    other = i.weight.clone()
    heads = (i.hidden, i.weight, i.targets, i.teacher)
    return {
        "head_stats": lambda: linear_logprob(i.hidden, i.weight, i.targets, impl="triton"),
        "pair_stats": lambda: linear_divergence(*heads, impl="triton"),
        "own_pair_stats": lambda: linear_divergence(*heads, other, impl="triton"),
        "mixture_stats": lambda: linear_divergence(*heads, features=("jsd",), impl="triton"),
        "logprob_grad": policy,
        "distill_grad": distill,
    }


def compare(kernel: str, major: int, call: Callable[[], object], device: str) -> dict[Config, float | str]:
    """Milliseconds of the op with each candidate configuration, or why it could not be timed."""
    table, candidates = HALF[kernel], HALF[kernel][major]

    def chosen(config: Config) -> Prepare:
        def prepare(_: int) -> Callable[[], object]:
            table[major] = (config,)
            return call

        return prepare

    refused: dict[str, Exception] = {}
    try:
        for config in candidates:  # compile outside the samples
            try:
                chosen(config)(0)()
            except Exception as error:
                refused[str(config)] = error
        compiled = {str(config): chosen(config) for config in candidates if str(config) not in refused}
        timings, failed = time_interleaved(compiled, device)
    finally:
        table[major] = candidates
    failed |= refused
    found: dict[Config, float | str] = {}
    for config in candidates:
        timing = timings.get(str(config))
        found[config] = timing.median if timing else f"{type(failed[str(config)]).__name__}: {failed[str(config)]}"
    return found


def main() -> int:
    """Print a line per candidate."""
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU: these are the candidates, nothing is timed")
        for kernel, table in HALF.items():
            for major, candidates in table.items():
                print(f"{kernel}, compute capability {major}.x:", *candidates, sep="\n  ")
        return 0
    major = torch.cuda.get_device_capability()[0]
    for kernel, call in calls(make(CASE)).items():
        print(f"{kernel}, in {CASE.shape}, N {CASE.tokens}, {CASE.dtype}; the first runs today")
        for config, result in compare(kernel, column_of(HALF[kernel], major), call, "cuda").items():
            print(f"  {result if isinstance(result, str) else f'{result:.3f} ms'}  {config}", flush=True)
    return 0
