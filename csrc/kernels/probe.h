// How fast this machine reads and multiplies: what benchmarks compare with.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// Independent sums. A product takes four to six cycles and two can begin in each, so fewer than twelve registers would
// measure the latency. Variables, not an array: compilers leave an array of vectors in memory here. A vector of 16 lanes
// takes two of the sixteen registers of AVX2.
#if defined(PUNA_AVX512)
#define PUNA_EACH_CHAIN(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5) DO(s6) DO(s7) DO(s8) DO(s9) DO(s10) DO(s11)
constexpr int kProbeChains = 12;
#else
#define PUNA_EACH_CHAIN(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5)
constexpr int kProbeChains = 6;
#endif

// Hides from the compiler what is in x, or it would work out the sums of constants ahead. Not a clobber of all memory, which
// would keep the sums there.
#define PUNA_OPAQUE(x) __asm__ volatile("" : "+m"(x))

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
  I total = sums[0];
  for (int i = 1; i < 8; ++i) total = total + sums[i];
  PUNA_OPAQUE(total);
  return static_cast<double>(range.end - range.begin);
}

// Each starts with what the compiler can't know, or it would make one of those that are equal.
#define PUNA_INT_CHAIN(s) I s; { I start = broadcast_int(0); PUNA_OPAQUE(start); s = start; }
#define PUNA_FLOAT_CHAIN(s) F s; { F start = zero(); PUNA_OPAQUE(start); s = start; }
#define PUNA_DOT(s) s = dot(s, x, x);
#define PUNA_FMA(s) s = fma(x, x, s);
#define PUNA_KEEP(s) { auto kept = s; PUNA_OPAQUE(kept); }  // a copy: an operand in memory stays there from the start

inline double probe_int8(const ProbeArgs& args) {
  std::uint8_t values[64];
  for (int i = 0; i < 64; ++i) values[i] = static_cast<std::uint8_t>(3 * i + 1);
  Bytes x = load_bytes(values);
  PUNA_EACH_CHAIN(PUNA_INT_CHAIN)
  for (std::int64_t n = 0; n < args.iterations; ++n) {
    PUNA_OPAQUE(x);
    PUNA_EACH_CHAIN(PUNA_DOT)
  }
  PUNA_EACH_CHAIN(PUNA_KEEP)
  return 2.0 * 64 * kProbeChains * static_cast<double>(args.iterations);
}

inline double probe_bf16(const ProbeArgs& args) {
  std::uint16_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = float_to_bf16(0.25f + 0.01f * static_cast<float>(i));
  Pairs x = load_pairs(values);
  PUNA_EACH_CHAIN(PUNA_FLOAT_CHAIN)
  for (std::int64_t n = 0; n < args.iterations; ++n) {
    PUNA_OPAQUE(x);
    PUNA_EACH_CHAIN(PUNA_DOT)
  }
  PUNA_EACH_CHAIN(PUNA_KEEP)
  return 2.0 * 32 * kProbeChains * static_cast<double>(args.iterations);
}

inline double probe_f32(const ProbeArgs& args) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = 0.25f + 0.01f * static_cast<float>(i);
  F x = load(values);
  PUNA_EACH_CHAIN(PUNA_FLOAT_CHAIN)
  for (std::int64_t n = 0; n < args.iterations; ++n) {
    PUNA_OPAQUE(x);
    PUNA_EACH_CHAIN(PUNA_FMA)
  }
  PUNA_EACH_CHAIN(PUNA_KEEP)
  return 2.0 * 16 * kProbeChains * static_cast<double>(args.iterations);
}

#undef PUNA_EACH_CHAIN
#undef PUNA_INT_CHAIN
#undef PUNA_FLOAT_CHAIN
#undef PUNA_DOT
#undef PUNA_FMA
#undef PUNA_KEEP
#undef PUNA_OPAQUE

inline void probe(const ProbeArgs& args, Worker& worker) {
  double done = 0;
  switch (args.kind) {
    case 0: done = probe_read(args, worker); break;
    case 1: done = probe_int8(args); break;
    case 2: done = probe_bf16(args); break;
    case 3: done = probe_f32(args); break;
  }
  args.operations[worker.index] = done;
}

}  // namespace puna::PUNA_LEVEL
