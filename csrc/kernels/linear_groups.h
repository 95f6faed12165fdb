// Linear layers over weights of 8 or 4 bits in groups: integer dot products of a block's codes with quantised
// activations, scaled and summed in float32.
//
// Every output is one chain: from 0, over the blocks of 32 inputs in order and the groups in each,
//   sum = fma(float(dot), weight_scale * x_scale, sum), and then with minimums
//   sum = fma(minimum, x_scale * x_sum, sum),
// where dot is the exact integer sum of (code - zero) * x, or of code * x with minimums. The tiles below differ in
// which rows and outputs they hold, and where, but not in this, so that an output's bits depend on nothing but its row
// and its weights.
#pragma once

#include "../vec.h"
#include "args.h"
#include "epilogue.h"
#include "quantize.h"

namespace puna::PUNA_LEVEL {

// Rows of a tile, of which up to kDotRowsInRegisters keep their float sums in registers, the others in the first-level
// cache; halves of the panel that a tile holds at a time; rows that are multiplied in one pass over the weight, by one
// tile. (At 7 and 8 rows one pass reads int4 15 % faster than chunks made ready do, though it unpacks the codes between
// the products.) At avx512 a tile of six rows reaches 73 % of the peak of vpdpbusd on Sapphire Rapids, which is all
// there is: the two ports that do eight of these for a block also have one conversion, product and fused multiply-add
// to do for them.
#if defined(PUNA_AVX512)
constexpr int kDotRows = 6, kDotRowsInRegisters = 6, kDotHalves = 2, kOnePassRows = 8;
#elif defined(PUNA_AVX2)
constexpr int kDotRows = 4, kDotRowsInRegisters = 2, kDotHalves = 1, kOnePassRows = 4;
#else
constexpr int kDotRows = 2, kDotRowsInRegisters = 2, kDotHalves = 1, kOnePassRows = 2;
#endif

// Where vectors are arrays, unrolled loops are only slow to compile.
#if defined(PUNA_AVX512) || defined(PUNA_AVX2)
#define PUNA_UNROLL_TEXT(text) _Pragma(#text)
#define PUNA_UNROLL(times) PUNA_UNROLL_TEXT(GCC unroll times)
#else
#define PUNA_UNROLL(times)
#endif

// How a block's codes are multiplied. Where there is no instruction for bytes, the plain product needs six operations:
// codes below 16 do with three and signed ones, in the formats without minimums, with four. All are exact.
enum class Dots { plain, small, centred };
#if defined(PUNA_AVX2) && !defined(PUNA_AVXVNNI)
constexpr Dots dots_for(int bits, bool minimums) {
  return bits == 4 ? Dots::small : minimums ? Dots::plain : Dots::centred;
}
template <Dots kDots>
struct Codes {
  Bytes w;
  PUNA_INLINE explicit Codes(Bytes codes) : w(codes) {}
  PUNA_INLINE I operator()(I acc, Bytes x) const {
    if constexpr (kDots == Dots::plain) return dot(acc, w, x);
    const __m256i ones = _mm256_set1_epi16(1);  // sums of two products fit into 16 bits: 2 * 15 * 127
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, x.a), ones)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, x.b), ones))};
  }
};
// |code - 128| times x with the sign of code - 128; 2 * 128 * 127 fits into 16 bits, and x is never -128.
template <>
struct Codes<Dots::centred> {
  Bytes w, magnitude;
  PUNA_INLINE explicit Codes(Bytes codes) {
    const __m256i zero_code = _mm256_set1_epi8(-128);
    w = {_mm256_xor_si256(codes.a, zero_code), _mm256_xor_si256(codes.b, zero_code)};
    magnitude = {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)};
  }
  PUNA_INLINE I operator()(I acc, Bytes x) const {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i a = _mm256_maddubs_epi16(magnitude.a, _mm256_sign_epi8(x.a, w.a));
    const __m256i b = _mm256_maddubs_epi16(magnitude.b, _mm256_sign_epi8(x.b, w.b));
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(a, ones)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(b, ones))};
  }
};
#else
constexpr Dots dots_for(int, bool) { return Dots::plain; }
template <Dots>
struct Codes {
  Bytes w;
  PUNA_INLINE I operator()(I acc, Bytes x) const { return dot(acc, w, x); }
};
#endif

// A block of the weight where it lies.
template <int kTheBits, int kTheGroups, bool kTheMinimums>
struct StoredBlocks {
  static constexpr int kBits = kTheBits, kGroups = kTheGroups;
  static constexpr bool kMinimums = kTheMinimums, kPrefetch = true;
  static constexpr Dots kDots = dots_for(kBits, kMinimums);
  static constexpr std::int64_t kCodesAt = 64 * kGroups * (kMinimums ? 2 : 1), kBytes = kCodesAt + 128 * kBits;

