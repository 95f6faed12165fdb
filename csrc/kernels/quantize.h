// Activations to int8: per row and group of 32 inputs one record, 32 signed bytes, their scale, and the corrections
// that the weight's format asks for.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

constexpr int kBlock = 32;  // inputs that share a record, and a block of the weight

// A record: int8 [32], float scale, then by group of the weight's block a correction: int32 -zero * sum(int8) where
// codes count from `zero`, float scale * sum(int8) where there are minimums. 40 bytes, so that the rows of a batch,
// which are read side by side, do not fall on the same sets of the cache where E is a power of two; 48 with two groups.
constexpr int kRecordScale = 32, kRecordCorrection = 36;
constexpr std::int64_t record_bytes(const PanelFormat& format) { return format.groups == 2 ? 48 : 40; }

// Quantises the records begin .. end - 1 of a row: scale = amax / 127, int8 = x * (127 / amax) to the nearest, ties to
// even. Inputs past the last are zeros. A group with an infinity or a NaN gets the scale NaN, which all its products
// then are.
inline void quantize_blocks(const LinearArgs& a, std::int64_t row, std::int64_t begin, std::int64_t end,
                            std::byte* out) {
  const PanelFormat& format = a.format;
  const std::int64_t step = record_bytes(format);
  const std::int32_t zero_code = format.bits == 8 ? 128 : 8;
  for (std::int64_t b = begin; b < end; ++b, out += step) {
    const std::int64_t at = row * a.x_stride + b * kBlock, left = a.inputs - b * kBlock;
    F low, high;
    if (left >= kBlock) {
      low = load_as(a.x, at, a.x_dtype);
      high = load_as(a.x, at + kLanes, a.x_dtype);
    } else {
      low = load_as_n(a.x, at, a.x_dtype, left < kLanes ? static_cast<int>(left) : kLanes);
      high = left > kLanes ? load_as_n(a.x, at + kLanes, a.x_dtype, static_cast<int>(left) - kLanes) : zero();
    }
    // As integers, the bits of numbers without sign are in the order of the numbers, with NaN above infinity.
    const std::int32_t amax_bits = maximum(max(bits_of(abs(low)), bits_of(abs(high))));
    float amax;
    std::memcpy(&amax, &amax_bits, 4);
    const float scale = amax / 127.0f + (amax - amax);
    if (scale != scale) low = high = zero();
    // Below 2^-120 or so 127 / amax is infinite; such a group is taken for zeros, which its scale makes of it anyway.
    const float inverse = amax > 1e-36f ? 127.0f / amax : 0.0f;
    const I q_low = to_int(low * broadcast(inverse)), q_high = to_int(high * broadcast(inverse));
    store_int8(reinterpret_cast<std::int8_t*>(out), q_low);
    store_int8(reinterpret_cast<std::int8_t*>(out) + kLanes, q_high);
    std::memcpy(out + kRecordScale, &scale, 4);
    for (int g = 0; g < format.groups; ++g) {
      const std::int32_t total = sum(format.groups == 1 ? q_low + q_high : g == 0 ? q_low : q_high);
      const std::int32_t correction = -zero_code * total;
      const float scaled = scale * static_cast<float>(total);
      std::byte* to = out + kRecordCorrection + 4 * g;
      if (format.minimums) {
        std::memcpy(to, &scaled, 4);
      } else {
        std::memcpy(to, &correction, 4);
      }
    }
  }
}

}  // namespace puna::PUNA_LEVEL
