// Linear layers over panels of float32, float16 and bfloat16 weights.
//
// Sums are float32, and each output's is one chain of fused multiply-adds over the inputs in order, whatever the number
// of rows, tile, thread: 16-bit weights and rows are widened first, which is exact, so nothing is lost but in the sum
// itself. The exception is bfloat16 weights with bfloat16 rows where bf16_dots() says so: there the chain is one of
// vdpbf16ps, two inputs at a time. It has twice the rate of a float32 fma on Zen 5, and half of it on Sapphire Rapids.
#pragma once

#include "../vec.h"
#include "args.h"
#include "epilogue.h"

// Where vectors are arrays, unrolled loops are only slow to compile.
#if defined(PUNA_AVX512) || defined(PUNA_AVX2)
#define PUNA_DENSE_UNROLL _Pragma("GCC unroll 16")
#else
#define PUNA_DENSE_UNROLL
#endif

namespace puna::PUNA_LEVEL {

// A tile is up to kTileRows rows x some halves of panels, its kTileSums sums in registers. Percentages below are shares
// of what a loop of nothing but fma reached in the same seconds on Sapphire Rapids, one thread, E = 2048.
#if defined(PUNA_AVX512)
constexpr int kTileRows = 12, kTileSums = 24;  // 12 rows: 94 % with 12 x 2 halves, 63 % as two tiles of 6 x 4
#elif defined(PUNA_AVX2)
constexpr int kTileRows = 6, kTileSums = 6;  // a vector takes two of the sixteen registers
#else
constexpr int kTileRows = 2, kTileSums = 2;
#endif
constexpr int kTileHalves = 8;  // of few rows: enough chains to hide the latency of fma
// Panels that go over a chunk of x before the next chunk is read: x comes from the third level, and with 4 panels
// 1 byte of it a cycle is enough; with 8 it is no faster.
constexpr int kGroupPanels = 4;
// A chunk of a panel in float32 is 32 KB and stays in the first level while all rows pass; half of that was slower.
constexpr int kChunk = kDenseChunk;
// 512 rows: 90-94 % in blocks of 256 rows, 80-84 % in one of 512, whose chunks of x and sums crowd the second level.
constexpr int kBlockRows = kDenseBlockRows;
// From here on 16-bit weights are widened into memory once, not in each tile: 256 rows 93 % instead of 90 % for
// bfloat16 and 79 % for float16, but 64 rows 83 % instead of 89 %.
constexpr int kUnpackRows = 96;
// Fewer rows are bound by memory, where threads that read long stretches are faster than those that take turns.
constexpr int kDynamicRows = 48;
// Few rows: the weights of the next chunk are fetched into the second level, those this far on into the first. One row
// of bfloat16: 105-111 % of a plain read; 102-106 % with one fetch, 4 KB ahead; 88 % with one panel at a time.
constexpr int kNearBytes = 1024;
constexpr int kLineBytes = 64;

static_assert((kGroupPanels * kBlockRows + kChunk) * kPanel * sizeof(float) <= Worker::kLocalBytes);

constexpr int halves_for(int rows) {
  int halves = kTileHalves;
  while (halves > 1 && rows * halves > kTileSums) halves /= 2;
  return halves;
}

// How weights are read: kInputs inputs a step, the steps kStep elements apart; the second half of a panel begins kHalf
// elements after the first. X is what x is packed to.
struct FloatWeights {
  using X = float;
  using Element = float;
  static constexpr bool kPairs = false, kNarrow = false;
  static constexpr int kInputs = 1, kStep = 32, kHalf = 16;
  static PUNA_INLINE F widen(const Element* p, int) { return load(p); }
};
struct HalfWeights {
  using X = float;
  using Element = std::uint16_t;
  static constexpr bool kPairs = false, kNarrow = true;
  static constexpr int kInputs = 1, kStep = 32, kHalf = 16;
  static PUNA_INLINE F widen(const Element* p, int) { return load_f16(p); }
};
struct Bf16Weights {
  using X = float;
  using Element = std::uint16_t;
  static constexpr bool kPairs = false, kNarrow = true;
  static constexpr int kInputs = 2, kStep = 64, kHalf = 32;
  static PUNA_INLINE F widen(const Element* p, int i) {
    return i == 0 ? first_of_pairs(load_pairs(p)) : second_of_pairs(load_pairs(p));
  }
};
struct PairWeights {
  using X = std::uint16_t;
  using Element = std::uint16_t;
  static constexpr bool kPairs = true, kNarrow = false;
  static constexpr int kInputs = 2, kStep = 64, kHalf = 32;
};

// sums[h][r] += x[r] . weight[h] (or =, where it `begins`) for R rows, kChunk apart, and H halves; `weights` and `sums`
// point to the panels (for H = 1: to the half). Where it streams, the weights come from memory: those `ahead_step`
// bytes on are fetched into the second level, and those kNearBytes on into the first. Else they are in a cache, and
// each step fetches the line at `ahead`, `ahead_step` bytes after the last one.
template <class W, int R, int H, bool streams>
void dense_tile(const typename W::X* x, const typename W::Element* const* weights, int steps, float* const* sums,
                bool begins, const char* ahead, std::int64_t ahead_step) {
  constexpr int kPanels = (H + 1) / 2;
  const typename W::Element* w[kPanels];
PUNA_DENSE_UNROLL
  for (int p = 0; p < kPanels; ++p) w[p] = weights[p];
  F acc[R][H];
PUNA_DENSE_UNROLL
  for (int r = 0; r < R; ++r)
PUNA_DENSE_UNROLL
    for (int h = 0; h < H; ++h) acc[r][h] = begins ? zero() : load(sums[h / 2] + r * kPanel + h % 2 * kLanes);
  for (std::int64_t step = 0; step < steps; ++step) {
    if constexpr (W::kPairs) {
      Pairs v[H];
PUNA_DENSE_UNROLL
      for (int h = 0; h < H; ++h) v[h] = load_pairs(w[h / 2] + step * W::kStep + h % 2 * W::kHalf);
PUNA_DENSE_UNROLL
      for (int r = 0; r < R; ++r) {
        const Pairs xs = broadcast_pair(x + r * kChunk + 2 * step);
PUNA_DENSE_UNROLL
        for (int h = 0; h < H; ++h) acc[r][h] = dot(acc[r][h], v[h], xs);
      }
    } else {
PUNA_DENSE_UNROLL
      for (int i = 0; i < W::kInputs; ++i) {
        F v[H];
PUNA_DENSE_UNROLL
        for (int h = 0; h < H; ++h) v[h] = W::widen(w[h / 2] + step * W::kStep + h % 2 * W::kHalf, i);
PUNA_DENSE_UNROLL
        for (int r = 0; r < R; ++r) {
          const F xs = broadcast(x[r * kChunk + W::kInputs * step + i]);
PUNA_DENSE_UNROLL
          for (int h = 0; h < H; ++h) acc[r][h] = fma(xs, v[h], acc[r][h]);
        }
      }
    }
    if constexpr (streams) {
      constexpr int kLine = kLineBytes / sizeof(typename W::Element);
PUNA_DENSE_UNROLL
      for (int p = 0; p < kPanels; ++p)
PUNA_DENSE_UNROLL
        for (int line = 0; line < (H == 1 ? W::kHalf : W::kStep); line += kLine) {
          const auto* at = reinterpret_cast<const char*>(w[p] + step * W::kStep + line);
          prefetch_far(at + ahead_step);
          prefetch(at + kNearBytes);
        }
    } else {
      prefetch_far(ahead);
      ahead += ahead_step;
    }
  }
PUNA_DENSE_UNROLL
  for (int r = 0; r < R; ++r)
PUNA_DENSE_UNROLL
    for (int h = 0; h < H; ++h) store(sums[h / 2] + r * kPanel + h % 2 * kLanes, acc[r][h]);
}

// Panels whose sums are computed together: for a gated layer the gates and then their ups.
template <class W>
struct DenseGroup {
  const typename W::Element* weights[kGroupPanels];
  float* sums[kGroupPanels];  // [rows][32] each
  int panels;
};

// What tiles fetch from memory while they compute: spans of as many lines as a tile has steps.
struct Ahead {
  const char* spans[4 * kGroupPanels + kBlockRows * kChunk * 4 / (kLineBytes * kChunk / 2) + 1];
  int count = 0, next = 0;
  std::int64_t offset = 0;  // where tiles stream: bytes from what they read

