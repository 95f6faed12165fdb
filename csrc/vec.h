// Vectors of 16 lanes in three spellings: AVX-512, AVX2, portable C++. A file that includes this is compiled once per level,
// and everything in it must be inside the namespace PUNA_LEVEL: the linker would otherwise take any one level's copy of an
// inline function for all, which crashes on processors without that level. For the same reason kernels use no templates
// or inline functions of the standard library.
//
// Where all levels must give the same bits (fma, exp, sums over lanes) the order of operations here is the same in all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/args.h"

#ifndef PUNA_LEVEL
#error "include this from a file in csrc/levels"
#endif

#if defined(PUNA_AVX512) || defined(PUNA_AVX2)
// GCC 12 warns of its own intrinsics, which leave registers undefined on purpose (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(PUNA_AVX512) || defined(PUNA_AVX2)
#define PUNA_INLINE inline __attribute__((always_inline))
#else
#define PUNA_INLINE inline  // a wrapper is a loop here: everything inlined would take minutes to compile
#endif

namespace puna::PUNA_LEVEL {

constexpr int kLanes = 16;

PUNA_INLINE float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
PUNA_INLINE std::uint16_t float_to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PUNA_INLINE float f16_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  std::uint32_t bits;
  float value;
  if (exponent == 0) {  // zero or denormal: mantissa * 2^-24, exactly
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    // A signalling NaN becomes a quiet one, as the processors' conversion has it.
    if (exponent == 31 && mantissa != 0) bits |= 0x400000u;
  }
  std::memcpy(&value, &bits, 4);
  return value;
}
PUNA_INLINE std::uint16_t float_to_f16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: in steps of 2^-24, which adding 0.5 to the number rounds to
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, 4);
    return static_cast<std::uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

#if defined(PUNA_AVX512)

struct F { __m512 v; };       // 16 float32
struct I { __m512i v; };      // 16 int32
struct Bytes { __m512i v; };  // 64 bytes: 16 quads
struct Pairs { __m512i v; };  // 32 bfloat16: 16 pairs

PUNA_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
PUNA_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
PUNA_INLINE F broadcast(float a) { return {_mm512_set1_ps(a)}; }
PUNA_INLINE F zero() { return {_mm512_setzero_ps()}; }
PUNA_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
PUNA_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
PUNA_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
PUNA_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
PUNA_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PUNA_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
PUNA_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
PUNA_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
PUNA_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
PUNA_INLINE F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// The first n (0 to 16) lanes, the others zero.
PUNA_INLINE F load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)}; }
PUNA_INLINE void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v); }
// a in the first n lanes, b in the others.
PUNA_INLINE F first_n(F a, F b, int n) { return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), b.v, a.v)}; }

// x in the lanes where a > b, y in the others, those of NaN too.
PUNA_INLINE F where_greater(F a, F b, F x, F y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}

