"""What the credit rules stand on: quantiles and shuffles of packed sequences, the span scan, no waiting for a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgcd_kernels import CreditConfig, backend_status, credit_weights
from sgcd_kernels.backends import registry
from sgcd_kernels.backends.registry import credit_backend
from sgcd_kernels.credit.eligible import EligibleTokens
from sgcd_kernels.credit.rules import RULES
from tests.properties import examples

IMPLS = [name for name in ("torch", "cpp") if backend_status()[name].usable]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]


@st.composite
def batches(draw: st.DrawFn, longest: int = 40) -> Batch:
    """(values with ties, eligible, cu_seqlens, the generator)"""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=12))
    n, g = sum(lengths), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(n, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    if draw(st.booleans()):
        values = (values * 3).round() / 8
    eligible = torch.rand(n, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return values, eligible, torch.tensor([0, *lengths]).cumsum(0), g


def sequences(cu: torch.Tensor, eligible: torch.Tensor) -> list[torch.Tensor]:
    """The indices of each sequence's eligible tokens."""
    return [start + eligible[start:stop].nonzero().squeeze(1) for start, stop in pairwise(cu.tolist())]


@given(batches(), st.sampled_from([0.01, 0.5, 0.75, 0.99, 1.0]))
@settings(max_examples=examples(300))
def test_quantile_has_the_bits_of_torch(batch: Batch, q: float) -> None:
    values, eligible, cu, _ = batch
    if not len(values):
        return
    tokens = EligibleTokens(cu, eligible)
    place = (tokens.counts - 1).clamp(min=0)
    found = []
    for name in IMPLS:
        backend = credit_backend(name, values)
        for one, at in zip(tokens.quantile(values, q, backend), sequences(cu, eligible)):
            assert not len(at) or torch.equal(one, values[at].quantile(q))
        found.append(backend.order_statistics(values, tokens.for_backend, place // 2, place)[:, tokens.counts > 0])
    assert all(torch.equal(one, found[0]) for one in found)


@given(batches())
@settings(max_examples=examples(100))
def test_reductions(batch: Batch) -> None:
    values, eligible, cu, _ = batch
    tokens = EligibleTokens(cu, eligible)
    broken = values.masked_fill(~eligible, torch.nan)
    mean, maximum = tokens.mean(broken), tokens.maximum(broken)
    for i, at in enumerate(sequences(cu, eligible)):
        assert int(tokens.counts[i]) == len(at)
        if len(at):
            assert torch.equal(maximum[i], values[at].max())
            torch.testing.assert_close(mean[i], values[at].mean())


@given(batches(), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=examples(100))
def test_a_shuffle_depends_only_on_its_sequence(batch: Batch, seed: int) -> None:
    _, eligible, cu, _ = batch
    to, source = EligibleTokens(cu, eligible).shuffle(seed)
    moved = torch.empty_like(to).index_copy(0, to, source)
    for at in sequences(cu, eligible):
        assert torch.equal(moved[at].sort().values, at)
    first, stop = cu[0], cu[1]
    to, source = EligibleTokens(cu[:2], eligible[:stop]).shuffle(seed)
    assert torch.equal(
        torch.empty_like(to).index_copy(0, to, source)[eligible[:stop]], moved[first:stop][eligible[:stop]]
    )


def test_shuffles_are_uniform() -> None:
    """Each of the 24 orders of 4 tokens, over 24,000 sequences; and neither neighbours nor seeds go together."""
    cu = torch.arange(0, 4 * 24_000 + 1, 4)
    counts = []
    for seed in (0, 1):
        to, source = EligibleTokens(cu, torch.ones(96_000, dtype=torch.bool)).shuffle(seed)
        order = torch.empty_like(to).index_copy(0, to, source).view(-1, 4) % 4
        counts.append(order)
        found = torch.unique(order, dim=0, return_counts=True)[1]
        assert len(found) == 24
        assert ((found - 1000) ** 2 / 1000).sum() < 60  # chi squared, 23 degrees of freedom: p < 1e-4
    for a, b in ((counts[0], counts[1]), (counts[0][1:], counts[0][:-1])):
        assert abs(float((a == b).float().mean()) - 0.25) < 0.01


@given(batches(60), st.data())
@settings(max_examples=examples(1000))  # 100 times as many: a quarter of an hour, and 1 GB of what was drawn
def test_the_operator_scans_as_the_loop_does(batch: Batch, data: st.DataObject) -> None:
    values, eligible, cu, g = batch
    n, dtype = len(values), values.dtype
    u = torch.rand(n, generator=g, dtype=dtype) ** data.draw(st.sampled_from([1, 4, 9]))
    entropy = torch.rand(n, generator=g, dtype=dtype) * data.draw(st.sampled_from([0.05, 3.0]))
    if data.draw(st.booleans()):
        u, entropy = (u * 10).round() / 10, (entropy * 10).round() / 10  # on the thresholds
    turns = (torch.rand(n, generator=g) < 0.15).cumsum(0) if data.draw(st.booleans()) else None
    start = data.draw(st.sampled_from([0.1, 0.5, 0.0]))
    config = CreditConfig(
        start=start, reset=start * data.draw(st.sampled_from([0.0, 0.2, 1.0])), patience=data.draw(st.integers(1, 5))
    )
    tokens = EligibleTokens(cu, eligible, turns).for_backend
    want = credit_backend("torch", u).find_spans(u, entropy, tokens, config)
    for name in IMPLS[1:]:
        assert torch.equal(credit_backend(name, u).find_spans(u, entropy, tokens, config), want)
    assert (want[~eligible] == -1).all()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_a_gpu(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors hold no values: whatever asks for one, or whose shape depends on one, fails on them."""
    plain = registry._FOLDERS["torch"]
    monkeypatch.setattr(plain, "find_spans", lambda u, *_: torch.full_like(u, -1, dtype=torch.long))
    x, cu = torch.empty(9, device="meta"), torch.empty(3, dtype=torch.long, device="meta")
    got = credit_weights(
        x, x, cu, mask=x, turn_ids=cu.new_empty(9), advantages=x[:2], log_ratio=x, forward_kl=x, bhattacharyya=x,
        student_entropy=x, config=CreditConfig(rule=rule), impl="torch",
    )  # fmt: skip
    assert all(out.is_meta and out.shape == (9,) for out in got)
