// The folds on whatever `Vec` is here. Included once by each folds_<isa>.cpp, which defines SGCD_FOLDS.
#include "folds.h"
#include "vec.h"

namespace sgcd {
namespace {

// Move a lane's maximum: give e^(old - new), and 0 for the shift where nothing was summed before.
inline Vec shift_of(Vec sum, Vec from, Vec to) { return where(greater(sum, Vec(0.0f)), from - to, Vec(0.0f)); }

// 0 times an infinite sum is no NaN here: mass that underflows takes what it weighed with it.
inline Vec shrunk(Vec shrink, Vec sum) { return where(greater(shrink, Vec(0.0f)), shrink * sum, Vec(0.0f)); }

// Denormal results cost a hundred cycles each and say nothing beside a maximum of 1.
struct FlushDenormals {
#if defined(SGCD_AVX512) || defined(SGCD_AVX2)
  const unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#else
  FlushDenormals() {}
#endif
};

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry it into an infinity
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(SGCD_AVX512)

inline __m512i bf16_bits(__m512 x) {  // rounded to nearest even, in the upper halves
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline void store_bf16(Vec x, uint16_t* p) {
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x.v), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#else

inline void store_bf16(Vec x, uint16_t* p) {
  float lanes[Vec::width];
  x.store(lanes);
  for (int i = 0; i < Vec::width; i++) p[i] = to_bf16(lanes[i]);
}
inline Vec load_bf16(const uint16_t* p) {
  float lanes[Vec::width];
  for (int i = 0; i < Vec::width; i++) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    __builtin_memcpy(&lanes[i], &bits, 4);
  }
  return Vec::load(lanes);
}

#endif

inline Vec column_max(const float* z, int words, Vec m) {
  for (int w = 0; w < words; w++) m = max(Vec::load(z + w * kTile), m);  // an old maximum stands against a NaN
  return m;
}

// Bring sums to a new maximum; true sums only, the caller stores m.
inline Vec rescale_head(const HeadStats& h, int64_t at, Vec to) {
  const Vec z = Vec::load(h.z + at), s = Vec::load(h.s + at);
  const Vec shift = shift_of(z, Vec::load(h.m + at), to), shrink = exp_accurate(shift);
  (z * shrink).store(h.z + at);
  shrunk(shrink, fma(shift, z, s)).store(h.s + at);
  to.store(h.m + at);
  return shift;
}

inline void rescale_pair(const PairStats& s, int64_t at, Vec to_p, Vec to_q) {
  const Vec shift_p = rescale_head(s.p, at, to_p), shift_q = rescale_head(s.q, at, to_q);
  shrunk(exp_accurate(shift_p), Vec::load(s.a_p + at)).store(s.a_p + at);
  shrunk(exp_accurate(shift_q), Vec::load(s.a_q + at)).store(s.a_q + at);
  (Vec::load(s.overlap + at) * exp_accurate((shift_p + shift_q) * Vec(0.5f))).store(s.overlap + at);
}

inline void add_to(float* p, Vec x) { (Vec::load(p) + x).store(p); }

void finish(float* z, int words, const Finish& f) {
  if (!f.bias && f.softcap == 0 && !f.temperature) return;
  const Vec cap(f.softcap);
  for (int w = 0; w < words; w++) {
    const Vec bias(f.bias ? f.bias[w] : 0.0f);
    for (int i = 0; i < kTile; i += Vec::width) {
      Vec x = Vec::load(z + w * kTile + i) + bias;
      if (f.softcap != 0) x = cap * tanh(x / cap);
      if (f.temperature) x = x / Vec::load(f.temperature + i);
      x.store(z + w * kTile + i);
    }
  }
}

void unfinish(float* dz, const float* z, int words, const Finish& f) {
  if (f.softcap == 0 && !f.temperature) return;
  const Vec cap(f.softcap);
  for (int w = 0; w < words; w++) {
    for (int i = 0; i < kTile; i += Vec::width) {
      const Vec t = f.temperature ? Vec::load(f.temperature + i) : Vec(1.0f);
      Vec x = Vec::load(dz + w * kTile + i);
      if (f.softcap != 0) {
        const Vec y = Vec::load(z + w * kTile + i) * t / cap;
        x = x * (Vec(1.0f) - y * y);
      }
      (x / t).store(dz + w * kTile + i);
    }
  }
}

// So many words are summed apart before they join a tile's sum: rounding then grows with the root of 8 + 8 additions,
// not of 64.
constexpr int kChunk = 8;

struct HeadSums {
  Vec z = 0.0f, s = 0.0f;

