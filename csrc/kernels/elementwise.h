// Norm, sums, gated activations, rotary embedding: everything that goes over tokens once.
//
// Roundings are those of puna.ops.reference, so that a bfloat16 or float16 model gives what torch gives: an operation of
// torch computes in float32 and rounds its result to the dtype. `rounded` stands where one torch operation ends inside of
// a kernel. The activation alone is not rounded before its product, as it is not in the epilogue of linear layers.
#pragma once

#include "../vec.h"
#include "activation.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// A thread gets this much or nothing: 2 KB are 32 cache lines, and what lies on the border of two threads' parts goes from
// one core to the other.
constexpr std::int64_t kLeastBytes = 2048;

PUNA_INLINE constexpr std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// How many items of `bytes` each are enough for a thread.
PUNA_INLINE constexpr std::int64_t grain_of(std::int64_t bytes) {
  return bytes < 1 ? kLeastBytes : bytes < kLeastBytes ? (kLeastBytes + bytes - 1) / bytes : 1;
}

PUNA_INLINE int lanes_left(std::int64_t left) { return left < kLanes ? static_cast<int>(left) : kLanes; }

// Runs `call` with kDtype for the dtype at hand, so that the loops inside are compiled for it.
#define PUNA_FOR_DTYPE(dtype, call)                                          \
  switch (dtype) {                                                           \
    case Dtype::f32: { constexpr Dtype kDtype = Dtype::f32; call; break; }   \
    case Dtype::bf16: { constexpr Dtype kDtype = Dtype::bf16; call; break; } \
    case Dtype::f16: { constexpr Dtype kDtype = Dtype::f16; call; break; }   \
    case Dtype::i8: break;                                                   \
  }

// One row of a norm: x and, or null, what is added to it.
struct NormRow {
  const void* x;
  std::int64_t x_at;  // of the row's first element
  const void* residual;
  std::int64_t at;  // of the row in the tensors of contiguous rows
};

template <Dtype dtype>
PUNA_INLINE F norm_input(const NormRow& row, std::int64_t column, int lanes) {
  const F x = load_as_n(row.x, row.x_at + column, dtype, lanes);
  if (row.residual == nullptr) return x;
  return rounded(x + load_as_n(row.residual, row.at + column, dtype, lanes), dtype);
}

// 1 / sqrt(mean(x^2) + epsilon). The order of the sum depends on the size alone: vector i goes to sum i % 4.
template <Dtype dtype>
inline F norm_scale(const NormRow& row, std::int64_t size, float epsilon) {
  F sums[4] = {zero(), zero(), zero(), zero()};
  std::int64_t column = 0;
  for (; column + 4 * kLanes <= size; column += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F x = norm_input<dtype>(row, column + i * kLanes, kLanes);
      sums[i] = fma(x, x, sums[i]);
    }
  }
  for (int i = 0; column < size; ++i, column += kLanes) {
    const F x = norm_input<dtype>(row, column, lanes_left(size - column));
    sums[i] = fma(x, x, sums[i]);
  }
  const F mean = broadcast(sum((sums[0] + sums[1]) + (sums[2] + sums[3]))) / broadcast(static_cast<float>(size));
  return broadcast(1.0f) / sqrt(mean + broadcast(epsilon));
}

template <Dtype dtype>
inline void norm_columns(const RmsNormArgs& args, const NormRow& row, F scale) {
  for (std::int64_t column = 0; column < args.size; column += kLanes) {
    const int lanes = lanes_left(args.size - column);
    const F x = norm_input<dtype>(row, column, lanes);
    const F weight = load_as_n(args.weight, column, dtype, lanes);
    if (args.sum != nullptr) store_as_n(args.sum, row.at + column, x, dtype, lanes);
    store_as_n(args.y, row.at + column, rounded(x * scale, dtype) * weight, dtype, lanes);
  }
}

