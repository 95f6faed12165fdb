// Weights to codes of 8 or 4 bits with a scale for each group of 32 inputs, written into panels. What puna.quantization.rounding
// says in torch, to the bit: no fma, and sums go through the inputs in order.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// The scales that are tried for 4 bits give the farthest value these codes, before they are clamped to -8 .. 7. Beyond 6 and 9
// the best one hardly ever lies (17 steps from 5 on leave the same error), half as many steps leave 0.1 % more of it, and steps
// on the other side, which make +7 of the farthest value, take 0.02 % off.
constexpr int kSteps = 13;
constexpr float kFirstStep = -6.0f, kStep = -0.25f;

// One group in each lane: `columns` are its 32 inputs. The sum with 1.5 * 2^23 has no room for fractions, which rounds to the
// nearest, ties to even, and takes no call of the library's where there is no instruction.
PUNA_INLINE F rounded_codes(F value, F inverse, F low, F high) {
  const F whole = broadcast(12582912.0f);
  return (min(max(value * inverse, low), high) + whole) - whole;
}

// The scale, not yet rounded, whose codes leave the least squared error, where the farthest values from zero are `far`.
inline F searched_scale(const float* columns, F far) {
  const F low = broadcast(-8.0f), high = broadcast(7.0f);
  F best = zero(), scale = zero();
  for (int step = 0; step < kSteps; ++step) {
    // A group of zeros has an infinite one, and codes of -8, which take nothing off.
    const F inverse = broadcast(kFirstStep + kStep * static_cast<float>(step)) / far;
    F products = zero(), squares = zero();
#pragma GCC unroll 4
    for (int k = 0; k < 32; ++k) {
      const F value = load(columns + k * kLanes);
      const F code = rounded_codes(value, inverse, low, high);
      products = products + value * code;
      squares = squares + code * code;
    }
    // For these codes products / squares is the best scale, and takes products^2 / squares off the squared error.
    const F fitted = products / squares, taken = fitted * products;
    scale = where_greater(taken, best, fitted, scale);
    best = where_greater(taken, best, taken, best);
  }
  return scale;
}

// Rounds 16 groups, and writes their half of a block's scales and codes.
template <int kBits>
inline void round_block(const float* columns, std::byte* scales_at, std::byte* codes_at) {
  F highest = load(columns), lowest = highest;
  for (int k = 1; k < 32; ++k) {
    const F value = load(columns + k * kLanes);
    highest = max(highest, value);
    lowest = min(lowest, value);
  }
  F scale;
  if constexpr (kBits == 8) {
    scale = max(highest, zero() - lowest) / broadcast(127.0f);
  } else {
    scale = searched_scale(columns, where_greater(highest, zero() - lowest, highest, lowest));
  }
  scale = round_f16(scale);
  store_f16(reinterpret_cast<std::uint16_t*>(scales_at), scale);
  // A scale that has become 0 gets the codes of 0.
  const F exact = broadcast(1.0f) / scale, inverse = where_greater(abs(scale), zero(), exact, zero());
  constexpr float kZero = kBits == 8 ? 128.0f : 8.0f;
  const F low = broadcast(-kZero), high = broadcast(kZero - 1.0f);
  const auto code = [&](int k) { return rounded_codes(load(columns + k * kLanes), inverse, low, high) + broadcast(kZero); };
  constexpr int kQuads = kBits;  // 8 quads of bytes, or 4 of two codes a byte
  for (int quad = 0; quad < kQuads; ++quad) {
    I bytes[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 8) {
        bytes[i] = to_int(code(4 * quad + i));
      } else {
        bytes[i] = to_int(code(8 * quad + i) + code(8 * quad + 4 + i) * broadcast(16.0f));
      }
    }
    const I word = bytes[0] + shift_left<8>(bytes[1]) + shift_left<16>(bytes[2]) + shift_left<24>(bytes[3]);
    store_int(reinterpret_cast<std::int32_t*>(codes_at + quad * 4 * kPanel), word);
  }
}

template <int kBits>
inline void round_panels(const RoundArgs& a, Worker& worker) {
  constexpr std::int64_t kCodesAt = 2 * kPanel, kBlockBytes = kCodesAt + 32 * kPanel * kBits / 8;
  const std::int64_t blocks = (a.inputs + 31) / 32, size = a.dtype == Dtype::f32 ? 4 : 2;
  const std::int64_t first_half = a.first / kLanes, halves = (a.first + a.count + kLanes - 1) / kLanes - first_half;
  const Worker::Range range = worker.share(halves);
  alignas(64) float columns[32 * kLanes];
  alignas(64) float row[32];
  alignas(64) std::byte aside[kBlockBytes];
  for (std::int64_t half = first_half + range.begin; half < first_half + range.end; ++half) {
    // Lanes begin .. end - 1 are rows of this call; the others keep what is in the panels.
    const std::int64_t top = half * kLanes - a.first;
    const int begin = top < 0 ? static_cast<int>(-top) : 0;
    const int end = a.count - top < kLanes ? static_cast<int>(a.count - top) : kLanes;
    const bool whole = begin == 0 && end == kLanes;
    std::byte* panel = static_cast<std::byte*>(a.panels) + half / 2 * blocks * kBlockBytes;
    if (!whole) std::memset(columns, 0, sizeof columns);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const int inputs = a.inputs - b * 32 < 32 ? static_cast<int>(a.inputs - b * 32) : 32;
      for (int lane = begin; lane < end; ++lane) {
        const std::int64_t at = (top + lane) * a.stride + b * 32;
        // 16 rows are more streams than the processor foresees well; four blocks are what it computes while one is fetched.
        if (b + 4 < blocks) prefetch(static_cast<const std::byte*>(a.rows) + (at + 128) * size);
        store(row, load_as_n(a.rows, at, a.dtype, inputs < kLanes ? inputs : kLanes));
        store(row + kLanes, inputs > kLanes ? load_as_n(a.rows, at + kLanes, a.dtype, inputs - kLanes) : zero());
        for (int k = 0; k < 32; ++k) columns[k * kLanes + lane] = row[k];
      }
      std::byte* block = panel + b * kBlockBytes;
      const std::int64_t lane0 = half % 2 * kLanes;
      std::byte* target = whole ? block : aside;
      round_block<kBits>(columns, target + 2 * lane0, target + kCodesAt + 4 * lane0);
      if (whole) continue;
      for (std::int64_t lane = lane0 + begin; lane < lane0 + end; ++lane) {
        std::memcpy(block + 2 * lane, aside + 2 * lane, 2);
        for (int quad = 0; quad < kBits; ++quad) {
          const std::int64_t at = kCodesAt + quad * 4 * kPanel + 4 * lane;
          std::memcpy(block + at, aside + at, 4);
        }
      }
    }
  }
}

inline void round_groups(const RoundArgs& a, Worker& worker) {
  a.bits == 8 ? round_panels<8>(a, worker) : round_panels<4>(a, worker);
}

}  // namespace puna::PUNA_LEVEL
