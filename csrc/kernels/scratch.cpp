// How much scratch memory the kernels need, for all levels alike.
#include <cstddef>

#include "args.h"

namespace puna {

std::size_t linear_scratch(const LinearArgs& args) {
  if (args.format.bits == 0) {  // x in float32, in whole chunks: see linear_dense.h
    const std::int64_t rows = args.rows < kDenseBlockRows ? args.rows : kDenseBlockRows;
    return static_cast<std::size_t>(rows * ((args.inputs + kDenseChunk - 1) / kDenseChunk * kDenseChunk)) * sizeof(float);
  }
  // Records of 32 quantised inputs: see quantize.h.
  const std::int64_t rows = args.rows < kScratchRows ? args.rows : kScratchRows;
  return static_cast<std::size_t>(rows * ((args.inputs + 31) / 32) * (args.format.groups == 2 ? 48 : 40));
}
std::int64_t attention_partitions(const PagedAttentionArgs& args) {
  return (args.table_width * args.cache.block_size + kAttentionPartition - 1) / kAttentionPartition;
}

// The sums of each partition for each head of a single token, where so few tokens are possible that threads would be idle
// otherwise: see attention.h.
std::size_t paged_attention_scratch(const PagedAttentionArgs& args) {
  constexpr std::int64_t kEnoughTasks = 64;
  const std::int64_t partitions = attention_partitions(args);
  if (partitions <= 1 || args.sequences * args.cache.kv_heads > kEnoughTasks) return 0;
  const std::int64_t padded = (args.cache.head_size + 15) / 16 * 16;
  return static_cast<std::size_t>(args.sequences * args.heads * partitions * (padded + 32) * 4);
}

std::size_t experts_scratch(const ExpertsArgs&) { return 0; }

}  // namespace puna
