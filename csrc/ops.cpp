// The operators that Python sees, as torch.ops.sgcd_kernels.*
#include <torch/library.h>

#include "grad.h"
#include "isa.h"
#include "score.h"
#include "spans.h"
#include "topk.h"

TORCH_LIBRARY(sgcd_kernels, m) {
  m.def("cpu_isa() -> str", [] { return std::string(sgcd::cpu_isa().name); });
  m.def("head_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, Tensor? temperature, "
        "float softcap) -> Tensor");
  m.def("head_stats_keep(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, "
        "Tensor? temperature, float softcap, bool weight_grad) -> (Tensor, Tensor[])");
  m.def("bare_walk(Tensor hidden, Tensor weight, Tensor? teacher_hidden) -> ()");
  m.def("pair_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor? rows, Tensor targets, Tensor? temperature, float softcap) -> Tensor");
  m.def("pair_topk(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor? rows, Tensor targets, Tensor? temperature, float softcap, int k) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("mixture_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor? rows, Tensor normalisers, Tensor? temperature, float softcap, float beta, "
        "bool jsd, bool tv) -> Tensor");
  m.def("logprob_grads(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, Tensor? temperature, "
        "float softcap, Tensor lse, Tensor scale, Tensor d_logp, Tensor? entropy, Tensor? d_entropy, bool[3] needs, "
        "bool wide, Tensor[] kept) -> (Tensor, Tensor, Tensor)");
  m.def("distill_grads(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? teacher_bias, Tensor? rows, Tensor? temperature, float softcap, Tensor lse, Tensor teacher_lse, "
        "Tensor centre, Tensor d_loss, float beta, int kind, bool[3] needs) -> (Tensor, Tensor, Tensor)");
  m.def("find_spans(Tensor u, Tensor entropy, Tensor? turns, Tensor eligible, Tensor cu_seqlens, float start, "
        "float reset, int patience, float entropy_ratio, float entropy_margin) -> Tensor");
  m.def("order_statistics(Tensor x, Tensor eligible, Tensor cu_seqlens, Tensor low, Tensor high) -> Tensor");
}

TORCH_LIBRARY_IMPL(sgcd_kernels, CPU, m) {
  m.impl("head_stats", &sgcd::head_stats);
  m.impl("head_stats_keep", &sgcd::head_stats_keep);
  m.impl("bare_walk", &sgcd::bare_walk);
  m.impl("pair_stats", &sgcd::pair_stats);
  m.impl("pair_topk", &sgcd::pair_topk);
  m.impl("mixture_stats", &sgcd::mixture_stats);
  m.impl("logprob_grads", &sgcd::logprob_grads);
  m.impl("distill_grads", &sgcd::distill_grads);
  m.impl("find_spans", &sgcd::find_spans);
  m.impl("order_statistics", &sgcd::order_statistics);
}
