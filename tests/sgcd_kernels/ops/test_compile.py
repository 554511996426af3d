"""torch.compile: one graph through every op, the bits of eager, one compilation for all N; and a fast import."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sgcd_kernels import (
    CreditConfig,
    FusedLinearSGCDLoss,
    PolicyLossConfig,
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.backends import registry
from sgcd_kernels.backends.protocol import DistillSaved, DivergenceOptions
from sgcd_kernels.core.lm_head import HeadGrads, LMHead, Needs
from sgcd_kernels.core.statistics import LogprobValues
from sgcd_kernels.credit.rules import Credit
from sgcd_kernels.credit.weights import CreditSignals, config_for_op, credit_op
from sgcd_kernels.ops import distill_loss, policy_loss
from sgcd_kernels.ops.divergence import divergence_op
from sgcd_kernels.ops.logprob import logprob_backward_op, logprob_op
from sgcd_kernels.ops.policy_inputs import PolicyTokens, Settings
from sgcd_kernels.ops.policy_loss import KnownLse, policy_loss_op
from sgcd_kernels.ops.sgcd_batch import batch_op, masked_mean_op, weigh_op

H, V = 8, 60
CONFIG = CreditConfig(gamma=0.7, d_floor=0.05, rule="permuted", seed=-3)
FORMS = [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False), (torch.float64, True)]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def tensors(n: int = 12, dtype: torch.dtype = torch.float32, *, padded: bool = False) -> Tensors:
    g = torch.Generator().manual_seed(n)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, n // 2, *x.shape[1:]) if padded else x

    y = torch.randint(V, (n,), generator=g)
    y[3] = -100
    return {
        "x": tokens(rand(n, 2 * H)[:, ::2].to(dtype)).requires_grad_(),  # not contiguous
        "w": rand(V, H).to(dtype).requires_grad_(),
        "b": rand(V).to(dtype).requires_grad_(),
        "t": tokens(rand(n, H).to(dtype)),
        "y": tokens(y),
        "a": tokens(rand(n)),
        "old": tokens(-4 + rand(n)),
        "mask": tokens(torch.arange(n) % 5 != 4),
        "some": tokens(torch.arange(n) % 3 != 1),
        "tau": tokens(0.5 + rand(n).abs()),
        "cu": torch.tensor([0, n // 3, n]),
    }


def policy(i: Tensors) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"old_logp": i["old"], "ref_logp": i["old"] - 0.1, "beta": 0.1, "mask": i["mask"]}
    options["cu_seqlens"] = None if i["x"].dim() == 3 else i["cu"]
    loss, metrics = linear_policy_loss(i["x"], i["w"], i["y"], i["a"], bias=i["b"], temperature=i["tau"], **options)
    return loss, *metrics.values()


def with_policy(i: Tensors) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"policy": PolicyLossConfig("dapo", epsilon_high=0.3), "epsilon": 0.1}
    loss, metrics = linear_policy_loss(i["x"], i["w"], i["y"], i["a"], bias=i["b"], old_logp=i["old"], **options)
    return loss, *metrics.values()


def sgcd(**options: Any) -> Callable[[Tensors], tuple[torch.Tensor, ...]]:
    """`options` that are names are looked up among the tensors."""

    def call(i: Tensors) -> tuple[torch.Tensor, ...]:
        cu = None if i["x"].dim() == 3 else i["cu"]
        named = {"teacher_hidden": "t", "config": CONFIG} | options
        given = {name: i[value] if isinstance(value, str) else value for name, value in named.items()}
        batch = {"hidden": i["x"], "weight": i["w"], "targets": i["y"], "advantages": i["a"], "mask": i["mask"]}
        loss, metrics = sgcd_loss(**batch, cu_seqlens=cu, bias=i["b"], **given)
        return loss, *metrics.values()

    return call


def module(i: Tensors) -> tuple[torch.Tensor, ...]:
    loss = FusedLinearSGCDLoss(config=CONFIG, loss_type="dapo", temperature=0.8, reuse_lse=True)
    cu = None if i["x"].dim() == 3 else i["cu"]
    value, metrics = loss(i["x"], i["w"], i["y"], i["t"], i["a"], cu, turn_ids=i["y"])
    return value, *metrics.values()


def divergence(i: Tensors) -> tuple[torch.Tensor, ...]:
    stats = linear_divergence(i["x"], i["w"], i["y"], i["t"], features=("tv", "jsd"), beta=0.3, top_k=4, bias=i["b"])
    return tuple(x for x in stats if x is not None)


def credit(i: Tensors) -> tuple[torch.Tensor, ...]:
    d = i["a"].reshape(-1).abs()
    return tuple(credit_weights(d, d, i["cu"], mask=i["mask"].reshape(-1), config=CONFIG))


def distill(kind: str, reduction: str) -> Callable[[Tensors], tuple[torch.Tensor, ...]]:
    def call(i: Tensors) -> tuple[torch.Tensor, ...]:
        teacher = i["w"].detach().flip(0)
        options: dict[str, Any] = {"kind": kind, "reduction": reduction, "mask": i["mask"], "temperature": 0.9}
        return (linear_distill_loss(i["x"], i["w"], i["t"], teacher, bias=i["b"], **options),)

    return call


OPS: dict[str, Callable[[Tensors], tuple[torch.Tensor, ...]]] = {
    "logprob": lambda i: tuple(linear_logprob(i["x"], i["w"], i["y"], bias=i["b"], temperature=0.7, softcap=9.0)),
    "divergence": divergence,
    "credit": credit,
    "policy": policy,
    "distill none": distill("reverse_kl", "none"),
    "distill sum": distill("jsd", "sum"),
    "distill mean": distill("forward_kl", "mean"),
    "policy of a config": with_policy,
    "sgcd": sgcd(),
    "sgcd, six products": sgcd(reuse_lse=False),
    "sgcd, some teachers": sgcd(has_teacher="some"),
    "sgcd, no teacher": sgcd(teacher_hidden=None),
    "module": module,
}


def results(call: Callable[[Tensors], tuple[torch.Tensor, ...]], i: Tensors) -> list[torch.Tensor]:
    """Values, and gradients of a sum over those that have one, each scaled by something that half would round."""
    out = call(i)
    seeds = [(x, torch.full_like(x, 1 / 3)) for x in out if x.requires_grad]
    leaves = [x for x in i.values() if x.requires_grad]
    if not seeds:
        return [x.detach() for x in out]
    outputs, upstream = zip(*seeds)
    grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return [x.detach() for x in out] + [g for g in grads if g is not None]


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for ours, plain in zip(got, want):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(("dtype", "padded"), FORMS)
@pytest.mark.parametrize("op", OPS)
def test_one_graph_and_the_bits_of_eager(op: str, dtype: torch.dtype, padded: bool) -> None:
    i = tensors(dtype=dtype, padded=padded)
    compiled = torch.compile(OPS[op], backend="aot_eager", fullgraph=True)
    assert_same_bits(results(compiled, i), results(OPS[op], i))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_inductor_gives_the_bits_of_eager(op: str, dtype: torch.dtype) -> None:
    i = tensors(dtype=dtype)
    compiled = torch.compile(OPS[op], backend="inductor", fullgraph=True)
    assert_same_bits(results(compiled, i), results(OPS[op], i))


@pytest.mark.parametrize("op", OPS)
def test_another_number_of_tokens_compiles_nothing(op: str) -> None:
    compiled = torch.compile(OPS[op], backend="aot_eager", fullgraph=True, dynamic=True)
    results(compiled, tensors(12))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (14, 30, 7):
            i = tensors(n)
            assert_same_bits(results(compiled, i), results(OPS[op], i))


def test_options_may_be_tensors() -> None:
    def call(i: Tensors) -> tuple[torch.Tensor, ...]:
        options: dict[str, Any] = {"temperature": torch.tensor(0.7), "num_items_in_batch": i["cu"][-1]}
        return (linear_policy_loss(i["x"], i["w"], i["y"], i["a"], loss_type="dapo", **options)[0],)

    i = tensors()
    assert_same_bits(results(torch.compile(call, backend="aot_eager", fullgraph=True), i), results(call, i))


def test_compiled_without_grad_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True)
    i = tensors()
    want = policy(i)[0].detach()
    monkeypatch.setattr(policy_loss, "_with_slope", None)
    with torch.no_grad():
        loss = compiled(i)[0]
    assert torch.equal(loss, want)
    assert not loss.requires_grad


def test_what_only_data_can_show_is_a_value_error_there_too() -> None:
    compiled = torch.compile(OPS["logprob"], backend="aot_eager", fullgraph=True)
    i = tensors()
    with pytest.raises(ValueError, match="targets holds 60, needs 0 <= y < 60"):
        compiled(i | {"y": i["y"].clamp(min=V)})


def test_inert_credit_warns_even_if_metrics_are_unused() -> None:
    def call(i: Tensors) -> torch.Tensor:
        return sgcd_loss(i["x"], i["w"], i["y"], i["x"], i["a"], i["cu"])[0]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="credit is inert: all divergences are 0 over 11 eligible tokens"):
        compiled(tensors())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_process_group_does_not_break_the_graph(group: dist.ProcessGroup) -> None:
    def call(i: Tensors) -> tuple[torch.Tensor, ...]:
        stats = linear_logprob(i["x"], i["w"], i["y"], group=group)
        return stats.logp, linear_policy_loss(i["x"], i["w"], i["y"], i["a"], loss_type="dapo", group=group)[0]

    i = tensors()
    assert_same_bits(results(torch.compile(call, backend="aot_eager", fullgraph=True), i), results(call, i))


def flattened(op: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the op of torch.library, its flat arguments), where `op` takes bundles."""
    registered: Any = op.op  # type: ignore[attr-defined]
    return registered.dispatched, tuple(registered.flat(arguments))


