// Mixtral's experts: each token goes through the few that the router prefers, and their outputs are summed up weighted.
//
// Tokens are grouped by expert, so that each expert's weights are read once for a block of tokens. A token's outputs
// are added in ascending order of the experts, and linear layers give a row the same bits in any batch: so does this.
#pragma once

#include "../vec.h"
#include "args.h"
#include "linear.h"

namespace puna::PUNA_LEVEL {

// Softmax of a token's logits into `probabilities`, and its `top` experts in descending order of them, the lower index
// first where two are equal, with weights that sum to one. NaN chooses some experts too, and weighs them with NaN.
inline void choose_experts(const ExpertsArgs& a, std::int64_t token, float* probabilities, std::int32_t* chosen,
                           float* weights) {
  const std::int64_t start = token * a.experts;
  const auto lanes = [&](std::int64_t e) { return a.experts - e < kLanes ? static_cast<int>(a.experts - e) : kLanes; };
  F most = broadcast(-3.4e38f);
  for (std::int64_t e = 0; e < a.experts; e += kLanes)
    most = max(most, first_n(load_as_n(a.router_logits, start + e, a.dtype, lanes(e)), most, lanes(e)));
  const F highest = broadcast(maximum(most));
  F total = zero();
  for (std::int64_t e = 0; e < a.experts; e += kLanes) {
    const F p = exp(load_as_n(a.router_logits, start + e, a.dtype, lanes(e)) - highest);
    total = total + first_n(p, zero(), lanes(e));
    store_n(probabilities + e, p, lanes(e));
  }
  const float divisor = sum(total);
  for (std::int64_t e = 0; e < a.experts; ++e) probabilities[e] /= divisor;

  constexpr float kTaken = -1.0f;
  float chosen_total = 0.0f;
  for (std::int64_t i = 0; i < a.top; ++i) {
    std::int64_t best = -1;
    for (std::int64_t e = 0; e < a.experts; ++e)
      if (probabilities[e] != kTaken && (best < 0 || probabilities[e] > probabilities[best])) best = e;
    chosen[i] = static_cast<std::int32_t>(best);
    weights[i] = probabilities[best];
    probabilities[best] = kTaken;
    chosen_total += weights[i];
  }
  for (std::int64_t i = 0; i < a.top; ++i) weights[i] /= chosen_total;
}

// The places in `chosen` [tokens * top] of each expert, ascending: rows[starts[e]] .. rows[starts[e + 1] - 1].
inline void group_by_expert(const ExpertsArgs& a, std::int64_t places, const std::int32_t* chosen, std::int32_t* starts,
                            std::int32_t* rows) {
  for (std::int64_t e = 0; e <= a.experts; ++e) starts[e] = 0;
  for (std::int64_t i = 0; i < places; ++i) ++starts[chosen[i] + 1];
  for (std::int64_t e = 0; e < a.experts; ++e) starts[e + 1] += starts[e];
  for (std::int64_t i = 0; i < places; ++i) rows[starts[chosen[i]]++] = static_cast<std::int32_t>(i);
  // Each start has moved on to the next one's.
  for (std::int64_t e = a.experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
}

// This thread's part of `rows` rows of `size` numbers, in pieces: use(row, first number, how many).
template <class Use>
PUNA_INLINE void share_pieces(const Worker& worker, std::int64_t rows, std::int64_t size, Use use) {
  constexpr std::int64_t kPiece = 512;
  const std::int64_t pieces = (size + kPiece - 1) / kPiece;
  const Worker::Range range = worker.share(rows * pieces);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    const std::int64_t begin = i % pieces * kPiece;
    use(i / pieces, begin, size - begin < kPiece ? size - begin : kPiece);
  }
}

inline void experts_block(const ExpertsArgs& a, std::int64_t first, std::int64_t tokens, Worker& worker) {
  const ExpertsScratch layout = experts_layout(a);
  auto* probabilities = reinterpret_cast<float*>(worker.shared + layout.probabilities);
  auto* chosen = reinterpret_cast<std::int32_t*>(worker.shared + layout.chosen);
  auto* weights = reinterpret_cast<float*>(worker.shared + layout.weights);
  auto* starts = reinterpret_cast<std::int32_t*>(worker.shared + layout.starts);
  auto* rows = reinterpret_cast<std::int32_t*>(worker.shared + layout.rows);
  std::byte* gathered = worker.shared + layout.gathered;
  auto* outputs = reinterpret_cast<float*>(worker.shared + layout.outputs);
  auto* totals = reinterpret_cast<float*>(worker.shared + layout.totals);
  const std::int64_t size = a.dtype == Dtype::f32 ? 4 : 2;
  const auto* x = static_cast<const std::byte*>(a.x) + first * a.hidden * size;

  const Worker::Range mine = worker.share(tokens);
  for (std::int64_t t = mine.begin; t < mine.end; ++t) {
    choose_experts(a, first + t, probabilities + t * a.experts, chosen + t * a.top, weights + t * a.top);
    std::memset(totals + t * a.hidden, 0, static_cast<std::size_t>(a.hidden) * sizeof(float));
  }
  worker.barrier();
  if (worker.index == 0) group_by_expert(a, tokens * a.top, chosen, starts, rows);
  worker.barrier();

  Worker inside = worker;
  inside.shared = worker.shared + layout.linear;
  LinearArgs up{};
  up.y = worker.shared + layout.inner;
  up.x_stride = a.hidden;
  up.y_stride = a.inner;
  up.inputs = a.hidden;
  up.outputs = a.inner;
  up.format = a.gate_up_format;
  up.x_dtype = up.y_dtype = a.dtype;
  up.activation = a.activation;
  up.gated = 1;
  LinearArgs down{};
  down.x = up.y;
  down.y = outputs;
  down.x_stride = a.inner;
  down.y_stride = a.hidden;
  down.inputs = a.inner;
  down.outputs = a.hidden;
  down.format = a.proj_format;
  down.x_dtype = a.dtype;
  down.y_dtype = Dtype::f32;

  for (std::int64_t e = 0; e < a.experts; ++e) {
    const std::int32_t* places = rows + starts[e];
    const std::int64_t count = starts[e + 1] - starts[e];
    if (count == 0) continue;
    const std::int64_t from = places[0] / a.top;
    if (places[count - 1] / a.top - from + 1 == count) {  // tokens in a row, as a single one is
      up.x = x + from * a.hidden * size;
    } else {
      share_pieces(worker, count, a.hidden, [&](std::int64_t row, std::int64_t begin, std::int64_t many) {
        std::memcpy(gathered + (row * a.hidden + begin) * size, x + (places[row] / a.top * a.hidden + begin) * size,
                    static_cast<std::size_t>(many * size));
      });
      worker.barrier();
      up.x = gathered;
    }
    up.weight = a.gate_up[e];
    down.weight = a.proj[e];
    up.rows = down.rows = count;
    linear(up, inside);
    worker.barrier();
    linear(down, inside);
    worker.barrier();
    share_pieces(worker, count, a.hidden, [&](std::int64_t row, std::int64_t begin, std::int64_t many) {
      const F weight = broadcast(weights[places[row]]);
      float* total = totals + places[row] / a.top * a.hidden + begin;
      const float* output = outputs + row * a.hidden + begin;
      for (std::int64_t i = 0; i < many; i += kLanes) {
        const int lanes = many - i < kLanes ? static_cast<int>(many - i) : kLanes;
        store_n(total + i, fma(weight, load_n(output + i, lanes), load_n(total + i, lanes)), lanes);
      }
    });
    // The next expert's outputs are written after at least one barrier more: that between its two layers.
  }
  worker.barrier();
  share_pieces(worker, tokens, a.hidden, [&](std::int64_t row, std::int64_t begin, std::int64_t many) {
    for (std::int64_t i = begin; i < begin + many; i += kLanes) {
      const int lanes = begin + many - i < kLanes ? static_cast<int>(begin + many - i) : kLanes;
      store_as_n(a.y, (first + row) * a.hidden + i, load_n(totals + row * a.hidden + i, lanes), a.dtype, lanes);
    }
  });
}

inline void experts(const ExpertsArgs& a, Worker& worker) {
  for (std::int64_t first = 0; first < a.tokens; first += kExpertsTokens) {
    if (first > 0) worker.barrier();
    experts_block(a, first, a.tokens - first < kExpertsTokens ? a.tokens - first : kExpertsTokens, worker);
  }
}

}  // namespace puna::PUNA_LEVEL
