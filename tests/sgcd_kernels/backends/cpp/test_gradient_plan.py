"""How the C++ backend cuts a gradient sweep (csrc/grad_plan.h): a pure function, compiled here without torch."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[4] / "csrc"
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
MAIN = r"""
#include <iostream>

#include "grad_plan.h"

int main() {
  sgcd::GradSizes s{};
  int weight_t;
  while (std::cin >> s.tokens >> s.vocab >> s.width >> s.depth >> s.element_size >> s.hidden_grad_size >>
         s.packed_tile_bytes >> s.cached_tokens >> weight_t >> s.needs_hidden >> s.needs_weight >> s.needs_bias) {
    s.weight_t = static_cast<sgcd::WeightT>(weight_t);
    const sgcd::GradPlan p = sgcd::plan_grad(s);
    std::cout << p.padded_tokens << ' ' << p.padded_width << ' ' << p.group << ' ' << p.chunk << ' ' << p.step << ' '
              << p.vocab_splits << ' ' << p.weight_t_bytes << ' ' << p.dz_bytes << '\n';
  }
}
"""
TILE, MB = 64, 1 << 20
IN_PLACE, INTERLEAVED, TRANSPOSED = range(3)
NEEDS = ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_plans_are_whole_tiles_within_their_budgets(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(MAIN)
    program = str(tmp_path / "plan")
    sources = [str(tmp_path / "main.cpp"), str(CSRC / "grad_plan.cpp")]
    subprocess.run([str(COMPILER), "-std=c++20", f"-I{CSRC}", *sources, "-o", program], check=True)
    cases = [
        (n, v, h, h + h % 2, size, size, packed * h * TILE * size, cached // TILE * TILE, weight_t, *needs)
        for n, v, h in itertools.product((1, 64, 65, 700, 16_384, 99_999), (1, 65, 49_152, 151_936), (1, 33, 576, 8192))
        for size, weight_t in ((4, IN_PLACE), (2, INTERLEAVED), (2, TRANSPOSED), (4, TRANSPOSED))
        for packed, cached, needs in itertools.product((1, 2), (0, n), NEEDS)
    ]
    lines = "\n".join(" ".join(map(str, case)) for case in cases)
    plans = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(plans) == len(cases)
    for case, line in zip(cases, plans, strict=True):
        n, v, h, _, size, _, tile_bytes, cached, weight_t, needs_hidden, needs_weight, _ = case
        padded, padded_width, group, chunk, step, splits, weight_t_bytes, dz_bytes = map(int, line.split())
        assert padded - TILE < n <= padded and padded_width - TILE < h <= padded_width
        assert all(x > 0 and x % TILE == 0 for x in (padded, padded_width, group, chunk, step)), case
        assert group <= padded and chunk < v + TILE and 1 <= splits <= 8, case
        if group > TILE:  # what both products read of the tokens
            assert group // TILE * (tile_bytes + needs_weight * padded_width * TILE * size) <= 24 * MB, case
        uncached = padded - cached if group == padded else group
        if chunk > TILE:
            assert chunk * uncached * size <= 8 * MB, case
        rounded = -(-uncached // 512)  # dZ lies in pieces of 512 tokens, 544 elements apart
        assert dz_bytes == (rounded * chunk * 544 * size if needs_weight else 0), case
        copies = needs_hidden and weight_t != IN_PLACE
        assert bool(weight_t_bytes) == bool(copies), case
        if copies and chunk > TILE:
            assert chunk * h * size <= 3 * MB and weight_t_bytes >= chunk * h * size, case
        assert splits == 1 or not needs_hidden or splits * padded * h * 4 <= 8 * MB, case
