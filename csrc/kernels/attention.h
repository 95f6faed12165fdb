// Attention of query rows over the paged cache, whose order kv_cache.h has.
//
// A query row is one head of one token. What is computed for it depends on its own position p and the cache alone: the keys
// p - window < position <= p in spans of 64 and partitions of 512, both cut at absolute positions, in order. Within a
// partition a running softmax (Milakov and Gimelshein, 2018) rescales its sums at most once a span; the partitions'
// sums are merged in order, whether one thread went through all of them or several threads shared them. Positions that a
// row does not see are not multiplied by zero but left out, so nothing that lies there reaches it: not even NaN.
//
// The rows of a task are those of one key/value head: all the heads that share it, times neighbouring tokens, so that the keys
// and values are loaded once for many rows. A decode step is the case of one token; there is no other code for it.
#pragma once

#include "../vec.h"
#include "args.h"
#include "kv_cache.h"

namespace puna::PUNA_LEVEL {

constexpr int kSpan = 64;  // positions whose scores are computed together
constexpr int kSpanStrips = kSpan / kStrip;
constexpr int kRowsPerTask = 64;

// Vectors of accumulators in registers.
#if defined(PUNA_AVX512)
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 4;
#endif

// Scores are powers of two here: log2(e) is part of the scale.
constexpr float kLog2E = 1.44269504088896341f;
// Lower than any score, and finite, as the difference of two infinities would be NaN.
constexpr float kLowest = -3.402823466e38f;
// How far above the reference of the running softmax a score may lie before the sums are rescaled to a new one. Any reference
// gives the same result; 2^20 leaves float32 all its range, and most spans need no rescaling.
constexpr float kSlack = 20.0f;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

PUNA_INLINE bool any_above(F x, float bound) {  // false for NaN
#if defined(PUNA_AVX512)
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(PUNA_AVX2)
  const __m256 limit = _mm256_set1_ps(bound);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, limit, _CMP_GT_OQ), _mm256_cmp_ps(x.b, limit, _CMP_GT_OQ))) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= x.v[i] > bound;
  return any;
#endif
}

PUNA_INLINE bool any_nan(F x) {
#if defined(PUNA_AVX512)
  return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q) != 0;
#elif defined(PUNA_AVX2)
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= x.v[i] != x.v[i];
  return any;
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
PUNA_INLINE F lanes_between(F x, F other, std::int64_t lo, std::int64_t hi) {
  const int from = static_cast<int>(lo < 0 ? 0 : lo > kLanes ? kLanes : lo);
  const int to = static_cast<int>(hi < 0 ? 0 : hi > kLanes ? kLanes : hi);
  return first_n(other, first_n(x, other, to), from);
}

// The running sums of one row: `top` the reference, `total` the sum of the weights in 16 parts, `values` [D padded to 16].
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

// Query rows as they are, in float32, and weights in float32.
template <Dtype kDtype>
struct FloatPath {
  static constexpr int kSums = kAccumulators;  // of sums in registers
  static constexpr int kTileRows = kAccumulators == 16 ? 8 : 4;

  struct Queries {
    const float* rows;
    std::int64_t stride;
    float scale;
  };

  static constexpr std::int64_t query_bytes(std::int64_t size) { return 4 * ((size + 15) / 16 * 16); }

