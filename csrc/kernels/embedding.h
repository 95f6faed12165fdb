// Rows of a table, row-major or in panels: what an embedding reads, also where it shares its weight with the output layer.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// Inputs that a thread copies at a time: 2 KB and more. A multiple of the block of 32.
constexpr std::int64_t kEmbeddingPart = 1024;

// The bytes of a block of 32 inputs of a panel: its scales, its minimums and its codes.
PUNA_INLINE std::int64_t block_scales(const PanelFormat& f) { return f.groups * kPanel * 2; }
PUNA_INLINE std::int64_t block_bytes(const PanelFormat& f) { return block_scales(f) * (1 + f.minimums) + f.bits * 128; }

PUNA_INLINE void embed_zeros(const EmbeddingArgs& args, std::int64_t to, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const int lanes = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
    store_as_n(args.y, to + i, zero(), args.y_dtype, lanes);
  }
}

// Inputs begin .. end - 1 of row `id` go to y from element `to` + begin on.
inline void embed_row_major(const EmbeddingArgs& args, std::int64_t id, std::int64_t to, std::int64_t begin, std::int64_t end) {
  const std::int64_t from = id * args.table_stride;
  if (args.dtype == args.y_dtype) {  // no arithmetic: the bits of a NaN stay, too
    const std::int64_t size = args.dtype == Dtype::f32 ? 4 : 2;
    std::memcpy(static_cast<char*>(args.y) + (to + begin) * size,
                static_cast<const char*>(args.table) + (from + begin) * size, static_cast<std::size_t>((end - begin) * size));
    return;
  }
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const int lanes = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
    store_as_n(args.y, to + i, load_as_n(args.table, from + i, args.dtype, lanes), args.y_dtype, lanes);
  }
}

// Every element lies in a cache line of its own (bf16: every pair), so the lines are asked for well ahead.
inline void embed_dense_panel(const EmbeddingArgs& args, std::int64_t id, std::int64_t to, std::int64_t begin,
                              std::int64_t end) {
  constexpr std::int64_t kAhead = 32;
  const std::int64_t panel = id / kPanel, lane = id % kPanel;
  const Dtype dtype = args.format.dense;
  const std::int64_t pairs = (args.inputs + 1) / 2;
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const int lanes = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
    alignas(64) float values[kLanes] = {};
    if (dtype == Dtype::bf16) {
      const auto* table = static_cast<const std::uint16_t*>(args.table) + panel * pairs * 2 * kPanel + lane * 2;
      for (int j = 0; j < lanes; ++j) {
        const std::uint16_t* element = table + (i + j) / 2 * 2 * kPanel + (i + j) % 2;
        prefetch(element + kAhead * kPanel);
        values[j] = bf16_to_float(*element);
      }
    } else if (dtype == Dtype::f16) {
      const auto* table = static_cast<const std::uint16_t*>(args.table) + panel * args.inputs * kPanel + lane;
      for (int j = 0; j < lanes; ++j) {
        prefetch(table + (i + j + kAhead) * kPanel);
        values[j] = f16_to_float(table[(i + j) * kPanel]);
      }
    } else {
      const auto* table = static_cast<const float*>(args.table) + panel * args.inputs * kPanel + lane;
      for (int j = 0; j < lanes; ++j) {
        prefetch(table + (i + j + kAhead) * kPanel);
        values[j] = table[(i + j) * kPanel];
      }
    }
    store_as_n(args.y, to + i, load(values), args.y_dtype, lanes);
  }
}

