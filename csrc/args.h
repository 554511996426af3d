// Arguments common to several operators, bundled where the operators are registered (ops.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace sgcd {

using OptionalTensor = std::optional<at::Tensor>;

// An LM head and the hidden states that it reads.
struct HeadArgs {
  at::Tensor hidden;           // [N, H] float32, bfloat16 or float16, each row contiguous
  at::Tensor weight;           // [V, H] likewise
  OptionalTensor bias;         // [V] float32
  OptionalTensor rows;         // [n] int64, the tokens that are computed; none means all N
  OptionalTensor temperature;  // [n] float32; none is 1
  double softcap;              // 0 is none
};

// Two heads with the same rows, temperature and softcap.
struct PairArgs {
  HeadArgs student, teacher;
};

}  // namespace sgcd
