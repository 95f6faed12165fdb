// The order of keys and values inside a block of the paged cache, and store_kv, which writes it.
//
// A block holds, for each key/value head, one chunk of block_size positions: strips of 16 positions, one after another.
// D is the head size, d runs over its numbers, n over the 16 positions of a strip, so that 16 keys lie in the lanes of
// a vector:
//
//   dtype   keys of a strip                              values of a strip
//   f32     [D][16 n]                                    [16 n][D]
//   f16     [D][16 n]                                    [16 n][D]
//   bf16    [D / 2][16 n][2 d]                           [8 pairs of n][D][2 n]
//   int8    [D / 4][16 n][4 d], then [16 n][2 d] where   [4 quads of n][D][4 n]
//           D is not a multiple of 4
//
// int8: value = scale * code with one float32 scale for each position; the codes of keys are stored unsigned, with 128
// added (the dot product of bytes wants one unsigned operand), those of values are signed. The block_size scales follow
// the codes of all strips, so a chunk is block_size * (D + 4) bytes. A number that is not finite makes the scale of its
// position NaN.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

constexpr int kStrip = 16;           // positions
constexpr int kLargestHead = 256;

PUNA_INLINE std::int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2;
}

// Where the chunk of a block and a head begins.
PUNA_INLINE std::int64_t chunk_bytes(const CacheArgs& cache) {
  const std::int64_t scales = cache.dtype == Dtype::i8 ? 4 : 0;
  return cache.block_size * (cache.head_size * element_bytes(cache.dtype) + scales);
}

// One head of one token, of `size` numbers, into position n of a strip. `row` holds them in the cache's dtype.
template <class T>
PUNA_INLINE void store_key_row(T* strip, const T* row, std::int64_t n, std::int64_t size) {
  for (std::int64_t d = 0; d < size; ++d) strip[kStrip * d + n] = row[d];
}

template <int kGroup>
PUNA_INLINE void store_key_groups(std::byte* strip, const std::byte* row, std::int64_t n, std::int64_t bytes) {
  std::int64_t at = 0;
  for (; at + kGroup <= bytes; at += kGroup) std::memcpy(strip + kStrip * at + kGroup * n, row + at, kGroup);
  // What is left of bytes in fours is a pair, as D is even.
  if (at < bytes) std::memcpy(strip + kStrip * at + 2 * n, row + at, 2);
}

// Position n of a strip lies in group n / kGroup, as element n % kGroup of each d.
template <int kGroup, class T>
PUNA_INLINE void store_value_row(T* strip, const T* row, std::int64_t n, std::int64_t size) {
  T* first = strip + n / kGroup * kGroup * size + n % kGroup;
  for (std::int64_t d = 0; d < size; ++d) first[kGroup * d] = row[d];
}

// Codes from -127 to 127 and their scale; `codes` has room for the size rounded up to 16.
inline float quantize_head(const void* x, std::int64_t at, std::int64_t size, Dtype dtype, std::int8_t* codes) {
  F largest = zero(), differences = zero();
  for (std::int64_t d = 0; d < size; d += kLanes) {
    const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
    const F numbers = load_as_n(x, at + d, dtype, n);
    largest = max(largest, abs(numbers));
    differences = differences + (numbers - numbers);  // NaN from anything that is not finite
  }
  const float top = maximum(largest);
  const bool finite = sum(differences) == 0.0f;
  const F inverse = broadcast(finite && top > 1e-30f ? 127.0f / top : 0.0f);
  for (std::int64_t d = 0; d < size; d += kLanes) {
    const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
    store_int8(codes + d, finite ? to_int(load_as_n(x, at + d, dtype, n) * inverse) : broadcast_int(0));
  }
  return finite ? top * (1.0f / 127.0f) : __builtin_nanf("");
}

