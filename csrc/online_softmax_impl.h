// Online softmax of one head and of two: updates by a tile of logits, and merging.
#pragma once

#include "bf16_impl.h"
#include "tile_kernels.h"
#include "vec.h"

namespace sgcd {
namespace {

// The shift of a lane's maximum, old - new; 0 if nothing was summed before.
inline Vec shift_of(Vec l, Vec from, Vec to) { return where(greater(l, Vec(0.0f)), from - to, Vec(0.0f)); }

// shrink * sum, and 0 where shrink is 0, also if the sum is infinite.
inline Vec rescale(Vec shrink, Vec sum) { return where(greater(shrink, Vec(0.0f)), shrink * sum, Vec(0.0f)); }

inline Vec column_max(const float* z, int count, Vec m) {
  for (int v = 0; v < count; v++) m = max(Vec::load(z + v * kTile), m);  // a NaN does not replace the old maximum
  return m;
}

// Rescale the sums at `at` to the maximum `to`, and store it.
inline Vec rescale_head(const HeadStats& h, int64_t at, Vec to) {
  const Vec l = Vec::load(h.l + at), s = Vec::load(h.s + at);
  const Vec shift = shift_of(l, Vec::load(h.m + at), to), shrink = exp_accurate(shift);
  (l * shrink).store(h.l + at);
  rescale(shrink, fma(shift, l, s)).store(h.s + at);
  to.store(h.m + at);
  return shift;
}

inline void rescale_pair(const PairStats& s, int64_t at, Vec to_p, Vec to_q) {
  const Vec shift_p = rescale_head(s.p, at, to_p), shift_q = rescale_head(s.q, at, to_q);
  rescale(exp_accurate(shift_p), Vec::load(s.a_p + at)).store(s.a_p + at);
  rescale(exp_accurate(shift_q), Vec::load(s.a_q + at)).store(s.a_q + at);
  (Vec::load(s.overlap + at) * exp_accurate((shift_p + shift_q) * Vec(0.5f))).store(s.overlap + at);
}

// Vocab ids in a partial sum of a tile: rounding error then grows with the root of 8 + 8 additions, not of 64.
constexpr int kRun = 8;

struct HeadSums {
  Vec l = 0.0f, s = 0.0f;

  void add(const HeadSums& o) {
    l = l + o.l;
    s = s + o.s;
  }
  void add_to(const HeadStats& h, int64_t at) const {
    accumulate(h.l + at, l);
    accumulate(h.s + at, s);
  }
};

template <bool cache>
void update_head_impl(const float* z, int count, const HeadStats& h, uint16_t* cached_e, int64_t ld, float* cached_m) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z += Vec::width) {
    const Vec old = Vec::load(h.m + i), m = column_max(z, count, old);
    if (any(greater(m, old))) rescale_head(h, i, m);
    if (cache) m.store(cached_m + i);
    HeadSums total;
    for (int first = 0; first < count; first += kRun) {
      const int stop = first + kRun < count ? first + kRun : count;
      HeadSums sums;
      for (int v = first; v < stop; v++) {
        const Vec c = Vec::load(z + v * kTile) - m, e = exp(c);
        sums.l = sums.l + e;
        sums.s = fma_where(greater(e, Vec(0.0f)), c, e, sums.s);  // 0 ln 0 = 0
        if (cache) store_bf16(e, cached_e + v * ld + i);
      }
      total.add(sums);
    }
    total.add_to(h, i);
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
    const auto live_p = greater(e_p, Vec(0.0f)), live_q = greater(e_q, Vec(0.0f));
    p.l = p.l + e_p;
    q.l = q.l + e_q;
    overlap = overlap + r_p * r_q;  // rounded before it is added, as e is: equal heads overlap by exactly l
    p.s = fma_where(live_p, c_p, e_p, p.s);
    q.s = fma_where(live_q, c_q, e_q, q.s);
    a_p = fma_where(live_p, delta, e_p, a_p);
    a_q = fma_where(live_q, delta, e_q, a_q);
  }
  void add(const PairSums& o) {
    p.add(o.p);
    q.add(o.q);
    a_p = a_p + o.a_p;
    a_q = a_q + o.a_q;
    overlap = overlap + o.overlap;
  }
  void add_to(const PairStats& to, int64_t at) const {
    p.add_to(to.p, at);
    q.add_to(to.q, at);
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
    if (any(greater(m_p, old_p)) || any(greater(m_q, old_q))) rescale_pair(stats, i, m_p, m_q);
    PairSums total;
    for (int first = 0; first < count; first += kRun) {
      const int stop = first + kRun < count ? first + kRun : count;
      PairSums sums;
      for (int v = first; v < stop; v++) sums.add(Vec::load(z_p + v * kTile), Vec::load(z_q + v * kTile), m_p, m_q);
      total.add(sums);
    }
    total.add_to(stats, i);
  }
}

// The sums of `from`, rescaled to the maximum `to`.
struct Rescaled {
  Vec l, s, shift;
  Rescaled(const HeadStats& from, int64_t at, Vec to) : l(Vec::load(from.l + at)) {
    shift = shift_of(l, Vec::load(from.m + at), to);
    const Vec shrink = exp_accurate(shift);
    s = rescale(shrink, fma(shift, l, Vec::load(from.s + at)));
    l = l * shrink;
  }
};

void merge_head(const HeadStats& into, const HeadStats& from, int64_t tokens) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < tokens; i += Vec::width) {
    const Vec m = max(Vec::load(from.m + i), Vec::load(into.m + i));
    rescale_head(into, i, m);
    const Rescaled other(from, i, m);
    accumulate(into.l + i, other.l);
    accumulate(into.s + i, other.s);
  }
}

void merge_pair(const PairStats& into, const PairStats& from, int64_t tokens) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < tokens; i += Vec::width) {
    const Vec m_p = max(Vec::load(from.p.m + i), Vec::load(into.p.m + i));
    const Vec m_q = max(Vec::load(from.q.m + i), Vec::load(into.q.m + i));
    rescale_pair(into, i, m_p, m_q);
    const Rescaled p(from.p, i, m_p), q(from.q, i, m_q);
    accumulate(into.p.l + i, p.l);
    accumulate(into.p.s + i, p.s);
    accumulate(into.q.l + i, q.l);
    accumulate(into.q.s + i, q.s);
    accumulate(into.a_p + i, rescale(exp_accurate(p.shift), Vec::load(from.a_p + i)));
    accumulate(into.a_q + i, rescale(exp_accurate(q.shift), Vec::load(from.a_q + i)));
    accumulate(into.overlap + i, Vec::load(from.overlap + i) * exp_accurate((p.shift + q.shift) * Vec(0.5f)));
  }
}

}  // namespace
}  // namespace sgcd
