// Attention over a cache of floats: queries, scores and weights in float32, each sum one chain of fma in order.
//
// bf16 too is widened and multiplied in float32: vdpbf16ps would have to round the weights, and where it was measured
// (Sapphire Rapids) it does half as many products a second as fma.
#pragma once

#include "attention_sums.h"

namespace puna::PUNA_LEVEL {

template <Dtype kDtype>
struct FloatPath {
  // Rows that share what is loaded, and vectors of sums.
  static constexpr int kTileRows = kRegisterSums == 16 ? 8 : 4;
  static constexpr int kSums = kRegisterSums;

  // Many rows are worth the keys and values being widened once: the sums are those of the float32 form.
  using Staged = FloatPath<Dtype::f32>;
  static constexpr bool kStages = kDtype != Dtype::f32;

  static constexpr std::int64_t query_bytes(std::int64_t size) { return 4 * round_up(size, kLanes); }

  static void prepare_row(const void* x, std::int64_t at, std::int64_t size, Dtype dtype, std::byte* row) {
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
      store(reinterpret_cast<float*>(row) + d, load_as_n(x, at + d, dtype, n));
    }
  }

  // Numbers 2 i and 2 i + 1 of the keys of a strip.
  PUNA_INLINE static void load_keys(const std::byte* strip, std::int64_t i, F& first, F& second) {
    if constexpr (kDtype == Dtype::bf16) {
      const Pairs pairs = load_pairs(strip + 64 * i);
      first = first_of_pairs(pairs), second = second_of_pairs(pairs);
    } else {
      first = load_as(strip, 2 * kStrip * i, kDtype);
      second = load_as(strip, 2 * kStrip * i + kStrip, kDtype);
    }
  }

  // Numbers d .. d + n - 1 of the values at positions 2 i and 2 i + 1 of a strip.
  template <bool kTail>
  PUNA_INLINE static void load_values(const std::byte* strip, std::int64_t i, std::int64_t d, int n, std::int64_t size,
                                      F& first, F& second) {
    if constexpr (kDtype == Dtype::bf16) {
      const std::byte* at = strip + 4 * (i * size + d);
      const Pairs pairs = kTail ? as_pairs(load_words_n(at, n)) : load_pairs(at);
      first = first_of_pairs(pairs), second = second_of_pairs(pairs);
    } else if constexpr (kTail) {
      first = load_as_n(strip, 2 * i * size + d, kDtype, n);
      second = load_as_n(strip, (2 * i + 1) * size + d, kDtype, n);
    } else {
      first = load_as(strip, 2 * i * size + d, kDtype);
      second = load_as(strip, (2 * i + 1) * size + d, kDtype);
    }
  }

  // Asks for the next span's values at the same place.
  PUNA_INLINE static void ask_ahead(const std::byte* strip, std::int64_t i, std::int64_t d, std::int64_t size) {
    if constexpr (kDtype == Dtype::bf16) {
      prefetch_far(strip + 4 * (i * size + d));
    } else {
      prefetch_far(strip + element_bytes(kDtype) * (2 * i * size + d));
      prefetch_far(strip + element_bytes(kDtype) * ((2 * i + 1) * size + d));
    }
  }

  // One strip in the order of float32, with room for the padded size in `values`.
  static void stage_keys(const std::byte* strip, std::int64_t size, float* keys) {
    for (std::int64_t i = 0; i < size / 2; ++i) {
      F first, second;
      load_keys(strip, i, first, second);
      store(keys + 2 * kStrip * i, first), store(keys + 2 * kStrip * i + kStrip, second);
    }
  }

  static void stage_values(const std::byte* strip, std::int64_t size, float* values) {
    for (std::int64_t i = 0; i < kStrip / 2; ++i) {
      float* row = values + 2 * i * size;
      F first, second;
      std::int64_t d = 0;
      for (; d + kLanes <= size; d += kLanes) {
        load_values<false>(strip, i, d, kLanes, size, first, second);
        store(row + d, first), store(row + size + d, second);
      }
      if (d == size) continue;
      const int n = static_cast<int>(size - d);
      load_values<true>(strip, i, d, n, size, first, second);
      store_n(row + d, first, n), store_n(row + size + d, second, n);
    }
  }

  // Dot products of kRows query rows with the keys of kStrips strips, into scores [kRows][kSpan].
  template <int kRows, int kStrips, bool kAhead>
  PUNA_INLINE static void score(const Queries& queries, std::int64_t row, const Span& span, const Span& ahead,
                                int strip, std::int64_t size, float* scores) {
    constexpr int kBytes = 2 * kStrip * static_cast<int>(kDtype == Dtype::f32 ? 4 : 2);
    F sums[kRows][kStrips];
    for (auto& of_row : sums)
      for (F& sum : of_row) sum = zero();
    const std::byte* query = queries.rows + row * queries.stride;
    for (std::int64_t i = 0; i < size / 2; ++i, query += 8) {
      F first[kStrips], second[kStrips];
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        load_keys(span.keys[strip + s], i, first[s], second[s]);
        if constexpr (kAhead) {
          prefetch_far(ahead.keys[strip + s] + kBytes * i);
          if constexpr (kBytes == 128) prefetch_far(ahead.keys[strip + s] + kBytes * i + 64);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F q = broadcast_once(reinterpret_cast<const float*>(query + r * queries.stride)[0]);
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) sums[r][s] = fma(first[s], q, sums[r][s]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F q = broadcast_once(reinterpret_cast<const float*>(query + r * queries.stride)[1]);
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
  PUNA_INLINE static void keep_weights(const F* weights, const Span&, Visible, float* scores, std::byte*, float*) {
    for (int s = 0; s < kSpanStrips; ++s) store(scores + s * kStrip, weights[s]);
  }

  // Adds weight * value over the visible positions to numbers d .. d + 16 kVectors - 1 of `values` [kRows][padded].
  template <int kRows, int kVectors, bool kTail, bool kAhead>
  PUNA_INLINE static void add_values(const float* weights, const std::byte*, const float*, const Span& span,
                                     const Span& ahead, Visible visible, std::int64_t d, std::int64_t size,
                                     float* values, std::int64_t padded) {
    F sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(values + r * padded + d + v * kLanes);
    const int n = kTail ? static_cast<int>(size - d) : kLanes;
    const auto add = [&](int position, const F* vectors) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F weight = broadcast_once(weights[r * kSpan + position]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(vectors[v], weight, sums[r][v]);
      }
    };
    int at = visible.begin;
    while (at < visible.end) {
      const int strip = at / kStrip, first_at = strip * kStrip;
      const int end = visible.end < first_at + kStrip ? visible.end : first_at + kStrip;
      const std::byte* from = span.values[strip];
      F first[kVectors], second[kVectors];
      if (at % 2 != 0) {
        for (int v = 0; v < kVectors; ++v)
          load_values<kTail>(from, (at - first_at) / 2, d + v * kLanes, n, size, first[v], second[v]);
        add(at++, second);
      }
      for (; at + 2 <= end; at += 2) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          load_values<kTail>(from, (at - first_at) / 2, d + v * kLanes, n, size, first[v], second[v]);
          if constexpr (kAhead) ask_ahead(ahead.values[strip], (at - first_at) / 2, d + v * kLanes, size);
        }
        add(at, first);
        add(at + 1, second);
      }
      if (at < end) {
        for (int v = 0; v < kVectors; ++v)
          load_values<kTail>(from, (at - first_at) / 2, d + v * kLanes, n, size, first[v], second[v]);
        add(at++, first);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(values + r * padded + d + v * kLanes, sums[r][v]);
  }
};

}  // namespace puna::PUNA_LEVEL
