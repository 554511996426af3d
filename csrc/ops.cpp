// The operators that Python sees, as torch.ops.sgcd_kernels.*
#include <torch/library.h>

#include "isa.h"
#include "score.h"

TORCH_LIBRARY(sgcd_kernels, m) {
  m.def("cpu_isa() -> str", [] { return std::string(sgcd::cpu_isa().name); });
  m.def("head_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, Tensor? temperature, "
        "float softcap) -> Tensor");
  m.def("bare_walk(Tensor hidden, Tensor weight, Tensor? teacher_hidden) -> ()");
  m.def("pair_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor? rows, Tensor targets, Tensor? temperature, float softcap) -> Tensor");
  m.def("mixture_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor? rows, Tensor normalisers, Tensor? temperature, float softcap, float beta, "
        "bool jsd, bool tv) -> Tensor");
}

TORCH_LIBRARY_IMPL(sgcd_kernels, CPU, m) {
  m.impl("head_stats", &sgcd::head_stats);
  m.impl("bare_walk", &sgcd::bare_walk);
  m.impl("pair_stats", &sgcd::pair_stats);
  m.impl("mixture_stats", &sgcd::mixture_stats);
}