PUNA_INLINE F load_f16(const std::uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
PUNA_INLINE void store_f16(std::uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PUNA_INLINE F load_bf16(const std::uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
// The bfloat16 in the high half of each lane; the low half is anything.
PUNA_INLINE __m512i to_bf16(__m512 a) {
  // Not vcvtneps2bf16, which takes denormal numbers for zero: all levels must round alike.
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
PUNA_INLINE void store_bf16(std::uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(to_bf16(a.v), 16)));
}
// Each lane rounded to the narrower type, and float32 again.
PUNA_INLINE F round_bf16(F a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(to_bf16(a.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
PUNA_INLINE F round_f16(F a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

PUNA_INLINE I broadcast_int(std::int32_t a) { return {_mm512_set1_epi32(a)}; }
PUNA_INLINE I load_int(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
PUNA_INLINE void store_int(std::int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
PUNA_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
PUNA_INLINE I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
PUNA_INLINE I shift_left(I a) { return {_mm512_slli_epi32(a.v, kBits)}; }
PUNA_INLINE I bits_of(F a) { return {_mm512_castps_si512(a.v)}; }
PUNA_INLINE std::int32_t sum(I a) { return _mm512_reduce_add_epi32(a.v); }
PUNA_INLINE std::int32_t maximum(I a) { return _mm512_reduce_max_epi32(a.v); }
PUNA_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
PUNA_INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // round to nearest even
// The low byte of each lane; lanes must be in -128..127.
PUNA_INLINE void store_int8(std::int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
PUNA_INLINE F load_int8(const std::int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))}; }

PUNA_INLINE Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
PUNA_INLINE Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
PUNA_INLINE Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
PUNA_INLINE void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
// Four signed bytes, repeated in every lane.
PUNA_INLINE Bytes broadcast_quad(const void* p) { std::int32_t q; std::memcpy(&q, p, 4); return {_mm512_set1_epi32(q)}; }
// acc + the dot product of each lane's four unsigned bytes of `weight` with the four signed bytes of `x`.
PUNA_INLINE I dot(I acc, Bytes weight, Bytes x) { return {_mm512_dpbusd_epi32(acc.v, weight.v, x.v)}; }

PUNA_INLINE Pairs load_pairs(const void* p) { return {_mm512_loadu_si512(p)}; }
PUNA_INLINE Pairs broadcast_pair(const void* p) { std::int32_t q; std::memcpy(&q, p, 4); return {_mm512_set1_epi32(q)}; }
// The first and the second bfloat16 of each pair.
PUNA_INLINE F first_of_pairs(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
PUNA_INLINE F second_of_pairs(Pairs a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// acc + the dot product of each lane's two bfloat16. The rounding is the processor's (vdpbf16ps) and differs by level.
PUNA_INLINE F dot(F acc, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }

// 2^n for n in -126..127, as whole numbers in float lanes.
PUNA_INLINE F power_of_two(F n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}

PUNA_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
PUNA_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // second level

#elif defined(PUNA_AVX2)

struct F { __m256 a, b; };  // lanes 0-7, 8-15
struct I { __m256i a, b; };
struct Bytes { __m256i a, b; };
struct Pairs { __m256i a, b; };

PUNA_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PUNA_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
PUNA_INLINE F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PUNA_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
PUNA_INLINE F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PUNA_INLINE F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PUNA_INLINE F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PUNA_INLINE F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PUNA_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PUNA_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PUNA_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PUNA_INLINE F abs(F x) { const __m256 sign = _mm256_set1_ps(-0.0f); return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)}; }
PUNA_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
PUNA_INLINE F round(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
PUNA_INLINE __m256i lanes_below(int n, int first) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PUNA_INLINE F load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n, 0)), _mm256_maskload_ps(n > 8 ? p + 8 : p, lanes_below(n, 8))};
}
PUNA_INLINE void store_n(float* p, F x, int n) {
  _mm256_maskstore_ps(p, lanes_below(n, 0), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, lanes_below(n, 8), x.b);
}
PUNA_INLINE F first_n(F x, F y, int n) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(lanes_below(n, 0))),
          _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(lanes_below(n, 8)))};
}
PUNA_INLINE F where_greater(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}
PUNA_INLINE __m128i half(const std::uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
PUNA_INLINE F load_f16(const std::uint16_t* p) { return {_mm256_cvtph_ps(half(p)), _mm256_cvtph_ps(half(p + 8))}; }
PUNA_INLINE void store_f16(std::uint16_t* p, F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
PUNA_INLINE __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
PUNA_INLINE F load_bf16(const std::uint16_t* p) { return {widen_bf16(half(p)), widen_bf16(half(p + 8))}; }
PUNA_INLINE __m256i to_bf16(__m256 x) {  // the bfloat16 in the high half of each lane; the low half is anything
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
}
PUNA_INLINE __m128i narrow_bf16(__m256 x) {
  const __m256i high = _mm256_srli_epi32(to_bf16(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
PUNA_INLINE void store_bf16(std::uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow_bf16(x.b));
}
PUNA_INLINE F round_bf16(F x) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(to_bf16(x.a), high)), _mm256_castsi256_ps(_mm256_and_si256(to_bf16(x.b), high))};
}
PUNA_INLINE F round_f16(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.a, mode)), _mm256_cvtph_ps(_mm256_cvtps_ph(x.b, mode))};
}

