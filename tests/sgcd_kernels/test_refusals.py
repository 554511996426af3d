"""Every wrong call of `refusals.py` raises the error message recorded in `refusals.json`.

After a deliberate change of a message, record the table again, and review its diff before committing:

    python -m tests.sgcd_kernels.refusals record
    git diff tests/sgcd_kernels/refusals.json
"""

from __future__ import annotations

import json

import pytest

from tests.sgcd_kernels.refusals import GOLDEN, all_calls, cannot_run_here, refusal

RECORDED: dict[str, str] = json.loads(GOLDEN.read_text(encoding="utf-8"))
FUNCTIONS = sorted({name.partition(":")[0] for name in RECORDED})


def test_each_recorded_call_is_still_made() -> None:
    assert not RECORDED.keys() - all_calls().keys()
    assert len(RECORDED) > 1000


@pytest.mark.parametrize("function", FUNCTIONS)
def test_words(function: str) -> None:
    calls = all_calls()
    changed = {}
    for name, words in RECORDED.items():
        if name.partition(":")[0] == function and not cannot_run_here(name):
            said = refusal(calls[name])
            if said != words:
                changed[name] = {"recorded": words, "said": said or "nothing: the call is accepted"}
    assert not changed, json.dumps(changed, indent=1, ensure_ascii=False)
