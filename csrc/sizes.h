// Sizes common to all files, and arithmetic on sizes.
#pragma once

#include <stdint.h>

namespace sgcd {

constexpr int kTile = 64;  // vocab ids and tokens of a tile of logits

constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

}  // namespace sgcd
