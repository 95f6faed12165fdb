// How much scratch memory the kernels need, for all levels alike.
#include <cstddef>

#include "args.h"

namespace puna {

std::size_t linear_scratch(const LinearArgs& args) {
  if (args.format.bits == 0) {  // x in float32, in whole chunks: see linear_dense.h
    const std::int64_t rows = args.rows < kDenseBlockRows ? args.rows : kDenseBlockRows;
    const std::int64_t inputs = (args.inputs + kDenseChunk - 1) / kDenseChunk * kDenseChunk;
    return static_cast<std::size_t>(rows * inputs) * sizeof(float);
  }
  // Records of 32 quantised inputs: see quantize.h.
  const std::int64_t rows = args.rows < kScratchRows ? args.rows : kScratchRows;
  return static_cast<std::size_t>(rows * ((args.inputs + 31) / 32) * (args.format.groups == 2 ? 48 : 40));
}
std::int64_t attention_partitions(const PagedAttentionArgs& args) {
  return (args.table_width * args.cache.block_size + kAttentionPartition - 1) / kAttentionPartition;
}

// The sums of each partition for each head of a single token, where so few tokens are possible that threads would be
// idle otherwise: see attention.h.
std::size_t paged_attention_scratch(const PagedAttentionArgs& args) {
  constexpr std::int64_t kEnoughTasks = 64;
  const std::int64_t partitions = attention_partitions(args);
  if (partitions <= 1 || args.sequences * args.cache.kv_heads > kEnoughTasks) return 0;
  const std::int64_t padded = (args.cache.head_size + 15) / 16 * 16;
  return static_cast<std::size_t>(args.sequences * args.heads * partitions * (padded + 32) * 4);
}

ExpertsScratch experts_layout(const ExpertsArgs& args) {
  const std::int64_t tokens = args.tokens < kExpertsTokens ? args.tokens : kExpertsTokens;
  const std::int64_t size = args.dtype == Dtype::f32 ? 4 : 2;
  ExpertsScratch layout;
  std::size_t end = 0;
  const auto take = [&end](std::int64_t bytes) {
    const std::size_t begin = end;
    end += (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
    return begin;
  };
  layout.probabilities = take(tokens * args.experts * 4);
  layout.chosen = take(tokens * args.top * 4);
  layout.weights = take(tokens * args.top * 4);
  layout.starts = take((args.experts + 1) * 4);
  layout.rows = take(tokens * args.top * 4);
  layout.gathered = take(tokens * args.hidden * size);
  layout.inner = take(tokens * args.inner * size);
  layout.outputs = take(tokens * args.hidden * 4);
  layout.totals = take(tokens * args.hidden * 4);
  LinearArgs linear{};
  linear.rows = tokens;
  linear.inputs = args.hidden;
  linear.format = args.gate_up_format;
  const std::size_t first = linear_scratch(linear);
  linear.inputs = args.inner;
  linear.format = args.proj_format;
  const std::size_t second = linear_scratch(linear);
  layout.linear = take(static_cast<std::int64_t>(first > second ? first : second));
  layout.bytes = end;
  return layout;
}

std::size_t experts_scratch(const ExpertsArgs& args) { return experts_layout(args).bytes; }

}  // namespace puna