PUNA_INLINE I broadcast_int(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PUNA_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PUNA_INLINE I load_int(const std::int32_t* p) { return {load256(p), load256(p + 8)}; }
PUNA_INLINE void store_int(std::int32_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
PUNA_INLINE I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
PUNA_INLINE I max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int kBits>
PUNA_INLINE I shift_left(I x) { return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)}; }
PUNA_INLINE I bits_of(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
PUNA_INLINE std::int32_t sum(I x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
PUNA_INLINE std::int32_t maximum(I x) {
  const __m256i eight = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
PUNA_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PUNA_INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
PUNA_INLINE void store_int8(std::int8_t* p, I x) {
  // Packs work within 128-bit halves; the permutation puts the groups of four bytes back in order.
  const __m256i words = _mm256_packs_epi32(x.a, x.b);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words), _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
}
PUNA_INLINE F load_int8(const std::int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}

PUNA_INLINE Bytes load_bytes(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
PUNA_INLINE void store_bytes(void* p, Bytes x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<char*>(p) + 32), x.b);
}
PUNA_INLINE Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
PUNA_INLINE Bytes high_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
PUNA_INLINE Bytes broadcast_quad(const void* p) {
  std::int32_t q;
  std::memcpy(&q, p, 4);
  return {_mm256_set1_epi32(q), _mm256_set1_epi32(q)};
}
PUNA_INLINE __m256i dot_bytes(__m256i acc, __m256i weight, __m256i x) {
#if defined(PUNA_AVXVNNI)
  return _mm256_dpbusd_avx_epi32(acc, weight, x);
#else
  // vpmaddubsw would saturate: 2 * 255 * 127 needs 17 bits. So in 16-bit products, the even bytes and the odd ones.
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weight, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weight, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
PUNA_INLINE I dot(I acc, Bytes weight, Bytes x) { return {dot_bytes(acc.a, weight.a, x.a), dot_bytes(acc.b, weight.b, x.b)}; }

PUNA_INLINE Pairs load_pairs(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
PUNA_INLINE Pairs broadcast_pair(const void* p) {
  std::int32_t q;
  std::memcpy(&q, p, 4);
  return {_mm256_set1_epi32(q), _mm256_set1_epi32(q)};
}
PUNA_INLINE F first_of_pairs(Pairs x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
PUNA_INLINE F second_of_pairs(Pairs x) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
PUNA_INLINE __m256 dot_pairs(__m256 acc, __m256i x, __m256i y) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), acc);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high)), acc);
}
PUNA_INLINE F dot(F acc, Pairs x, Pairs y) { return {dot_pairs(acc.a, x.a, y.a), dot_pairs(acc.b, x.b, y.b)}; }

PUNA_INLINE __m256 power256(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
PUNA_INLINE F power_of_two(F n) { return {power256(n.a), power256(n.b)}; }

PUNA_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
PUNA_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // second level

#else  // portable

struct F { float v[kLanes]; };
struct I { std::int32_t v[kLanes]; };
struct Bytes { std::uint8_t v[4 * kLanes]; };
struct Pairs { std::uint16_t v[2 * kLanes]; };

#define PUNA_EACH_LANE for (int i = 0; i < kLanes; ++i)

PUNA_INLINE F load(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
PUNA_INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
PUNA_INLINE F broadcast(float a) { F r; PUNA_EACH_LANE r.v[i] = a; return r; }
PUNA_INLINE F zero() { return broadcast(0.0f); }
PUNA_INLINE F operator+(F a, F b) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] + b.v[i]; return r; }
PUNA_INLINE F operator-(F a, F b) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] - b.v[i]; return r; }
PUNA_INLINE F operator*(F a, F b) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] * b.v[i]; return r; }
PUNA_INLINE F operator/(F a, F b) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] / b.v[i]; return r; }
PUNA_INLINE F fma(F a, F b, F c) { F r; PUNA_EACH_LANE r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return r; }
PUNA_INLINE F max(F a, F b) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
PUNA_INLINE F min(F a, F b) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return r; }
PUNA_INLINE F abs(F a) { F r; PUNA_EACH_LANE r.v[i] = __builtin_fabsf(a.v[i]); return r; }
PUNA_INLINE F sqrt(F a) { F r; PUNA_EACH_LANE r.v[i] = __builtin_sqrtf(a.v[i]); return r; }
PUNA_INLINE F round(F a) { F r; PUNA_EACH_LANE r.v[i] = __builtin_rintf(a.v[i]); return r; }
PUNA_INLINE F load_n(const float* p, int n) { F r = zero(); for (int i = 0; i < n; ++i) r.v[i] = p[i]; return r; }
PUNA_INLINE void store_n(float* p, F a, int n) { for (int i = 0; i < n; ++i) p[i] = a.v[i]; }
PUNA_INLINE F first_n(F a, F b, int n) { F r; PUNA_EACH_LANE r.v[i] = i < n ? a.v[i] : b.v[i]; return r; }
PUNA_INLINE F where_greater(F a, F b, F x, F y) { F r; PUNA_EACH_LANE r.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i]; return r; }

