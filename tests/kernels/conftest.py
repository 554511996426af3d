"""Run the tests of the ops on each backend that "auto" can choose here, and on the torch backend alone."""

from __future__ import annotations

import pytest

from sgcd_kernels import backend_status, backends

OPS = ("test_divergence", "test_logprob", "test_policy_loss", "test_distill_loss", "test_sgcd")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in OPS and backend_status()["cpp"].usable:
        metafunc.fixturenames.insert(0, "chosen")
        metafunc.parametrize("chosen", ["cpp", "torch"], indirect=True)


@pytest.fixture
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the compiled backend out for the half of the tests that is for the torch backend."""
    if request.param == "torch":
        monkeypatch.delitem(backends._BACKENDS, "cpp")
