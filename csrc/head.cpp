#include "head.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sgcd {
namespace {

template <class Out, class In>
Out element(In x) {
  return static_cast<Out>(static_cast<float>(x));
}
template <>
at::BFloat16 element<at::BFloat16, at::BFloat16>(at::BFloat16 x) {
  return x;
}

// Call f with null pointers of the types (stored, multiplied).
template <class F>
void with_types(at::ScalarType from, Math math, F f) {
  if (math == Math::kBf16) return f(static_cast<const at::BFloat16*>(nullptr), static_cast<at::BFloat16*>(nullptr));
  float* to = nullptr;
  if (from == at::kBFloat16) return f(static_cast<const at::BFloat16*>(nullptr), to);
  if (from == at::kHalf) return f(static_cast<const at::Half*>(nullptr), to);
  f(static_cast<const float*>(nullptr), to);
}

#if defined(__SSE2__)
// dst[k][i] = src[i][k] for 8 x 8 elements of two bytes: interleave them, then pairs, then fours.
void transpose8(const char* src, int64_t src_bytes, char* dst, int64_t dst_bytes) {
  __m128i a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * src_bytes));
  for (int i = 0; i < 4; i++) {
    b[i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);      // columns 0-3 of rows 2i, 2i + 1
    b[i + 4] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);  // columns 4-7
  }
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm_unpacklo_epi32(b[2 * i], b[2 * i + 1]);  // two columns of rows 0-3 (even i) or 4-7
    a[2 * i + 1] = _mm_unpackhi_epi32(b[2 * i], b[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    const int low = i / 2 * 4 + i % 2;  // rows 0-3; rows 4-7 are two further on
    char* out = dst + 2 * i * dst_bytes;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi64(a[low], a[low + 2]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + dst_bytes), _mm_unpackhi_epi64(a[low], a[low + 2]));
  }
}
#endif

// The stride of a single row has no meaning and may be anything.
int64_t row_stride(const at::Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1); }

}  // namespace

Head::Head(const HeadArgs& args)
    : hidden_type_(args.hidden.scalar_type()),
      weight_type_(args.weight.scalar_type()),
      hidden_(static_cast<const char*>(args.hidden.const_data_ptr())),
      weight_(static_cast<const char*>(args.weight.const_data_ptr())),
      hidden_ld_(row_stride(args.hidden)),
      weight_ld_(row_stride(args.weight)),
      bias_(args.bias ? args.bias->const_data_ptr<float>() : nullptr),
      rows_(args.rows ? args.rows->const_data_ptr<int64_t>() : nullptr),
      tokens_(args.rows ? args.rows->size(0) : args.hidden.size(0)),
      vocab_(args.weight.size(0)),
      width_(args.weight.size(1)) {
  const bool both_bf16 = hidden_type_ == at::kBFloat16 && weight_type_ == at::kBFloat16;
  math_ = both_bf16 && has_bf16_products() ? Math::kBf16 : Math::kFloat;
  depth_ = math_ == Math::kBf16 ? round_up(width_, 2) : width_;
}

bool Head::same_weight(const Head& other) const {
  return weight_ == other.weight_ && weight_ld_ == other.weight_ld_ && weight_type_ == other.weight_type_ &&
         width_ == other.width_ && math_ == other.math_;
}

void Head::multiply_tile(const WeightRows& rows, int64_t skip, int64_t count, int64_t token, const void* packed,
                         float* z) const {
  const int64_t live = live_columns(token);
  multiply(math_, count, live, depth_, rows.at(skip, math_), rows.ld, packed, kTile, z, kTile, false);
  for (int64_t v = 0; v < count && live < kTile; v++) std::fill(z + v * kTile + live, z + (v + 1) * kTile, 0.0f);
}

void Head::pack_token_tile(int64_t token, void* out) const {
  std::memset(out, 0, packed_tile_bytes());
  const int64_t count = std::min<int64_t>(kTile, tokens_ - token), pair = math_ == Math::kBf16 ? 2 : 1;
  with_types(hidden_type_, math_, [&](auto* in, auto* to) {
    using Out = std::remove_pointer_t<decltype(to)>;
    Out* dst = static_cast<Out*>(out);
    for (int64_t k0 = 0; k0 < width_; k0 += 32) {  // a cache line or two of each row at a time
      const int64_t k1 = std::min(k0 + 32, width_);
      for (int64_t t = 0; t < count; t++) {
        const int64_t row = rows_ ? rows_[token + t] : token + t;
        const auto* src = reinterpret_cast<decltype(in)>(hidden_) + row * hidden_ld_;
        for (int64_t k = k0; k < k1; k++) dst[k / pair * kTile * pair + t * pair + k % pair] = element<Out>(src[k]);
      }
    }
  });
}

