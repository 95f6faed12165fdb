// Packing: row-major weights into the panels that kernels/args.h describes, and back. Done when a model is loaded or an
// engine is built; plain functions on memory, the same on every machine, so that an engine built on one runs on
// another.
//
// All work on a range of rows: `rows` rows of the source go to the rows first_row, first_row + 1 ... of the panels, so
// a layer may be packed from several tensors (query, key, value), by shards, and by several threads at once (ranges
// must not overlap, and where threads share a panel of 4-bit codes or scales they still write different bytes).
// Padding, of inputs up to a whole block and of outputs up to a whole panel, is left as it is: the caller clears the
// panels first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/args.h"

namespace puna {

// Bytes of the panels of a weight [outputs, inputs]; of a gated one, outputs counts gates and ups.
std::int64_t panel_bytes(const PanelFormat& format, std::int64_t outputs, std::int64_t inputs);

// codes [rows, inputs]; scales, and minimums where the format has them, float32 [rows, ceil(inputs / group_size)],
// rounded to fp16 here. group_size is a multiple of the format's group (32, or 16 with two groups a block): scales are
// repeated. Codes of formats without minimums count from 128 or 8; of 4-bit codes the low half counts.
void pack_groups(const PanelFormat& format, std::int64_t inputs, const std::uint8_t* codes, const float* scales,
                 const float* minimums, std::int64_t group_size, std::int64_t first_row, std::int64_t rows,
                 std::byte* panels);

// The inverse, with the format's own group size.
void unpack_groups(const PanelFormat& format, std::int64_t inputs, const std::byte* panels, std::int64_t first_row,
                   std::int64_t rows, std::uint8_t* codes, float* scales, float* minimums);

// weight [rows, inputs] of the format's dense dtype, whose rows are `stride` elements apart.
void pack_dense(const PanelFormat& format, std::int64_t inputs, const void* weight, std::int64_t stride,
                std::int64_t first_row, std::int64_t rows, std::byte* panels);
void unpack_dense(const PanelFormat& format, std::int64_t inputs, const std::byte* panels, std::int64_t first_row,
                  std::int64_t rows, void* weight, std::int64_t stride);

}  // namespace puna
