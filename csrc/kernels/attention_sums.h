// What the forms of attention share: spans of keys, powers of two, and the running sums of a query row.
#pragma once

#include "../vec.h"
#include "args.h"
#include "kv_cache.h"

namespace puna::PUNA_LEVEL {

constexpr int kSpan = 64;  // positions whose scores are computed together
constexpr int kSpanStrips = kSpan / kStrip;

// Vectors of sums in registers.
#if defined(PUNA_AVX512)
constexpr int kRegisterSums = 16;
#else
constexpr int kRegisterSums = 4;
#endif

// Scores are powers of two here: log2(e) is part of the scale.
constexpr float kLog2E = 1.44269504088896341f;
// Lower than any score, and finite, as the difference of two infinities would be NaN.
constexpr float kLowest = -3.402823466e38f;
// How far above the reference of the running softmax a score may lie before the sums are rescaled to a new one. Any
// reference gives the same result; 2^20 leaves float32 all its range, and most spans need no rescaling.
constexpr float kSlack = 20.0f;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// One number in all lanes, in a register: GCC would broadcast it anew, from memory, for each product.
PUNA_INLINE F broadcast_once(float x) {
  F all = broadcast(x);
#if defined(PUNA_AVX512)
  __asm__("" : "+v"(all.v));
#endif
  return all;
}

// dot() of vec.h; GCC 12 copies the sum before and after the intrinsic, which takes as long as the product.
PUNA_INLINE void add_dot(I& sum, Bytes unsigned_bytes, Bytes signed_bytes) {
#if defined(PUNA_AVX512)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(unsigned_bytes.v), "v"(signed_bytes.v));
#else
  sum = dot(sum, unsigned_bytes, signed_bytes);
#endif
}

// The first n words of 4 bytes, the others zero.
PUNA_INLINE Bytes load_words_n(const void* p, int n) {
#if defined(PUNA_AVX512)
  return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p)};
#elif defined(PUNA_AVX2)
  const F words = load_n(static_cast<const float*>(p), n);
  return {_mm256_castps_si256(words.a), _mm256_castps_si256(words.b)};
#else
  Bytes words{};
  std::memcpy(words.v, p, 4 * static_cast<std::size_t>(n));
  return words;
#endif
}
PUNA_INLINE Pairs as_pairs(Bytes x) {
#if defined(PUNA_AVX512)
  return {x.v};
#elif defined(PUNA_AVX2)
  return {x.a, x.b};
#else
  return load_pairs(x.v);
#endif
}

PUNA_INLINE bool any_above(F x, float bound) {  // false for NaN
#if defined(PUNA_AVX512)
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(PUNA_AVX2)
  const __m256 limit = _mm256_set1_ps(bound);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, limit, _CMP_GT_OQ), _mm256_cmp_ps(x.b, limit, _CMP_GT_OQ)));
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= x.v[i] > bound;
  return any;
#endif
}

PUNA_INLINE bool all_below(F x, float bound) {  // false for NaN
#if defined(PUNA_AVX512)
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_LT_OQ) == 0xffff;
#elif defined(PUNA_AVX2)
  const __m256 limit = _mm256_set1_ps(bound);
  const __m256 below = _mm256_and_ps(_mm256_cmp_ps(x.a, limit, _CMP_LT_OQ), _mm256_cmp_ps(x.b, limit, _CMP_LT_OQ));
  return _mm256_movemask_ps(below) == 0xff;
#else
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= x.v[i] < bound;
  return all;
#endif
}

// p * 2^n for whole n, NaN kept.
PUNA_INLINE F scale_by_power(F p, F n) {
#if defined(PUNA_AVX512)
  return {_mm512_scalef_ps(p.v, n.v)};
#else
  return p * power_of_two(n);
#endif
}

// 2^x to 1.6e-7 for x up to 127; below -100 it is 2^-100 (denormal products take a hundred cycles each), NaN stays. The
// polynomial is the one of degree 5 with the least relative error on [-1/2, 1/2] that is 1 at 0.
PUNA_INLINE F power2(F x) {
  x = max(broadcast(-100.0f), x);
  const F n = round(x), f = x - n;
  F p = broadcast(1.3264727029e-03f);
  p = fma(p, f, broadcast(9.6715128782e-03f));
  p = fma(p, f, broadcast(5.5507337459e-02f));
  p = fma(p, f, broadcast(2.4022242082e-01f));
  p = fma(p, f, broadcast(6.9314697760e-01f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power(p, n);
}

// x in lanes lo .. hi - 1, other in the rest; any integers.
PUNA_INLINE F lanes_between(F x, F other, int lo, int hi) {
  const int from = lo < 0 ? 0 : lo > kLanes ? kLanes : lo;
  const int to = hi < 0 ? 0 : hi > kLanes ? kLanes : hi;
  return first_n(other, first_n(x, other, to), from);
}

// The running sums of one row: `top` the reference, `total` the sum of the weights in 16 parts, `values` [D padded to
// 16].
struct RowSums {
  float* top;
  float* total;
  float* values;
};

inline void clear_sums(RowSums row, std::int64_t padded) {
  *row.top = kLowest;
  store(row.total, zero());
  for (std::int64_t d = 0; d < padded; d += kLanes) store(row.values + d, zero());
}

inline void rescale_sums(RowSums row, float top, std::int64_t padded) {
  const F factor = power2(broadcast(*row.top) - broadcast(top));
  *row.top = top;
  store(row.total, load(row.total) * factor);
  for (std::int64_t d = 0; d < padded; d += kLanes) store(row.values + d, load(row.values + d) * factor);
}

// into += from, where `from` comes later in the order.
inline void merge_sums(RowSums into, RowSums from, std::int64_t padded) {
  if (*from.top > *into.top) rescale_sums(into, *from.top, padded);
  const F factor = power2(broadcast(*from.top) - broadcast(*into.top));
  store(into.total, fma(load(from.total), factor, load(into.total)));
  for (std::int64_t d = 0; d < padded; d += kLanes)
    store(into.values + d, fma(load(from.values + d), factor, load(into.values + d)));
}

// One span of one key/value head. Strips that no row of the task sees point where others do.
struct Span {
  const std::byte* keys[kSpanStrips];
  const std::byte* values[kSpanStrips];
  const float* key_scales[kSpanStrips];  // int8
  const float* value_scales[kSpanStrips];
};

// Positions of a span that a row sees.
struct Visible {
  int begin, end;
};

// The query rows of a task, in the form that their path wants, `stride` bytes apart.
struct Queries {
  const std::byte* rows;
  std::int64_t stride;
  float scale;  // of the scores
};

}  // namespace puna::PUNA_LEVEL
