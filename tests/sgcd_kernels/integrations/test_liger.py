"""Our class under Liger's name against Liger's, loss type by loss type: loss, metrics, gradients."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from sgcd_kernels import CreditConfig, FusedLinearSGCDLoss, linear_policy_loss
from sgcd_kernels.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearSGCDLoss, LigerOptions

theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")

B, T, H, V = 3, 7, 12, 50


def inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.rand(B, T) > 0.3
    mask[:, 0] = True
    return {
        "_input": torch.randn(B, T, H),
        "lin_weight": torch.randn(V, H),
        "selected_token_ids": torch.randint(V, (B, T)),
        "attention_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7]),
        "bias": torch.randn(V),
        "old_per_token_logps": -4 + torch.randn(B, T),
    }


def run(loss_class: Any, options: dict[str, Any], more: dict[str, Any]) -> tuple[Any, ...]:
    given = inputs() | more
    leaves = [given[name].clone().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    given |= dict(zip(("_input", "lin_weight", "bias"), leaves))
    loss, metrics = loss_class(**options)(**given)
    return loss, metrics, torch.autograd.grad(loss, leaves)


NO_REFERENCE = {"beta": 0.0, "use_ref_model": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": (NO_REFERENCE, {}),
    "grpo": (NO_REFERENCE | {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.3}, {}),
    "bnpo": (NO_REFERENCE | {"loss_type": "bnpo", "temperature": 0.7}, {}),
    "dr_grpo": (NO_REFERENCE | {"loss_type": "dr_grpo", "max_completion_length": 20}, {}),
    "cispo": (NO_REFERENCE | {"loss_type": "cispo", "epsilon_high": 5.0}, {}),
    "cispo by default": (NO_REFERENCE | {"loss_type": "cispo"}, {}),  # a cap of 0.2: every ratio above it is cut
    "cispo, nothing left": (NO_REFERENCE | {"loss_type": "cispo", "epsilon_high": 0.0}, {}),
    "gspo": (NO_REFERENCE | {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
    "on-policy": (NO_REFERENCE, {"old_per_token_logps": None}),
    "kl": ({"beta": 0.1}, {"ref_per_token_logps": -4 + torch.linspace(-1, 1, B * T).view(B, T)}),
    "reference model": (
        {},
        {"ref_input": torch.linspace(-1, 1, B * T * H).view(B, T, H), "ref_weight": torch.eye(V, H)},
    ),
    "no reference model": ({"use_ref_model": False}, {}),
    "a reference that is not to be read": (
        {"beta": 0.5, "use_ref_model": False},
        {"ref_per_token_logps": -4 + torch.linspace(-1, 1, B * T).view(B, T)},
    ),
    "importance weights": (NO_REFERENCE, {"vllm_is_ratio": torch.tensor([[0.5], [1.0], [2.0]])}),
    "importance weights [B]": (NO_REFERENCE, {"vllm_is_ratio": torch.tensor([0.5, 1.0, 2.0])}),
    "importance weights [B, T]": (NO_REFERENCE, {"vllm_is_ratio": torch.linspace(0.5, 2, B * T).view(B, T)}),
    "gspo, importance weights [B, T]": (
        NO_REFERENCE | {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"vllm_is_ratio": torch.linspace(0.5, 2, B * T).view(B, T)},
    ),
    "a sequence without loss tokens": (
        NO_REFERENCE | {"loss_type": "grpo"},
        {"attention_mask": torch.tensor([[1.0] * T, [0.0] * T, [1.0] * T])},
    ),
    "items": (NO_REFERENCE, {"num_items_in_batch": 40}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_import_may_be_changed(name: str) -> None:
    options, more = CASES[name]
    loss, metrics, grads = run(LigerFusedLinearGRPOLoss, options, more)
    want, their_metrics, their_grads = run(theirs.LigerFusedLinearGRPOLoss, options | {"compiled": False}, more)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, their_metrics, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads, their_grads, rtol=1e-4, atol=1e-6)


def test_a_ratio_per_sequence_when_tokens_equal_sequences() -> None:
    """[B] and [T] look alike."""
    square = {k: v[:, :B] if v.dim() > 1 and v.shape[1] == T else v for k, v in inputs().items()}
    more = square | {"vllm_is_ratio": torch.tensor([0.5, 1.0, 2.0])}
    loss, _, grads = run(LigerFusedLinearGRPOLoss, NO_REFERENCE, more)
    want, _, their_grads = run(theirs.LigerFusedLinearGRPOLoss, NO_REFERENCE | {"compiled": False}, more)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, their_grads, rtol=1e-4, atol=1e-6)


def test_a_ratio_of_another_shape_is_refused() -> None:
    message = r"vllm_is_ratio has shape \[7\], needs \[3\] or \[3, 1\] \(per sequence\) or \[3, 7\] \(per token\)"
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**NO_REFERENCE)(**inputs(), vllm_is_ratio=torch.ones(T))


def test_both_take_what_theirs_takes() -> None:
    """Every argument, in the same place, with the same default."""

    def known(function: Any) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    made, called = (
        known(f) for f in (theirs.LigerFusedLinearGRPOLoss.__init__, theirs.LigerFusedLinearGRPOLoss.forward)
    )
    assert list((made | {"impl": "auto"}).items()) == list(known(LigerFusedLinearGRPOLoss.__init__).items())
    assert list(called.items()) == list(known(LigerFusedLinearGRPOLoss.forward).items())
    assert list(called.items()) == list(known(LigerFusedLinearSGCDLoss.forward).items())[: len(called)]
    assert list(LigerOptions.__annotations__) == list(known(LigerFusedLinearGRPOLoss.__init__))[1:]


def credit() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    return {
        "teacher_input": torch.randn(B, T, H, generator=g),
        "turn_ids": torch.arange(T).expand(B, T) // 3,
        "credit_mask": torch.rand(B, T, generator=g) > 0.2,
    }


@pytest.mark.parametrize("name", CASES)
def test_without_credit_sgcd_is_their_loss(name: str) -> None:
    options, more = CASES[name]
    made = partial(LigerFusedLinearSGCDLoss, config=CreditConfig(gamma=0.0))
    loss, metrics, grads = run(made, options, more | credit())
    want, their_metrics, their_grads = run(theirs.LigerFusedLinearGRPOLoss, options | {"compiled": False}, more)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, their_metrics, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads, their_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dapo", "gspo", "kl", "importance weights [B]", "items"])
@pytest.mark.parametrize("own_head", [False, True])
def test_with_credit_it_is_our_loss(name: str, own_head: bool) -> None:
    """The same numbers as `FusedLinearSGCDLoss`, which is tested against the reference; and not those of plain GRPO."""
    options, more = CASES[name]
    g = torch.Generator().manual_seed(3)
    head = {"teacher_weight": torch.randn(V, H, generator=g), "teacher_bias": torch.randn(V, generator=g)}
    given, config = credit() | (head if own_head else {}), CreditConfig(clip=1.7, d_floor=0.5)
    loss, _, grads = run(partial(LigerFusedLinearSGCDLoss, config=config), options, more | given)

    def ours(_input: torch.Tensor, lin_weight: torch.Tensor, bias: torch.Tensor, **batch: Any) -> Any:
        ratio = batch.get("vllm_is_ratio")
        loss_type = "gspo" if name == "gspo" else "dapo"
        criterion = FusedLinearSGCDLoss(config=config, loss_type=loss_type, beta=options["beta"])
        return criterion(
            _input,
            lin_weight,
            batch["selected_token_ids"],
            batch["teacher_input"],
            batch["advantages"],
            mask=batch["attention_mask"],
            bias=bias,
            old_logp=batch["old_per_token_logps"],
            ref_logp=batch.get("ref_per_token_logps"),
            importance_weights=None if ratio is None else ratio[:, None].expand(B, T),
            num_items_in_batch=batch.get("num_items_in_batch"),
            **{k: batch[k] for k in given if k != "teacher_input"},
        )

    want, _, want_grads = run(lambda: ours, {}, more | given)
    assert torch.equal(loss, want) and all(map(torch.equal, grads, want_grads))
    plain, _, _ = run(LigerFusedLinearGRPOLoss, options, more)
    assert abs(loss - plain) > 1e-3


def test_credit_of_another_type_than_credit_config_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a CreditConfig"):
        LigerFusedLinearSGCDLoss(config={"gamma": 1.0})  # type: ignore[arg-type]


def test_advantages_per_token() -> None:
    advantages = torch.randn(B, T, generator=torch.Generator().manual_seed(1))
    given = inputs() | {"advantages": advantages}
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0)(**given)
    want, _ = linear_policy_loss(
        given["_input"],
        given["lin_weight"],
        given["selected_token_ids"],
        advantages,
        old_logp=given["old_per_token_logps"],
        mask=given["attention_mask"],
        bias=given["bias"],
        loss_type="dapo",
    )
    assert torch.equal(loss, want)
    assert not torch.equal(loss, LigerFusedLinearGRPOLoss(beta=0.0)(**inputs())[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sapo"}, "'sapo' is a loss of TRL, Liger and verl that this library does not have"),
        ({"importance_sampling_level": "sequence"}, "needs loss_type 'grpo'"),
        ({"delta": 2.0}, "delta is 2.0"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "gspo"}, "'gspo' is loss_type 'grpo' with importance_sampling_level 'sequence' in Liger"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


def test_two_references_are_warned_of_as_liger_does() -> None:
    states = torch.linspace(-1, 1, B * T * H).view(B, T, H)
    more = {"ref_per_token_logps": -4 * torch.ones(B, T), "ref_input": states, "ref_weight": torch.eye(V, H)}
    found = []
    for loss_class, options in ((LigerFusedLinearGRPOLoss, {}), (theirs.LigerFusedLinearGRPOLoss, {"compiled": False})):
        for used in (True, False):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                loss, metrics, _ = run(loss_class, options | {"use_ref_model": used}, more)
            found.append((loss, metrics, [(w.category, str(w.message)) for w in seen]))
    ours, torch_results = found[:2], found[2:]
    assert [len(messages) for *_, messages in ours] == [1, 0]
    for (loss, metrics, messages), (want, their_metrics, their_messages) in zip(ours, torch_results):
        assert messages == their_messages
        torch.testing.assert_close((loss, metrics), (want, their_metrics), rtol=1e-4, atol=1e-6)


def test_a_reference_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="ref_input or ref_weight is None"):
        LigerFusedLinearGRPOLoss(beta=0.1)(**inputs())
