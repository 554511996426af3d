// The inner loops on tiles of logits, compiled once for each instruction set and chosen at run time.
//
// A tile is z[vocab id][token] with kTile tokens per row, so that tokens are vector lanes: every statistic is a vector,
// and nothing is summed across lanes. `count` is the number of vocab ids in a tile, at most kTile. Statistics are
// arrays over tokens, at least kTile long from the first token of a tile.
//
// Letters, here and in every *_impl.h: z is a logit, m a running maximum, l = sum e^(z-m), s = sum e^(z-m) (z-m);
// _p is the student's, _q the teacher's. Of l, rest = l - 1 is kept: the sum without one vocab id at the maximum,
// beside whose 1 a sum in fp32 would lose what a nearly certain token leaves to the others. An empty sum has rest -1. A
// log-sum-exp is lse + lse_low, m + ln l to twice the digits: see core/statistics.py.
#pragma once

#include <stdint.h>

#include "sizes.h"

namespace sgcd {

constexpr float kLowest = -3.4028234663852886e38f;  // of maxima, not -inf: e^(-inf - m) must be 0, not NaN

// Online softmax of one head.
struct HeadStats {
  float *m, *rest, *s;
};

// And of two: a_p = sum e^(z_p-m_p) (z_p-z_q), a_q likewise, overlap = sum of the roots of both exponentials.
struct PairStats {
  HeadStats p, q;
  float *a_p, *a_q, *overlap;
};

// The logit transform, from a product to final logits: + bias, softcap, then temperature.
struct LogitTransform {
  const float* bias;         // [count] or null
  float softcap;             // 0 is none
  const float* temperature;  // [kTile] or null
};

// The inputs of dZ = p (scale - d_entropy (ln p + entropy)); the caller sees to the target.
struct LogprobGrad {
  const float *lse, *lse_low;        // [kTile]
  const float* scale;                // [kTile]
  const float *entropy, *d_entropy;  // [kTile] or null
};

enum DistillKind : int { kReverseKl = 0, kForwardKl = 1, kJsd = 2 };

struct DistillGrad {
  const float *lse_p, *lse_p_low;   // [kTile]
  const float *lse_q, *lse_q_low;   // [kTile]
  const float* expected_log_ratio;  // [kTile], sum p ln(p / q), or with the mixture in the place of q for kJsd
  const float* d_loss;              // [kTile]
  float beta;
  DistillKind kind;
};

// Sums over the mixture m = beta q + (1 - beta) p, which need both normalisers first.
struct MixtureStats {
  const float *m_p, *log_l_p, *m_q, *log_l_q;  // [kTile]
  float *jsd, *tv, *expected_log_ratio;        // [kTile], null where not wanted; the last is sum p ln(p / mixture)
  float beta;
};

struct TileKernels {
  const char* name;
  // In place: products to final logits, and a gradient of final logits `z` back to one of products.
  void (*transform_logits)(float* z, int count, const LogitTransform&);
  void (*transform_backward)(float* dz, const float* z, int count, const LogitTransform&);

  // Online-softmax updates by one tile.
  void (*update_head)(const float* z, int count, const HeadStats&);
  void (*update_pair)(const float* z_p, const float* z_q, int count, const PairStats&);
  // The same, and store e^(z-m) in bf16, rows `ld` elements apart, with its m [kTile].
  void (*update_head_and_cache)(const float* z, int count, const HeadStats&, uint16_t* e, int64_t ld, float* m);
  // Merge statistics over disjoint vocab ids into `into`, of `tokens` tokens, a multiple of 16.
  void (*merge_head)(const HeadStats& into, const HeadStats& from, int64_t tokens);
  void (*merge_pair)(const PairStats& into, const PairStats& from, int64_t tokens);
  void (*add_mixture)(const float* z_p, const float* z_q, int count, const MixtureStats&);

  // Replace logits by their gradient; for two heads, the student's.
  void (*logprob_grad)(float* z, int count, const LogprobGrad&);
  void (*distill_grad)(float* z_p, const float* z_q, int count, const DistillGrad&);
  // The gradient without entropies, from the output of update_head_and_cache.
  void (*cached_logprob_grad)(const uint16_t* e, int64_t ld, int count, const float* m, const LogprobGrad&, float* dz);

  // Round a gradient tile to bf16: to rows `ld` elements apart, and interleaved by pairs of vocab ids, an odd last one
  // with 0. Either output may be null.
  void (*round_tile)(const float* dz, int count, uint16_t* rows, int64_t ld, uint16_t* pairs);
  void (*round_row)(const float* x, int64_t count, uint16_t* out);
};

const TileKernels* tile_kernels_portable();
const TileKernels* tile_kernels_avx2();    // null where not compiled in
const TileKernels* tile_kernels_avx512();  // null where not compiled in

}  // namespace sgcd