  const std::byte* block;

  PUNA_INLINE F scale(int group, int half) const {
    return load_f16(reinterpret_cast<const std::uint16_t*>(block) + group * kPanel + half * kLanes);
  }
  PUNA_INLINE F minimum(int group, int half) const {
    return load_f16(reinterpret_cast<const std::uint16_t*>(block) + (kGroups + group) * kPanel + half * kLanes);
  }
  PUNA_INLINE const std::byte* codes() const { return block + kCodesAt; }
  PUNA_INLINE void next() { block += kBytes; }
};

// A block made ready for many rows: codes of 8 bits, scales in float32 [kGroups][32] and minimums likewise behind them.
template <int kTheGroups, bool kTheMinimums, Dots kTheDots>
struct ReadyBlocks {
  static constexpr int kBits = 8, kGroups = kTheGroups;
  static constexpr bool kMinimums = kTheMinimums, kPrefetch = false;
  static constexpr Dots kDots = kTheDots;
  static constexpr std::int64_t kScales = kPanel * kGroups * (kMinimums ? 2 : 1);

  const std::byte* at;
  std::int64_t step;  // bytes
  const float* scales;
  // At each block, so many lines from here on are asked for.
  const std::byte* ahead;
  int ahead_lines;

  PUNA_INLINE F scale(int group, int half) const { return load(scales + group * kPanel + half * kLanes); }
  PUNA_INLINE F minimum(int group, int half) const { return load(scales + (kGroups + group) * kPanel + half * kLanes); }
  PUNA_INLINE const std::byte* codes() const { return at; }
  PUNA_INLINE void next() {
    at += step;
    scales += kScales;
  }
};

