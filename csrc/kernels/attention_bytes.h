// Attention over a cache of int8: everything in integers but the scales.
//
// Queries are rounded to 15 bits with a scale for each row, weights (times the values' scales) to 16 bits with a scale
// for each row and span. Both are kept as two bytes, so that a product takes two byte dot products, which do four times
// as many products an instruction as fma. What that rounds is a hundredth of the rounding of the cache's codes.
#pragma once

#include "attention_sums.h"

namespace puna::PUNA_LEVEL {

struct BytePath {
  static constexpr int kTileRows = kRegisterSums == 16 ? 4 : 2;
  static constexpr int kSums = kRegisterSums / 2;  // each is two vectors

  using Staged = BytePath;
  static constexpr bool kStages = false;

  // A query row: float scale, int32 corrections of the high and the low bytes, padding to 16; high bytes; low bytes.
  static constexpr std::int64_t kHeader = 16;
  static constexpr std::int64_t query_bytes(std::int64_t size) { return kHeader + 2 * round_up(size, kLanes); }

  static void prepare_row(const void* x, std::int64_t at, std::int64_t size, Dtype dtype, std::byte* row) {
    auto* high = reinterpret_cast<std::int8_t*>(row + kHeader);
    std::int8_t* low = high + round_up(size, kLanes);
    alignas(64) float numbers[kLargestHead];
    F largest = zero(), differences = zero();
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
      const F x16 = load_as_n(x, at + d, dtype, n);
      store(numbers + d, x16);
      largest = max(largest, abs(x16));
      differences = differences + (x16 - x16);  // NaN from anything that is not finite
    }
    const float top = maximum(largest);
    const bool finite = sum(differences) == 0.0f;
    const F inverse = broadcast(finite && top > 1e-30f ? 127.0f * 128.0f / top : 0.0f);
    I high_sum = broadcast_int(0), low_sum = broadcast_int(0);
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const F whole = finite ? round(load(numbers + d) * inverse) : zero();
      const F upper = round(whole * broadcast(1.0f / 128.0f));
      const I upper_int = to_int(upper), lower_int = to_int(fma(upper, broadcast(-128.0f), whole));
      store_int8(high + d, upper_int);
      store_int8(low + d, lower_int);
      high_sum = high_sum + upper_int, low_sum = low_sum + lower_int;
    }
    // The codes of the keys are stored with 128 added.
    const std::int32_t corrections[2] = {-128 * sum(high_sum), -128 * sum(low_sum)};
    const float scale = finite ? top * (1.0f / (127.0f * 128.0f)) : __builtin_nanf("");
    std::memcpy(row, &scale, 4);
    std::memcpy(row + 4, corrections, 8);
  }

  template <int kRows, int kStrips, bool kAhead>
  PUNA_INLINE static void score(const Queries& queries, std::int64_t row, const Span& span, const Span& ahead,
                                int strip, std::int64_t size, float* scores) {
    I high[kRows][kStrips], low[kRows][kStrips];
    const std::byte* query = queries.rows + row * queries.stride;
    for (int r = 0; r < kRows; ++r) {
      std::int32_t corrections[2];
      std::memcpy(corrections, query + r * queries.stride + 4, 8);
      for (int s = 0; s < kStrips; ++s)
        high[r][s] = broadcast_int(corrections[0]), low[r][s] = broadcast_int(corrections[1]);
    }
    const std::int64_t padded = round_up(size, kLanes);
    const auto add = [&](std::int64_t d, const Bytes* keys) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const std::byte* at = query + r * queries.stride + kHeader + d;
        const Bytes upper = broadcast_quad(at), lower = broadcast_quad(at + padded);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) add_dot(high[r][s], keys[s], upper);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) add_dot(low[r][s], keys[s], lower);
      }
    };
    Bytes keys[kStrips];
    std::int64_t d = 0;
    for (; d + 4 <= size; d += 4) {
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        keys[s] = load_bytes(span.keys[strip + s] + kStrip * d);
        if constexpr (kAhead) prefetch_far(ahead.keys[strip + s] + kStrip * d);
      }
      add(d, keys);
    }
    if (d < size) {
      for (int s = 0; s < kStrips; ++s) {
        alignas(64) std::byte buffer[64] = {};
        for (int n = 0; n < kStrip; ++n) std::memcpy(buffer + 4 * n, span.keys[strip + s] + kStrip * d + 2 * n, 2);
        keys[s] = load_bytes(buffer);
      }
      add(d, keys);
    }
    for (int r = 0; r < kRows; ++r)
      for (int s = 0; s < kStrips; ++s)
        store(scores + r * kSpan + (strip + s) * kStrip,
              fma(to_float(high[r][s]), broadcast(128.0f), to_float(low[r][s])));
  }

  PUNA_INLINE static F scaled(F score, const Queries& queries, std::int64_t row, const Span& span, int strip) {
    float scale;
    std::memcpy(&scale, queries.rows + row * queries.stride, 4);
    return score * (broadcast(scale * queries.scale) * load(span.key_scales[strip]));
  }

  // `bytes` are the weights' high bytes [kSpan], then the low ones. Positions 16 s + 4 j .. + 3 are in bytes
  // 16 j + 4 s .. + 3: what packs within 128 bits give.
  PUNA_INLINE static int weight_at(int position) { return position % kStrip * 4 + position / kStrip * 4; }

  PUNA_INLINE static void pack(const F* whole, std::byte* bytes) {
#if defined(PUNA_AVX512)
    const __m512i first = _mm512_packus_epi32(_mm512_cvtps_epi32(whole[0].v), _mm512_cvtps_epi32(whole[1].v));
    const __m512i second = _mm512_packus_epi32(_mm512_cvtps_epi32(whole[2].v), _mm512_cvtps_epi32(whole[3].v));
    const __m512i low = _mm512_set1_epi16(0xff);
    _mm512_storeu_si512(bytes, _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
    _mm512_storeu_si512(bytes + kSpan,
                        _mm512_packus_epi16(_mm512_and_si512(first, low), _mm512_and_si512(second, low)));
#elif defined(PUNA_AVX2)
    const auto pack_half = [&](__m256 a, __m256 b, __m256 c, __m256 d, std::byte* to) {
      const __m256i first = _mm256_packus_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
      const __m256i second = _mm256_packus_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
      const __m256i low = _mm256_set1_epi16(0xff);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kSpan),
                          _mm256_packus_epi16(_mm256_and_si256(first, low), _mm256_and_si256(second, low)));
    };
    pack_half(whole[0].a, whole[1].a, whole[2].a, whole[3].a, bytes);
    pack_half(whole[0].b, whole[1].b, whole[2].b, whole[3].b, bytes + kSpan / 2);
