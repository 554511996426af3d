"""The table of docs/trl.md, for one trainer of each kind: measured, not counted."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
pytest.importorskip("datasets", reason="datasets is not installed")

from tests.sgcd_kernels.integrations import trl_memory


@pytest.mark.slow
@pytest.mark.parametrize(("family", "times"), [("SGCD", 5), ("GKD", 10), ("SDFT", 10)])
def test_hidden_states_take_a_fraction(family: str, times: int) -> None:
    own, tokens = trl_memory.measured(family, False)
    ours, _ = trl_memory.measured(family, True)
    logits = tokens * trl_memory.VOCABULARY * 4
    assert ours * times < own
    assert ours < logits
