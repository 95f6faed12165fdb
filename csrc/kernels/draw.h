// A random token for each row of logits: temperature, top-k, top-p, min-p and the draw, in that order.
//
// Probabilities are whole numbers, exp(scaled logit) in units of 2^-35, so sums of them do not depend on their order, and
// what is sorted elsewhere is found here by selection: the bits of a number, taken as an integer that is lower the likelier
// the token, are looked at from above in three steps, each a histogram of those that are still in question.
#pragma once

#include "../vec.h"
#include "argmax.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

constexpr float kWeightUnits = 34359738368.0f;  // 2^35
constexpr std::int64_t kDrawBlock = 1024;       // columns whose weights are summed up together

// What a row's kernel knows of it; what no step has set rules nothing out.
struct DrawRow {
  const float* x;
  std::int64_t size;
  float highest, temperature;
  float least_logit;      // lower logits are out (top-k)
  float least_scaled;     // lower scaled logits are out (top-p)
  std::int64_t last_id;   // and of those that are level with it, the ids behind this one
  float least_relative;   // lower probabilities, the highest being 1, are out (min-p)
};

PUNA_INLINE std::uint32_t bits_of(float a) {
  std::uint32_t bits;
  std::memcpy(&bits, &a, 4);
  return bits;
}

PUNA_INLINE float float_of(std::uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, 4);
  return a;
}

