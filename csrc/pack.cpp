#include "pack.h"

#include <algorithm>
#include <cstring>

namespace puna {

namespace {

constexpr std::int64_t kBlock = 32;  // inputs

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// fp16 from and to float32 in integer arithmetic: the baseline processor has no instruction for it. To nearest, ties to
// even.
std::uint16_t to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
  if (magnitude >= 0x38800000u) {                       // 2^-14 and above: normal numbers
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  // Below, fp16 counts in steps of 2^-24, and so does float32 from 0.5 to 1: the sum rounds.
  float shifted;
  std::memcpy(&shifted, &magnitude, 4);
  shifted += 0.5f;
  std::uint32_t steps;
  std::memcpy(&steps, &shifted, 4);
  return static_cast<std::uint16_t>(sign | (steps - 0x3f000000u));
}

float from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const std::uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::uint32_t load_quad(const void* p) {
  std::uint32_t quad;
  std::memcpy(&quad, p, 4);
  return quad;
}
void store_quad(void* p, std::uint32_t quad) { std::memcpy(p, &quad, 4); }

// Four codes of a row from input `at` on; zeros past the last.
std::uint32_t codes_at(const std::uint8_t* row, std::int64_t at, std::int64_t inputs) {
  if (at + 4 <= inputs) return load_quad(row + at);
  std::uint8_t quad[4] = {};
  for (int i = 0; i < 4 && at + i < inputs; ++i) quad[i] = row[at + i];
  return load_quad(quad);
}
void store_codes(std::uint8_t* row, std::int64_t at, std::int64_t inputs, std::uint32_t codes) {
  if (at + 4 <= inputs) return store_quad(row + at, codes);
  std::uint8_t quad[4];
  store_quad(quad, codes);
  for (int i = 0; i < 4 && at + i < inputs; ++i) row[at + i] = quad[i];
}

// Where things are in the panels of a format with groups.
struct GroupsLayout {
  explicit GroupsLayout(const PanelFormat& format, std::int64_t inputs)
      : groups(format.groups),
        blocks(ceil_div(inputs, kBlock)),
        minimums_at(format.groups * 2 * kPanel),
        codes_at(minimums_at * (format.minimums ? 2 : 1)),
        block_bytes(codes_at + kBlock * kPanel * format.bits / 8) {}

  std::int64_t groups, blocks, minimums_at, codes_at, block_bytes;

