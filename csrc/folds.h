// The inner loops on logit tiles, compiled once for each instruction set and chosen at run time.
//
// A tile is z[word][token] with `kTile` tokens a row, so that tokens are lanes: every statistic is a plain vector, and
// nothing is ever summed across lanes. Statistics are arrays over tokens, at least `kTile` long at each tile.
#pragma once

#include <stdint.h>

namespace sgcd {

constexpr int kTile = 64;
constexpr float kLowest = -3.4028234663852886e38f;  // of maxima, not -inf: e^(-inf - m) must be 0, not NaN

// Running statistics of one head: m = max z, z = sum e^(z-m), s = sum e^(z-m) (z-m).
struct HeadStats {
  float *m, *z, *s;
};

// And of two heads: a_p = sum e^(z_p-m_p) (z_p-z_q), a_q likewise, overlap = sum of the roots of both exponentials.
struct PairStats {
  HeadStats p, q;
  float *a_p, *a_q, *overlap;
};

// What turns a product into final logits: + bias, softcap, then temperature.
struct Finish {
  const float* bias;         // [words] or null
  float softcap;             // 0 is none
  const float* temperature;  // [kTile] or null
};

// The gradient of one head's tile, see `logprob_grad`.
struct LogprobGrad {
  const float *lse, *scale;             // [kTile]
  const float *entropy, *d_entropy;     // [kTile] or null
};

enum DistillKind : int { kReverseKl = 0, kForwardKl = 1, kJsd = 2 };

struct DistillGrad {
  const float *lse_p, *lse_q, *centre, *d_loss;  // [kTile]
  float beta;
  DistillKind kind;
};

// Sums of the second pass: jsd, tv, and centre = sum p ln(p/m).
struct SecondPass {
  const float *m_p, *log_z_p, *m_q, *log_z_q;  // [kTile]
  float *jsd, *tv, *centre;                    // [kTile], null where not wanted
  float beta;
};

struct Folds {
  const char* name;
  void (*finish)(float* z, int words, const Finish&);
  void (*fold_head)(const float* z, int words, const HeadStats&);
  // And leave e^(z-m) in bf16, rows apart by `ld`, and the m [kTile] that it is of.
  void (*fold_head_keep)(const float* z, int words, const HeadStats&, uint16_t* e, int64_t ld, float* m);
  void (*fold_pair)(const float* z_p, const float* z_q, int words, const PairStats&);
  // Merge statistics over disjoint words into `into`, `tokens` of them, a multiple of 16.
  void (*merge_head)(const HeadStats& into, const HeadStats& from, int64_t tokens);
  void (*merge_pair)(const PairStats& into, const PairStats& from, int64_t tokens);
  void (*second_pass)(const float* z_p, const float* z_q, int words, const SecondPass&);
  // Replace logits by their gradient.
  void (*logprob_grad)(float* z, int words, const LogprobGrad&);
  // The gradient without entropies from what fold_head_keep left.
  void (*kept_grad)(const uint16_t* e, int64_t ld, int words, const float* m, const LogprobGrad&, float* dz);
  void (*distill_grad)(float* z_p, const float* z_q, int words, const DistillGrad&);
  // Carry a gradient of the final logits back to the product. `z` are final logits.
  void (*unfinish)(float* dz, const float* z, int words, const Finish&);
  // Round a gradient tile to bf16, rows apart by `ld`, and interleaved by pairs of words (an odd last one with 0).
  void (*round_tile)(const float* dz, int words, uint16_t* rows, int64_t ld, uint16_t* pairs);
  void (*round_row)(const float* x, int64_t count, uint16_t* out);
};

const Folds* folds_portable();
const Folds* folds_avx2();    // null where not compiled in
const Folds* folds_avx512();  // null where not compiled in

}  // namespace sgcd