  static void prepare_row(const void* x, std::int64_t at, std::int64_t size, Dtype dtype, void* row) {
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
      store(static_cast<float*>(row) + d, load_as_n(x, at + d, dtype, n));
    }
  }

  // Numbers 2 i and 2 i + 1 of the keys of a strip.
  PUNA_INLINE static void load_keys(const std::byte* strip, std::int64_t i, F& first, F& second) {
    if constexpr (kDtype == Dtype::f32) {
      first = load(reinterpret_cast<const float*>(strip) + 32 * i);
      second = load(reinterpret_cast<const float*>(strip) + 32 * i + 16);
    } else if constexpr (kDtype == Dtype::f16) {
      first = load_f16(reinterpret_cast<const std::uint16_t*>(strip) + 32 * i);
      second = load_f16(reinterpret_cast<const std::uint16_t*>(strip) + 32 * i + 16);
    } else {
      const Pairs pairs = load_pairs(strip + 64 * i);
      first = first_of_pairs(pairs), second = second_of_pairs(pairs);
    }
  }

  // Numbers d .. d + n - 1 of the values at positions 2 i and 2 i + 1 of a strip.
  template <bool kTail>
  PUNA_INLINE static void load_values(const std::byte* strip, std::int64_t i, std::int64_t d, int n, std::int64_t size,
                                      F& first, F& second) {
    if constexpr (kDtype == Dtype::bf16) {
      const std::byte* at = strip + 4 * (i * size + d);
      Pairs pairs;
      if constexpr (kTail) {
        alignas(64) std::byte buffer[64] = {};
        std::memcpy(buffer, at, 4 * static_cast<std::size_t>(n));
        pairs = load_pairs(buffer);
      } else {
        pairs = load_pairs(at);
      }
      first = first_of_pairs(pairs), second = second_of_pairs(pairs);
    } else if constexpr (kTail) {
      first = load_as_n(strip, 2 * i * size + d, kDtype, n);
      second = load_as_n(strip, (2 * i + 1) * size + d, kDtype, n);
    } else {
      first = load_as(strip, 2 * i * size + d, kDtype);
      second = load_as(strip, (2 * i + 1) * size + d, kDtype);
    }
  }

  // Dot products of kRows query rows with the keys of kStrips strips, into scores [kRows][kSpan].
  template <int kRows, int kStrips, bool kAhead>
  PUNA_INLINE static void score(const Queries& queries, std::int64_t row, const Span& span, const Span& ahead, int strip,
                                std::int64_t size, float* scores) {
    F sums[kRows][kStrips];
    for (auto& of_row : sums)
      for (F& sum : of_row) sum = zero();
    const float* query = queries.rows + row * queries.stride;
    for (std::int64_t i = 0; i < size / 2; ++i) {
      F first[kStrips], second[kStrips];
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        load_keys(span.keys[strip + s], i, first[s], second[s]);
        if constexpr (kAhead) {
          constexpr int kBytes = kDtype == Dtype::f32 ? 128 : 64;
          prefetch(ahead.keys[strip + s] + kBytes * i);
          if constexpr (kBytes == 128) prefetch(ahead.keys[strip + s] + kBytes * i + 64);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F q = broadcast(query[r * queries.stride + 2 * i]);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) sums[r][s] = fma(first[s], q, sums[r][s]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F q = broadcast(query[r * queries.stride + 2 * i + 1]);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) sums[r][s] = fma(second[s], q, sums[r][s]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int s = 0; s < kStrips; ++s) store(scores + r * kSpan + (strip + s) * kStrip, sums[r][s]);
  }

  PUNA_INLINE static F scaled(F score, const Queries& queries, std::int64_t, const Span&, int) {
    return score * broadcast(queries.scale);
  }

  // The weights take the place of the scores.
  using Weight = float;
  PUNA_INLINE static void keep_weights(const F* weights, const Span&, Visible, float* scores, Weight*, float*) {
    for (int s = 0; s < kSpanStrips; ++s) store(scores + s * kStrip, weights[s]);
  }

  // Adds weight * value over the visible positions to `values` [kRows][padded], numbers d .. d + 16 kVectors - 1.
  template <int kRows, int kVectors, bool kTail, bool kAhead>
  PUNA_INLINE static void add_values(const float* weights, const Weight*, const float*, const Span& span, const Span& ahead,
                                     Visible visible, std::int64_t d, std::int64_t size, float* values,
                                     std::int64_t padded) {
    F sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(values + r * padded + d + v * kLanes);
    const int n = kTail ? static_cast<int>(size - d) : kLanes;
    const auto add = [&](int position, const F* vectors) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F weight = broadcast(weights[r * kSpan + position]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(vectors[v], weight, sums[r][v]);
      }
    };
    for (int at = visible.begin; at < visible.end;) {
      const int strip = at / kStrip, strip_end = (strip + 1) * kStrip;
      const int end = visible.end < strip_end ? visible.end : strip_end;
      const std::byte* from = span.values[strip];
      F first[kVectors], second[kVectors];
      if (at % 2 != 0) {
        for (int v = 0; v < kVectors; ++v)
          load_values<kTail>(from, at % kStrip / 2, d + v * kLanes, n, size, first[v], second[v]);
        add(at, second);
        ++at;
      }
      for (; at + 2 <= end; at += 2) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          load_values<kTail>(from, at % kStrip / 2, d + v * kLanes, n, size, first[v], second[v]);
          if constexpr (kAhead) {
            const std::byte* next = ahead.values[strip];
            if constexpr (kDtype == Dtype::bf16) {
              prefetch(next + 4 * (at % kStrip / 2 * size + d + v * kLanes));
            } else {
              prefetch(next + element_bytes(kDtype) * (at % kStrip * size + d + v * kLanes));
              prefetch(next + element_bytes(kDtype) * ((at % kStrip + 1) * size + d + v * kLanes));
            }
          }
        }
        add(at, first);
        add(at + 1, second);
      }
      if (at < end) {
        for (int v = 0; v < kVectors; ++v)
          load_values<kTail>(from, at % kStrip / 2, d + v * kLanes, n, size, first[v], second[v]);
        add(at, first);
        ++at;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(values + r * padded + d + v * kLanes, sums[r][v]);
  }
};

