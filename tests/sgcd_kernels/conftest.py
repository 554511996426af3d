"""Which backends the tests of the ops run on: the ops by "auto", with and without C++; the kernels by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sgcd_kernels import backend_status
from sgcd_kernels.backends import registry
from sgcd_kernels.backends.cpp import extension

OPS = ("test_divergence", "test_logprob", "test_policy_loss", "test_distill_loss", "test_sgcd")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    _, folder, module = metafunc.module.__name__.rsplit(".", 2)
    if folder == "ops" and module in OPS and backend_status()["cpp"].usable:
        metafunc.fixturenames.insert(0, "chosen")
        metafunc.parametrize("chosen", ["cpp", "torch"], indirect=True)


@pytest.fixture
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiled backend out for the half of the tests that is for the torch backend."""
    if request.param == "torch":
        monkeypatch.delitem(registry._BACKENDS, "cpp")
        monkeypatch.setattr(extension, "unavailable_reason", lambda: "this test is for the torch backend")


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> str:
    """A compiled backend by name, where it can be used."""
    status = backend_status()[request.param]
    if not status.usable:
        pytest.skip(status.reason)
    return str(request.param)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill all fresh memory, scratch inside the operators too, with NaN (bytes with 255, NaN in bf16)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
