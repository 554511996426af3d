// Online softmax of one head and of two: updates by a tile of logits, and merging.
#pragma once

#include "bf16_impl.h"
#include "tile_kernels.h"
#include "vec.h"

namespace sgcd {
namespace {

// The shift of a lane's maximum, old - new; 0 if nothing was summed before.
inline Vec shift_of(Vec rest, Vec from, Vec to) { return where(equal(rest, Vec(-1.0f)), Vec(0.0f), from - to); }

// shrink * sum, and 0 where shrink is 0, also if the sum is infinite.
inline Vec rescale(Vec shrink, Vec sum) { return where(greater(shrink, Vec(0.0f)), shrink * sum, Vec(0.0f)); }

inline Vec column_max(const float* z, int count, Vec m) {
  for (int v = 0; v < count; v++) m = max(Vec::load(z + v * kTile), m);  // a NaN does not replace the old maximum
  return m;
}

// Sums relative to the maximum `to` >= their own. If `to` is their own, `rest` goes without a 1, and ones is 1; else
// what was 1 has become less and is in `rest`.
struct Rescaled {
  Vec rest, s, shift, ones;
  Rescaled(const HeadStats& from, int64_t at, Vec to) {
    const Vec old = Vec::load(from.rest + at), l = old + Vec(1.0f);
    shift = shift_of(old, Vec::load(from.m + at), to);
    const Vec shrink = exp_accurate(shift);
    s = rescale(shrink, fma(shift, l, Vec::load(from.s + at)));
    ones = where(equal(old, Vec(-1.0f)), Vec(0.0f), where(equal(shift, Vec(0.0f)), Vec(1.0f), Vec(0.0f)));
    rest = where(equal(ones, Vec(1.0f)), old, l * shrink);
  }
};

// Vocab ids in a partial sum of a tile: rounding error then grows with the root of 8 + 8 additions, not of 64.
constexpr int kRun = 8;

struct HeadSums {
  Vec rest = 0.0f, ones = 0.0f, s = 0.0f;  // those at the maximum are counted apart

  void add(Vec c, Vec e) {  // c = z - m, e = e^c
    const auto at_maximum = equal(c, Vec(0.0f));
    rest = add_unless(at_maximum, rest, e);  // a NaN is not at the maximum
    ones = add_where(at_maximum, ones, Vec(1.0f));
    s = fma_where(greater(e, Vec(0.0f)), c, e, s);  // 0 ln 0 = 0
  }
  void add(const HeadSums& o) {
    rest = rest + o.rest;
    ones = ones + o.ones;
    s = s + o.s;
  }
  // Add to the statistics at `at`, which are rescaled to these sums' maximum `to` if that is larger for any lane.
  // Returns the shift of their exponents.
  Vec add_to(const HeadStats& h, int64_t at, Vec to, bool larger) const {
    if (!larger) {
      accumulate(h.rest + at, rest + ones);
      accumulate(h.s + at, s);
      return Vec(0.0f);
    }
    const Rescaled own(h, at, to);
    to.store(h.m + at);
    (own.rest + rest + (own.ones + ones - Vec(1.0f))).store(h.rest + at);
    (own.s + s).store(h.s + at);
    return own.shift;
  }
};

template <bool cache>
void update_head_impl(const float* z, int count, const HeadStats& h, uint16_t* cached_e, int64_t ld, float* cached_m) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z += Vec::width) {
    const Vec old = Vec::load(h.m + i), m = column_max(z, count, old);
    if (cache) m.store(cached_m + i);
    HeadSums total;
    for (int first = 0; first < count; first += kRun) {
      const int stop = first + kRun < count ? first + kRun : count;
      HeadSums sums;
      for (int v = first; v < stop; v++) {
        const Vec c = Vec::load(z + v * kTile) - m, e = exp(c);
        sums.add(c, e);
        if (cache) store_bf16(e, cached_e + v * ld + i);
      }
      total.add(sums);
    }
    total.add_to(h, i, m, any(greater(m, old)));
  }
}

void update_head(const float* z, int count, const HeadStats& h) {
  update_head_impl<false>(z, count, h, nullptr, 0, nullptr);
}

void update_head_and_cache(const float* z, int count, const HeadStats& h, uint16_t* e, int64_t ld, float* m) {
  update_head_impl<true>(z, count, h, e, ld, m);
}

