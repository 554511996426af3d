"""has_teacher: elsewhere nothing is scored and W is 1. And where credit cannot act, nothing is scored at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgcd_kernels import CreditConfig, backend_status, linear_policy_loss, sgcd_loss
from sgcd_kernels.backends import registry
from sgcd_kernels.core.surrogate import LOSS_TYPES
from sgcd_kernels.ops import sgcd
from sgcd_kernels.ops.policy_inputs import PolicyTokens, Settings
from sgcd_kernels.ops.sgcd_batch import CreditInputs, Teacher

N, H, V = 50, 12, 90
CU = torch.tensor([0, 17, 17, 31, 50])
LEAVES = ("hidden", "weight", "bias")
CLOSE = {torch.float64: {"rtol": 1e-11, "atol": 1e-14}, torch.float32: {"rtol": 2e-5, "atol": 1e-6}}


@pytest.fixture(params=["torch", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    status = backend_status()[request.param]
    if not status.usable:
        pytest.skip(status.reason)
    return str(request.param)


def batch(impl: str = "torch", dtype: torch.dtype | None = None) -> dict[str, Any]:
    g, dtype = torch.Generator().manual_seed(0), dtype or (torch.float32 if impl == "cpp" else torch.float64)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x = rand(N, H)
    return {
        "hidden": x.clone().requires_grad_(),
        "weight": (rand(V, H) / 2).requires_grad_(),
        "bias": rand(V).requires_grad_(),
        "targets": torch.randint(V, (N,), generator=g),
        "teacher_hidden": x + 0.5 * rand(N, H),
        "advantages": torch.tensor([1.0, 0.3, -1.0, 0.5]),
        "cu_seqlens": CU,
        "mask": torch.rand(N, generator=g) < 0.8,
        "old_logp": -4 + rand(N) / 4,
        "impl": impl,
    }


def has_teacher() -> Tensor:
    return torch.arange(N) % 3 != 1


def gradients(loss: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs[name] for name in LEAVES]))


def assert_close(ours: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    tolerance = CLOSE[ours[0].dtype]
    torch.testing.assert_close(ours[0], other[0], **tolerance)
    for one, two in zip(ours[1], other[1], strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance["rtol"], atol=10 * tolerance["atol"])


def run(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    loss, metrics = sgcd_loss(**inputs, **options)
    return loss.detach(), gradients(loss, inputs), metrics


def per_token(inputs: dict[str, Any], given: Tensor | None, config: CreditConfig | None = None) -> sgcd.SGCDTokens:
    """What `sgcd_loss` knows of each token."""
    options = {name: inputs[name] for name in ("bias", "impl")}
    settings = Settings.of("sgcd_loss", inputs["weight"], options)
    tokens = PolicyTokens(*(inputs[k] for k in ("targets", "advantages", "old_logp", "mask", "cu_seqlens")))
    teacher = Teacher(inputs["teacher_hidden"], settings.head, given)
    credit = CreditInputs(teacher, config=config or CreditConfig())
    scored = sgcd.score_and_weigh(inputs["hidden"], settings, tokens, credit)
    return sgcd.weighted_policy_loss(inputs["hidden"], settings, tokens, scored).tokens


class Calls:
    """Counts a backend's calls of a function, and keeps their arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, impl: str, function: str) -> None:
        self.arguments: list[tuple[Any, ...]] = []
        inner: Callable[..., Any] = getattr(registry._FOLDERS[impl], function)

        def counted(*arguments: Any) -> Any:
            self.arguments.append(arguments)
            return inner(*arguments)

        monkeypatch.setattr(registry._FOLDERS[impl], function, counted)