  template <class T>
  void add(const T* from, std::int64_t elements, int steps) {
    const auto* at = reinterpret_cast<const char*>(from);
    const char* end = at + elements * static_cast<std::int64_t>(sizeof(T));
    for (; at < end; at += kLineBytes * steps) spans[count++] = at;
  }
};

// One tile of R rows over all halves of a group, H at a time, what is left over in narrower tiles.
template <class W, int R, int H, bool streams>
void dense_row_tile(const typename W::X* x, const DenseGroup<W>& group, int row, int steps, bool begins, int half,
                    Ahead& ahead) {
  for (; half + H <= 2 * group.panels; half += H) {
    const typename W::Element* weights[(H + 1) / 2];
    float* sums[(H + 1) / 2];
    for (int p = 0; p < (H + 1) / 2; ++p) {
      weights[p] = group.weights[half / 2 + p] + half % 2 * W::kHalf;
      sums[p] = group.sums[half / 2 + p] + row * kPanel + half % 2 * kLanes;
    }
    const char* at = reinterpret_cast<const char*>(x);
    std::int64_t ahead_step = ahead.offset;
    if constexpr (!streams) {
      if (ahead.next < ahead.count) {
        at = ahead.spans[ahead.next++];
        ahead_step = kLineBytes;
      }
    }
    dense_tile<W, R, H, streams>(x, weights, steps, sums, begins, at, ahead_step);
  }
  if constexpr (H > 2) dense_row_tile<W, R, H / 2, streams>(x, group, row, steps, begins, half, ahead);
}

template <class W, bool streams, int R = 1>
void dense_rows(const typename W::X* x, const DenseGroup<W>& group, int row, int rows, int steps, bool begins,
                Ahead& ahead) {
  if (rows == R) return dense_row_tile<W, R, halves_for(R), streams>(x, group, row, steps, begins, 0, ahead);
  if constexpr (R < kTileRows) dense_rows<W, streams, R + 1>(x, group, row, rows, steps, begins, ahead);
}

// Inputs of a panel as float32 [inputs][32].
template <class W>
void unpack(const typename W::Element* weights, int inputs, float* out) {
  for (int i = 0; i < inputs; i += W::kInputs, weights += W::kStep)
PUNA_DENSE_UNROLL
    for (int j = 0; j < W::kInputs; ++j)
PUNA_DENSE_UNROLL
      for (int half = 0; half < 2; ++half)
        store(out + (i + j) * kPanel + half * kLanes, W::widen(weights + half * W::kHalf, j));
}

// The rows of one panel in tiles: its weights are read from memory once, then stay in a cache.
template <class W>
void dense_tiles(const typename W::X* x, const DenseGroup<W>& panel, int rows, int steps, bool begins, Ahead& ahead) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int tile = 0; tile < tiles; ++tile) {
    const int row = rows * tile / tiles;
    dense_rows<W, false>(x + row * kChunk, panel, row, rows * (tile + 1) / tiles - row, steps, begins, ahead);
  }
}