// Everything in integers but the scales: query numbers in 15 bits with a scale for each row, weights in 16 bits with a scale
// for each row and span, both as two bytes, so that a product takes two byte dot products. What that rounds is far below the
// rounding of the cache's codes.
struct BytePath {
  static constexpr int kSums = kAccumulators / 2;
  static constexpr int kTileRows = kAccumulators == 16 ? 4 : 2;

  // A row: float scale, int32 corrections of the high and the low bytes, padding to 16 bytes; high bytes, low bytes.
  struct Queries {
    const std::byte* rows;
    std::int64_t stride;
    float scale;
  };

  static constexpr std::int64_t padded_size(std::int64_t size) { return (size + 15) / 16 * 16; }
  static constexpr std::int64_t query_bytes(std::int64_t size) { return 16 + 2 * padded_size(size); }

  static void prepare_row(const void* x, std::int64_t at, std::int64_t size, Dtype dtype, void* row) {
    auto* high = static_cast<std::int8_t*>(row) + 16;
    std::int8_t* low = high + padded_size(size);
    F largest = zero(), differences = zero();
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
      const F numbers = load_as_n(x, at + d, dtype, n);
      largest = max(largest, abs(numbers));
      differences = differences + (numbers - numbers);  // NaN from anything that is not finite
    }
    const float top = maximum(largest);
    const bool finite = sum(differences) == 0.0f;
    const F inverse = broadcast(finite && top > 1e-30f ? 127.0f * 128.0f / top : 0.0f);
    std::int32_t corrections[2] = {0, 0};
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
      const F numbers = finite ? round(load_as_n(x, at + d, dtype, n) * inverse) : zero();
      const F upper = round(numbers * broadcast(1.0f / 128.0f));
      store_int8(high + d, to_int(upper));
      store_int8(low + d, to_int(fma(upper, broadcast(-128.0f), numbers)));
    }
    for (std::int64_t d = 0; d < size; ++d) corrections[0] -= 128 * high[d], corrections[1] -= 128 * low[d];
    const float scale = finite ? top * (1.0f / (127.0f * 128.0f)) : __builtin_nanf("");
    std::memcpy(row, &scale, 4);
    std::memcpy(static_cast<std::byte*>(row) + 4, corrections, 8);
  }

  template <int kRows, int kStrips, bool kAhead>
  PUNA_INLINE static void score(const Queries& queries, std::int64_t row, const Span& span, const Span& ahead, int strip,
                                std::int64_t size, float* scores) {
    I high[kRows][kStrips], low[kRows][kStrips];
    const std::byte* query = queries.rows + row * queries.stride;
    for (int r = 0; r < kRows; ++r) {
      std::int32_t corrections[2];
      std::memcpy(corrections, query + r * queries.stride + 4, 8);
      for (int s = 0; s < kStrips; ++s)
        high[r][s] = broadcast_int(corrections[0]), low[r][s] = broadcast_int(corrections[1]);
    }
    const std::int64_t padded = padded_size(size);
    const auto add = [&](std::int64_t d, const Bytes* keys) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const std::byte* at = query + r * queries.stride + 16 + d;
        const Bytes upper = broadcast_quad(at), lower = broadcast_quad(at + padded);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) high[r][s] = dot(high[r][s], keys[s], upper);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) low[r][s] = dot(low[r][s], keys[s], lower);
      }
    };
    Bytes keys[kStrips];
    std::int64_t d = 0;
    for (; d + 4 <= size; d += 4) {
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        keys[s] = load_bytes(span.keys[strip + s] + kStrip * d);
        if constexpr (kAhead) prefetch(ahead.keys[strip + s] + kStrip * d);
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

  // Weights times the values' scales: [kSpan] high bytes, then [kSpan] low bytes for each row, and what they are to be
  // multiplied by.
  using Weight = std::byte;
  PUNA_INLINE static void keep_weights(const F* weights, const Span& span, Visible visible, float*, Weight* bytes,
                                       float* scale) {
    F scaled[kSpanStrips];
    for (int s = 0; s < kSpanStrips; ++s) {
      scaled[s] = weights[s] * load(span.value_scales[s]);
      if (visible.begin > 0 || visible.end < kSpan)
        scaled[s] = lanes_between(scaled[s], zero(), visible.begin - s * kStrip, visible.end - s * kStrip);
    }
    const F all = (scaled[0] + scaled[1]) + (scaled[2] + scaled[3]);
    const float top = maximum(max(max(scaled[0], scaled[1]), max(scaled[2], scaled[3])));
    const bool finite = !any_above(abs(all), 3.0e38f) && !any_nan(all);
    constexpr float kLargest = 255.0f * 256.0f;
    const F inverse = broadcast(finite && top > 1e-30f ? kLargest / top : 0.0f);
    *scale = finite ? top * (1.0f / kLargest) : __builtin_nanf("");
    for (int s = 0; s < kSpanStrips; ++s) {
      const F whole = finite ? round(scaled[s] * inverse) : zero();
      // The quotient by 256 rounded down: whole = 256 k to 256 k + 255 become k - 127.5/256 to k + 127.5/256.
      const F upper = round(fma(whole, broadcast(1.0f / 256.0f), broadcast(-127.5f / 256.0f)));
      store_uint8(bytes + s * kStrip, to_int(upper));
      store_uint8(bytes + kSpan + s * kStrip, to_int(fma(upper, broadcast(-256.0f), whole)));
    }
  }

  PUNA_INLINE static void store_uint8(std::byte* p, I x) {
#if defined(PUNA_AVX512)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
#elif defined(PUNA_AVX2)
    const __m256i words = _mm256_packus_epi32(x.a, x.b);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::byte>(x.v[i]);
#endif
  }

  template <int kRows, int kVectors, bool kTail, bool kAhead>
  PUNA_INLINE static void add_values(const float*, const Weight* bytes, const float* scales, const Span& span,
                                     const Span& ahead, Visible visible, std::int64_t d, std::int64_t size, float* values,
                                     std::int64_t padded) {
    I high[kRows][kVectors], low[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) high[r][v] = low[r][v] = broadcast_int(0);
    for (int at = visible.begin / 4 * 4; at < visible.end; at += 4) {
      const std::int64_t offset = at % kStrip * size + 4 * d;
      const std::byte* from = span.values[at / kStrip] + offset;
      Bytes vectors[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kTail) {
          alignas(64) std::byte buffer[64] = {};
          std::memcpy(buffer, from, 4 * static_cast<std::size_t>(size - d));
          vectors[v] = load_bytes(buffer);
        } else {
          vectors[v] = load_bytes(from + 64 * v);
        }
        if constexpr (kAhead) prefetch(ahead.values[at / kStrip] + offset + 64 * v);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Bytes upper = broadcast_quad(bytes + r * 2 * kSpan + at), lower = broadcast_quad(bytes + r * 2 * kSpan + kSpan + at);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) high[r][v] = dot(high[r][v], upper, vectors[v]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) low[r][v] = dot(low[r][v], lower, vectors[v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* sum = values + r * padded + d + v * kLanes;
        store(sum, fma(fma(to_float(high[r][v]), broadcast(256.0f), to_float(low[r][v])), broadcast(scales[r]), load(sum)));
      }
  }
};

// Query rows row_begin .. row_begin + rows - 1 of one sequence and key/value head (row = token * group + head in the
// group), and the keys that they see. All threads find the same tasks in the same order.
template <class Path>
struct Task {
  const PagedAttentionArgs& args;
  Worker& worker;
  std::int64_t sequence, kv_head, row_begin, rows;
  std::int64_t group, padded;

  // Of each row: the absolute positions that it sees.
  std::int64_t begins[kRowsPerTask], ends[kRowsPerTask];
  typename Path::Queries queries;
  RowSums partition[kRowsPerTask], all[kRowsPerTask];
  bool any[kRowsPerTask];  // whether `all` holds a partition

  // Memory of this thread: what the rows need. At D = 256: 64 KB each of queries and twice of sums.
  void prepare(std::int64_t first_position) {
    const std::int64_t size = args.cache.head_size;
    std::byte* memory = worker.local;
    const auto cut = [&](std::int64_t bytes) {
      std::byte* start = memory;
      memory += round_up(bytes, 64);
      return start;
    };
    const std::int64_t stride = Path::query_bytes(size);
    std::byte* query_rows = cut(rows * stride);
    queries = {reinterpret_cast<decltype(queries.rows)>(query_rows),
               stride / static_cast<std::int64_t>(sizeof *queries.rows), args.scale * kLog2E};
    const std::int64_t first_token = args.query_starts[sequence];
    auto* tops = reinterpret_cast<float*>(cut(2 * rows * 4));
    auto* totals = reinterpret_cast<float*>(cut(2 * rows * 64));
    auto* values = reinterpret_cast<float*>(cut(2 * rows * padded * 4));
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t token = (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
      Path::prepare_row(args.query, (first_token + token) * args.query_stride + head * size, size, args.dtype,
                        query_rows + r * stride);
      const std::int64_t position = first_position + token;
      ends[r] = position + 1;
      begins[r] = args.window > 0 && position + 1 > args.window ? position + 1 - args.window : 0;
      partition[r] = {tops + r, totals + r * kLanes, values + r * padded};
      all[r] = {tops + rows + r, totals + (rows + r) * kLanes, values + (rows + r) * padded};
      any[r] = false;
    }
  }

  std::int64_t output_at(std::int64_t r) const {
    const std::int64_t token = args.query_starts[sequence] + (row_begin + r) / group;
    return (token * args.heads + kv_head * group + (row_begin + r) % group) * args.cache.head_size;
  }

  Visible visible(std::int64_t r, std::int64_t span_begin) const {
    const std::int64_t begin = begins[r] - span_begin, end = ends[r] - span_begin;
    return {static_cast<int>(begin < 0 ? 0 : begin > kSpan ? kSpan : begin),
            static_cast<int>(end < 0 ? 0 : end > kSpan ? kSpan : end)};
  }

  // The strips of a span as far as positions begin .. end - 1 go.
  Span find(std::int64_t span_begin, std::int64_t begin, std::int64_t end) const {
    const CacheArgs& cache = args.cache;
    const std::int32_t* table = args.block_tables + sequence * args.table_stride;
    const std::int64_t chunk = chunk_bytes(cache);
    const std::int64_t position_bytes = cache.head_size * element_bytes(cache.dtype);
    Span span{};
    int known = -1;
    for (int s = 0; s < kSpanStrips; ++s) {
      const std::int64_t position = span_begin + s * kStrip;
      if (position + kStrip <= begin || position >= end) continue;
      const std::int64_t offset = position % cache.block_size;
      const std::int64_t at = (table[position / cache.block_size] * cache.kv_heads + kv_head) * chunk;
      const auto* keys = static_cast<const std::byte*>(cache.keys) + at;
      const auto* values = static_cast<const std::byte*>(cache.values) + at;
      span.keys[s] = keys + offset * position_bytes;
      span.values[s] = values + offset * position_bytes;
      const std::int64_t scales = cache.block_size * position_bytes + 4 * offset;
      span.key_scales[s] = reinterpret_cast<const float*>(keys + scales);
      span.value_scales[s] = reinterpret_cast<const float*>(values + scales);
      known = s;
    }
    for (int s = 0; s < kSpanStrips && known >= 0; ++s)
      if (span.keys[s] == nullptr) {
        span.keys[s] = span.keys[known], span.values[s] = span.values[known];
        span.key_scales[s] = span.key_scales[known], span.value_scales[s] = span.value_scales[known];
      }
    return span;
  }

  template <int kRows, bool kAhead>
  void score_rows(std::int64_t row, const Span& span, const Span& ahead, int strip, int strips, float* scores) {
    constexpr int kMost = Path::kSums / kRows < 4 ? Path::kSums / kRows : 4;
    const std::int64_t size = args.cache.head_size;
    if constexpr (kMost >= 4)
      for (; strips >= 4; strip += 4, strips -= 4)
        Path::template score<kRows, 4, kAhead>(queries, row, span, ahead, strip, size, scores);
    if constexpr (kMost >= 2)
      for (; strips >= 2; strip += 2, strips -= 2)
        Path::template score<kRows, 2, kAhead>(queries, row, span, ahead, strip, size, scores);
    for (; strips >= 1; ++strip, --strips)
      Path::template score<kRows, 1, kAhead>(queries, row, span, ahead, strip, size, scores);
  }

  template <int kRows, bool kAhead>
  void value_rows(std::int64_t row, const Span& span, const Span& ahead, Visible seen, const float* scores,
                  const typename Path::Weight* weights, const float* scales) {
    constexpr int kMost = Path::kSums / kRows < 4 ? Path::kSums / kRows : 4;
    const std::int64_t size = args.cache.head_size, full = size / kLanes * kLanes;
    float* values = partition[row].values;
    std::int64_t d = 0;
    if constexpr (kMost >= 4)
      for (; d + 4 * kLanes <= full; d += 4 * kLanes)
        Path::template add_values<kRows, 4, false, kAhead>(scores, weights, scales, span, ahead, seen, d, size, values, padded);
    if constexpr (kMost >= 2)
      for (; d + 2 * kLanes <= full; d += 2 * kLanes)
        Path::template add_values<kRows, 2, false, kAhead>(scores, weights, scales, span, ahead, seen, d, size, values, padded);
    for (; d < full; d += kLanes)
      Path::template add_values<kRows, 1, false, kAhead>(scores, weights, scales, span, ahead, seen, d, size, values, padded);
    if (d < size)
      Path::template add_values<kRows, 1, true, false>(scores, weights, scales, span, ahead, seen, d, size, values, padded);
  }

  // The scores of one row become weights, and its sums are rescaled to them.
  void weigh(std::int64_t r, const Span& span, Visible seen, float* scores, typename Path::Weight* weights, float* scale) {
    F powers[kSpanStrips];
    const bool cut = seen.begin > 0 || seen.end < kSpan;
    for (int s = 0; s < kSpanStrips; ++s) {
      powers[s] = Path::scaled(load(scores + s * kStrip), queries, r, span, s);
      if (cut) powers[s] = lanes_between(powers[s], broadcast(kLowest), seen.begin - s * kStrip, seen.end - s * kStrip);
    }
    const F largest = max(max(powers[0], powers[1]), max(powers[2], powers[3]));
    if (any_above(largest, *partition[r].top + kSlack)) rescale_sums(partition[r], maximum(largest), padded);
    const F top = broadcast(*partition[r].top);
    for (int s = 0; s < kSpanStrips; ++s) {
      powers[s] = power2(powers[s] - top);
      if (cut) powers[s] = lanes_between(powers[s], zero(), seen.begin - s * kStrip, seen.end - s * kStrip);
    }
    store(partition[r].total, load(partition[r].total) + ((powers[0] + powers[1]) + (powers[2] + powers[3])));
    Path::keep_weights(powers, span, seen, scores, weights, scale);
  }

  template <int kRows, bool kAhead>
  void tile(std::int64_t row, const Span& span, const Span& ahead, std::int64_t span_begin) {
    alignas(64) float scores[kRows * kSpan];
    alignas(64) typename Path::Weight weights[kRows * 2 * kSpan];
    float scales[kRows];
    Visible seen[kRows];
    int begin = kSpan, end = 0;
    for (int r = 0; r < kRows; ++r) {
      seen[r] = visible(row + r, span_begin);
      if (seen[r].begin >= seen[r].end) continue;
      begin = seen[r].begin < begin ? seen[r].begin : begin;
      end = seen[r].end > end ? seen[r].end : end;
    }
    if (begin >= end) return;
    const int strip = begin / kStrip, strips = (end + kStrip - 1) / kStrip - strip;
    if (strips < kSpanStrips)
      for (float& score : scores) score = 0.0f;
    score_rows<kRows, kAhead>(row, span, ahead, strip, strips, scores);
    for (int r = 0; r < kRows; ++r)
      if (seen[r].begin < seen[r].end)
        weigh(row + r, span, seen[r], scores + r * kSpan, weights + r * 2 * kSpan, scales + r);
    // Values only for the positions that a row sees: rows that see the same ones go together.
    bool same = true;
    for (int r = 1; r < kRows; ++r) same &= seen[r].begin == seen[0].begin && seen[r].end == seen[0].end;
    if (same) return value_rows<kRows, kAhead>(row, span, ahead, seen[0], scores, weights, scales);
    for (int r = 0; r < kRows;) {
      int end_row = r + 1;
      while (end_row < kRows && seen[end_row].begin == seen[r].begin && seen[end_row].end == seen[r].end) ++end_row;
      if constexpr (Path::kTileRows >= 4)
        for (; seen[r].begin < seen[r].end && r + 4 <= end_row; r += 4)
          value_rows<4, false>(row + r, span, ahead, seen[r], scores + r * kSpan, weights + r * 2 * kSpan, scales + r);
      for (; r < end_row; ++r)
        if (seen[r].begin < seen[r].end)
          value_rows<1, false>(row + r, span, ahead, seen[r], scores + r * kSpan, weights + r * 2 * kSpan, scales + r);
    }
  }

  template <bool kAhead>
  std::int64_t one_tile(std::int64_t row, const Span& span, const Span& ahead, std::int64_t span_begin) {
    const std::int64_t left = rows - row;
    if constexpr (Path::kTileRows >= 8)
      if (left >= 8) return tile<8, kAhead>(row, span, ahead, span_begin), 8;
    if constexpr (Path::kTileRows >= 4)
      if (left >= 4) return tile<4, kAhead>(row, span, ahead, span_begin), 4;
    if (left >= 2) return tile<2, kAhead>(row, span, ahead, span_begin), 2;
    return tile<1, kAhead>(row, span, ahead, span_begin), 1;
  }

  // Goes through the keys of partitions part_begin .. part_end - 1. `partial`, where given, takes the sums of the one
  // partition instead of `all`.
  void attend(std::int64_t part_begin, std::int64_t part_end, float* partial) {
    std::int64_t begin = begins[0], end = ends[rows - 1];  // positions rise with the rows
    const std::int64_t limit = part_end * kAttentionPartition;
    begin = begin < part_begin * kAttentionPartition ? part_begin * kAttentionPartition : begin;
    end = end > limit ? limit : end;
    for (std::int64_t r = 0; r < rows; ++r) clear_sums(partition[r], padded);
    Span ahead = find(begin / kSpan * kSpan, begin, end);
    for (std::int64_t at = begin / kSpan * kSpan; at < end; at += kSpan) {
      const Span span = ahead;
      if (at + kSpan < end) ahead = find(at + kSpan, begin, end);
      std::int64_t row = one_tile<true>(0, span, ahead, at);
      while (row < rows) row += one_tile<false>(row, span, ahead, at);
      if (partial == nullptr && ((at + kSpan) % kAttentionPartition == 0 || at + kSpan >= end))
        finish_partition(at / kAttentionPartition);
    }
    if (partial == nullptr) return;
    for (std::int64_t r = 0; r < rows; ++r) save(partition[r], partial + r * partial_floats(padded));
  }

  void finish_partition(std::int64_t part) {
    for (std::int64_t r = 0; r < rows; ++r) {
      if (begins[r] >= (part + 1) * kAttentionPartition || ends[r] <= part * kAttentionPartition) continue;
      if (any[r]) {
        merge_sums(all[r], partition[r], padded);
      } else {
        any[r] = true;
        const RowSums kept = all[r];
        all[r] = partition[r], partition[r] = kept;
      }
      clear_sums(partition[r], padded);
    }
  }

  // Partial sums in shared memory: top, 15 unused, the 16 parts of the total, the values.
  static std::int64_t partial_floats(std::int64_t padded) { return padded + 2 * kLanes; }

  void save(RowSums row, float* partial) const {
    partial[0] = *row.top;
    store(partial + kLanes, load(row.total));
    for (std::int64_t d = 0; d < padded; d += kLanes) store(partial + 2 * kLanes + d, load(row.values + d));
  }

  void write(std::int64_t r) const {
    const std::int64_t size = args.cache.head_size;
    const F total = broadcast(any[r] ? sum(load(all[r].total)) : 1.0f);
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
      const F values = any[r] ? load(all[r].values + d) / total : zero();
      store_as_n(args.y, output_at(r) + d, values, args.dtype, n);
    }
  }
};