  void add(const HeadSums& o) {
    z = z + o.z;
    s = s + o.s;
  }
  void add_to(const HeadStats& h, int64_t at) const {
    sgcd::add_to(h.z + at, z);
    sgcd::add_to(h.s + at, s);
  }
};

template <bool keep>
void fold_and(const float* z, int words, const HeadStats& h, uint16_t* left, int64_t ld, float* left_m) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z += Vec::width) {
    const Vec old = Vec::load(h.m + i), m = column_max(z, words, old);
    if (any(greater(m, old))) rescale_head(h, i, m);
    if (keep) m.store(left_m + i);
    HeadSums total;
    for (int first = 0; first < words; first += kChunk) {
      const int stop = first + kChunk < words ? first + kChunk : words;
      HeadSums sums;
      for (int w = first; w < stop; w++) {
        const Vec c = Vec::load(z + w * kTile) - m, e = exp(c);
        sums.z = sums.z + e;
        sums.s = fma_where(greater(e, Vec(0.0f)), c, e, sums.s);  // 0 ln 0 = 0
        if (keep) store_bf16(e, left + w * ld + i);
      }
      total.add(sums);
    }
    total.add_to(h, i);
  }
}

void fold_head(const float* z, int words, const HeadStats& h) {
  fold_and<false>(z, words, h, nullptr, 0, nullptr);
}

void fold_head_keep(const float* z, int words, const HeadStats& h, uint16_t* e, int64_t ld, float* m) {
  fold_and<true>(z, words, h, e, ld, m);
}

struct PairSums {
  HeadSums p, q;
  Vec a_p = 0.0f, a_q = 0.0f, overlap = 0.0f;

  // One word of both heads.
  void fold(Vec z_p, Vec z_q, Vec m_p, Vec m_q) {
    const Vec half(0.5f * kLog2e), c_p = z_p - m_p, c_q = z_q - m_q, delta = z_p - z_q;
    // Of the roots, so that the product of both needs no third exponential and underflows no sooner than it must.
    const Vec r_p = exp2(c_p * half), r_q = exp2(c_q * half), e_p = r_p * r_p, e_q = r_q * r_q;
    const auto live_p = greater(e_p, Vec(0.0f)), live_q = greater(e_q, Vec(0.0f));
    p.z = p.z + e_p;
    q.z = q.z + e_q;
    overlap = overlap + r_p * r_q;  // rounded before it is added, as e is: equal heads overlap by exactly z
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
    sgcd::add_to(to.a_p + at, a_p);
    sgcd::add_to(to.a_q + at, a_q);
    sgcd::add_to(to.overlap + at, overlap);
  }
};

void fold_pair(const float* z_p, const float* z_q, int words, const PairStats& stats) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z_p += Vec::width, z_q += Vec::width) {
    const Vec old_p = Vec::load(stats.p.m + i), m_p = column_max(z_p, words, old_p);
    const Vec old_q = Vec::load(stats.q.m + i), m_q = column_max(z_q, words, old_q);
    if (any(greater(m_p, old_p)) || any(greater(m_q, old_q))) rescale_pair(stats, i, m_p, m_q);
    PairSums total;
    for (int first = 0; first < words; first += kChunk) {
      const int stop = first + kChunk < words ? first + kChunk : words;
      PairSums sums;
      for (int w = first; w < stop; w++)
        sums.fold(Vec::load(z_p + w * kTile), Vec::load(z_q + w * kTile), m_p, m_q);
      total.add(sums);
    }
    total.add_to(stats, i);
  }
}

// The sums of `from`, brought to the maximum `to`.
struct Brought {
  Vec z, s, shift;
  Brought(const HeadStats& from, int64_t at, Vec to) : z(Vec::load(from.z + at)) {
    shift = shift_of(z, Vec::load(from.m + at), to);
    const Vec shrink = exp_accurate(shift);
    s = shrunk(shrink, fma(shift, z, Vec::load(from.s + at)));
    z = z * shrink;
  }
};

