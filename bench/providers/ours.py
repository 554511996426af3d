"""This library, one provider per backend; `-lse` reuses the log-sum-exp of the scoring pass, which saves a product."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case
from bench.inputs import EPSILON, EPSILON_HIGH, Inputs
from bench.providers import Outputs, provides
from bench.truth import BETA, CREDIT, credit
from sgcd_kernels import (
    backend_status,
    linear_distill_loss,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    sgcd_loss,
)

BACKENDS = ("triton", "cpp", "torch")
CLIP = {"epsilon": EPSILON, "epsilon_high": EPSILON_HIGH, "loss_type": "dapo"}


def refuses(impl: str) -> Callable[[Case], str | None]:
    """Why a backend does not run here, as `backend_status` says it."""

    def reason(case: Case) -> str | None:
        status = backend_status()[impl]
        if not status.usable:
            return f"not usable here: {status.reason}"
        if impl == "triton" and case.device == "cpu":
            return "not usable here: on CPU tensors only Triton's interpreter runs it, which says nothing of its speed"
        return "runs on CPU tensors" if impl == "cpp" and case.device != "cpu" else None

    return reason


def register(impl: str) -> None:
    def ours(op: str, name: str = impl) -> Callable[..., object]:
        return provides(op, name, package="sgcd-kernels", refuses=refuses(impl))

    @ours("logprob")
    def logprob(i: Inputs, mode: str) -> Outputs:
        return {"logp": linear_logprob(i.hidden, i.weight, i.targets, impl=impl).logp}

    @ours("cross_entropy")
    def cross_entropy(i: Inputs, mode: str) -> Outputs:
        return {"loss": -linear_logprob(i.hidden, i.weight, i.targets, impl=impl).logp.sum() / i.kept}

    @ours("divergence")
    def divergence(i: Inputs, mode: str) -> Outputs:
        stats = linear_divergence(i.hidden, i.weight, i.targets, i.teacher, impl=impl)
        return {"reverse_kl": stats.reverse_kl, "teacher_entropy": stats.teacher_entropy}

    @ours("distill")
    def distill(i: Inputs, mode: str) -> Outputs:
        return {
            "loss": linear_distill_loss(i.hidden, i.weight, i.teacher, mask=i.mask, kind="jsd", beta=BETA, impl=impl)
        }

    @ours("policy_loss")
    def policy_loss(i: Inputs, mode: str) -> Outputs:
        loss, _ = linear_policy_loss(
            i.hidden,
            i.weight,
            i.targets,
            i.advantages,
            old_logp=i.old_logp,
            cu_seqlens=i.cu_seqlens,
            impl=impl,
            **CLIP,  # type: ignore[arg-type]
        )
        return {"loss": loss}

    def step(reuse: bool) -> Callable[[Inputs, str], Outputs]:
        def run(i: Inputs, mode: str) -> Outputs:
            loss, _ = sgcd_loss(
                i.hidden,
                i.weight,
                i.targets,
                i.teacher,
                i.advantages,
                i.cu_seqlens,
                turn_ids=i.turns,
                old_logp=i.old_logp,
                config=CREDIT,
                reuse_lse=reuse,
                impl=impl,
                **CLIP,  # type: ignore[arg-type]
            )
            return {"loss": loss}

        return run

    ours("sgcd")(step(reuse=False))
    ours("sgcd", f"{impl}-lse")(step(reuse=True))


for backend in BACKENDS:
    register(backend)


@provides("credit", "ours", package="sgcd-kernels")
def ours_credit(i: Inputs, mode: str) -> Outputs:
    """One definition serves all backends."""
    return {"weights": credit(i, i.divergence, i.teacher_entropy)}