PUNA_INLINE float float_at(const std::byte* p) {
  float value;
  std::memcpy(&value, p, 4);
  return value;
}
PUNA_INLINE std::int32_t int_at(const std::byte* p) {
  std::int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

// How many bytes ahead of its use a weight is asked for: first for the second-level cache, which has more requests
// under way than the first (48 and 16 on Sapphire Rapids), then for the first. Of a plain read's speed, one thread, one
// row, reaches with both 100 % at 8 bits and 95 % at 4; with the near one alone 96 and 83, with the far one alone 90 at
// 4, with none 67.
constexpr std::int64_t kPrefetchFar = 8192, kPrefetchNear = 2304;

// sums[row][0 .. 31] continues over `blocks` blocks, for kRows rows of records, `x_stride` bytes apart. `following` is
// what will be read after these blocks.
template <int kRows, class Weight>
__attribute__((noinline)) void multiply_tile(Weight weight, std::int64_t blocks, const std::byte* x,
                                             std::int64_t x_stride, float* sums, const std::byte* following) {
  constexpr bool kInRegisters = kRows <= kDotRowsInRegisters;
  constexpr int kGroups = Weight::kGroups, kGroupQuads = 8 / kGroups;
  constexpr std::int64_t kRecord = kGroups == 2 ? 48 : 40;
  [[maybe_unused]] const std::byte *start = nullptr, *far = nullptr, *near = nullptr;
  if constexpr (Weight::kPrefetch) start = weight.block;
  F acc[kRows][2];
  if constexpr (kInRegisters) {
PUNA_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      acc[r][0] = load(sums + r * kPanel);
      acc[r][1] = load(sums + r * kPanel + kLanes);
    }
  }
  for (std::int64_t b = 0; b < blocks; ++b) {
    if constexpr (Weight::kPrefetch) {
      constexpr std::int64_t kFar = (kPrefetchFar + Weight::kBytes - 1) / Weight::kBytes;
      constexpr std::int64_t kNear = (kPrefetchNear + Weight::kBytes - 1) / Weight::kBytes;
      const std::byte* beyond = following - blocks * Weight::kBytes;  // as if it continued the blocks
      far = (b + kFar < blocks ? start : beyond) + (b + kFar) * Weight::kBytes;
      near = (b + kNear < blocks ? start : beyond) + (b + kNear) * Weight::kBytes;
    } else {
      for (int line = 0; line < weight.ahead_lines; ++line, weight.ahead += 64) prefetch_far(weight.ahead);
    }
    const std::byte* codes = weight.codes();
PUNA_UNROLL(2)
    for (int first = 0; first < 2; first += kDotHalves) {
PUNA_UNROLL(2)
      for (int group = 0; group < kGroups; ++group) {
        I dots[kRows][kDotHalves];
PUNA_UNROLL(8)
        for (int r = 0; r < kRows; ++r) {
          const std::byte* correction = x + r * x_stride + kRecordCorrection + 4 * group;
          constexpr bool kCorrects = !Weight::kMinimums && Weight::kDots != Dots::centred;
          const I from = broadcast_int(kCorrects ? int_at(correction) : 0);
PUNA_UNROLL(2)
          for (int h = 0; h < kDotHalves; ++h) dots[r][h] = from;
        }
PUNA_UNROLL(8)
        for (int q = group * kGroupQuads; q < (group + 1) * kGroupQuads; ++q) {
          if constexpr (Weight::kPrefetch) {
            if (first == 0) {
PUNA_UNROLL(8)
              for (std::int64_t line = Weight::kBytes / 64 * q / 8; line < Weight::kBytes / 64 * (q + 1) / 8; ++line) {
                prefetch_far(far + line * 64);
                prefetch(near + line * 64);
              }
            }
          }
          Bytes w[kDotHalves];
PUNA_UNROLL(2)
          for (int h = 0; h < kDotHalves; ++h) {
            if constexpr (Weight::kBits == 8) {
              w[h] = load_bytes(codes + (q * 2 + first + h) * 64);
            } else {
              const Bytes both = load_bytes(codes + (q / 2 * 2 + first + h) * 64);
              w[h] = q % 2 == 0 ? low_nibbles(both) : high_nibbles(both);
            }
          }
PUNA_UNROLL(8)
          for (int r = 0; r < kRows; ++r) {
            const Bytes quad = broadcast_quad(x + r * x_stride + 4 * q);
PUNA_UNROLL(2)
            for (int h = 0; h < kDotHalves; ++h) dots[r][h] = Codes<Weight::kDots>{w[h]}(dots[r][h], quad);
          }
        }
PUNA_UNROLL(2)
        for (int h = 0; h < kDotHalves; ++h) {
          const F scale = weight.scale(group, first + h);
          F minimum;
          if constexpr (Weight::kMinimums) minimum = weight.minimum(group, first + h);
PUNA_UNROLL(8)
          for (int r = 0; r < kRows; ++r) {
            const std::byte* record = x + r * x_stride;
            float* home = sums + r * kPanel + (first + h) * kLanes;
            F sum = kInRegisters ? acc[r][first + h] : load(home);
            sum = fma(to_float(dots[r][h]), scale * broadcast(float_at(record + kRecordScale)), sum);
            if constexpr (Weight::kMinimums)
              sum = fma(minimum, broadcast(float_at(record + kRecordCorrection + 4 * group)), sum);
            if constexpr (kInRegisters) {
              acc[r][first + h] = sum;
            } else {
              store(home, sum);
            }
          }
        }
      }
    }
    weight.next();
    x += kRecord;
  }
  if constexpr (kInRegisters) {
PUNA_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      store(sums + r * kPanel, acc[r][0]);
      store(sums + r * kPanel + kLanes, acc[r][1]);
    }
  }
}

// The same for a number of rows, 1 to kMost, that is known at run time.
template <int kMost, class Weight>
PUNA_INLINE void multiply_rows(int rows, const Weight& weight, std::int64_t blocks, const std::byte* x,
                               std::int64_t x_stride, float* sums, const std::byte* following) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return multiply_rows<kMost - 1>(rows, weight, blocks, x, x_stride, sums, following);
  }
  multiply_tile<kMost>(weight, blocks, x, x_stride, sums, following);
}

// Blocks of the K axis that are read for all rows of a task before the next ones: 16 of 1 KB and their scales stay in a
// first-level cache of 32 KB beside the activations of a tile.
constexpr std::int64_t kChunkBlocks = 16;

// The sums of one panel for few rows, in one pass over the weight.
template <class Weight>
PUNA_INLINE void multiply_panel(const std::byte* panel, std::int64_t blocks, const std::byte* x, std::int64_t x_stride,
                                int rows, float* sums, const std::byte* following) {
  for (int i = 0; i < rows * kPanel; i += kLanes) store(sums + i, zero());
  multiply_rows<kOnePassRows>(rows, Weight{panel}, blocks, x, x_stride, sums, following);
}

// Outputs of one panel are stored tile by tile, as soon as their sums are complete: a store waits for its line to come
// from memory, which costs nothing while tiles are multiplied (5 to 15 % when all were stored at the end).
struct PanelOutput {
  const LinearArgs& a;
  const float* sums;
  const float* up_sums;  // or null
  std::int64_t first_row, panel;

