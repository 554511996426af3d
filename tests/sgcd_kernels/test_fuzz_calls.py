"""Random calls raise a ValueError or agree with the reference; a nightly run makes 100 times as many."""

from __future__ import annotations

import random

import torch

from sgcd_kernels.ops.logprob import LogprobStats
from tests.properties import examples
from tests.sgcd_kernels.fuzz_calls import Case, differs, fuzz, outcome


def test_random_calls_are_refused_or_right() -> None:
    seed = random.SystemRandom().getrandbits(32)
    found, problems = fuzz(examples(600), seed)
    assert not problems, "\n".join(problems[:10])
    assert min(found[kind] for kind in ("refused", "right", "made")) > 0, found


def test_the_fuzzer_sees_a_wrong_result_and_an_unclear_error() -> None:
    x, w, y = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2])
    case = Case(
        "linear_logprob", {"hidden": x, "weight": w, "targets": y, "bias": None, "temperature": 1, "softcap": None}
    )
    assert outcome(case) == ("right", "")
    wrong = torch.full((3,), -1.3)
    assert "logp is -1.29" in str(differs(case, LogprobStats(wrong, wrong, wrong)))
    assert outcome(Case("linear_logprob", {**case.arguments, "unknown": 1}))[0] == "raised"