// The outputs of `count` panels from `panel` on, for some of the rows.
template <class W>
void dense_panels(const LinearArgs& a, const typename W::X* x, std::int64_t chunk_stride, std::int64_t first_row,
                  int rows, std::int64_t panel, int count, Worker& worker) {
  const std::int64_t inputs = (a.inputs + W::kInputs - 1) / W::kInputs * W::kInputs;
  auto* sums = reinterpret_cast<float*>(worker.local);
  float* unpacked = sums + kGroupPanels * kBlockRows * kPanel;
  const std::int64_t panel_elements = inputs / W::kInputs * W::kStep;
  DenseGroup<W> group;
  group.panels = a.gated ? 2 * count : count;
  for (int p = 0; p < group.panels; ++p) {
    const std::int64_t number = p < count ? panel + p : a.outputs / kPanel + panel + p - count;
    group.weights[p] = static_cast<const typename W::Element*>(a.weight) + number * panel_elements;
    group.sums[p] = sums + p * rows * kPanel;
  }
  constexpr int kElements = kChunk / W::kInputs * W::kStep;  // of a panel in a chunk
  for (std::int64_t k = 0; k < inputs; k += kChunk, x += chunk_stride) {
    const int chunk = inputs - k < kChunk ? static_cast<int>(inputs - k) : kChunk, steps = chunk / W::kInputs;
    Ahead ahead;
    if (rows <= kTileRows) {
      const bool last = k + kChunk >= inputs;
      const std::int64_t next = last ? count * panel_elements - k / W::kInputs * W::kStep : kElements;
      ahead.offset = next * static_cast<std::int64_t>(sizeof(typename W::Element));
      dense_rows<W, true>(x, group, 0, rows, steps, k == 0, ahead);
    } else {
      const bool unpacks = W::kNarrow && rows >= kUnpackRows;
      for (int p = 0; p < group.panels; ++p)
        ahead.add(group.weights[p] + kElements, kElements, unpacks ? kChunk : kChunk / W::kInputs);
      ahead.add(x + chunk_stride, rows * kChunk, unpacks ? kChunk : kChunk / W::kInputs);
      for (int p = 0; p < group.panels; ++p) {
        if constexpr (W::kNarrow) {
          if (unpacks) {
            unpack<W>(group.weights[p], chunk, unpacked);
            dense_tiles<FloatWeights>(x, {{unpacked}, {group.sums[p]}, 1}, rows, chunk, k == 0, ahead);
            continue;
          }
        }
        dense_tiles<W>(x, {{group.weights[p]}, {group.sums[p]}, 1}, rows, steps, k == 0, ahead);
      }
    }
    for (int p = 0; p < group.panels; ++p) group.weights[p] += kElements;
  }
  for (int p = 0; p < count; ++p)
    epilogue_store(a, group.sums[p], a.gated ? group.sums[count + p] : nullptr, first_row, rows, panel + p);
}