// Whether positions begin .. end - 1 of a sequence are all in blocks that the cache has.
inline bool blocks_are_valid(const PagedAttentionArgs& args, std::int64_t sequence, std::int64_t begin, std::int64_t end) {
  const std::int64_t block_size = args.cache.block_size;
  if (end > args.table_width * block_size) return false;
  const std::int32_t* table = args.block_tables + sequence * args.table_stride;
  bool valid = true;
  for (std::int64_t i = begin / block_size; i * block_size < end; ++i) valid &= table[i] >= 0 && table[i] < args.cache.blocks;
  return valid;
}

// The sequences' tasks in order: first those of sequences with several query tokens, the last tokens first, as they see most;
// then those of single tokens. Split ones have a task for each partition.
template <class Path>
inline void attend(const PagedAttentionArgs& args, Worker& worker) {
  const CacheArgs& cache = args.cache;
  const std::int64_t group = args.heads / cache.kv_heads, padded = round_up(cache.head_size, kLanes);
  const bool may_split = paged_attention_scratch(args) != 0;
  const std::int64_t partitions = attention_partitions(args);
  using OneTask = Task<Path>;
  const auto tokens_of = [&](std::int64_t b) -> std::int64_t { return args.query_starts[b + 1] - args.query_starts[b]; };
  const auto length_of = [&](std::int64_t b) -> std::int64_t { return args.sequence_lengths[b]; };
  const auto first_part = [&](std::int64_t b) -> std::int64_t {  // of a single token
    const std::int64_t length = length_of(b);
    return (args.window > 0 && length > args.window ? length - args.window : 0) / kAttentionPartition;
  };
  const auto parts_of = [&](std::int64_t b) -> std::int64_t {
    const std::int64_t length = length_of(b);
    if (!may_split || tokens_of(b) != 1 || length < 1 || length > args.table_width * cache.block_size) return 1;
    return (length + kAttentionPartition - 1) / kAttentionPartition - first_part(b);
  };
  const auto partial_at = [&](std::int64_t b, std::int64_t kv_head, std::int64_t part) {
    return reinterpret_cast<float*>(worker.shared) +
           ((b * cache.kv_heads + kv_head) * partitions + part) * group * OneTask::partial_floats(padded);
  };

  std::int64_t cursor = 0, base = 0, count = 0;  // of the 2 B runs of tasks, the run at `cursor` begins with task `base`
  bool counted = false;
  for (std::int64_t task_index = worker.take();; task_index = worker.take()) {
    for (; cursor < 2 * args.sequences; ++cursor, counted = false) {
      if (!counted) {
        const std::int64_t b = cursor % args.sequences, tokens = tokens_of(b);
        const bool multiple = cursor < args.sequences;
        count = multiple != (tokens > 1) || tokens < 1 ? 0
                : multiple ? (tokens * group + kRowsPerTask - 1) / kRowsPerTask * cache.kv_heads
                           : (group + kRowsPerTask - 1) / kRowsPerTask * cache.kv_heads * parts_of(b);
        counted = true;
      }
      if (task_index < base + count) break;
      base += count;
    }
    if (cursor >= 2 * args.sequences) break;
    const std::int64_t b = cursor % args.sequences, tokens = tokens_of(b), length = length_of(b);
    const std::int64_t parts = parts_of(b), row_blocks = (tokens * group + kRowsPerTask - 1) / kRowsPerTask;
    // Key/value heads change slowest for a single token, where the partitions of a head follow each other in memory.
    std::int64_t index = task_index - base;
    const std::int64_t part = first_part(b) + index % parts;
    index /= parts;
    const std::int64_t kv_head = tokens > 1 ? index % cache.kv_heads : index / row_blocks;
    const std::int64_t row_block = tokens > 1 ? row_blocks - 1 - index / cache.kv_heads : index % row_blocks;
    const std::int64_t row_begin = row_block * kRowsPerTask;
    const std::int64_t rows = tokens * group - row_begin < kRowsPerTask ? tokens * group - row_begin : kRowsPerTask;
    OneTask task{args, worker, b, kv_head, row_begin, rows, group, padded, {}, {}, {}, {}, {}, {}};
    task.prepare(length - tokens);
    if (!blocks_are_valid(args, b, task.begins[0], task.ends[rows - 1])) {
      worker.fail(Failure::block_out_of_range);
      if (part != first_part(b)) continue;
    } else if (parts > 1) {
      task.attend(part, part + 1, partial_at(b, kv_head, part) + row_begin * OneTask::partial_floats(padded));
      continue;
    } else {
      task.attend(0, (task.ends[rows - 1] + kAttentionPartition - 1) / kAttentionPartition, nullptr);
    }
    for (std::int64_t r = 0; r < rows; ++r) task.write(r);
  }

  bool any_split = false;
  for (std::int64_t b = 0; b < args.sequences; ++b) any_split |= parts_of(b) > 1;
  if (!any_split) return;
  worker.barrier();
  const Worker::Range range = worker.share(args.sequences * cache.kv_heads);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    const std::int64_t b = i / cache.kv_heads, kv_head = i % cache.kv_heads, parts = parts_of(b), first = first_part(b);
    if (parts <= 1) continue;
    const std::int64_t length = length_of(b);
    const std::int64_t begin = args.window > 0 && length > args.window ? length - args.window : 0;
    if (!blocks_are_valid(args, b, begin, length)) continue;
    for (std::int64_t r = 0; r < group; ++r) {
      RowSums sums{};
      for (std::int64_t part = first; part < first + parts; ++part) {
        float* partial = partial_at(b, kv_head, part) + r * OneTask::partial_floats(padded);
        const RowSums one = {partial, partial + kLanes, partial + 2 * kLanes};
        if (part == first) sums = one;
        else merge_sums(sums, one, padded);
      }
      const F total = broadcast(sum(load(sums.total)));
      const std::int64_t at = (args.query_starts[b] * args.heads + kv_head * group + r) * cache.head_size;
      for (std::int64_t d = 0; d < cache.head_size; d += kLanes) {
        const int n = static_cast<int>(cache.head_size - d < kLanes ? cache.head_size - d : kLanes);
        store_as_n(args.y, at + d, load(sums.values + d) / total, args.dtype, n);
      }
    }
  }
}

inline void paged_attention(const PagedAttentionArgs& args, Worker& worker) {
  switch (args.cache.dtype) {
    case Dtype::f32: return attend<FloatPath<Dtype::f32>>(args, worker);
    case Dtype::f16: return attend<FloatPath<Dtype::f16>>(args, worker);
    case Dtype::bf16: return attend<FloatPath<Dtype::bf16>>(args, worker);
    case Dtype::i8: return attend<BytePath>(args, worker);
  }
}

}  // namespace puna::PUNA_LEVEL
