#include "spans.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace sgcd {
namespace {

struct Limits {
  double start, reset;
  int64_t patience;
  double entropy_ratio, entropy_margin;
};

// Read as bytes: a bool whose byte is neither 0 nor 1 would be undefined behaviour.
const uint8_t* flags_of(const at::Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }

template <class Float>
struct Tokens {
  const Float *u, *entropy;
  const int64_t* turns;  // or null
  const uint8_t* eligible;
};

// In fp64 whatever the inputs, as Python's floats are.
template <class Float>
void scan(const Tokens<Float>& in, int64_t first, int64_t stop, const Limits& limits, int64_t* out) {
  int64_t onset = -1, quiet = 0;
  double ceiling = 0;
  for (int64_t t = first; t < stop; t++) {
    out[t] = -1;
    if (!in.eligible[t]) continue;
    const double u = in.u[t], h = in.entropy[t];
    if (onset >= 0) {
      quiet = u < limits.reset ? quiet + 1 : 0;
      if (h > ceiling || (in.turns && in.turns[t] != in.turns[onset]) || quiet == limits.patience) onset = -1;
    }
    if (onset < 0 && u > limits.start) {
      onset = t;
      quiet = 0;
      const double ratio = limits.entropy_ratio * h, sum = h + limits.entropy_margin;
      ceiling = sum > ratio ? sum : ratio;
    }
    out[t] = onset;
  }
}

template <class Float>
void scan_all(const at::Tensor& u, const at::Tensor& entropy, const int64_t* turns, const at::Tensor& eligible,
              const at::Tensor& cu_seqlens, const Limits& limits, int64_t* out) {
  const Tokens<Float> in{u.const_data_ptr<Float>(), entropy.const_data_ptr<Float>(), turns, flags_of(eligible)};
  const int64_t* cu = cu_seqlens.const_data_ptr<int64_t>();
  parallel_tasks(cu_seqlens.size(0) - 1, [&](auto next) {
    for (int64_t b; (b = next()) >= 0;) scan(in, cu[b], cu[b + 1], limits, out);
  });
}

void check_bounds(const at::Tensor& cu_seqlens, int64_t tokens) {
  check_dense("cu_seqlens", cu_seqlens, at::kLong);
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, "cu_seqlens has shape ", cu_seqlens.sizes(),
                    ", needs [B + 1]");
  const int64_t* cu = cu_seqlens.const_data_ptr<int64_t>();
  bool rises = cu[0] == 0 && cu[cu_seqlens.size(0) - 1] == tokens;
  for (int64_t b = 1; b < cu_seqlens.size(0); b++) rises = rises && cu[b - 1] <= cu[b];
  TORCH_CHECK_VALUE(rises, "cu_seqlens does not rise from 0 to ", tokens, ", the number of tokens");
}

template <class Float>
void select_all(const at::Tensor& x, const at::Tensor& eligible, const at::Tensor& cu_seqlens, const at::Tensor& low,
                const at::Tensor& high, Float* out) {
  const Float* from = x.const_data_ptr<Float>();
  const int64_t *cu = cu_seqlens.const_data_ptr<int64_t>(), sequences = cu_seqlens.size(0) - 1;
  const int64_t *lows = low.const_data_ptr<int64_t>(), *highs = high.const_data_ptr<int64_t>();
  const uint8_t* flags = flags_of(eligible);
  parallel_tasks(sequences, [&](auto next) {
    std::vector<Float> values;
    for (int64_t b; (b = next()) >= 0;) {
      values.resize(cu[b + 1] - cu[b]);
      int64_t count = 0;
      for (int64_t t = cu[b]; t < cu[b + 1]; t++) {
        values[count] = from[t];
        count += flags[t] != 0;
      }
      out[b] = out[b + sequences] = 0;
      if (count == 0) continue;
      const int64_t i = std::clamp<int64_t>(lows[b], 0, count - 1), j = std::clamp<int64_t>(highs[b], i, count - 1);
      const auto begin = values.begin(), end = begin + count;
      // NaN last.
      const auto before = [](Float one, Float other) { return one < other || (std::isnan(other) && !std::isnan(one)); };
      std::nth_element(begin, begin + i, end, before);
      out[b] = values[i];
      if (j > i) std::nth_element(begin + i + 1, begin + j, end, before);
      out[b + sequences] = values[j];
    }
  });
}

}  // namespace

at::Tensor find_spans(const at::Tensor& u, const at::Tensor& entropy, const std::optional<at::Tensor>& turns,
                      const at::Tensor& eligible, const at::Tensor& cu_seqlens, double start, double reset,
                      int64_t patience, double entropy_ratio, double entropy_margin) {
  const bool wide = u.scalar_type() == at::kDouble;
  TORCH_CHECK_VALUE(u.dim() == 1, "u has shape ", u.sizes(), ", needs [N]");
  const int64_t n = u.size(0);
  check_tokens("u", u, wide ? at::kDouble : at::kFloat, n);
  check_tokens("entropy", entropy, u.scalar_type(), n);
  if (turns) check_tokens("turns", *turns, at::kLong, n);
  check_tokens("eligible", eligible, at::kBool, n);
  check_bounds(cu_seqlens, n);
  at::Tensor out = at::empty({n}, cu_seqlens.options());
  const Limits limits{start, reset, patience, entropy_ratio, entropy_margin};
  const int64_t* turn = turns ? turns->const_data_ptr<int64_t>() : nullptr;
  (wide ? scan_all<double> : scan_all<float>)(u, entropy, turn, eligible, cu_seqlens, limits,
                                              out.mutable_data_ptr<int64_t>());
  return out;
}

at::Tensor order_statistics(const at::Tensor& x, const at::Tensor& eligible, const at::Tensor& cu_seqlens,
                            const at::Tensor& low, const at::Tensor& high) {
  const bool wide = x.scalar_type() == at::kDouble;
  TORCH_CHECK_VALUE(x.dim() == 1, "x has shape ", x.sizes(), ", needs [N]");
  check_tokens("x", x, wide ? at::kDouble : at::kFloat, x.size(0));
  check_tokens("eligible", eligible, at::kBool, x.size(0));
  check_bounds(cu_seqlens, x.size(0));
  const int64_t sequences = cu_seqlens.size(0) - 1;
  check_tokens("low", low, at::kLong, sequences);
  check_tokens("high", high, at::kLong, sequences);
  at::Tensor out = at::empty({2, sequences}, x.options());
  if (wide)
    select_all(x, eligible, cu_seqlens, low, high, out.mutable_data_ptr<double>());
  else
    select_all(x, eligible, cu_seqlens, low, high, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace sgcd