template <Dtype dtype>
inline void rms_norm_of(const RmsNormArgs& args, Worker& worker) {
  const std::int64_t rows = args.outer * args.inner;
  const Worker::Range range = worker.share(rows, grain_of(args.size * bytes_of(dtype)));
  for (std::int64_t row = range.begin; row < range.end; ++row) {
    const std::int64_t outer = row / args.inner, inner = row % args.inner;
    const NormRow input{args.x, outer * args.x_outer_stride + inner * args.x_inner_stride, args.residual, row * args.size};
    norm_columns<dtype>(args, input, norm_scale<dtype>(input, args.size, args.epsilon));
  }
}

inline void rms_norm(const RmsNormArgs& args, Worker& worker) {
  PUNA_FOR_DTYPE(args.dtype, rms_norm_of<kDtype>(args, worker));
}

template <Dtype dtype>
inline void add_of(const AddArgs& args, Worker& worker) {
  const Worker::Range range = worker.share(args.count, kLeastBytes / bytes_of(dtype));
  for (std::int64_t i = range.begin; i < range.end; i += kLanes) {
    const int lanes = lanes_left(range.end - i);
    store_as_n(args.y, i, load_as_n(args.a, i, dtype, lanes) + load_as_n(args.b, i, dtype, lanes), dtype, lanes);
  }
}

inline void add(const AddArgs& args, Worker& worker) { PUNA_FOR_DTYPE(args.dtype, add_of<kDtype>(args, worker)); }

template <Dtype dtype>
inline void gated_activation_of(const GatedActivationArgs& args, Worker& worker) {
  // Parts of rows are shared, so that one long row is work for all threads.
  constexpr std::int64_t kPart = kLeastBytes / bytes_of(dtype);
  const std::int64_t parts = (args.size + kPart - 1) / kPart;
  const Worker::Range range = worker.share(args.rows * parts, grain_of(args.size * bytes_of(dtype)));
  for (std::int64_t unit = range.begin; unit < range.end; ++unit) {
    const std::int64_t row = unit / parts, begin = unit % parts * kPart;
    const std::int64_t end = begin + kPart < args.size ? begin + kPart : args.size;
    const std::int64_t gates = 2 * row * args.size, ups = gates + args.size;
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const int lanes = lanes_left(end - i);
      const F gate = load_as_n(args.gate_up, gates + i, dtype, lanes), up = load_as_n(args.gate_up, ups + i, dtype, lanes);
      store_as_n(args.y, row * args.size + i, activate(gate, args.activation) * up, dtype, lanes);
    }
  }
}

inline void gated_activation(const GatedActivationArgs& args, Worker& worker) {
  PUNA_FOR_DTYPE(args.dtype, gated_activation_of<kDtype>(args, worker));
}

template <Dtype dtype>
inline void rotary_of(const RotaryArgs& args, Worker& worker) {
  const std::int64_t half = args.head_size / 2;
  const Worker::Range range = worker.share(args.tokens * args.heads, grain_of(args.head_size * bytes_of(dtype)));
  for (std::int64_t unit = range.begin; unit < range.end; ++unit) {
    const std::int64_t token = unit / args.heads, head = unit % args.heads;
    const std::int64_t from = token * args.x_stride + head * args.head_size, to = unit * args.head_size;
    for (std::int64_t i = 0; i < half; i += kLanes) {
      const int lanes = lanes_left(half - i);
      const F cos = rounded(load_n(args.cos + token * args.angle_stride + i, lanes), dtype);
      const F sin = rounded(load_n(args.sin + token * args.angle_stride + i, lanes), dtype);
      const F first = load_as_n(args.x, from + i, dtype, lanes), second = load_as_n(args.x, from + half + i, dtype, lanes);
      const F turned_first = rounded(first * cos, dtype) - rounded(second * sin, dtype);
      const F turned_second = rounded(second * cos, dtype) + rounded(first * sin, dtype);
      store_as_n(args.y, to + i, turned_first, dtype, lanes);
      store_as_n(args.y, to + half + i, turned_second, dtype, lanes);
    }
  }
}

inline void rotary(const RotaryArgs& args, Worker& worker) { PUNA_FOR_DTYPE(args.dtype, rotary_of<kDtype>(args, worker)); }

#undef PUNA_FOR_DTYPE

}  // namespace puna::PUNA_LEVEL