PUNA_INLINE F load_f16(const std::uint16_t* p) { F r; PUNA_EACH_LANE r.v[i] = f16_to_float(p[i]); return r; }
PUNA_INLINE void store_f16(std::uint16_t* p, F a) { PUNA_EACH_LANE p[i] = float_to_f16(a.v[i]); }
PUNA_INLINE F load_bf16(const std::uint16_t* p) { F r; PUNA_EACH_LANE r.v[i] = bf16_to_float(p[i]); return r; }
PUNA_INLINE void store_bf16(std::uint16_t* p, F a) { PUNA_EACH_LANE p[i] = float_to_bf16(a.v[i]); }
PUNA_INLINE F round_bf16(F a) { F r; PUNA_EACH_LANE r.v[i] = bf16_to_float(float_to_bf16(a.v[i])); return r; }
PUNA_INLINE F round_f16(F a) { F r; PUNA_EACH_LANE r.v[i] = f16_to_float(float_to_f16(a.v[i])); return r; }

PUNA_INLINE I broadcast_int(std::int32_t a) { I r; PUNA_EACH_LANE r.v[i] = a; return r; }
PUNA_INLINE I load_int(const std::int32_t* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
PUNA_INLINE void store_int(std::int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
PUNA_INLINE I operator+(I a, I b) { I r; PUNA_EACH_LANE r.v[i] = a.v[i] + b.v[i]; return r; }
PUNA_INLINE I max(I a, I b) { I r; PUNA_EACH_LANE r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
template <int kBits>
PUNA_INLINE I shift_left(I a) {
  I r;
  PUNA_EACH_LANE r.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << kBits);
  return r;
}
PUNA_INLINE I bits_of(F a) { I r; std::memcpy(r.v, a.v, sizeof r.v); return r; }
PUNA_INLINE std::int32_t sum(I a) { std::int32_t total = 0; PUNA_EACH_LANE total += a.v[i]; return total; }
PUNA_INLINE std::int32_t maximum(I a) {
  std::int32_t most = a.v[0];
  PUNA_EACH_LANE most = a.v[i] > most ? a.v[i] : most;
  return most;
}
PUNA_INLINE F to_float(I a) { F r; PUNA_EACH_LANE r.v[i] = static_cast<float>(a.v[i]); return r; }
// What does not fit (NaN and infinity too) becomes the lowest integer, as the processors' conversion has it.
PUNA_INLINE I to_int(F a) {
  I r;
  PUNA_EACH_LANE {
    const float whole = __builtin_rintf(a.v[i]);
    r.v[i] = whole >= -2147483648.0f && whole < 2147483648.0f ? static_cast<std::int32_t>(whole) : INT32_MIN;
  }
  return r;
}
PUNA_INLINE void store_int8(std::int8_t* p, I a) { PUNA_EACH_LANE p[i] = static_cast<std::int8_t>(a.v[i]); }
PUNA_INLINE F load_int8(const std::int8_t* p) { F r; PUNA_EACH_LANE r.v[i] = static_cast<float>(p[i]); return r; }

PUNA_INLINE Bytes load_bytes(const void* p) { Bytes r; std::memcpy(r.v, p, sizeof r.v); return r; }
PUNA_INLINE void store_bytes(void* p, Bytes a) { std::memcpy(p, a.v, sizeof a.v); }
PUNA_INLINE Bytes low_nibbles(Bytes a) { for (auto& x : a.v) x &= 15; return a; }
PUNA_INLINE Bytes high_nibbles(Bytes a) { for (auto& x : a.v) x >>= 4; return a; }
PUNA_INLINE Bytes broadcast_quad(const void* p) { Bytes r; PUNA_EACH_LANE std::memcpy(r.v + 4 * i, p, 4); return r; }
PUNA_INLINE I dot(I acc, Bytes weight, Bytes x) {
  PUNA_EACH_LANE for (int j = 4 * i; j < 4 * i + 4; ++j) acc.v[i] += weight.v[j] * static_cast<std::int8_t>(x.v[j]);
  return acc;
}
PUNA_INLINE Pairs load_pairs(const void* p) { Pairs r; std::memcpy(r.v, p, sizeof r.v); return r; }
PUNA_INLINE Pairs broadcast_pair(const void* p) { Pairs r; PUNA_EACH_LANE std::memcpy(r.v + 2 * i, p, 4); return r; }
PUNA_INLINE F first_of_pairs(Pairs a) { F r; PUNA_EACH_LANE r.v[i] = bf16_to_float(a.v[2 * i]); return r; }
PUNA_INLINE F second_of_pairs(Pairs a) { F r; PUNA_EACH_LANE r.v[i] = bf16_to_float(a.v[2 * i + 1]); return r; }
PUNA_INLINE F dot(F acc, Pairs a, Pairs b) {
  PUNA_EACH_LANE for (int j = 2 * i; j < 2 * i + 2; ++j)
    acc.v[i] = __builtin_fmaf(bf16_to_float(a.v[j]), bf16_to_float(b.v[j]), acc.v[i]);
  return acc;
}
PUNA_INLINE F power_of_two(F n) {
  F r;
  PUNA_EACH_LANE {
    const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(n.v[i]) + 127) << 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
PUNA_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
PUNA_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

#undef PUNA_EACH_LANE
#endif

// Sums and maxima over the lanes, in halves: lane i with i + 8, then i + 4, i + 2, i + 1. The same on all levels.
#if defined(PUNA_AVX512) || defined(PUNA_AVX2)
PUNA_INLINE float sum_halves(__m256 eight) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
PUNA_INLINE float maximum_halves(__m256 eight) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
#endif
#if defined(PUNA_AVX512)
PUNA_INLINE float sum(F a) {
  return sum_halves(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
PUNA_INLINE float maximum(F a) {
  return maximum_halves(_mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
#elif defined(PUNA_AVX2)
PUNA_INLINE float sum(F x) { return sum_halves(_mm256_add_ps(x.a, x.b)); }
PUNA_INLINE float maximum(F x) { return maximum_halves(_mm256_max_ps(x.a, x.b)); }
#else
PUNA_INLINE float sum(F a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
PUNA_INLINE float maximum(F a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  return a.v[0];
}
#endif

// e^x to within two units in the last place; x is clamped to -87.3 .. 88.3, so nothing becomes zero or infinite, and NaN
// stays NaN (max and min return their second operand then). x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 is split in two so
// that r is exact, and e^r is the Taylor polynomial of degree 7, whose rest is below 1e-8.
PUNA_INLINE F exp(F x) {
  x = min(broadcast(88.3f), max(broadcast(-87.3f), x));
  const F n = round(x * broadcast(1.44269504088896341f));
  F r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return p * power_of_two(n);
}

// Reading and writing the activations' dtypes; `n` lanes, the others zero or left alone.
PUNA_INLINE F load_as(const void* base, std::int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return load(static_cast<const float*>(base) + i);
  const auto* p = static_cast<const std::uint16_t*>(base) + i;
  return dtype == Dtype::bf16 ? load_bf16(p) : load_f16(p);
}
PUNA_INLINE void store_as(void* base, std::int64_t i, F x, Dtype dtype) {
  if (dtype == Dtype::f32) return store(static_cast<float*>(base) + i, x);
  auto* p = static_cast<std::uint16_t*>(base) + i;
  return dtype == Dtype::bf16 ? store_bf16(p, x) : store_f16(p, x);
}
PUNA_INLINE F load_as_n(const void* base, std::int64_t i, Dtype dtype, int n) {
  if (n == kLanes) return load_as(base, i, dtype);
  if (dtype == Dtype::f32) return load_n(static_cast<const float*>(base) + i, n);
  std::uint16_t buffer[kLanes] = {};
  std::memcpy(buffer, static_cast<const std::uint16_t*>(base) + i, 2 * static_cast<std::size_t>(n));
  return dtype == Dtype::bf16 ? load_bf16(buffer) : load_f16(buffer);
}
// x as it would be read again after a store_as.
PUNA_INLINE F rounded(F x, Dtype dtype) {
  return dtype == Dtype::f32 ? x : dtype == Dtype::bf16 ? round_bf16(x) : round_f16(x);
}
PUNA_INLINE void store_as_n(void* base, std::int64_t i, F x, Dtype dtype, int n) {
  if (n == kLanes) return store_as(base, i, x, dtype);
  if (dtype == Dtype::f32) return store_n(static_cast<float*>(base) + i, x, n);
  std::uint16_t buffer[kLanes];
  dtype == Dtype::bf16 ? store_bf16(buffer, x) : store_f16(buffer, x);
  std::memcpy(static_cast<std::uint16_t*>(base) + i, buffer, 2 * static_cast<std::size_t>(n));
}

}  // namespace puna::PUNA_LEVEL