#else
    for (int s = 0; s < kSpanStrips; ++s) {
      const I lanes = to_int(whole[s]);
      for (int n = 0; n < kStrip; ++n) {
        const std::int32_t weight = lanes.v[n] < 0 ? 0 : lanes.v[n];  // NaN
        const int at = weight_at(s * kStrip + n / 4 * 4) + n % 4;
        bytes[at] = static_cast<std::byte>(weight >> 8);
        bytes[kSpan + at] = static_cast<std::byte>(weight & 0xff);
      }
    }
#endif
  }

  // Weights times the values' scales, and in `scale` what their integers are to be multiplied by.
  PUNA_INLINE static void keep_weights(const F* weights, const Span& span, Visible visible, float*, std::byte* bytes,
                                       float* scale) {
    F products[kSpanStrips];
    for (int s = 0; s < kSpanStrips; ++s) products[s] = weights[s] * load(span.value_scales[s]);
    if (visible.begin > 0 || visible.end < kSpan)
      for (int s = 0; s < kSpanStrips; ++s)
        products[s] = lanes_between(products[s], zero(), visible.begin - s * kStrip, visible.end - s * kStrip);
    const bool finite = all_below((products[0] + products[1]) + (products[2] + products[3]), 3.0e38f);
    const float top = maximum(max(max(products[0], products[1]), max(products[2], products[3])));
    constexpr float kLargest = 65280.0f;  // 255 * 256
    const F inverse = broadcast(finite && top > 1e-30f ? kLargest / top : 0.0f);
    *scale = finite ? top * (1.0f / kLargest) : __builtin_nanf("");
    for (int s = 0; s < kSpanStrips; ++s) products[s] = products[s] * inverse;
    pack(products, bytes);
  }

  template <int kRows, int kVectors, bool kTail, bool kAhead>
  PUNA_INLINE static void add_values(const float*, const std::byte* bytes, const float* scales, const Span& span,
                                     const Span& ahead, Visible visible, std::int64_t d, std::int64_t size,
                                     float* values, std::int64_t padded) {
    I high[kRows][kVectors], low[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) high[r][v] = low[r][v] = broadcast_int(0);
    // Weights of positions that are not seen are zero, and so are their products: whole quads.
    for (int strip = visible.begin / kStrip; strip * kStrip < visible.end; ++strip) {
      const int begin = visible.begin > strip * kStrip ? (visible.begin - strip * kStrip) / 4 : 0;
      const int end = visible.end < (strip + 1) * kStrip ? (visible.end - strip * kStrip + 3) / 4 : kStrip / 4;
      const std::byte* from = span.values[strip] + 4 * (begin * size + d);
      const std::byte* next = ahead.values[strip] + 4 * (begin * size + d);
      const std::byte* weight = bytes + 16 * begin + 4 * strip;
      for (int quad = begin; quad < end; ++quad, from += 4 * size, next += 4 * size, weight += 16) {
        Bytes vectors[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          vectors[v] = kTail ? load_words_n(from, static_cast<int>(size - d)) : load_bytes(from + 64 * v);
          if constexpr (kAhead) prefetch_far(next + 64 * v);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const std::byte* of_row = weight + r * 2 * kSpan;
          const Bytes upper = broadcast_quad(of_row), lower = broadcast_quad(of_row + kSpan);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) add_dot(high[r][v], upper, vectors[v]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) add_dot(low[r][v], lower, vectors[v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* to = values + r * padded + d + v * kLanes;
        const F whole = fma(to_float(high[r][v]), broadcast(256.0f), to_float(low[r][v]));
        store(to, fma(whole, broadcast(scales[r]), load(to)));
      }
  }
};

}  // namespace puna::PUNA_LEVEL