void merge_head(const HeadStats& into, const HeadStats& from, int64_t tokens) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < tokens; i += Vec::width) {
    const Vec m = max(Vec::load(from.m + i), Vec::load(into.m + i));
    rescale_head(into, i, m);
    const Brought other(from, i, m);
    add_to(into.z + i, other.z);
    add_to(into.s + i, other.s);
  }
}

void merge_pair(const PairStats& into, const PairStats& from, int64_t tokens) {
  const FlushDenormals flush;
  for (int64_t i = 0; i < tokens; i += Vec::width) {
    const Vec m_p = max(Vec::load(from.p.m + i), Vec::load(into.p.m + i));
    const Vec m_q = max(Vec::load(from.q.m + i), Vec::load(into.q.m + i));
    rescale_pair(into, i, m_p, m_q);
    const Brought p(from.p, i, m_p), q(from.q, i, m_q);
    add_to(into.p.z + i, p.z);
    add_to(into.p.s + i, p.s);
    add_to(into.q.z + i, q.z);
    add_to(into.q.s + i, q.s);
    add_to(into.a_p + i, shrunk(exp_accurate(p.shift), Vec::load(from.a_p + i)));
    add_to(into.a_q + i, shrunk(exp_accurate(q.shift), Vec::load(from.a_q + i)));
    add_to(into.overlap + i, Vec::load(from.overlap + i) * exp_accurate((p.shift + q.shift) * Vec(0.5f)));
  }
}

// ln(p/m) and ln(q/m) of the mixture m = beta q + (1 - beta) p. Beyond 80 nats apart the smaller of the two adds
// nothing to any sum, so its ratio may stop there; two words of probability 0 have none.
inline void mixture_ratios(Vec log_p, Vec log_q, float beta, Vec& to_p, Vec& to_q) {
  const Vec infinity(-__builtin_inff());
  Vec delta = log_p - log_q;
  delta = where(equal(log_p, infinity), where(equal(log_q, infinity), Vec(0.0f), delta), delta);
  delta = max(Vec(-80.0f), min(Vec(80.0f), delta));
  to_p = Vec(0.0f) - log1p(Vec(beta) * expm1(Vec(0.0f) - delta));
  to_q = Vec(0.0f) - log1p(Vec(1.0f - beta) * expm1(delta));
}

void second_pass(const float* z_p, const float* z_q, int words, const SecondPass& pass) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z_p += Vec::width, z_q += Vec::width) {
    const Vec m_p = Vec::load(pass.m_p + i), lz_p = Vec::load(pass.log_z_p + i);
    const Vec m_q = Vec::load(pass.m_q + i), lz_q = Vec::load(pass.log_z_q + i);
    Vec jsd(0.0f), tv(0.0f), centre(0.0f);
    for (int w = 0; w < words; w++) {
      // In two steps: at large logits one rounded normaliser would cost digits.
      const Vec log_p = Vec::load(z_p + w * kTile) - m_p - lz_p, log_q = Vec::load(z_q + w * kTile) - m_q - lz_q;
      const Vec p = exp(log_p), q = exp(log_q);
      tv = tv + abs(p - q);
      if (pass.jsd || pass.centre) {
        Vec to_p, to_q;
        mixture_ratios(log_p, log_q, pass.beta, to_p, to_q);
        centre = centre + p * to_p;
        jsd = jsd + (Vec(1.0f - pass.beta) * (p * to_p) + Vec(pass.beta) * (q * to_q));
      }
    }
    if (pass.tv) add_to(pass.tv + i, tv * Vec(0.5f));
    if (pass.jsd) add_to(pass.jsd + i, jsd);
    if (pass.centre) add_to(pass.centre + i, centre);
  }
}

constexpr float kFloor = -1e4f;  // e^kFloor is 0, and 0 times it is 0 where 0 times -inf would be NaN

// p (scale - d_entropy (ln p + entropy)); the caller adds d_logp at the target.
void logprob_grad(float* z, int words, const LogprobGrad& g) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z += Vec::width) {
    const Vec lse = Vec::load(g.lse + i), scale = Vec::load(g.scale + i);
    const Vec entropy = g.d_entropy ? Vec::load(g.entropy + i) : Vec(0.0f);
    const Vec d_entropy = g.d_entropy ? Vec::load(g.d_entropy + i) : Vec(0.0f);
    for (int w = 0; w < words; w++) {
      const Vec log_p = max(Vec(kFloor), Vec::load(z + w * kTile) - lse), p = exp(log_p);
      const Vec slope = g.d_entropy ? scale - d_entropy * (log_p + entropy) : scale;
      (p * slope).store(z + w * kTile);
    }
  }
}