// Keys are lower the likelier the token is. Negative numbers: the higher, the lower their bits. Adding zero makes -0 to 0.
PUNA_INLINE std::uint32_t logit_key(float x) {
  const std::uint32_t bits = bits_of(x + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
PUNA_INLINE float logit_of(std::uint32_t key) { return float_of(key >> 31 ? key : ~key & 0x7fffffffu); }
// Scaled logits are 0 or below.
PUNA_INLINE std::uint32_t scaled_key(float scaled) { return bits_of(scaled) & 0x7fffffffu; }
PUNA_INLINE float scaled_of(std::uint32_t key) { return -float_of(key); }

// Sixteen columns from `at` on: their logits and scaled logits, and how many there are.
struct DrawLanes {
  alignas(64) float x[kLanes], scaled[kLanes];
  int count;
};
PUNA_INLINE F draw_logits(const DrawRow& row, std::int64_t at, int count) {
  return count < kLanes ? load_n(row.x + at, count) : load(row.x + at);
}
PUNA_INLINE F draw_scaled(const DrawRow& row, F x) { return (x - broadcast(row.highest)) / broadcast(row.temperature); }
PUNA_INLINE int draw_count(const DrawRow& row, std::int64_t at) {
  return row.size - at < kLanes ? static_cast<int>(row.size - at) : kLanes;
}
PUNA_INLINE F draw_load(const DrawRow& row, std::int64_t at, DrawLanes& lanes) {
  lanes.count = draw_count(row, at);
  const F x = draw_logits(row, at, lanes.count), scaled = draw_scaled(row, x);
  store(lanes.x, x);
  store(lanes.scaled, scaled);
  return scaled;
}

// The weights of sixteen columns after top-k, top-p and min-p; of what is no column, 0.
PUNA_INLINE void draw_weights(const DrawRow& row, std::int64_t at, std::int64_t* weights) {
  const int count = draw_count(row, at);
  const F x = draw_logits(row, at, count), scaled = draw_scaled(row, x);
  F relative = exp(scaled);
  relative = where_greater(broadcast(row.least_logit), x, zero(), relative);
  relative = where_greater(broadcast(row.least_relative), relative, zero(), relative);
  const F least = broadcast(row.least_scaled);
  // Level with the least scaled logit is enough up to last_id.
  const std::int64_t level = row.last_id - at + 1;
  if (level > 0) {
    const F kept = where_greater(least, scaled, zero(), relative);
    relative = level < kLanes ? first_n(kept, where_greater(scaled, least, relative, zero()), static_cast<int>(level)) : kept;
  } else {
    relative = where_greater(scaled, least, relative, zero());
  }
  if (count < kLanes) relative = first_n(relative, zero(), count);
  alignas(64) float shares[kLanes];
  store(shares, relative * broadcast(kWeightUnits));
  for (int i = 0; i < kLanes; ++i) weights[i] = static_cast<std::int64_t>(shares[i]);
}

// The key at which the sum over tokens, likeliest first, reaches `target`, and the sum of those before it. `by_weight`: of
// the weights of tokens that top-k leaves, by the keys of scaled logits; else of tokens, by the keys of logits.
struct DrawCut {
  std::uint32_t key;
  std::int64_t before;
};
template <bool by_weight>
inline DrawCut draw_cut(const DrawRow& row, std::int64_t target, std::int64_t* histogram) {
  constexpr int kShifts[] = {21, 10, 0}, kBits[] = {11, 11, 10};
  DrawCut cut{0, 0};
  for (int step = 0; step < 3; ++step) {
    const int shift = kShifts[step], above = shift + kBits[step];
    const std::uint32_t last = (1u << kBits[step]) - 1;
    for (std::uint32_t i = 0; i <= last; ++i) histogram[i] = 0;
    for (std::int64_t at = 0; at < row.size; at += kLanes) {
      DrawLanes lanes;
      const F scaled = draw_load(row, at, lanes);
      alignas(64) float relative[kLanes];
      if (by_weight && step == 0) store(relative, exp(scaled));
      for (int i = 0; i < lanes.count; ++i) {
        const std::uint32_t key = by_weight ? scaled_key(lanes.scaled[i]) : logit_key(lanes.x[i]);
        if (step > 0 && key >> above != cut.key >> above) continue;
        if (!by_weight) {
          histogram[key >> shift & last] += 1;
        } else if (lanes.x[i] >= row.least_logit) {
          if (step > 0) {  // few
            store(relative, exp(broadcast(lanes.scaled[i])));
            histogram[key >> shift & last] += static_cast<std::int64_t>(relative[0] * kWeightUnits);
          } else {
            histogram[key >> shift & last] += static_cast<std::int64_t>(relative[i] * kWeightUnits);
          }
        }
      }
    }
    std::uint32_t bucket = 0;
    while (bucket < last && cut.before + histogram[bucket] < target) cut.before += histogram[bucket++];
    cut.key |= bucket << shift;
  }
  return cut;
}

// Leaves the fewest likeliest tokens that hold top_p of the weight; of equals, those with the lowest ids.
inline void draw_nucleus(DrawRow& row, std::int64_t total, double top_p, std::int64_t* histogram) {
  const double share = static_cast<double>(total) * top_p;
  std::int64_t target = static_cast<std::int64_t>(share);
  if (static_cast<double>(target) < share) ++target;
  const DrawCut cut = draw_cut<true>(row, target, histogram);
  // Tokens that are level with the last one have its weight.
  std::int64_t reached = cut.before;
  row.least_scaled = scaled_of(cut.key);
  for (std::int64_t at = 0; at < row.size; at += kLanes) {
    DrawLanes lanes;
    draw_load(row, at, lanes);
    for (int i = 0; i < lanes.count; ++i) {
      if (lanes.scaled[i] != row.least_scaled || lanes.x[i] < row.least_logit) continue;
      alignas(64) float relative[kLanes];
      store(relative, exp(broadcast(lanes.scaled[i])));
      reached += static_cast<std::int64_t>(relative[0] * kWeightUnits);
      row.last_id = at + i;
      if (reached >= target) return;
    }
  }
}

// Sums of the weights of each block of columns; the sum of all.
inline std::int64_t draw_sums(const DrawRow& row, std::int64_t* sums) {
  std::int64_t total = 0;
  for (std::int64_t begin = 0; begin < row.size; begin += kDrawBlock) {
    const std::int64_t end = begin + kDrawBlock < row.size ? begin + kDrawBlock : row.size;
    std::int64_t sum = 0;
    for (std::int64_t at = begin; at < end; at += kLanes) {
      std::int64_t weights[kLanes];
      draw_weights(row, at, weights);
      for (int i = 0; i < kLanes; ++i) sum += weights[i];
    }
    sums[begin / kDrawBlock] = sum;
    total += sum;
  }
  return total;
}

inline void draw_row(const DrawArgs& args, std::int64_t r, std::int64_t* histogram, std::int64_t* sums) {
  DrawRow row{};
  row.x = args.x + r * args.x_stride;
  row.size = args.size;
  row.least_logit = row.least_scaled = -__builtin_inff();
  row.last_id = args.size;
  const float highest = args.highest[r];
  args.tokens[r] = 0;
  if (!(highest - highest == 0.0f)) return;  // NaN or infinite: no id has a meaning
  row.highest = highest;
  row.temperature = args.temperature[r];
  if (!(row.temperature > 0 && row.temperature - row.temperature == 0.0f)) return;
  if (args.top_k && args.top_k[r] < args.size)
    row.least_logit = logit_of(draw_cut<false>(row, args.top_k[r], histogram).key);
  if (args.top_p && args.top_p[r] < 1.0) draw_nucleus(row, draw_sums(row, sums), args.top_p[r], histogram);
  if (args.min_p) row.least_relative = args.min_p[r];
  const std::int64_t total = draw_sums(row, sums);
  // Rounding may reach the total itself.
  std::int64_t aim = static_cast<std::int64_t>(static_cast<double>(total) * args.uniform[r]);
  if (aim > total - 1) aim = total - 1;
  std::int64_t block = 0;
  while (aim >= sums[block]) aim -= sums[block++];
  for (std::int64_t at = block * kDrawBlock;; at += kLanes) {
    std::int64_t weights[kLanes];
    draw_weights(row, at, weights);
    for (int i = 0; i < kLanes; ++i) {
      if (aim < weights[i]) {
        args.tokens[r] = at + i;
        return;
      }
      aim -= weights[i];
    }
  }
}

// The highest logit has the weight 2^35, so a total is never 0, and the walk to `aim` ends within the row.
inline void draw(const DrawArgs& args, Worker& worker) {
  auto* histogram = reinterpret_cast<std::int64_t*>(worker.local);  // [2048]
  std::int64_t* sums = histogram + 2048;                            // [size / kDrawBlock]
  for (std::int64_t row = worker.take(); row < args.rows; row = worker.take()) {
    ArgmaxArgs one{args.x, args.tokens, args.highest, args.rows, args.size, args.x_stride};
    argmax_row(one, row);
    draw_row(args, row, histogram, sums);
  }
}

}  // namespace puna::PUNA_LEVEL
