"""`python -m bench tune`: the configs of the Triton kernels, from the table `sgcd_kernels.triton.configs.CONFIGS`."""

from __future__ import annotations

import importlib

from bench.errors import UserError

MODULE = "sgcd_kernels.triton.configs"


def main() -> int:
    """List every op's configs."""
    try:
        configs = importlib.import_module(MODULE).CONFIGS
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"no Triton kernels to tune in this version ({error})") from None
    for op, candidates in configs.items():
        print(f"{op}: {len(candidates)} configs")
        for config in candidates:
            print(f"  {config}")
    return 0
