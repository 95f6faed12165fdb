// What each kernel is called with: plain structs of pointers and sizes, and the table of the kernels of one level.
//
// Shape letters as in puna.ops: T tokens, B sequences, H query heads, K key/value heads, D head size, E inputs of a
// linear layer, N its outputs, F mlp hidden. Strides count elements; the last axis of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "../worker.h"

namespace puna {

enum class Dtype : std::int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

enum class Activation : std::int32_t { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, relu = 4 };

// How the weight of a linear layer is stored: panels of 32 outputs one after another (the last one padded with zeros), in
// each panel the inputs in order. docs/cpu_kernels.md draws it.
//   dense   f32  [E][32]            bf16 [E / 2][2][16][2]  (pairs of inputs; E even, padded)       f16 [E][32]
//   groups  blocks of 32 inputs (E padded to 32): fp16 scales [groups][32], fp16 minimums [groups][32] where `minimums`, then
//           the codes: 8 bits [8 quads][2][16][4] = 1024 bytes, weight = scale * (code - 128), or with minimums
//           scale * code + minimum; 4 bits [4][2][16][4] = 512 bytes, of which byte [p][h][lane][i] holds input
//           8 p + i in its low and 8 p + 4 + i in its high half, weight = scale * (code - 8) or scale * code + minimum.
//           `groups` is 1, or 2 where each half of 16 inputs has a scale (and minimum) of its own.
struct PanelFormat {
  Dtype dense;              // meaningful where bits is 0
  std::int32_t bits;        // 0 (dense), 4 or 8
  std::int32_t groups;      // 1 or 2 a block of 32 inputs
  std::int32_t minimums;    // 0 or 1
};

constexpr int kPanel = 32;  // outputs

// y[t, n] = sum over e of x[t, e] * weight[n, e] + bias[n], or with `gated` (outputs: N gates, then N ups)
// y[t, n] = activation(gate[t, n]) * up[t, n]. The sums are in float32, x is quantised to int8 in groups of 32 where the
// weight has groups. x and bias have x_dtype.
struct LinearArgs {
  const void* x;         // [T, E]
  const void* weight;
  const void* bias;      // [N] ([2 N] if gated), or null
  void* y;               // [T, N]
  std::int64_t x_stride, y_stride;
  std::int64_t rows, inputs, outputs;  // T, E, N
  PanelFormat format;
  Dtype x_dtype, y_dtype;
  Activation activation;
  std::int32_t gated;
};

// Rows of a table for token ids (any row indices): y[t] = table[ids[t]]. The table is row-major of `dtype`, or panels.
struct EmbeddingArgs {
  const std::int64_t* ids;  // [T]
  const void* table;        // [V, E]
  void* y;                  // [T, E] of y_dtype
  std::int64_t rows, vocabulary, inputs, table_stride;
  PanelFormat format;       // where is_panels
  Dtype dtype, y_dtype;     // dtype: of a row-major table
  std::int32_t is_panels;
};

// y = x / sqrt(mean(x^2) + epsilon) * weight over rows of `size`; where `residual` is given, x + residual takes the place of
// x and is written to `sum` (rounded to the dtype; the norm is that of the rounded sum). Rows are [outer][inner]: the row
// (o, i) begins at o * x_outer_stride + i * x_inner_stride, so that heads inside of a wider row can be normalised.
struct RmsNormArgs {
  const void* x;
  const void* residual;  // contiguous rows, or null; only with inner == 1
  const void* weight;    // [size]
  void* sum;             // contiguous rows, or null
  void* y;               // contiguous rows
  std::int64_t outer, inner, size, x_outer_stride, x_inner_stride;
  float epsilon;
  Dtype dtype;
};

// y = a + b, all contiguous, of `count` elements, the sum in float32.
struct AddArgs {
  const void* a;
  const void* b;
  void* y;
  std::int64_t count;
  Dtype dtype;
};

// y[t, f] = activation(gate_up[t, f]) * gate_up[t, F + f]
struct GatedActivationArgs {
  const void* gate_up;  // [T, 2 F], contiguous
  void* y;              // [T, F]
  std::int64_t rows, size;  // T, F
  Activation activation;
  Dtype dtype;
};

// Rotates pairs (i, i + D / 2) of each head: x [T, heads, D] with row stride -> y [T, heads, D] contiguous.
struct RotaryArgs {
  const void* x;
  const float* cos;  // [T, D / 2]
  const float* sin;
  void* y;
  std::int64_t tokens, heads, head_size, x_stride, angle_stride;
  Dtype dtype;
};

// The paged cache of one layer: for each block and key/value head a chunk of block_size x D numbers of `dtype`. Only these
// kernels look inside a chunk (attention.h has the order), so chunks may be copied whole, and nothing else.
// For int8 each chunk is followed by block_size float32 scales: D + 4 bytes a position.
struct CacheArgs {
  void* keys;
  void* values;
  std::int64_t blocks, kv_heads, block_size, head_size;
  Dtype dtype;
};

// Writes the keys and values of T tokens into the slots slot = block * block_size + offset.
struct StoreKvArgs {
  const void* key;    // [T, K, D], row strides below
  const void* value;
  const std::int64_t* slots;  // [T]
  std::int64_t tokens, key_stride, value_stride;
  CacheArgs cache;
  Dtype dtype;  // of key and value
};

// See paged_attention in puna.ops.reference.
struct PagedAttentionArgs {
  const void* query;  // [T, H, D], row stride below
  void* y;            // [T, H, D], contiguous
  const std::int32_t* block_tables;      // [B, table_stride]
  const std::int32_t* query_starts;      // [B + 1]
  const std::int32_t* sequence_lengths;  // [B]
  std::int64_t sequences, heads, query_stride, table_stride, table_width;
  std::int64_t window;  // tokens, or 0 for all
  CacheArgs cache;
  float scale;
  Dtype dtype;  // of query and y
};

// Mixtral's experts: softmax of router_logits, the `top` best renormalised, and the sum of their gated MLPs, in ascending
// order of the experts, in float32.
struct ExpertsArgs {
  const void* x;              // [T, E] contiguous
  const void* router_logits;  // [T, experts] contiguous, of `dtype`
  const void* const* gate_up;  // for each expert: panels [2 F, E]
  const void* const* proj;     // for each expert: panels [E, F]
  void* y;                    // [T, E]
  std::int64_t tokens, hidden, inner, experts, top;
  PanelFormat gate_up_format, proj_format;
  Activation activation;
  Dtype dtype;
};

// Rounds rows of a weight to codes of `bits` with one scale a group of 32 inputs, and writes them as the rows first,
// first + 1 ... into panels of such a format. 4 bits: the scale is searched for. Other rows of the panels stay as they are.
struct RoundArgs {
  const void* rows;  // [count, inputs], row stride below, of `dtype`
  void* panels;
  std::int64_t first, count, inputs, stride;
  std::int32_t bits;  // 4 or 8
  Dtype dtype;
};

// The lowest index of the largest number of each row, and that number. A row with a NaN has NaN as its largest.
struct ArgmaxArgs {
  const float* x;         // [rows, size], row stride below
  std::int64_t* indices;  // [rows]
  float* values;          // [rows]
  std::int64_t rows, size, x_stride;  // size up to 2^24
};

// A random token for each row of logits: see draw.h. Each of top_k, top_p and min_p may be null: no row asks for it.
struct DrawArgs {
  const float* x;            // [rows, size], row stride below
  const float* temperature;  // [rows], above 0
  const std::int64_t* top_k;  // [rows], 1 .. size
  const double* top_p;       // [rows], above 0; 1 and more: all
  const float* min_p;        // [rows], 0 .. 1
  const double* uniform;     // [rows], 0 .. 1: where in the sum of the probabilities
  std::int64_t* tokens;      // [rows]
  float* highest;            // [rows], the highest logit
  std::int64_t rows, size, x_stride;  // size up to 2^24
};

using Kernel = void (*)(const void* args, Worker& worker);

// The kernels of one instruction level. Every one takes its share of the work by worker.index and worker.count.
struct Kernels {
  const char* level;
  Kernel linear;
  Kernel embedding;
  Kernel rms_norm;
  Kernel add;
  Kernel gated_activation;
  Kernel rotary;
  Kernel store_kv;
  Kernel paged_attention;
  Kernel experts;
  Kernel probe;
  Kernel round_groups;
  Kernel argmax;
  Kernel draw;
};

// The quantised rows that a linear layer keeps at a time: more take no less time, only more memory.
constexpr std::int64_t kScratchRows = 1024;

// Rows and inputs of what a linear layer over weights without groups packs of x at a time: see linear_dense.h.
constexpr std::int64_t kDenseBlockRows = 256, kDenseChunk = 256;

// Whether bfloat16 rows meet bfloat16 weights in vdpbf16ps (level avx512 alone) or, widened, in float32 fma. The bits differ,
// so it is one choice for all kernels of a process: cpu_features.h.
bool bf16_dots();

// Positions whose attention is summed up on its own, cut at absolute positions, before the sums are merged: enough work for
// one thread to take while others take the sequence's other partitions.
constexpr std::int64_t kAttentionPartition = 512;

// How many of them the longest sequence can have.
std::int64_t attention_partitions(const PagedAttentionArgs& args);

// What a task needs of Worker::shared. Sizes do not depend on the level.
std::size_t linear_scratch(const LinearArgs& args);
std::size_t paged_attention_scratch(const PagedAttentionArgs& args);
std::size_t experts_scratch(const ExpertsArgs& args);

// Where experts.h keeps what it needs for a block of tokens: offsets into Worker::shared.
struct ExpertsScratch {
  std::size_t probabilities;  // float [tokens][experts]
  std::size_t chosen;         // int32 [tokens][top], experts
  std::size_t weights;        // float [tokens][top]
  std::size_t starts;         // int32 [experts + 1], into `rows`
  std::size_t rows;           // int32 [tokens * top]: for each expert its places in `chosen`, ascending
  std::size_t gathered;       // of x's dtype, [tokens][E]
  std::size_t inner;          // of x's dtype, [tokens][F]
  std::size_t outputs;        // float [tokens][E]
  std::size_t totals;         // float [tokens][E]
  std::size_t linear;         // of the linear layers
  std::size_t bytes;
};
constexpr std::int64_t kExpertsTokens = 512;  // a block: the weights are read again for each, which is little then
ExpertsScratch experts_layout(const ExpertsArgs& args);

// A probe of the hardware (csrc/kernels/probe.h): each thread repeats one kind of work and stores what it did.
struct ProbeArgs {
  std::int32_t kind;       // 0: read memory, 1: int8 dot products, 2: bf16 dot products, 3: float32 fma
  const void* memory;      // kind 0: read once by all threads together
  std::int64_t bytes;
  std::int64_t iterations;  // kinds 1-3: per thread
  double* operations;      // [threads], written: multiply-adds x 2 (kinds 1-3), or bytes read
};

}  // namespace puna
