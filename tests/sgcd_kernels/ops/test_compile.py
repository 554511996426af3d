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
    credit_weights,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)
from sgcd_kernels.registered import policy_loss as registered_policy
from sgcd_kernels.registered.credit import as_arguments
from sgcd_kernels.registered.sgcd import METRICS

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
        "tau": tokens(0.5 + rand(n).abs()),
        "cu": torch.tensor([0, n // 3, n]),
    }


def policy(i: Tensors) -> tuple[torch.Tensor, ...]:
    options: dict[str, Any] = {"old_logp": i["old"], "ref_logp": i["old"] - 0.1, "beta": 0.1, "mask": i["mask"]}
    options["cu_seqlens"] = None if i["x"].dim() == 3 else i["cu"]
    loss, metrics = linear_policy_loss(i["x"], i["w"], i["y"], i["a"], bias=i["b"], temperature=i["tau"], **options)
    return loss, *metrics.values()


def sgcd(i: Tensors) -> tuple[torch.Tensor, ...]:
    cu = None if i["x"].dim() == 3 else i["cu"]
    loss, metrics = sgcd_loss(i["x"], i["w"], i["y"], i["t"], i["a"], cu, i["mask"], bias=i["b"], config=CONFIG)
    return loss, *metrics.values()


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
    "sgcd": sgcd,
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
    monkeypatch.setattr(registered_policy, "_slope", None)
    with torch.no_grad():
        loss = compiled(i)[0]
    assert torch.equal(loss, want)
    assert not loss.requires_grad


def test_what_only_data_can_show_is_a_value_error_there_too() -> None:
    compiled = torch.compile(OPS["logprob"], backend="aot_eager", fullgraph=True)
    i = tensors()
    with pytest.raises(ValueError, match="targets holds 60, needs 0 <= y < 60"):
        compiled(i | {"y": i["y"].clamp(min=V)})


def test_inert_credit_warns_though_nobody_reads_the_metrics() -> None:
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


def test_an_op_called_where_the_compiler_gave_up_is_not_traced() -> None:
    """A generator is run as it is, but what it calls is watched."""
    op, i, graphs = torch.ops.sgcd.linear_logprob.default, tensors(), []

    def generator() -> Iterator[torch.Tensor]:
        torch._dynamo.graph_break()
        yield op(i["x"].detach(), i["w"].detach(), i["y"], None, None, 1.0, None, -100, "torch", "")[0]

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(lambda: list(generator()), backend=count)()
    assert len(graphs) == 0


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check(name: str, *arguments: Any) -> None:
    torch.library.opcheck(getattr(torch.ops.sgcd, name).default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize(("dtype", "padded"), FORMS)
class TestOpcheck:
    def test_logprob(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, y, b, tau = (i[k] for k in ("x", "w", "y", "b", "tau"))
        check("linear_logprob", x, w, y, None, None, 0.5, None, -100, "auto", "")
        check("linear_logprob", x, w.detach(), y.int(), b, tau, 1.0, 5.0, -100, "torch", "")
        plain = [z.detach() for z in (x, w, y, b)]
        stats = linear_logprob(x.detach(), w.detach(), y)
        for needs in ([True, True, True], [False, True, False]):
            saved = (*plain, tau, stats.entropy, stats.lse, stats.lse, None, stats.lse)
            check("linear_logprob_backward", *saved, 1.0, 5.0, -100, "auto", "", needs)

    def test_divergence(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, y, t, b = (i[k].detach() for k in ("x", "w", "y", "t", "b"))
        check("linear_divergence", x, w, y, t, None, b, b, None, 0.5, None, -100, False, False, 0.5, None, "auto", "")
        wide = (t.float(), w.float().flip(0))
        check("linear_divergence", x, w, y, *wide, b, None, None, 1.0, 9.0, -100, True, True, 0.2, 3, "auto", "")

    def test_policy_loss(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, b, y, a, old, mask, tau = (i[k] for k in ("x", "w", "b", "y", "a", "old", "mask", "tau"))
        # A loss > 0, whose absolute value, which is what opcheck derives, has the slope 1: eager scales the gradients
        # among the op's own results, where only opcheck looks.
        a = -a.abs()
        cu = None if padded else i["cu"]
        plain = (None, 1.0, None, None, None, -100, "grpo", 0.2, 0.2, 0.0, "auto", "")
        check("linear_policy_loss", x, w, b, y, a, *(None,) * 2, cu, *(None,) * 3, *plain, [True, True, True])
        check("linear_policy_loss", x, w.detach(), None, y, a.reshape(-1)[:2], *(None,) * 2, cu,
              *(None,) * 3, *plain, [True, False, False])  # fmt: skip
        inputs = (x.detach(), w.detach(), None, y, a, old, mask, cu, old, a.abs(), old.abs())
        rich = (tau, 1.0, 9.0, torch.tensor(7), None, -100, "gspo", 0.1, 0.3, 0.2, "torch", "")
        check("linear_policy_loss", *inputs, *rich, [False, False, False])

    def test_distill_loss(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        x, w, b, t, mask, tau = (i[k] for k in ("x", "w", "b", "t", "mask", "tau"))
        for options in (("reverse_kl", 0.5, "none"), ("jsd", 0.2, "mean")):
            check("linear_distill_loss", x, w, None, t, None, None, None, None, 0.5, None, *options, "auto", "")
            teacher = (t, w.detach().flip(0), b.detach())
            check("linear_distill_loss", x, w, b, *teacher, mask, tau, 1.0, 9.0, *options, "torch", "")
        with torch.no_grad():
            x, w, b = (z.detach() for z in (x, w, b))
            out = torch.ops.sgcd.linear_distill_loss(x, w, b, t, None, b, mask, None, 1.0, None, *options, "auto", "")
        check("linear_distill_loss_backward", x, w, b, t, None, b, mask, None, *out[1:], out[0], 1.0, None, *options,
              "auto", "", [True, False, True])  # fmt: skip

    def test_credit_and_sgcd(self, dtype: torch.dtype, padded: bool) -> None:
        i = tensors(dtype=dtype, padded=padded)
        d, n = i["a"].reshape(-1).abs().to(dtype), i["a"].numel()
        for config in (CreditConfig(), CONFIG, CreditConfig(rule="gear"), CreditConfig(rule="turn_level")):
            signals = (d, d, i["cu"], i["mask"].reshape(-1), torch.arange(n) // 5, d[:2], d, d, None, None)
            check("credit_weights", *signals, *as_arguments(config))
        cu = None if padded else i["cu"]
        given = (i["w"].detach(), i["y"], i["a"].to(dtype), cu)
        check("sgcd_inputs", *given, i["mask"], i["mask"].float(), -100, "")
        check("sgcd_inputs", i["w"].detach(), i["y"], given[2][:2, 0] if padded else d[:2], cu, None, None, -100, "")
        weights, spans = 1 + d, torch.arange(n) // 3 - 1
        check("weigh_advantages", d, weights, d, spans, d.float(), d.float(), d.float(), d > 0.5, d > 1, 2.0, False)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_no_result_shares_memory(impl: str) -> None:
    """What the schema promises and the compiler relies on; with no token left out, nothing is copied on the way."""
    i = {name: x.detach() for name, x in tensors().items()}
    x, w, y, t = i["x"], i["w"], i["y"].clamp(min=0), i["t"]
    calls = (
        ("linear_logprob", x, w, y, None, None, 1.0, None, -100, impl, ""),
        ("linear_divergence", x, w, y, t, *(None,) * 4, 1.0, None, -100, False, False, 0.5, None, impl, ""),
        ("linear_distill_loss", x, w, None, t, *(None,) * 4, 1.0, None, "reverse_kl", 0.5, "none", impl, ""),
        ("sgcd_inputs", w, y, i["a"], i["cu"], None, None, -100, ""),
    )
    for name, *arguments in calls:
        out = getattr(torch.ops.sgcd, name)(*arguments)
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        assert len({z.untyped_storage().data_ptr() for z in (*out, *given)}) == len(out) + len(given), name


def test_metrics_have_their_names() -> None:
    _, metrics = sgcd_loss(*(tensors()[k] for k in ("x", "w", "y", "t", "a", "cu")))
    assert list(metrics) == [*registered_policy.metric_names(kl=False, entropy=True), *METRICS[1:]]


class TestPolicyGradientsAreScaledWhereTheyLie:
    @pytest.fixture
    def computed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The addresses of the gradients that forward computes."""
        addresses: list[int] = []

        def three(*arguments: Any) -> tuple[torch.Tensor, ...]:
            out = inner(*arguments)
            addresses.extend(x.data_ptr() for x in out[:2])
            return out

        inner = registered_policy.three
        monkeypatch.setattr(registered_policy, "three", three)
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
            assert registered_policy.scale(gradient, torch.tensor(factor)) is gradient
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
