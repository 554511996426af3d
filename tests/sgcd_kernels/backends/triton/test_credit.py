"""The span scan on a GPU (or in the interpreter) finds what the scan in plain Python finds."""

from __future__ import annotations

import pytest
import torch

from sgcd_kernels import CreditConfig, reference
from sgcd_kernels.backends.protocol import CreditTokens
from tests.sgcd_kernels.backends.cases import DEVICES

pytest.importorskip("triton")


def expected(u: list[float], entropy: list[float], turns: list[int], cfg: CreditConfig) -> list[int]:
    """Onsets by the specification, whose scale is 1 because the largest divergence is."""
    ids = reference.sgcd_credit(u, entropy, turns, cfg)[2]
    return [-1 if i < 0 else ids.index(i) for i in ids]


@pytest.mark.parametrize("seed", range(20))
def test_onsets(seed: int) -> None:
    from sgcd_kernels.backends.triton.credit import find_spans

    g = torch.Generator().manual_seed(seed)
    lengths = [0, 1, 17, 40, 3]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    n = int(cu[-1])
    cfg = CreditConfig(quantile=1.0, patience=1 + seed % 4, start=0.3, reset=0.2)
    u = torch.rand(n, generator=g) ** 3
    entropy, turns = torch.rand(n, generator=g), (torch.rand(n, generator=g) < 0.1).cumsum(0)
    eligible = torch.rand(n, generator=g) < 0.8
    for start in cu[:-1][torch.tensor(lengths) > 0].tolist():
        u[start], eligible[start] = 1.0, True
    u_, entropy_, turns_, eligible_, cu_ = (a.to(DEVICES["triton"]) for a in (u, entropy, turns, eligible, cu))
    got = find_spans(u_, entropy_, CreditTokens(eligible_, cu_, turns_), cfg).cpu()
    want = torch.full((n,), -1)
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist()):
        at = start + eligible[start:stop].nonzero().squeeze(1)
        if at.numel():
            rows = expected(u[at].double().tolist(), entropy[at].double().tolist(), turns[at].tolist(), cfg)
            want[at] = torch.tensor([-1 if r < 0 else int(at[r]) for r in rows])
    assert got.tolist() == want.tolist()