  std::int64_t panel(std::int64_t row) const { return row / kPanel * blocks * block_bytes; }
};

// Element (row, input) of dense panels is at panel(row) + input * kPanel + row % kPanel; bf16 goes by pairs of inputs.
template <bool kPairs, bool kPack, class Rows, class Panels>
void copy_dense(std::int64_t inputs, Rows* weight, std::int64_t stride, std::int64_t first_row, std::int64_t rows,
                Panels* panels) {
  const std::int64_t padded = kPairs ? inputs + inputs % 2 : inputs;
  // Rows of one panel together, over a stretch of inputs: whole cache lines of the panel are written while they are
  // near.
  constexpr std::int64_t kStretch = 64;
  for (std::int64_t begin = first_row; begin < first_row + rows;) {
    const std::int64_t end = std::min(first_row + rows, (begin / kPanel + 1) * kPanel);
    Panels* panel = panels + begin / kPanel * kPanel * padded;
    for (std::int64_t from = 0; from < inputs; from += kStretch) {
      const std::int64_t to = std::min(inputs, from + kStretch);
      for (std::int64_t row = begin; row < end; ++row) {
        Rows* line = weight + (row - first_row) * stride;
        const std::int64_t lane = row % kPanel;
        for (std::int64_t k = from; k < to; ++k) {
          const std::int64_t at = kPairs ? k / 2 * 2 * kPanel + lane * 2 + k % 2 : k * kPanel + lane;
          if constexpr (kPack) {
            panel[at] = line[k];
          } else {
            line[k] = panel[at];
          }
        }
      }
    }
    begin = end;
  }
}

}  // namespace

std::int64_t panel_bytes(const PanelFormat& format, std::int64_t outputs, std::int64_t inputs) {
  const std::int64_t panels = ceil_div(outputs, kPanel);
  if (format.bits != 0) {
    const GroupsLayout layout(format, inputs);
    return panels * layout.blocks * layout.block_bytes;
  }
  if (format.dense == Dtype::f32) return panels * kPanel * inputs * 4;
  return panels * kPanel * (format.dense == Dtype::bf16 ? inputs + inputs % 2 : inputs) * 2;
}

void pack_groups(const PanelFormat& format, std::int64_t inputs, const std::uint8_t* codes, const float* scales,
                 const float* minimums, std::int64_t group_size, std::int64_t first_row, std::int64_t rows,
                 std::byte* panels) {
  const GroupsLayout layout(format, inputs);
  const std::int64_t own_size = kBlock / layout.groups, source_groups = ceil_div(inputs, group_size);
  for (std::int64_t begin = first_row; begin < first_row + rows;) {
    const std::int64_t end = std::min(first_row + rows, (begin / kPanel + 1) * kPanel);
    for (std::int64_t b = 0; b < layout.blocks; ++b) {
      std::byte* block = panels + layout.panel(begin) + b * layout.block_bytes;
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t lane = row % kPanel, source = row - first_row;
        for (std::int64_t g = 0; g < layout.groups; ++g) {
          const std::int64_t k = b * kBlock + g * own_size;
          if (k >= inputs) break;
          const std::int64_t from = source * source_groups + k / group_size;
          std::byte* to = block + (g * kPanel + lane) * 2;
          const std::uint16_t scale = to_half(scales[from]);
          std::memcpy(to, &scale, 2);
          if (format.minimums) {
            const std::uint16_t minimum = to_half(minimums[from]);
            std::memcpy(to + layout.minimums_at, &minimum, 2);
          }
        }
        const std::uint8_t* line = codes + source * inputs;
        std::byte* to = block + layout.codes_at + lane * 4;
        for (std::int64_t quad = 0; quad < 8; ++quad) {
          const std::int64_t k = b * kBlock + quad * 4;
          if (k >= inputs) break;
          if (format.bits == 8) {
            store_quad(to + quad * 4 * kPanel, codes_at(line, k, inputs));
          } else if (quad % 2 == 0) {
            const std::uint32_t low = codes_at(line, k, inputs), high = codes_at(line, k + 4, inputs);
            store_quad(to + quad / 2 * 4 * kPanel, (low & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4);
          }
        }
      }
    }
    begin = end;
  }
}

void unpack_groups(const PanelFormat& format, std::int64_t inputs, const std::byte* panels, std::int64_t first_row,
                   std::int64_t rows, std::uint8_t* codes, float* scales, float* minimums) {
  const GroupsLayout layout(format, inputs);
  const std::int64_t own_size = kBlock / layout.groups, own_groups = ceil_div(inputs, own_size);
  for (std::int64_t row = first_row; row < first_row + rows; ++row) {
    const std::int64_t lane = row % kPanel, target = row - first_row;
    for (std::int64_t b = 0; b < layout.blocks; ++b) {
      const std::byte* block = panels + layout.panel(row) + b * layout.block_bytes;
      for (std::int64_t g = 0; g < layout.groups; ++g) {
        const std::int64_t group = b * layout.groups + g;
        if (group >= own_groups) break;
        const std::byte* from = block + (g * kPanel + lane) * 2;
        std::uint16_t half;
        std::memcpy(&half, from, 2);
        scales[target * own_groups + group] = from_half(half);
        if (format.minimums) {
          std::memcpy(&half, from + layout.minimums_at, 2);
          minimums[target * own_groups + group] = from_half(half);
        }
      }
      std::uint8_t* line = codes + target * inputs;
      const std::byte* from = block + layout.codes_at + lane * 4;
      for (std::int64_t quad = 0; quad < 8; ++quad) {
        const std::int64_t k = b * kBlock + quad * 4;
        if (k >= inputs) break;
        if (format.bits == 8) {
          store_codes(line, k, inputs, load_quad(from + quad * 4 * kPanel));
        } else {
          const std::uint32_t both = load_quad(from + quad / 2 * 4 * kPanel);
          store_codes(line, k, inputs, (quad % 2 ? both >> 4 : both) & 0x0f0f0f0fu);
        }
      }
    }
  }
}

void pack_dense(const PanelFormat& format, std::int64_t inputs, const void* weight, std::int64_t stride,
                std::int64_t first_row, std::int64_t rows, std::byte* panels) {
  if (format.dense == Dtype::f32) {
    return copy_dense<false, true>(inputs, static_cast<const float*>(weight), stride, first_row, rows,
                                          reinterpret_cast<float*>(panels));
  }
  const auto* halves = static_cast<const std::uint16_t*>(weight);
  auto* to = reinterpret_cast<std::uint16_t*>(panels);
  if (format.dense == Dtype::bf16)
    return copy_dense<true, true>(inputs, halves, stride, first_row, rows, to);
  copy_dense<false, true>(inputs, halves, stride, first_row, rows, to);
}

void unpack_dense(const PanelFormat& format, std::int64_t inputs, const std::byte* panels, std::int64_t first_row,
                  std::int64_t rows, void* weight, std::int64_t stride) {
  if (format.dense == Dtype::f32) {
    return copy_dense<false, false>(inputs, static_cast<float*>(weight), stride, first_row, rows,
                                           reinterpret_cast<const float*>(panels));
  }
  auto* halves = static_cast<std::uint16_t*>(weight);
  const auto* from = reinterpret_cast<const std::uint16_t*>(panels);
  if (format.dense == Dtype::bf16)
    return copy_dense<true, false>(inputs, halves, stride, first_row, rows, from);
  copy_dense<false, false>(inputs, halves, stride, first_row, rows, from);
}

}  // namespace puna