// A row of one head in the cache's dtype (float ones), in `row`, which has room for the size rounded up to 16.
PUNA_INLINE void convert_head(const void* x, std::int64_t at, std::int64_t size, Dtype from, void* row, Dtype to) {
  if (from == to) {  // the same bits, those of a NaN too
    std::memcpy(row, static_cast<const std::byte*>(x) + at * element_bytes(from),
                static_cast<std::size_t>(size * element_bytes(from)));
    return;
  }
  for (std::int64_t d = 0; d < size; d += kLanes) {
    const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
    store_as(row, d, load_as_n(x, at + d, from, n), to);
  }
}

// One head of one token. `keys` and `values` are the chunk's.
inline void store_head(const StoreKvArgs& args, std::int64_t key_at, std::int64_t value_at, std::byte* keys,
                       std::byte* values, std::int64_t offset) {
  const std::int64_t size = args.cache.head_size;
  const std::int64_t strip = offset / kStrip * kStrip * size * element_bytes(args.cache.dtype), n = offset % kStrip;
  alignas(64) std::byte row[4 * kLargestHead];
  if (args.cache.dtype == Dtype::i8) {
    auto* codes = reinterpret_cast<std::int8_t*>(row);
    const std::int64_t scales = args.cache.block_size * size + 4 * offset;
    float scale = quantize_head(args.key, key_at, size, args.dtype, codes);
    for (std::int64_t d = 0; d < size; ++d) row[d] ^= std::byte{0x80};
    store_key_groups<4>(keys + strip, row, n, size);
    std::memcpy(keys + scales, &scale, 4);
    scale = quantize_head(args.value, value_at, size, args.dtype, codes);
    store_value_row<4>(values + strip, row, n, size);
    std::memcpy(values + scales, &scale, 4);
    return;
  }
  convert_head(args.key, key_at, size, args.dtype, row, args.cache.dtype);
  if (args.cache.dtype == Dtype::f32) {
    store_key_row(reinterpret_cast<float*>(keys + strip), reinterpret_cast<float*>(row), n, size);
  } else if (args.cache.dtype == Dtype::f16) {
    store_key_row(reinterpret_cast<std::uint16_t*>(keys + strip), reinterpret_cast<std::uint16_t*>(row), n, size);
  } else {
    store_key_groups<4>(keys + strip, row, n, 2 * size);
  }
  convert_head(args.value, value_at, size, args.dtype, row, args.cache.dtype);
  if (args.cache.dtype == Dtype::bf16) {
    store_value_row<2>(reinterpret_cast<std::uint16_t*>(values + strip), reinterpret_cast<std::uint16_t*>(row), n,
                       size);
  } else {
    const std::int64_t bytes = size * element_bytes(args.cache.dtype);
    std::memcpy(values + strip + n * bytes, row, static_cast<std::size_t>(bytes));
  }
}

inline void store_kv(const StoreKvArgs& args, Worker& worker) {
  const CacheArgs& cache = args.cache;
  const std::int64_t heads = cache.kv_heads, chunk = chunk_bytes(cache);
  // Sixteen tokens a grain: neighbours in a strip, which share cache lines.
  const Worker::Range range = worker.share(args.tokens * heads, kStrip * heads);
  for (std::int64_t at = range.begin; at < range.end; ++at) {
    const std::int64_t token = at / heads, head = at % heads, slot = args.slots[token];
    if (slot < 0 || slot >= cache.blocks * cache.block_size) {
      worker.fail(Failure::block_out_of_range);
      continue;
    }
    const std::int64_t at_chunk = (slot / cache.block_size * heads + head) * chunk;
    const std::int64_t at_head = head * cache.head_size;
    store_head(args, token * args.key_stride + at_head, token * args.value_stride + at_head,
               static_cast<std::byte*>(cache.keys) + at_chunk, static_cast<std::byte*>(cache.values) + at_chunk,
               slot % cache.block_size);
  }
}

}  // namespace puna::PUNA_LEVEL
