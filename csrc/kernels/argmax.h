// The largest number of each row and where it is: greedy decoding.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// A row is one thread's: half a megabyte of 128k logits takes it 20 us.
inline void argmax_row(const ArgmaxArgs& args, std::int64_t row) {
  constexpr float kInfinity = __builtin_inff();
  constexpr std::int32_t kInfinityBits = 0x7f800000;
  const float* x = args.x + row * args.x_stride;
  alignas(64) float steps[kLanes];
  for (int i = 0; i < kLanes; ++i) steps[i] = static_cast<float>(i);
  // Indices as float, which is exact up to 2^24.
  F index = load(steps), best = broadcast(-kInfinity), where = index;
  I largest_bits = broadcast_int(0);  // without the sign; a NaN's are above those of infinity
  for (std::int64_t i = 0; i < args.size; i += kLanes) {
    const std::int64_t left = args.size - i;
    const F values = left < kLanes ? first_n(load_n(x + i, static_cast<int>(left)), broadcast(-kInfinity), static_cast<int>(left))
                                   : load(x + i);
    where = where_greater(values, best, index, where);
    best = where_greater(values, best, values, best);
    largest_bits = max(largest_bits, bits_of(abs(values)));
    index = index + broadcast(static_cast<float>(kLanes));
  }
  alignas(64) float values[kLanes], places[kLanes];
  store(values, best);
  store(places, where);
  int first = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (values[i] > values[first] || (values[i] == values[first] && places[i] < places[first])) first = i;
  }
  args.indices[row] = static_cast<std::int64_t>(places[first]);
  args.values[row] = maximum(largest_bits) > kInfinityBits ? __builtin_nanf("") : values[first];
}

inline void argmax(const ArgmaxArgs& args, Worker& worker) {
  const Worker::Range range = worker.share(args.rows);
  for (std::int64_t row = range.begin; row < range.end; ++row) argmax_row(args, row);
}

}  // namespace puna::PUNA_LEVEL