struct PairSums {
  HeadSums p, q;
  Vec a_p = 0.0f, a_q = 0.0f, overlap = 0.0f;

  // One vocab id of both heads.
  void add(Vec z_p, Vec z_q, Vec m_p, Vec m_q) {
    const Vec half(0.5f * kLog2e), c_p = z_p - m_p, c_q = z_q - m_q, delta = z_p - z_q;
    // The roots of the exponentials: their product needs no third exponential, and underflows later than e_p e_q.
    const Vec r_p = exp2(c_p * half), r_q = exp2(c_q * half), e_p = r_p * r_p, e_q = r_q * r_q;
    overlap = overlap + r_p * r_q;
    p.add(c_p, e_p);
    q.add(c_q, e_q);
    a_p = fma_where(greater(e_p, Vec(0.0f)), delta, e_p, a_p);
    a_q = fma_where(greater(e_q, Vec(0.0f)), delta, e_q, a_q);
  }
  void add(const PairSums& o) {
    p.add(o.p);
    q.add(o.q);
    a_p = a_p + o.a_p;
    a_q = a_q + o.a_q;
    overlap = overlap + o.overlap;
  }
  void add_to(const PairStats& to, int64_t at, Vec m_p, Vec m_q, bool larger) const {
    const Vec shift_p = p.add_to(to.p, at, m_p, larger), shift_q = q.add_to(to.q, at, m_q, larger);
    if (larger) {
      rescale(exp_accurate(shift_p), Vec::load(to.a_p + at)).store(to.a_p + at);
      rescale(exp_accurate(shift_q), Vec::load(to.a_q + at)).store(to.a_q + at);
      (Vec::load(to.overlap + at) * exp_accurate((shift_p + shift_q) * Vec(0.5f))).store(to.overlap + at);
    }
    accumulate(to.a_p + at, a_p);
    accumulate(to.a_q + at, a_q);
    accumulate(to.overlap + at, overlap);
  }
};

void update_pair(const float* z_p, const float* z_q, int count, const PairStats& stats) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z_p += Vec::width, z_q += Vec::width) {
    const Vec old_p = Vec::load(stats.p.m + i), m_p = column_max(z_p, count, old_p);
    const Vec old_q = Vec::load(stats.q.m + i), m_q = column_max(z_q, count, old_q);
    PairSums total;
    for (int first = 0; first < count; first += kRun) {
      const int stop = first + kRun < count ? first + kRun : count;
      PairSums sums;
      for (int v = first; v < stop; v++) sums.add(Vec::load(z_p + v * kTile), Vec::load(z_q + v * kTile), m_p, m_q);
      total.add(sums);
    }
    total.add_to(stats, i, m_p, m_q, any(greater(m_p, old_p)) || any(greater(m_q, old_q)));
  }
}

// The sums of `from`, relative to the maximum `to`.
inline HeadSums sums_of(const HeadStats& from, int64_t at, Vec to, Vec& shift) {
  const Rescaled own(from, at, to);
  HeadSums sums;
  sums.rest = own.rest;
  sums.ones = own.ones;
  sums.s = own.s;
  shift = own.shift;
  return sums;
}

void merge_head(const HeadStats& into, const HeadStats& from, int64_t tokens) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < tokens; i += Vec::width) {
    const Vec m = max(Vec::load(from.m + i), Vec::load(into.m + i));
    Vec shift;
    sums_of(from, i, m, shift).add_to(into, i, m, true);
  }
}

void merge_pair(const PairStats& into, const PairStats& from, int64_t tokens) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < tokens; i += Vec::width) {
    const Vec m_p = max(Vec::load(from.p.m + i), Vec::load(into.p.m + i));
    const Vec m_q = max(Vec::load(from.q.m + i), Vec::load(into.q.m + i));
    Vec shift_p, shift_q;
    PairSums sums;
    sums.p = sums_of(from.p, i, m_p, shift_p);
    sums.q = sums_of(from.q, i, m_q, shift_q);
    sums.a_p = rescale(exp_accurate(shift_p), Vec::load(from.a_p + i));
    sums.a_q = rescale(exp_accurate(shift_q), Vec::load(from.a_q + i));
    sums.overlap = Vec::load(from.overlap + i) * exp_accurate((shift_p + shift_q) * Vec(0.5f));
    sums.add_to(into, i, m_p, m_q, true);
  }
}

}  // namespace
}  // namespace sgcd
