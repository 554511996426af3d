"""The inputs are what docs/benchmarks.md says: peaked, near, masked, and the same every time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench import inputs, truth
from bench.cases import Case, cpu_selection, gpu_selection


@pytest.mark.parametrize("tokens", [64, 128, 256, 512, 4096, 65_536])
def test_about_a_third_is_masked(tokens: int) -> None:
    i = inputs.make(Case("sgcd", "full", "tiny", tokens, "fp32"))
    assert 0.6 <= i.kept / tokens <= 0.72
    assert bool((i.targets[~i.mask] == inputs.IGNORED).all()) and bool((i.targets[i.mask] >= 0).all())
    assert i.cu_seqlens[-1] == tokens


def test_rows_are_peaked_and_the_teacher_near() -> None:
    _, exact = truth.prepare(Case("sgcd", "full", "smollm2", 256, "fp32"))
    p = exact.student_logp.exp()
    assert float((p > 0.9).double().mean()) > 0.4, "half of the tokens are nearly certain"
    assert float((p < 0.5).double().mean()) > 0.1, "some are not"
    order = exact.reverse_kl.sort(descending=True).values
    top = order[: max(1, len(order) // 10)].sum() / order.sum()
    assert float(top) > 0.5, "a tenth of the tokens holds most of the divergence"
    assert float(exact.reverse_kl.median()) < 0.05
    assert 1 < float(exact.weights.mean()) < 1.8


def test_the_same_inputs_every_time_and_copies_elsewhere() -> None:
    case = Case("sgcd", "full", "tiny", 128, "bf16")
    a, b = inputs.make(case), inputs.make(case)
    copy = a.copy()
    for field in dataclasses.fields(a):
        x, y, z = (getattr(o, field.name) for o in (a, b, copy))
        assert torch.equal(x, y) and torch.equal(x, z) and x.data_ptr() != z.data_ptr()


def test_every_token_count_of_the_selections_splits_into_equal_sequences() -> None:
    for case in [*cpu_selection(("fp32", "bf16")), *gpu_selection()]:
        tiny = dataclasses.replace(case, shape="tiny", device="cpu", dtype="fp32")
        lengths = inputs.make(tiny).cu_seqlens.diff()
        assert int(lengths.min()) == int(lengths.max()) >= 16


def test_some_tokens_are_clipped_and_none_is_where_clipping_begins() -> None:
    i, exact = truth.prepare(Case("policy_loss", "full", "tiny", 16_384, "fp32"))
    log_ratio = exact.student_logp.double() - i.old_logp[i.rows].double()
    for begins in (math.log(1 - inputs.EPSILON), math.log(1 + inputs.EPSILON_HIGH)):
        assert float((log_ratio - begins).abs().min()) > inputs.CLEAR - 1e-3
    beyond = (log_ratio < math.log(1 - inputs.EPSILON)) | (log_ratio > math.log(1 + inputs.EPSILON_HIGH))
    assert 0.005 < float(beyond.double().mean()) < 0.05
