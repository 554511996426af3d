"""Where an op runs: with the GPU current that its tensors lie on, which Triton launches on whatever it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgcd_kernels import CreditConfig
from sgcd_kernels.backends import registry
from sgcd_kernels.backends.protocol import CreditTokens
from sgcd_kernels.core import registration


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on the second GPU; there is none here."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda:1"))  # type: ignore[assignment]


def test_the_tensors_gpu_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            seen.append(self.device)

        def __exit__(self, *_: object) -> None:
            seen.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    for given in ((None, 1.0, torch.zeros(1), "a"), (None, torch.zeros(1).as_subclass(Elsewhere), 1.0)):
        with registration._on_device_of(given):
            seen.append("body")
    assert seen == ["body", torch.device("cuda:1"), "body", "left"], "nothing is asked of CUDA for CPU tensors"


def test_every_op_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(registration.torch.library, "define", lambda *a, **k: None)
    monkeypatch.setattr(registration.torch.library, "register_fake", lambda *a, **k: None)
    monkeypatch.setattr(registration.torch.library, "impl", lambda name, key, body, lib: made.append(body))

    def logprob_op(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    registration.register(logprob_op)(logprob_op)
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or _Nothing())  # type: ignore[func-returns-value]
    made[0](torch.zeros(1).as_subclass(Elsewhere), [], [], None)  # no numbers
    assert entered == [torch.device("cuda:1")]


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_second_gpu() -> None:
    from sgcd_kernels import linear_logprob

    x, w, y = torch.randn(70, 64), torch.randn(100, 64), torch.randint(100, (70,))
    there = linear_logprob(*(a.to("cuda:1") for a in (x, w, y)))
    torch.testing.assert_close(there.logp.cpu(), linear_logprob(x, w, y).logp, rtol=1e-4, atol=1e-4)


def test_spans_of_a_gpu_without_triton_are_found_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "triton_unavailable_reason", lambda: "there is no triton")
    u, h = torch.tensor([0.0, 9.0, 9.0, 0.0]), torch.ones(4)
    tokens = CreditTokens(torch.ones(4, dtype=torch.bool), torch.tensor([0, 4]), None)
    here = registry.credit_backend("auto", u).find_spans(u, h, tokens, CreditConfig())

    class OnGpu(torch.Tensor):
        is_cuda = property(lambda self: True)  # type: ignore[assignment]

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return self.as_subclass(torch.Tensor)

    there = registry.credit_backend("auto", u.as_subclass(OnGpu))
    assert torch.equal(here, there.find_spans(u.as_subclass(OnGpu), h.as_subclass(OnGpu), tokens, CreditConfig()))
    assert here.tolist() == [-1, 1, 1, 1]