  // Asks for the lines of these rows.
  PUNA_INLINE void expect(int from, int rows) const {
    const std::int64_t size = a.y_dtype == Dtype::f32 ? 4 : 2;
    const char* y = static_cast<const char*>(a.y) + ((first_row + from) * a.y_stride + panel * kPanel) * size;
    for (int r = 0; r < rows; ++r, y += a.y_stride * size)
      for (std::int64_t at = 0; at < kPanel * size; at += 64) prefetch(y + at);
  }
  PUNA_INLINE void store(int from, int rows) const {
    const std::int64_t at = static_cast<std::int64_t>(from) * kPanel;
    epilogue_store(a, sums + at, up_sums == nullptr ? nullptr : up_sums + at, first_row + from, rows, panel);
  }
};
struct NoOutput {
  PUNA_INLINE void expect(int, int) const {}
  PUNA_INLINE void store(int, int) const {}
};

// The sums of one panel for many rows: chunks of blocks are made ready once, and used by tile after tile.
template <class Weight, class Output>
PUNA_INLINE void multiply_panel_in_chunks(const std::byte* panel, std::int64_t blocks, const std::byte* x,
                                          std::int64_t x_stride, int rows, float* sums, std::byte* ready,
                                          const std::byte* following, const Output& output) {
  using Ready = ReadyBlocks<Weight::kGroups, Weight::kMinimums, Weight::kDots>;
  constexpr std::int64_t kRecord = Weight::kGroups == 2 ? 48 : 40;
  for (int i = 0; i < rows * kPanel; i += kLanes) store(sums + i, zero());
  auto* scales = reinterpret_cast<float*>(ready);
  std::byte* codes = ready + kChunkBlocks * Ready::kScales * 4;
  const int tiles = (rows + kDotRows - 1) / kDotRows;
  for (std::int64_t begin = 0; begin < blocks; begin += kChunkBlocks) {
    const std::int64_t count = blocks - begin < kChunkBlocks ? blocks - begin : kChunkBlocks;
    Weight weight{panel + begin * Weight::kBytes};
    const std::byte* chunk_end = weight.block + count * Weight::kBytes;
    constexpr bool kInPlace = Weight::kBits == 8;
    Ready chunk{kInPlace ? weight.codes() : codes, kInPlace ? Weight::kBytes : 1024, scales, nullptr, 0};
    for (std::int64_t b = 0; b < count; ++b, weight.next()) {
      float* to = scales + b * Ready::kScales;
      for (int i = 0; i < Ready::kScales; i += kLanes)
        store(to + i, load_f16(reinterpret_cast<const std::uint16_t*>(weight.block) + i));
      if constexpr (Weight::kBits == 4) {
        std::byte* wide = codes + b * 1024;
        for (int pair = 0; pair < 4; ++pair) {
          for (int h = 0; h < 2; ++h) {
            const Bytes both = load_bytes(weight.codes() + (pair * 2 + h) * 64);
            store_bytes(wide + (pair * 4 + h) * 64, low_nibbles(both));
            store_bytes(wide + (pair * 4 + 2 + h) * 64, high_nibbles(both));
          }
        }
      }
    }
    // While the tiles use this chunk, they ask for the next one, each for its part: a few lines at each block, as more
    // at a time than there may be requests under way would have to wait for each other, and the tile with them.
    const bool is_last = begin + kChunkBlocks >= blocks;
    const std::byte* next = is_last ? following : chunk_end;
    const std::int64_t lines = kChunkBlocks * Weight::kBytes / 64, steps = tiles * count;
    const int step_lines = static_cast<int>((lines + steps - 1) / steps);
    for (int t = 0; t < tiles; ++t) {
      const std::int64_t asked = t * count * step_lines;
      chunk.ahead = next + asked * 64;
      chunk.ahead_lines = asked < lines ? step_lines : 0;
      const int first = rows * t / tiles, last = rows * (t + 1) / tiles;
      if (is_last) output.expect(first, last - first);
      multiply_rows<kDotRows>(last - first, chunk, count, x + begin * kRecord + first * x_stride, x_stride,
                               sums + first * kPanel, nullptr);
      if (is_last) output.store(first, last - first);
    }
  }
}

// The rows of one task: their sums (32 KB, or 64 if gated) and records stay in the second-level cache.
constexpr std::int64_t kTaskRows = 264;
// Numbers that are quantised faster than threads meet at a barrier.
constexpr std::int64_t kQuantizeAlone = 16384;