// The codes of one output's 32 inputs, less `zero`, as float: inputs 0-15 and 16-31.
struct CodePair {
  F low, high;
};
PUNA_INLINE CodePair block_codes(const PanelFormat& f, const std::uint8_t* codes, std::int64_t lane) {
  // [quads][2][16][4] bytes: 128 bytes from one quad of inputs (or of pairs of inputs) to the next.
  const std::uint8_t* mine = codes + lane * 4;
  alignas(64) std::int8_t bytes[kPanel];
  if (f.bits == 8) {
    for (int quad = 0; quad < 8; ++quad) {
      std::uint32_t four;
      std::memcpy(&four, mine + quad * 128, 4);
      four ^= 0x80808080u;  // code - 128, as signed bytes
      std::memcpy(bytes + 4 * quad, &four, 4);
    }
  } else {
    for (int pair = 0; pair < 4; ++pair) {
      std::uint32_t eight;
      std::memcpy(&eight, mine + pair * 128, 4);
      const std::uint32_t first = eight & 0x0f0f0f0fu, second = (eight >> 4) & 0x0f0f0f0fu;
      std::memcpy(bytes + 8 * pair, &first, 4);
      std::memcpy(bytes + 8 * pair + 4, &second, 4);
    }
  }
  // What the formats subtract: 8 bits 128, 4 bits 8, nothing where there are minimums.
  const float offset = f.bits == 8 ? (f.minimums ? 128.0f : 0.0f) : (f.minimums ? 0.0f : -8.0f);
  return {load_int8(bytes) + broadcast(offset), load_int8(bytes + kLanes) + broadcast(offset)};
}

inline void embed_group_panel(const EmbeddingArgs& args, std::int64_t id, std::int64_t to, std::int64_t begin,
                              std::int64_t end) {
  const PanelFormat& f = args.format;
  const std::int64_t blocks = (args.inputs + kPanel - 1) / kPanel, bytes = block_bytes(f);
  const std::int64_t panel = id / kPanel, lane = id % kPanel;
  const auto* table = static_cast<const std::uint8_t*>(args.table) + panel * blocks * bytes;
  const auto scale = [&](const std::uint8_t* scales, std::int64_t group) {
    std::uint16_t half;
    std::memcpy(&half, scales + (group * kPanel + lane) * 2, 2);
    return broadcast(f16_to_float(half));
  };
  for (std::int64_t i = begin; i < end; i += kPanel) {  // begin is the first of a block
    const std::uint8_t* block = table + i / kPanel * bytes;
    const std::uint8_t* minimums = block + block_scales(f);
    const CodePair codes = block_codes(f, minimums + (f.minimums ? block_scales(f) : 0), lane);
    const std::int64_t second = f.groups - 1;
    // Products of 11 and 8 bits are exact, so with a minimum there is one rounding, as in scale * code + minimum.
    F low = codes.low * scale(block, 0), high = codes.high * scale(block, second);
    if (f.minimums) {
      low = low + scale(minimums, 0);
      high = high + scale(minimums, second);
    }
    const std::int64_t left = end - i;
    store_as_n(args.y, to + i, low, args.y_dtype, left < kLanes ? static_cast<int>(left) : kLanes);
    if (left > kLanes)
      store_as_n(args.y, to + i + kLanes, high, args.y_dtype, left < kPanel ? static_cast<int>(left) - kLanes : kLanes);
  }
}

// A row of an id outside of the table is zeros.
inline void embedding(const EmbeddingArgs& args, Worker& worker) {
  const std::int64_t parts = (args.inputs + kEmbeddingPart - 1) / kEmbeddingPart;
  const Worker::Range range = worker.share(args.rows * parts);
  for (std::int64_t unit = range.begin; unit < range.end; ++unit) {
    const std::int64_t row = unit / parts, begin = unit % parts * kEmbeddingPart;
    const std::int64_t end = begin + kEmbeddingPart < args.inputs ? begin + kEmbeddingPart : args.inputs;
    const std::int64_t id = args.ids[row], to = row * args.inputs;
    if (id < 0 || id >= args.vocabulary) {
      worker.fail(Failure::token_out_of_range);
      embed_zeros(args, to, begin, end);
    } else if (!args.is_panels) {
      embed_row_major(args, id, to, begin, end);
    } else if (args.format.bits == 0) {
      embed_dense_panel(args, id, to, begin, end);
    } else {
      embed_group_panel(args, id, to, begin, end);
    }
  }
}

}  // namespace puna::PUNA_LEVEL