class TestHasTeacher:
    def test_elsewhere_tokens_are_left_out_of_credit(self, impl: str) -> None:
        inputs = batch(impl)
        loss, grads, metrics = run(inputs, has_teacher=has_teacher())
        masked = run(inputs, credit_mask=has_teacher(), turn_ids=None)
        assert_close((loss, grads), masked[:2])
        for name, value in masked[2].items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6)
        assert metrics["credit/mean_weight"] > 1.05

    def test_elsewhere_nothing_is_scored(self, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs, calls = batch(impl), Calls(monkeypatch, impl, "divergence_forward")
        run(inputs, has_teacher=has_teacher())
        ((student, teacher, *_),) = calls.arguments
        scored = (inputs["mask"] & has_teacher()).nonzero().squeeze(1)
        assert torch.equal(student.rows, scored) and torch.equal(teacher.rows, scored)

    def test_elsewhere_the_weight_is_one_and_the_teacher_the_student(self, impl: str) -> None:
        inputs = batch(impl)
        tokens = per_token(inputs, has_teacher())
        without = inputs["mask"] & ~has_teacher()
        assert (tokens.weights[~has_teacher()] == 1).all() and (tokens.weights > 1).any()
        assert (tokens.saliency[~has_teacher()] == 0).all() and (tokens.span_ids[~has_teacher()] == -1).all()
        assert (tokens.divergence[without] == 0).all() and (tokens.divergence[inputs["mask"] & has_teacher()] > 0).all()
        assert torch.equal(tokens.teacher_logp[without], tokens.student_logp[without])
        assert torch.equal(tokens.teacher_entropy[without], tokens.student_entropy[without])
        whole = per_token(inputs, None)
        for name in ("student_logp", "student_entropy"):
            torch.testing.assert_close(getattr(tokens, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
        assert all((field[~inputs["mask"]] == 0).all() for field in (tokens.student_logp, tokens.student_entropy))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_elsewhere_teacher_hidden_may_hold_anything(self, impl: str, value: float) -> None:
        inputs = batch(impl)
        clean = run(inputs, has_teacher=has_teacher())
        inputs["teacher_hidden"][~has_teacher()] = value
        broken = run(inputs, has_teacher=has_teacher())
        assert torch.equal(broken[0], clean[0])
        assert all(torch.equal(a, b) for a, b in zip(broken[1], clean[1], strict=True))
        assert all(torch.equal(broken[2][name], clean[2][name]) for name in clean[2])

    def test_a_sequence_is_all_of_its_tokens(self, impl: str) -> None:
        inputs, of_sequences = batch(impl), torch.tensor([1, 0, 0, 1])  # integers will do
        ours = run(inputs, has_teacher=of_sequences)
        tokens = run(inputs, has_teacher=of_sequences.repeat_interleave(CU.diff()))
        assert torch.equal(ours[0], tokens[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1], tokens[1], strict=True))
        rows = {k: v.reshape(5, 10, *v.shape[1:]) for k, v in inputs.items() if k in
                ("hidden", "targets", "teacher_hidden", "mask", "old_logp")}  # fmt: skip
        padded = inputs | rows | {"cu_seqlens": None, "advantages": torch.ones(5)}
        by_row = sgcd_loss(**padded, has_teacher=torch.tensor([1, 1, 0, 1, 0]))
        by_token = sgcd_loss(**padded, has_teacher=torch.tensor([1, 1, 0, 1, 0])[:, None].expand(5, 10))
        assert torch.equal(by_row[0], by_token[0])

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_five_products_give_what_six_give(self, impl: str, loss_type: str) -> None:
        inputs = batch(impl)
        five = run(inputs, has_teacher=has_teacher(), loss_type=loss_type)
        six = run(inputs, has_teacher=has_teacher(), loss_type=loss_type, reuse_lse=False)
        assert_close(five[:2], six[:2])
        torch.testing.assert_close(five[2]["entropy"], six[2]["entropy"], rtol=1e-5, atol=1e-6)
        assert five[2].keys() == six[2].keys()

    def test_tokens_without_a_teacher_are_all_that_is_computed_again(
        self, impl: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs, calls = batch(impl), Calls(monkeypatch, impl, "logprob_forward")
        run(inputs, has_teacher=has_teacher())
        ((x, targets, *_),) = calls.arguments
        rows = (inputs["mask"] & ~has_teacher()).nonzero().squeeze(1)
        assert torch.equal(x.rows, rows) and torch.equal(targets, inputs["targets"][rows])
        run(inputs)
        assert len(calls.arguments) == 1  # with a teacher everywhere nothing is

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_nowhere_is_the_plain_loss_and_no_inert_credit(self, impl: str, dtype: torch.dtype) -> None:
        inputs = batch(impl, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            loss, grads, metrics = run(inputs, has_teacher=torch.zeros(4))
        plain, _ = plain_loss(inputs)
        assert torch.equal(loss, plain)
        assert all(torch.equal(a, b) for a, b in zip(grads, gradients(plain, inputs), strict=True))
        assert metrics["credit/inert"] == 0 and metrics["credit/mean_weight"] == 1

    @pytest.mark.parametrize("rule", ["gear", "rlsd", "sc_grpo", "egrsd", "dgpo", "turn_level", "uniform", "permuted"])
    def test_every_rule_leaves_the_others_alone(self, impl: str, rule: str) -> None:
        weights = per_token(batch(impl), has_teacher(), CreditConfig(rule=rule)).weights  # type: ignore[arg-type]
        assert (weights[~has_teacher()] == 1).all() and (weights[has_teacher()] != 1).any()

    def test_another_shape_is_refused(self) -> None:
        for shape in ((N - 1,), (5,), (N, 1)):
            with pytest.raises(
                ValueError, match=r"has_teacher has shape .*, needs \[50\] \(per token\) or \[4\] \(per sequence\)"
            ):
                sgcd_loss(**batch(), has_teacher=torch.ones(shape))
        with pytest.raises(ValueError, match=r"has_teacher is \[1, 0, 0, 1\] \(list\), needs a tensor"):
            sgcd_loss(**batch(), has_teacher=[1, 0, 0, 1])


def plain_loss(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return linear_policy_loss(**{k: v for k, v in inputs.items() if k != "teacher_hidden"}, **options)


class TestWhereCreditCannotAct:
    """The host knows it: no `teacher_hidden`, gamma 0 in a rule that uses it, rule "none"."""

    REASONS: dict[str, dict[str, Any]] = {
        "no teacher": {"teacher_hidden": None},
        "no teacher, says has_teacher too": {"teacher_hidden": None, "has_teacher": torch.zeros(4)},
        "gamma": {"config": CreditConfig(gamma=0.0)},
        "gamma of uniform": {"config": CreditConfig(gamma=0.0, rule="uniform")},
        "gamma of matched_uniform": {"config": CreditConfig(gamma=0.0, rule="matched_uniform")},
        "gamma of permuted": {"config": CreditConfig(gamma=0.0, rule="permuted")},
        "rule": {"config": CreditConfig(rule="none")},
    }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("reason", REASONS)
    def test_it_is_the_plain_loss_to_the_bit_and_scores_nothing(
        self, impl: str, reason: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = [Calls(monkeypatch, impl, name) for name in ("divergence_forward", "find_spans", "order_statistics")]
        inputs = batch(impl, dtype)
        options = {"beta": 0.1, "ref_logp": inputs["old_logp"] - 0.1, "temperature": 0.8, "softcap": 6.0}
        for loss_type in LOSS_TYPES:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                ours, metrics = sgcd_loss(**inputs | self.REASONS[reason], loss_type=loss_type, **options)
            plain, plain_metrics = plain_loss(inputs, loss_type=loss_type, **options)
            assert torch.equal(ours, plain)
            for a, b in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
                assert torch.equal(a, b)
            assert list(metrics) == list(plain_metrics)
            assert all(torch.equal(metrics[name], plain_metrics[name]) for name in metrics)
        assert not any(call.arguments for call in calls)

    @pytest.mark.parametrize("rule", ["gear", "rlsd", "sc_grpo", "egrsd", "dgpo", "turn_level"])
    def test_rules_without_gamma_act_at_any(self, impl: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = Calls(monkeypatch, impl, "divergence_forward")
        _, metrics = sgcd_loss(**batch(impl), config=CreditConfig(gamma=0.0, rule=rule))  # type: ignore[arg-type]
        assert len(calls.arguments) == 1 and "credit/mean_weight" in metrics

    def test_bad_input_is_refused_all_the_same(self) -> None:
        without = batch() | {"teacher_hidden": None, "advantages": torch.ones(N)}
        for wrong in ({"turn_ids": torch.ones(3)}, {"has_teacher": torch.ones(3)}, {"cu_seqlens": None}):
            with pytest.raises(ValueError, match=f"^{next(iter(wrong))} "):
                sgcd_loss(**without | {"loss_type": "dapo"} | wrong)

    @pytest.mark.parametrize("has_one", [True, False])
    def test_what_is_known_of_each_token_without_credit(self, impl: str, has_one: bool) -> None:
        inputs = batch(impl)
        inputs["teacher_hidden"] = inputs["teacher_hidden"] if has_one else None
        tokens = per_token(inputs, None, CreditConfig(gamma=0.0))
        assert (tokens.weights == 1).all() and (tokens.span_ids == -1).all()
        assert (tokens.saliency == 0).all() and (tokens.divergence == 0).all()
        assert torch.equal(tokens.teacher_logp, tokens.student_logp)
        assert (tokens.student_entropy[inputs["mask"]] > 0).all()