def test_an_op_called_after_a_graph_break_is_not_traced() -> None:
    """A generator is run unchanged, but the functions that it calls are traced."""
    i, graphs = {name: x.detach() for name, x in tensors().items()}, []
    op, flat = flattened(logprob_op, i["x"], LMHead(i["w"]), i["y"], -100, "torch")

    def generator() -> Iterator[torch.Tensor]:
        torch._dynamo.graph_break()
        yield op(*flat)[0]

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(lambda: list(generator()), backend=count)()
    assert len(graphs) == 0


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check(op: Callable[..., Any], *arguments: Any) -> None:
    """What torch.library asks of an op."""
    registered, flat = flattened(op, *arguments)
    torch.library.opcheck(registered, flat, test_utils=OPCHECKS)


@pytest.mark.parametrize(("dtype", "padded"), FORMS)
class TestOpcheck:
    def test_logprob(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, y, b, tau = (i[k] for k in ("x", "w", "y", "b", "tau"))
        check(logprob_op, x, LMHead(w, temperature=0.5), y, -100, "auto")
        check(logprob_op, x, LMHead(w.detach(), b, 5.0, tau), y.int(), -100, "torch")
        x, w, b = (leaf.detach() for leaf in (x, w, b))
        stats, head = linear_logprob(x, w, y), LMHead(w, b, 5.0, tau)
        values, upstream = LogprobValues(None, stats.entropy, stats.lse), LogprobValues(stats.lse, None, stats.lse)
        for needs in (Needs(True, True, True), Needs(False, True, False)):
            check(logprob_backward_op, x, head, y, -100, "auto", values, upstream, needs)

    def test_divergence(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, y, t, b = (i[k].detach() for k in ("x", "w", "y", "t", "b"))
        head, plain = LMHead(w, b, temperature=0.5), DivergenceOptions()
        check(divergence_op, x, head, t, head, y, -100, plain, "auto")
        teacher, everything = LMHead(w.float().flip(0), softcap=9.0), DivergenceOptions(("jsd", "tv"), 0.2, 3)
        check(divergence_op, x, LMHead(w, b, 9.0), t.float(), teacher, y, -100, everything, "auto")

    def test_policy_loss(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, b, y, a, old, mask, tau = (i[k] for k in ("x", "w", "b", "y", "a", "old", "mask", "tau"))
        # A loss > 0, whose absolute value, which is what opcheck derives, has the slope 1: eager scales the gradients
        # among the op's own results, where only opcheck looks.
        a = -a.abs()
        cu = None if padded else i["cu"]
        plain, tokens = Settings(LMHead(w, b), PolicyLossConfig(), -100, "auto"), PolicyTokens(y, a, cu_seqlens=cu)
        check(policy_loss_op, x, plain, tokens, KnownLse(), Needs(True, True, True))
        frozen, per_sequence = plain._replace(head=LMHead(w.detach())), tokens._replace(advantages=a.reshape(-1)[:2])
        check(policy_loss_op, x, frozen, per_sequence, KnownLse(), Needs(True, False, False))
        x, w = x.detach(), w.detach()
        policy = PolicyLossConfig("gspo", 0.1, 0.3, 0.2, torch.tensor(7))
        every = Settings(LMHead(w, None, 9.0, tau), policy, -100, "torch")
        given = PolicyTokens(y, a, old, mask, cu, old, a.abs())
        for known in (KnownLse(old.abs()), KnownLse(old.abs(), known=i["some"]), KnownLse(old.abs(), old * 1e-8)):
            check(policy_loss_op, x, every, given, known, Needs(False, False, False))

    def test_distill_loss(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, b, t, mask, tau = (i[k] for k in ("x", "w", "b", "t", "mask", "tau"))
        for options in (("reverse_kl", 0.5, "none"), ("jsd", 0.2, "mean")):
            student, teacher = LMHead(w, temperature=0.5), LMHead(w.detach(), temperature=0.5)
            auto, plain = distill_loss._Options(*options, "auto"), distill_loss._Options(*options, "torch")
            check(distill_loss.distill_op, distill_loss._Inputs(x, student, t, teacher, None), auto)
            student, teacher = LMHead(w, b, 9.0, tau), LMHead(w.detach().flip(0), b.detach(), 9.0, tau)
            check(distill_loss.distill_op, distill_loss._Inputs(x, student, t, teacher, mask), plain)
        x, w, b = (leaf.detach() for leaf in (x, w, b))
        inputs = distill_loss._Inputs(x, LMHead(w, b), t, LMHead(w, b), mask)
        loss, saved = distill_loss.distill_op(inputs, auto)
        assert isinstance(saved, DistillSaved)
        check(distill_loss.distill_backward_op, inputs, auto, saved, loss, Needs(True, False, True))

    def test_credit_and_sgcd(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        d, n = i["a"].reshape(-1).abs().to(dtype), i["a"].numel()
        signals, turns = CreditSignals(d, d, d[:2], d, d, None, None), torch.arange(n) // 5
        for config in (CreditConfig(), CONFIG, CreditConfig(rule="gear"), CreditConfig(rule="turn_level")):
            check(credit_op, signals, i["cu"], i["mask"].reshape(-1), turns, config_for_op(config), "auto", "")
        cu, head, a = None if padded else i["cu"], LMHead(i["w"].detach()), i["a"].to(dtype)
        every = PolicyTokens(i["y"], a, mask=i["mask"], cu_seqlens=cu)
        check(batch_op, head, every, i["some"].float(), i["some"], -100)
        check(batch_op, head, PolicyTokens(i["y"], d[:2], cu_seqlens=cu), None, torch.ones(2), -100)
        d = d.reshape(i["a"].shape).clone()
        batch = batch_op(head, every, None, None, -100)
        credit = Credit(1 + d, d.clone(), (torch.arange(n) // 3 - 1).reshape(d.shape))
        check(weigh_op, batch, credit, d, d.clone(), 2.0, False)
        check(masked_mean_op, d, i["mask"])


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_no_result_shares_memory(impl: str) -> None:
    """What the schema promises and the compiler relies on; with no token left out, nothing is copied on the way."""
    i = {name: x.detach() for name, x in tensors().items()}
    x, head, y, t = i["x"], LMHead(i["w"]), i["y"].clamp(min=0), i["t"]
    tokens = PolicyTokens(y, i["a"], cu_seqlens=i["cu"])
    distilled = distill_loss.distill_op(
        distill_loss._Inputs(x, head, t, head, None), distill_loss._Options("reverse_kl", 0.5, "none", impl)
    )
    settings = Settings(head, PolicyLossConfig(), -100, impl)
    policy = policy_loss_op(x, settings, tokens, KnownLse(), Needs(True, True, False))
    divergence = divergence_op(x, head, t, head, y, -100, DivergenceOptions(), impl)
    calls = {
        "logprob": logprob_op(x, head, y, -100, impl),
        "divergence": (*divergence.stats, divergence.student_lse_low),
        "distill": (distilled.loss, *distilled.saved),
        "policy": (policy.loss, *policy.metrics, *policy.grads, policy.logp, policy.entropy),
        "batch": batch_op(head, tokens, None, None, -100),
    }
    given = [a for a in (x, head.weight, y, t, *tokens) if a is not None]
    for name, results in calls.items():
        out = [z for z in results if z is not None]
        pointers = {z.untyped_storage().data_ptr() for z in (*out, *given)}
        assert len(pointers) == len(out) + len({z.untyped_storage().data_ptr() for z in given}), name


def test_metrics_have_their_names() -> None:
    policy = "clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean ratio/mean ratio/min ratio/max num_tokens"
    credit = "mean_divergence mean_weight frac_salient frac_saturated num_spans mean_span_length teacher_entropy inert"
    _, metrics = sgcd_loss(*(tensors()[k] for k in ("x", "w", "y", "t", "a", "cu")))
    assert list(metrics) == [*policy.split(), "entropy", *(f"credit/{name}" for name in credit.split())]
    _, plain = linear_policy_loss(*(tensors()[k] for k in ("x", "w", "y", "a")), loss_type="dapo")
    assert list(plain) == [*policy.split(), "entropy"]


class TestPolicyGradientsAreScaledWhereTheyLie:
    @pytest.fixture
    def computed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The addresses of the gradients that forward computes."""
        addresses: list[int] = []

        def noting(backward: Callable[..., HeadGrads]) -> Callable[..., HeadGrads]:
            def run(*arguments: Any) -> HeadGrads:
                grads = backward(*arguments)
                addresses.extend(x.data_ptr() for x in (grads.hidden, grads.weight) if x is not None)
                return grads

            return run

        for name in ("torch", "cpp"):
            backend = registry._FOLDERS[name]
            monkeypatch.setattr(backend, "logprob_backward", noting(backend.logprob_backward))
        return addresses

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("factor", [1.0, 1 / 3])
    @pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=pytest.mark.slow)])
    def test_no_copy(self, dtype: torch.dtype, factor: float, backend: str | None, computed: list[int]) -> None:
        i = tensors(dtype=dtype)

        def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return linear_policy_loss(x, w, i["y"], i["a"], loss_type="dapo")[0]

        x, w = (i[k].detach().contiguous().requires_grad_() for k in ("x", "w"))
        run = call if backend is None else torch.compile(call, backend=backend, fullgraph=True)
        (run(x, w) * factor).backward()
        assert [x.grad.data_ptr(), w.grad.data_ptr()] == computed

    def test_a_factor_of_one_writes_nothing(self) -> None:
        for factor, writes in ((1.0, 0), (0.5, 1)):
            gradient = torch.ones(3)
            assert policy_loss.scale(gradient, torch.tensor(factor)) is gradient
            assert gradient._version == writes
            assert (gradient == factor).all()


@pytest.mark.parametrize("op", ["logprob", "policy", "distill none"])
def test_a_second_derivative_is_refused(op: str) -> None:
    i = tensors(dtype=torch.float64)
    (grad,) = torch.autograd.grad(OPS[op](i)[0].sum() ** 2, i["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_what_is_trained_gets_a_graph() -> None:
    """The teacher, log-probs and advantages are constants, whatever they require."""
    i = {name: x.detach() for name, x in tensors().items()}
    given = {k: i[k].requires_grad_() for k in ("a", "old", "t", "tau")}
    loss, _ = linear_policy_loss(
        i["x"], i["w"], i["y"], given["a"], old_logp=given["old"], loss_type="dapo", temperature=given["tau"]
    )
    assert not loss.requires_grad
    assert not linear_distill_loss(i["x"], i["w"], given["t"], temperature=given["tau"]).requires_grad
    assert not linear_logprob(i["x"], i["w"], i["y"], temperature=given["tau"]).logp.requires_grad


def test_import_is_fast_and_leaves_the_compiler_alone() -> None:
    """CPU time, against that of importing torch in the same process."""
    code = (
        "import sys, time; t = time.process_time(); import torch; u = time.process_time(); import sgcd_kernels\n"
        "print(u - t, time.process_time() - u)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "sgcd_kernels.linear_logprob(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 2]))\n"
        "assert 'torch._dynamo' not in sys.modules, 'the first call imports the compiler'\n"
    )
    ratios = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        theirs, ours = map(float, run.stdout.split())
        ratios.append(ours / max(theirs, 0.5))
    assert statistics.median(ratios) < 0.3