// A chunk of a row of x as the tiles read it, zeros after the last input up to a whole pair.
inline void pack_inputs(const LinearArgs& a, std::int64_t at, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_as(a.x, at + i, a.x_dtype));
  if (i < count) store(out + i, load_as_n(a.x, at + i, a.x_dtype, count - i));
}
inline void pack_inputs(const LinearArgs& a, std::int64_t at, int count, std::uint16_t* out) {
  std::memcpy(out, static_cast<const std::uint16_t*>(a.x) + at, static_cast<std::size_t>(count) * 2);
  if (count % 2 != 0) out[count] = 0;
}

template <class W>
void dense_of(const LinearArgs& a, Worker& worker) {
  const std::int64_t panels = (a.outputs + kPanel - 1) / kPanel, chunks = (a.inputs + kChunk - 1) / kChunk;
  const int most = a.gated ? kGroupPanels / 2 : kGroupPanels;
  const std::int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = a.rows * block / blocks, rows = a.rows * (block + 1) / blocks - first;
    if (block > 0) worker.barrier();  // others may still read the last block's rows
    // x as [chunk][row][kChunk], so that the rows of a tile are one stream; at the distance of a power of two they
    // would all fall into the same few sets of a cache.
    auto* x = reinterpret_cast<typename W::X*>(worker.shared);
    const Worker::Range mine = worker.share(rows * chunks);
    for (std::int64_t i = mine.begin; i < mine.end; ++i) {
      const std::int64_t chunk = i / rows, row = i % rows, left = a.inputs - chunk * kChunk;
      pack_inputs(a, (first + row) * a.x_stride + chunk * kChunk, static_cast<int>(left < kChunk ? left : kChunk),
                  x + i * kChunk);
    }
    worker.barrier();
    const auto compute = [&](std::int64_t begin, std::int64_t end, std::int64_t panel, std::int64_t last) {
      dense_panels<W>(a, x + begin * kChunk, rows * kChunk, first + begin, static_cast<int>(end - begin), panel,
                      static_cast<int>(last - panel < most ? last - panel : most), worker);
    };
    if (rows < kDynamicRows) {
      const Worker::Range range = worker.share(panels);
      for (std::int64_t panel = range.begin; panel < range.end; panel += most) compute(0, rows, panel, range.end);
    } else {
      const std::int64_t groups = (panels + most - 1) / most;
      std::int64_t parts = 1;
      while (groups * parts < 3 * worker.count && rows / parts >= kDynamicRows) parts *= 2;
      for (std::int64_t item; (item = worker.take()) < groups * parts;) {
        const std::int64_t part = item % parts;
        compute(rows * part / parts, rows * (part + 1) / parts, item / parts * most, panels);
      }
    }
  }
}

#undef PUNA_DENSE_UNROLL

inline void dense_linear(const LinearArgs& a, Worker& worker) {
  switch (a.format.dense) {
    case Dtype::f32: return dense_of<FloatWeights>(a, worker);
    case Dtype::f16: return dense_of<HalfWeights>(a, worker);
    case Dtype::bf16:
#if defined(PUNA_AVX512)
      if (a.x_dtype == Dtype::bf16 && bf16_dots()) return dense_of<PairWeights>(a, worker);
#endif
      return dense_of<Bf16Weights>(a, worker);
    case Dtype::i8: return;
  }
}

}  // namespace puna::PUNA_LEVEL