void kept_grad(const uint16_t* e, int64_t ld, int words, const float* m, const LogprobGrad& g, float* dz) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width) {
    const Vec factor = exp(min(Vec(0.0f), Vec::load(m + i) - Vec::load(g.lse + i))) * Vec::load(g.scale + i);
    for (int w = 0; w < words; w++) (load_bf16(e + w * ld + i) * factor).store(dz + w * kTile + i);
  }
}

void distill_grad(float* z_p, const float* z_q, int words, const DistillGrad& g) {
  const FlushDenormals flush;
  for (int i = 0; i < kTile; i += Vec::width, z_p += Vec::width, z_q += Vec::width) {
    const Vec lse_p = Vec::load(g.lse_p + i), lse_q = Vec::load(g.lse_q + i);
    const Vec centre = Vec::load(g.centre + i), d_loss = Vec::load(g.d_loss + i);
    for (int w = 0; w < words; w++) {
      const Vec log_p = Vec::load(z_p + w * kTile) - lse_p, log_q = Vec::load(z_q + w * kTile) - lse_q;
      const Vec p = exp(log_p);
      Vec dz;
      if (g.kind == kForwardKl) {
        dz = p - exp(log_q);
      } else if (g.kind == kReverseKl) {
        const Vec gap = where(greater(p, Vec(0.0f)), log_p - log_q, Vec(0.0f));
        dz = p * (gap - centre);
      } else {
        Vec to_p, to_q;
        mixture_ratios(max(Vec(kFloor), log_p), log_q, g.beta, to_p, to_q);
        dz = p * (to_p - centre) * Vec(1.0f - g.beta);
      }
      (dz * d_loss).store(z_p + w * kTile);
    }
  }
}

#if defined(SGCD_AVX512)

void round_tile(const float* dz, int words, uint16_t* rows, int64_t ld, uint16_t* pairs) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int w = 0; w < words; w += 2) {
    for (int i = 0; i < kTile; i += 16) {
      const __m512i a = bf16_bits(_mm512_loadu_ps(dz + w * kTile + i));
      const bool two = w + 1 < words;
      const __m512i b = two ? bf16_bits(_mm512_loadu_ps(dz + (w + 1) * kTile + i)) : _mm512_setzero_si512();
      const __m512i low = _mm512_srli_epi32(a, 16);
      if (rows) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + w * ld + i), _mm512_cvtepi32_epi16(low));
        if (two) {
          const __m512i high = _mm512_srli_epi32(b, 16);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + (w + 1) * ld + i), _mm512_cvtepi32_epi16(high));
        }
      }
      if (pairs) {
        const __m512i both = _mm512_or_si512(low, _mm512_and_si512(b, upper));
        _mm512_storeu_si512(pairs + w * kTile + 2 * i, both);
      }
    }
  }
}

#else

void round_tile(const float* dz, int words, uint16_t* rows, int64_t ld, uint16_t* pairs) {
  for (int w = 0; w < words; w += 2) {
    for (int i = 0; i < kTile; i++) {
      const bool two = w + 1 < words;
      const uint16_t a = to_bf16(dz[w * kTile + i]), b = two ? to_bf16(dz[(w + 1) * kTile + i]) : uint16_t{0};
      if (rows) rows[w * ld + i] = a;
      if (rows && two) rows[(w + 1) * ld + i] = b;
      if (pairs) {
        pairs[w * kTile + 2 * i] = a;
        pairs[w * kTile + 2 * i + 1] = b;
      }
    }
  }
}

#endif

void round_row(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(SGCD_AVX512)
  for (; i + 16 <= count; i += 16) {
    const __m512i upper = _mm512_srli_epi32(bf16_bits(_mm512_loadu_ps(x + i)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(upper));
  }
#endif
  for (; i < count; i++) out[i] = to_bf16(x[i]);
}

constexpr Folds kFolds{
    SGCD_NAME,   finish,       fold_head, fold_head_keep, fold_pair, merge_head, merge_pair,
    second_pass, logprob_grad, kept_grad, distill_grad,   unfinish,  round_tile, round_row,
};

}  // namespace

const Folds* SGCD_FOLDS() { return &kFolds; }

}  // namespace sgcd
