// For the credit rules: the spans and the quantiles of each packed sequence.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace sgcd {

// [N] int64: the index of the onset of the span that a token lies in, or -1. u, entropy [N] float32 or float64, turns
// [N] int64, eligible [N] bool, cu_seqlens [B + 1] int64.
at::Tensor find_spans(const at::Tensor& u, const at::Tensor& entropy, const std::optional<at::Tensor>& turns,
                      const at::Tensor& eligible, const at::Tensor& cu_seqlens, double start, double reset,
                      int64_t patience, double entropy_ratio, double entropy_margin);

// [2, B]: each sequence's eligible values, in ascending order with NaN last, at the indices `low` and `high` [B] int64.
// Indices are clamped to the last value, and a sequence without values gets 0.
at::Tensor order_statistics(const at::Tensor& x, const at::Tensor& eligible, const at::Tensor& cu_seqlens,
                            const at::Tensor& low, const at::Tensor& high);

}  // namespace sgcd
