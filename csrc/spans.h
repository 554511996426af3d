// What the credit rules ask of each packed sequence: its high-credit spans (sgcd_kernels/spans.py says what one is) and
// its quantiles (sgcd_kernels/packed.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace sgcd {

// [N] int64: the index of the onset of the span that a token lies in, or -1
at::Tensor find_spans(const at::Tensor& u, const at::Tensor& entropy, const std::optional<at::Tensor>& turns,
                      const at::Tensor& eligible, const at::Tensor& cu_seqlens, double start, double reset,
                      int64_t patience, double entropy_ratio, double entropy_margin);

// [2, B]: of each sequence's eligible values in rising order, NaN last, those at the places `low` and `high`; the places
// are clamped to what there is, and a sequence without values gets 0.
at::Tensor order_statistics(const at::Tensor& x, const at::Tensor& eligible, const at::Tensor& cu_seqlens,
                            const at::Tensor& low, const at::Tensor& high);

}  // namespace sgcd
