"""linear_policy_loss: every loss type against the reference, denominators, masks, gradients in forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgcd_kernels import linear_logprob, linear_policy_loss, reference
from sgcd_kernels.backends.torch import blocks
from sgcd_kernels.core.surrogate import LOSS_TYPES

IMPLS = ("torch", "auto")
F64 = torch.float64
CU = [0, 4, 4, 9, 17]  # one sequence is empty
N, H, V = 17, 5, 130


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_TOKENS", 5)
    monkeypatch.setitem(blocks.WORKSPACE_BYTES, "cpu", 8192)


def batch(dtype: torch.dtype = F64, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=g)

    x, w, b = rand(N, H), rand(V, H), rand(V)
    y = torch.randint(V, (N,), generator=g)
    logp = reference.logprob(reference.logits(x, w, b), y)[0]
    mask = torch.ones(N).bool()
    mask[[1, 6, 16]] = False
    return {
        "hidden": x.to(dtype).requires_grad_(),
        "weight": w.to(dtype).requires_grad_(),
        "bias": b.to(dtype).requires_grad_(),
        "targets": y,
        "advantages": rand(N),
        "old_logp": logp + 0.3 * rand(N),
        "ref_logp": logp + 0.3 * rand(N),
        "importance_weights": rand(N).abs().clamp(max=2),
        "mask": mask,
        "cu_seqlens": torch.tensor(CU),
    }


def expected(
    inputs: dict[str, Any], loss_type: str, temperature: Any = 1.0, softcap: float | None = None, **options: Any
) -> torch.Tensor:
    z = reference.logits(inputs["hidden"], inputs["weight"], inputs["bias"], temperature, softcap)
    logp = reference.logprob(z, inputs["targets"])[0]
    extra = {k: inputs[k] for k in ("old_logp", "ref_logp", "importance_weights") if k in inputs}
    return reference.policy_loss(
        logp, inputs["advantages"], inputs["mask"], CU, loss_type=loss_type, **extra, **options
    )


def leaves(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return inputs["hidden"], inputs["weight"], inputs["bias"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("optional", [(), ("old_logp",), ("old_logp", "ref_logp", "importance_weights")])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 5.0), ("token", None)])
def test_value_and_gradients_equal_reference(
    loss_type: str, optional: tuple[str, ...], temperature: Any, softcap: float | None
) -> None:
    inputs = batch()
    if temperature == "token":
        temperature = torch.linspace(0.5, 1.5, N, dtype=F64)
    for name in ("old_logp", "ref_logp", "importance_weights"):
        if name not in optional:
            del inputs[name]
    options = {"epsilon": 0.1, "epsilon_high": 0.25, "beta": 0.2 if "ref_logp" in optional else 0.0}
    options |= {"temperature": temperature, "softcap": softcap}
    loss, metrics = linear_policy_loss(**inputs, loss_type=loss_type, **options)
    want = expected(inputs, loss_type, **options)
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-13)
    for a, e in zip(torch.autograd.grad(loss, leaves(inputs)), torch.autograd.grad(want, leaves(inputs))):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-13)
    assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])  # the others stop a gradient on purpose
def test_directional_derivative(loss_type: str) -> None:
    inputs = batch()
    loss, _ = linear_policy_loss(**inputs, loss_type=loss_type, beta=0.1)
    grads = torch.autograd.grad(loss, leaves(inputs))
    directions = [torch.randn_like(g) for g in grads]

    def at(step: float) -> torch.Tensor:
        moved = {k: inputs[k] + step * d for k, d in zip(("hidden", "weight", "bias"), directions)}
        with torch.no_grad():
            return linear_policy_loss(**(inputs | moved), loss_type=loss_type, beta=0.1)[0]

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, sum((g * d).sum() for g, d in zip(grads, directions)), rtol=1e-6, atol=1e-8)


def test_no_old_logp_means_on_policy() -> None:
    inputs = batch()
    inputs["old_logp"] = linear_logprob(*(inputs[k] for k in ("hidden", "weight", "targets")), bias=inputs["bias"]).logp
    given = linear_policy_loss(**inputs)
    del inputs["old_logp"]
    implied = linear_policy_loss(**inputs)
    assert torch.equal(given[0], implied[0])
    assert implied[1]["ratio/max"] == 1
    assert implied[1]["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_sum_to_the_whole_batch(loss_type: str) -> None:
    inputs = batch()
    whole, _ = linear_policy_loss(**inputs, loss_type=loss_type, beta=0.1)
    items = {"grpo": 4, "gspo": 4, "dr_grpo": 4 * 8}.get(loss_type, int(inputs["mask"].sum()))
    parts = torch.zeros((), dtype=F64)
    for start, stop, cu in ((0, 9, [0, 4, 4, 9]), (9, 17, [0, 8])):
        rows = {k: v[start:stop] for k, v in inputs.items() if k not in ("weight", "bias", "cu_seqlens")}
        shared = {"weight": inputs["weight"], "bias": inputs["bias"], "cu_seqlens": torch.tensor(cu)}
        options = {"loss_type": loss_type, "beta": 0.1, "num_items_in_batch": items}
        parts = parts + linear_policy_loss(**rows, **shared, **options)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    for a, e in zip(torch.autograd.grad(parts, leaves(inputs)), torch.autograd.grad(whole, leaves(inputs))):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padded_batch_equals_packed(loss_type: str) -> None:
    inputs = batch()
    inputs["cu_seqlens"] = torch.tensor([0, 5, 10, 15])
    packed = {k: v[:15] if k not in ("weight", "bias", "cu_seqlens") else v for k, v in inputs.items()}
    padded = {
        k: v if k in ("weight", "bias") else v.reshape(3, 5, *v.shape[1:])
        for k, v in packed.items()
        if k != "cu_seqlens"
    }
    assert torch.equal(
        linear_policy_loss(**packed, loss_type=loss_type)[0], linear_policy_loss(**padded, loss_type=loss_type)[0]
    )


def test_advantage_of_a_sequence_is_that_of_its_tokens() -> None:
    inputs = batch()
    a = torch.randn(4, dtype=F64)
    by_token = inputs | {"advantages": a.repeat_interleave(torch.tensor(CU).diff())}
    assert torch.equal(linear_policy_loss(**inputs | {"advantages": a})[0], linear_policy_loss(**by_token)[0])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_tokens_have_no_influence(loss_type: str) -> None:
    inputs = batch()
    clean, _ = linear_policy_loss(**inputs, loss_type=loss_type, beta=0.1)
    gone = ~inputs["mask"]
    for name in ("hidden", "advantages", "old_logp", "ref_logp", "importance_weights"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][gone] = torch.nan
    inputs["hidden"].requires_grad_()
    loss, metrics = linear_policy_loss(**inputs, loss_type=loss_type, beta=0.1)
    assert torch.equal(loss, clean)
    gx, gw, gb = torch.autograd.grad(loss, leaves(inputs))
    assert (gx[gone] == 0).all()
    assert all(x.isfinite().all() for x in (gx, gw, gb, *metrics.values()))


def test_ignored_target_is_a_masked_token() -> None:
    inputs = batch()
    masked, _ = linear_policy_loss(**inputs)
    inputs["targets"] = inputs["targets"].masked_fill(~inputs.pop("mask"), -100)
    assert torch.equal(linear_policy_loss(**inputs)[0], masked)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_left_is_zero(loss_type: str) -> None:
    inputs = batch() | {"mask": torch.zeros(N)}
    loss, metrics = linear_policy_loss(**inputs, loss_type=loss_type, beta=0.1)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, leaves(inputs)))
    assert all(value.isfinite() for value in metrics.values())
    empty = torch.zeros(0, H, requires_grad=True)
    nothing = linear_policy_loss(
        empty,
        torch.randn(V, H),
        torch.zeros(0).long(),
        torch.zeros(0),
        cu_seqlens=torch.tensor([0]),
        loss_type=loss_type,
    )
    assert nothing[0] == 0
    nothing[0].backward()


def test_a_nan_at_a_loss_token_is_not_hidden() -> None:
    inputs = batch()
    with torch.no_grad():
        inputs["hidden"][0, 0] = torch.nan
    assert linear_policy_loss(**inputs)[0].isnan()


def test_saved_normaliser_gives_the_same_loss() -> None:
    inputs = batch()
    lse = linear_logprob(*(inputs[k] for k in ("hidden", "weight", "targets")), bias=inputs["bias"]).lse.detach()
    plain, with_lse = linear_policy_loss(**inputs), linear_policy_loss(**inputs, lse=lse)
    torch.testing.assert_close(with_lse[0], plain[0], rtol=1e-12, atol=1e-13)
    for a, e in zip(torch.autograd.grad(with_lse[0], leaves(inputs)), torch.autograd.grad(plain[0], leaves(inputs))):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13)
    assert "entropy" in plain[1]
    assert "entropy" not in with_lse[1]


def test_clip_metrics_count_by_sign() -> None:
    x, w, y = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4).long()
    logp = -torch.log(torch.tensor(3.0))
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    _, m = linear_policy_loss(x, w, y, advantages, old_logp=logp - ratios.log(), loss_type="dapo")
    got = {k: float(v) for k, v in m.items()}
    assert got["clip_ratio/high_mean"] == 0.25
    assert got["clip_ratio/low_mean"] == 0.25
    assert got["clip_ratio/region_mean"] == 0.5
    assert got["ratio/mean"] == pytest.approx(1.0)
    assert got["ratio/max"] == pytest.approx(1.5)
    assert got["entropy"] == pytest.approx(1.0986123)
    assert got["num_tokens"] == 4


def test_frozen_weight_is_skipped_and_upstream_scale_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch()
    inputs["weight"] = inputs["weight"].detach()
    inputs["bias"] = inputs["bias"].detach()
    loss, _ = linear_policy_loss(**inputs)
    saved = loss.grad_fn.grads
    assert saved.weight is None
    assert saved.bias is None
    (loss * 3).backward()
    whole = batch()
    linear_policy_loss(**whole)[0].backward()
    torch.testing.assert_close(inputs["hidden"].grad, 3 * whole["hidden"].grad)


def test_without_grad_no_gradient_is_computed() -> None:
    with torch.no_grad():
        loss, _ = linear_policy_loss(**batch())
    assert not loss.requires_grad


def extreme(old: float, a: float, ref: float) -> dict[str, Any]:
    """A batch with extreme log-probs of the old and the reference policy at one token each."""
    inputs = batch(torch.float32)
    for name in ("old_logp", "ref_logp", "importance_weights", "advantages"):
        inputs[name] = inputs[name].float()
    inputs["old_logp"][0], inputs["advantages"][:4] = old, a
    inputs["ref_logp"][2] = ref
    return inputs


def assert_follows_the_formula(inputs: dict[str, Any], loss_type: str, impl: str) -> None:
    loss, _ = linear_policy_loss(**inputs, loss_type=loss_type, beta=0.1, impl=impl)
    exact = inputs | {k: inputs[k].detach().double().requires_grad_() for k in ("hidden", "weight", "bias")}
    want = expected(exact, loss_type, beta=0.1)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-5)
    for ours, plain in zip(torch.autograd.grad(loss, leaves(inputs)), torch.autograd.grad(want, leaves(exact))):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("old", "ref"), [(-25.0, -1.0), (-60.0, -1.0), (30.0, -1.0), (-1.0, 22.0), (-1.0, 60.0)])
@pytest.mark.parametrize("a", [1.0, 0.0, -1.0])
def test_extreme_ratios_follow_the_formula(impl: str, loss_type: str, old: float, ref: float, a: float) -> None:
    """Nothing is clamped that the formula does not clip: as far as fp32 reaches, in loss and gradient."""
    assert_follows_the_formula(extreme(old, a, ref), loss_type, impl)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("a", [1.0, 0.0])
def test_a_ratio_that_overflows_where_it_counts_for_nothing(loss_type: str, a: float) -> None:
    """Clipped, or times 0: the slope is 0, not 0 times inf."""
    assert_follows_the_formula(extreme(-200.0, a, -1.0), loss_type, "auto")


@pytest.mark.parametrize(("old", "ref"), [(-200.0, -1.0), (-1.0, 200.0)])
def test_an_overflow_shows_in_the_loss_and_the_metrics(old: float, ref: float) -> None:
    loss, metrics = linear_policy_loss(**extreme(old, -1.0, ref), loss_type="dapo", beta=0.1)
    assert loss.item() == float("inf")
    assert metrics["ratio/max" if old < -1 else "kl"].item() == float("inf")


def test_the_kl_of_nearby_policies_keeps_its_digits() -> None:
    inputs = batch(torch.float32)
    logp = linear_logprob(*(inputs[k] for k in ("hidden", "weight", "targets")), bias=inputs["bias"]).logp.detach()
    inputs["ref_logp"] = logp + 1e-3
    metrics = linear_policy_loss(**inputs, beta=0.1)[1]
    assert metrics["kl"].item() == pytest.approx(5e-7, rel=2e-3)  # d^2 / 2; e^d - d - 1 would be off by 10%


def test_masked_targets_may_be_anything() -> None:
    inputs = batch()
    want, _ = linear_policy_loss(**inputs)
    for placeholder in (-1, V, 1 << 40):
        inputs["targets"] = inputs["targets"].masked_fill(~inputs["mask"], placeholder)
        assert torch.equal(linear_policy_loss(**inputs)[0], want)


def test_the_upstream_scale_is_not_rounded_to_bf16() -> None:
    """bf16(1/3) is off by 2e-3, in every element the same way."""
    once, scaled = batch(torch.bfloat16), batch(torch.bfloat16)
    linear_policy_loss(**once)[0].backward()
    (linear_policy_loss(**scaled)[0] * (1 / 3)).backward()
    for a, b in zip(leaves(once)[:2], leaves(scaled)):  # a bias's gradient is kept in fp32
        assert torch.equal(b.grad, (a.grad.float() * torch.tensor(1 / 3)).bfloat16())


def test_backward_runs_once() -> None:
    loss, _ = linear_policy_loss(**batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward may run once"):
        loss.backward()


def test_fp16_gradients_survive_the_loss_scale() -> None:
    """Computed in forward, before the scale is known: in fp16 they would underflow to 0."""
    inputs = batch(torch.float16)
    inputs["advantages"] = inputs["advantages"] * 1e-6
    loss, _ = linear_policy_loss(**inputs)
    (loss * 65536.0).backward()
    exact = batch()
    exact["advantages"] = exact["advantages"] * 1e-6
    (linear_policy_loss(**exact)[0] * 65536.0).backward()
    assert inputs["hidden"].grad.dtype == torch.float16
    error = (inputs["hidden"].grad - exact["hidden"].grad).norm() / exact["hidden"].grad.norm()
    assert float(error) < 5e-3


def test_bf16_gradient_error_is_within_twice_that_of_plain_pytorch() -> None:
    exact, plain, fused = batch(), batch(torch.bfloat16), batch(torch.bfloat16)
    rounded = {k: plain[k].detach().double().requires_grad_() for k in ("hidden", "weight", "bias")}
    exact |= rounded
    expected(exact, "dapo").backward()
    expected(plain, "dapo").backward()
    linear_policy_loss(**fused, loss_type="dapo")[0].backward()
    for name in ("hidden", "weight", "bias"):
        ours, theirs = ((x[name].grad - exact[name].grad).norm() for x in (fused, plain))
        assert float(ours) <= 2 * float(theirs)
