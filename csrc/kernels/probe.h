// How fast this machine reads and multiplies: what benchmarks compare with.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// Independent sums. A product takes four to six cycles and two can begin in each, so fewer than twelve would measure the
// latency; more registers than this there are not (a vector of 16 lanes takes two of the sixteen of AVX2).
#if defined(PUNA_AVX512)
constexpr int kProbeChains = 16;
#else
constexpr int kProbeChains = 6;
#endif

// Hides from the compiler what is in memory, or it would work out the sums of constants ahead.
#define PUNA_OPAQUE __asm__ volatile("" ::: "memory")

inline double probe_read(const ProbeArgs& args, Worker& worker) {
  constexpr std::int64_t kLine = 64, kAhead = 4096;  // a prefetch past the end is ignored
  const Worker::Range range = worker.share(args.bytes / kLine * kLine, 8 * kLine);
  const auto* memory = static_cast<const char*>(args.memory);
  I sums[8];
  for (I& sum : sums) sum = broadcast_int(0);
  std::int64_t at = range.begin;
  for (; at + 8 * kLine <= range.end; at += 8 * kLine) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      prefetch(memory + at + kAhead + i * kLine);
      sums[i] = sums[i] + load_int(reinterpret_cast<const std::int32_t*>(memory + at + i * kLine));
    }
  }
  for (; at < range.end; at += kLine) sums[0] = sums[0] + load_int(reinterpret_cast<const std::int32_t*>(memory + at));
  for (int i = 1; i < 8; ++i) sums[0] = sums[0] + sums[i];
  store_int(reinterpret_cast<std::int32_t*>(worker.local), sums[0]);
  PUNA_OPAQUE;
  return static_cast<double>(range.end - range.begin);
}

// acc = product(acc) in every chain, `iterations` times, and each product is `operations`.
#define PUNA_PROBE_LOOP(Vector, start, prepare, product, finish)        \
  Vector sums[kProbeChains];                                            \
  for (Vector& sum : sums) sum = start;                                 \
  for (std::int64_t n = 0; n < args.iterations; ++n) {                  \
    PUNA_OPAQUE;                                                        \
    prepare;                                                            \
    _Pragma("GCC unroll 16") for (Vector& sum : sums) sum = product;    \
  }                                                                     \
  for (int i = 1; i < kProbeChains; ++i) sums[0] = sums[0] + sums[i];   \
  finish;                                                               \
  PUNA_OPAQUE

inline double probe_int8(const ProbeArgs& args, Worker& worker) {
  for (int i = 0; i < 64; ++i) worker.local[i] = static_cast<std::byte>(3 * i + 1);
  PUNA_PROBE_LOOP(I, broadcast_int(0), const Bytes x = load_bytes(worker.local), dot(sum, x, x),
                  store_int(reinterpret_cast<std::int32_t*>(worker.local), sums[0]));
  return 2.0 * 64 * kProbeChains * static_cast<double>(args.iterations);
}

inline double probe_bf16(const ProbeArgs& args, Worker& worker) {
  auto* values = reinterpret_cast<std::uint16_t*>(worker.local);
  for (int i = 0; i < 32; ++i) values[i] = float_to_bf16(0.25f + 0.01f * static_cast<float>(i));
  PUNA_PROBE_LOOP(F, zero(), const Pairs x = load_pairs(values), dot(sum, x, x),
                  store(reinterpret_cast<float*>(worker.local), sums[0]));
  return 2.0 * 32 * kProbeChains * static_cast<double>(args.iterations);
}

inline double probe_f32(const ProbeArgs& args, Worker& worker) {
  auto* values = reinterpret_cast<float*>(worker.local);
  for (int i = 0; i < 16; ++i) values[i] = 0.25f + 0.01f * static_cast<float>(i);
  PUNA_PROBE_LOOP(F, zero(), const F x = load(values), fma(x, x, sum), store(values, sums[0]));
  return 2.0 * 16 * kProbeChains * static_cast<double>(args.iterations);
}

#undef PUNA_PROBE_LOOP
#undef PUNA_OPAQUE

inline void probe(const ProbeArgs& args, Worker& worker) {
  double done = 0;
  switch (args.kind) {
    case 0: done = probe_read(args, worker); break;
    case 1: done = probe_int8(args, worker); break;
    case 2: done = probe_bf16(args, worker); break;
    case 3: done = probe_f32(args, worker); break;
  }
  args.operations[worker.index] = done;
}

}  // namespace puna::PUNA_LEVEL