template <class Weight>
inline void linear_with_groups(const LinearArgs& a, Worker& worker) {
  constexpr std::int64_t kRecord = Weight::kGroups == 2 ? 48 : 40;
  const std::int64_t blocks = (a.inputs + kBlock - 1) / kBlock, x_stride = blocks * kRecord;
  const std::int64_t panels = (a.outputs + kPanel - 1) / kPanel, panel_size = blocks * Weight::kBytes;
  const auto* weight = static_cast<const std::byte*>(a.weight);
  auto* sums = reinterpret_cast<float*>(worker.local);
  float* up_sums = a.gated ? sums + kTaskRows * kPanel : nullptr;
  std::byte* local = worker.local + 2 * kTaskRows * kPanel * sizeof(float);

  if (a.rows <= kOnePassRows) {
    const int rows = static_cast<int>(a.rows);
    const std::byte* x = local;
    if (a.rows * a.inputs <= kQuantizeAlone) {
      for (int r = 0; r < rows; ++r) quantize_blocks(a, r, 0, blocks, local + r * x_stride);
    } else {
      for (int r = 0; r < rows; ++r) {
        const Worker::Range range = worker.share(blocks, 4);
        quantize_blocks(a, r, range.begin, range.end, worker.shared + r * x_stride + range.begin * kRecord);
      }
      worker.barrier();
      x = worker.shared;
    }
    const Worker::Range range = worker.share(panels);
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      const std::byte* panel = weight + i * panel_size;
      const std::byte* following = i + 1 < range.end ? panel + panel_size : panel;
      const std::byte* up = panel + panels * panel_size;
      multiply_panel<Weight>(panel, blocks, x, x_stride, rows, sums, a.gated ? up : following);
      if (a.gated) multiply_panel<Weight>(up, blocks, x, x_stride, rows, up_sums, following);
      epilogue_store(a, sums, up_sums, 0, rows, i);
    }
    return;
  }

  for (std::int64_t first = 0; first < a.rows; first += kScratchRows) {
    const std::int64_t rows = a.rows - first < kScratchRows ? a.rows - first : kScratchRows;
    if (first > 0) worker.barrier();  // the records of the rows before are no longer read
    const Worker::Range range = worker.share(rows * blocks, 8);
    for (std::int64_t at = range.begin; at < range.end;) {
      const std::int64_t row = at / blocks, begin = at - row * blocks;
      const std::int64_t end = blocks - begin < range.end - at ? blocks : begin + range.end - at;
      quantize_blocks(a, first + row, begin, end, worker.shared + at * kRecord);
      at += end - begin;
    }
    worker.barrier();
    const std::int64_t parts = (rows + kTaskRows - 1) / kTaskRows;
    for (std::int64_t task = worker.take(); task < parts * panels; task = worker.take()) {
      const std::int64_t part = task / panels, i = task % panels;
      const std::int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
      const int count = static_cast<int>(end - begin);
      const std::byte* x = worker.shared + begin * x_stride;
      const std::byte* panel = weight + i * panel_size;
      const std::byte* following = panel + panel_size;
      const std::byte* up = panel + panels * panel_size;
      const PanelOutput output{a, sums, up_sums, first + begin, i};
      if (a.gated) {
        multiply_panel_in_chunks<Weight>(panel, blocks, x, x_stride, count, sums, local, up, NoOutput{});
        multiply_panel_in_chunks<Weight>(up, blocks, x, x_stride, count, up_sums, local, following, output);
      } else {
        multiply_panel_in_chunks<Weight>(panel, blocks, x, x_stride, count, sums, local, following, output);
      }
    }
  }
}

inline void groups_linear(const LinearArgs& a, Worker& worker) {
  const PanelFormat& format = a.format;
  if (format.bits == 8 && format.groups == 1)
    return format.minimums ? linear_with_groups<StoredBlocks<8, 1, true>>(a, worker)
                           : linear_with_groups<StoredBlocks<8, 1, false>>(a, worker);
  if (format.bits == 8)
    return format.minimums ? linear_with_groups<StoredBlocks<8, 2, true>>(a, worker)
                           : linear_with_groups<StoredBlocks<8, 2, false>>(a, worker);
  if (format.groups == 1)
    return format.minimums ? linear_with_groups<StoredBlocks<4, 1, true>>(a, worker)
                           : linear_with_groups<StoredBlocks<4, 1, false>>(a, worker);
  return format.minimums ? linear_with_groups<StoredBlocks<4, 2, true>>(a, worker)
                         : linear_with_groups<StoredBlocks<4, 2, false>>(a, worker);
}

#undef PUNA_UNROLL
#undef PUNA_UNROLL_TEXT

}  // namespace puna::PUNA_LEVEL