void Head::pack_token_rows(int64_t token, void* out, int64_t block_stride) const {
  const int64_t count = std::min<int64_t>(kTile, tokens_ - token), pair = math_ == Math::kBf16 ? 2 : 1;
  with_types(hidden_type_, math_, [&](auto* in, auto* to) {
    using Out = std::remove_pointer_t<decltype(to)>;
    for (int64_t k0 = 0; k0 < width_; k0 += kTile) {
      Out* dst = static_cast<Out*>(out) + k0 / kTile * block_stride;
      std::memset(static_cast<void*>(dst), 0, kTile * kTile * sizeof(Out));
      const int64_t columns = std::min<int64_t>(kTile, width_ - k0);
      for (int64_t t = 0; t < count; t++) {
        const int64_t row = rows_ ? rows_[token + t] : token + t;
        const auto* src = reinterpret_cast<decltype(in)>(hidden_) + row * hidden_ld_ + k0;
        for (int64_t k = 0; k < columns; k++) dst[t / pair * kTile * pair + k * pair + t % pair] = element<Out>(src[k]);
      }
    }
  });
}

WeightRows Head::weight_rows(int64_t first, int64_t count, void* scratch) const {
  const bool multiplies_as_is = depth_ == width_ && weight_type_ == (math_ == Math::kBf16 ? at::kBFloat16 : at::kFloat);
  const bool wants_copy = math_ == Math::kFloat ? cpu_isa().fp32 != nullptr : weight_ld_ % 2 != 0;
  if (multiplies_as_is && !wants_copy) return {weight_ + first * weight_ld_ * element_size(math_), weight_ld_};
  with_types(weight_type_, math_, [&](auto* in, auto* to) {
    using Out = std::remove_pointer_t<decltype(to)>;
    Out* dst = static_cast<Out*>(scratch);
    for (int64_t v = 0; v < count; v++, dst += scratch_ld()) {
      const auto* src = reinterpret_cast<decltype(in)>(weight_) + (first + v) * weight_ld_;
      for (int64_t k = 0; k < width_; k++) dst[k] = element<Out>(src[k]);
      for (int64_t k = width_; k < depth_; k++) dst[k] = Out(0.0f);
    }
  });
  return {scratch, scratch_ld()};
}

void Head::interleave_weight_rows(int64_t first, int64_t count, void* out, int64_t ld) const {
  const auto* from = reinterpret_cast<const uint16_t*>(weight_) + first * weight_ld_;
  auto* to = static_cast<uint16_t*>(out);
  for (int64_t v = 0; v < count; v += 2, from += 2 * weight_ld_, to += 2 * ld) {
    const bool two = v + 1 < count;
    int64_t k = 0;
#if defined(__SSE2__)
    for (; two && k + 8 <= width_; k += 8) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + weight_ld_ + k));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * k), _mm_unpacklo_epi16(a, b));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * k + 8), _mm_unpackhi_epi16(a, b));
    }
#endif
    for (; k < width_; k++) {
      to[2 * k] = from[k];
      to[2 * k + 1] = two ? from[weight_ld_ + k] : uint16_t{0};
    }
  }
}

void Head::transpose_weight_rows(int64_t first, int64_t count, int64_t padded, void* out, int64_t ld) const {
#if defined(__SSE2__)
  if (math_ == Math::kBf16 && count % 8 == 0 && width_ % 8 == 0) {
    for (int64_t k = 0; k < width_; k += 8)
      for (int64_t v = 0; v < count; v += 8)
        transpose8(weight_ + ((first + v) * weight_ld_ + k) * 2, weight_ld_ * 2,
                   static_cast<char*>(out) + (k * ld + v) * 2, ld * 2);
    return;
  }
#endif
  with_types(weight_type_, math_, [&](auto* in, auto* to) {
    using Out = std::remove_pointer_t<decltype(to)>;
    Out* dst = static_cast<Out*>(out);
    for (int64_t k0 = 0; k0 < width_; k0 += 32) {
      const int64_t k1 = std::min(k0 + 32, width_);
      for (int64_t v = 0; v < count; v++) {
        const auto* src = reinterpret_cast<decltype(in)>(weight_) + (first + v) * weight_ld_;
        for (int64_t k = k0; k < k1; k++) dst[k * ld + v] = element<Out>(src[k]);
      }
      for (int64_t k = k0; k < k1; k++)
        for (int64_t v = count; v < padded; v++) dst[k * ld + v] = Out(0.0f);
    }
  });
}

}  // namespace sgcd
