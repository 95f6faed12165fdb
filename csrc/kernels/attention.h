// Attention of query rows over the paged cache, whose order kv_cache.h has.
//
// A query row is one head of one token. What is computed for it depends on its own position p and the cache alone: the
// keys p - window < position <= p in spans of 64 and partitions of 512, both cut at absolute positions, in order.
// Within a partition a running softmax (Milakov and Gimelshein, 2018) rescales its sums at most once a span; the
// partitions' sums are merged in order, whether one thread went through all of them or several shared them. Positions
// that a row does not see are not multiplied by zero but left out, so nothing that lies there reaches it: not even NaN.
//
// The rows of a task are those of one key/value head: all the query heads that share it, times neighbouring tokens, so
// that keys and values are loaded once for many rows. A decode step is the case of one token; there is no other code
// for it.
#pragma once

#include "../vec.h"
#include "args.h"
#include "attention_bytes.h"
#include "attention_float.h"
#include "attention_sums.h"
#include "kv_cache.h"

namespace puna::PUNA_LEVEL {

// A span of keys and values of 64 x 64 float32 numbers, the sums and queries of 64 rows: 80 KB, which L2 holds, and
// what is loaded from there is used for 8 rows at a time.
constexpr int kRowsPerTask = 64;
// From how many rows on widening a span first is less work than widening it for every tile.
constexpr int kStagedRows = 16;

// Partial sums in shared memory: top, 15 unused, the 16 parts of the total, the values.
constexpr std::int64_t partial_floats(std::int64_t padded) { return padded + 2 * kLanes; }

inline RowSums partial_sums(float* partial) { return {partial, partial + kLanes, partial + 2 * kLanes}; }

inline void copy_sums(RowSums to, RowSums from, std::int64_t padded) {
  *to.top = *from.top;
  store(to.total, load(from.total));
  for (std::int64_t d = 0; d < padded; d += kLanes) store(to.values + d, load(from.values + d));
}

// One row of the output, from index `at` on.
inline void write_row(const PagedAttentionArgs& args, std::int64_t at, RowSums sums) {
  const std::int64_t size = args.cache.head_size;
  const F total = broadcast(sum(load(sums.total)));
  for (std::int64_t d = 0; d < size; d += kLanes) {
    const int n = static_cast<int>(size - d < kLanes ? size - d : kLanes);
    store_as_n(args.y, at + d, load(sums.values + d) / total, args.dtype, n);
  }
}

// Query rows row_begin .. row_begin + rows - 1 of one sequence and key/value head, where row = token * group + head in
// the group.
template <class Path>
struct RowTask {
  const PagedAttentionArgs& args;
  Worker& worker;
  std::int64_t sequence, kv_head, row_begin, rows;
  std::int64_t group, padded;

  // Of each row: the absolute positions that it sees.
  std::int64_t begins[kRowsPerTask], ends[kRowsPerTask];
  Queries queries;
  RowSums partition[kRowsPerTask], all[kRowsPerTask];
  bool any[kRowsPerTask];  // whether `all` holds a partition
  float* staged;           // keys, then values of one span

  // Memory of this thread: what the rows need. At D = 256: 64 KB of queries, 128 KB of sums and 128 KB for a span.
  void prepare(std::int64_t first_position) {
    const std::int64_t size = args.cache.head_size, first_token = args.query_starts[sequence];
    std::byte* memory = worker.local;
    const auto cut = [&](std::int64_t bytes) {
      std::byte* start = memory;
      memory += round_up(bytes, 64);
      return start;
    };
    const std::int64_t stride = Path::query_bytes(size);
    std::byte* query_rows = cut(rows * stride);
    queries = {query_rows, stride, args.scale * kLog2E};
    auto* tops = reinterpret_cast<float*>(cut(2 * rows * 4));
    auto* totals = reinterpret_cast<float*>(cut(2 * rows * kLanes * 4));
    auto* values = reinterpret_cast<float*>(cut(2 * rows * padded * 4));
    staged = reinterpret_cast<float*>(cut(2 * kSpan * padded * 4));
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t token = (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
      Path::prepare_row(args.query, (first_token + token) * args.query_stride + head * size, size, args.dtype,
                        query_rows + r * stride);
      const std::int64_t position = first_position + token;
      ends[r] = position + 1;
      begins[r] = args.window > 0 && position + 1 > args.window ? position + 1 - args.window : 0;
      partition[r] = {tops + r, totals + r * kLanes, values + r * padded};
      all[r] = {tops + rows + r, totals + (rows + r) * kLanes, values + (rows + r) * padded};
      any[r] = false;
      clear_sums(partition[r], padded);
    }
  }

  Visible visible(std::int64_t r, std::int64_t span_begin) const {
    const std::int64_t begin = begins[r] - span_begin, end = ends[r] - span_begin;
    return {static_cast<int>(begin < 0 ? 0 : begin > kSpan ? kSpan : begin),
            static_cast<int>(end < 0 ? 0 : end > kSpan ? kSpan : end)};
  }

  // The strips of a span as far as positions begin .. end - 1 go.
  Span find(std::int64_t span_begin, std::int64_t begin, std::int64_t end) const {
    const CacheArgs& cache = args.cache;
    const std::int32_t* table = args.block_tables + sequence * args.table_stride;
    const std::int64_t chunk = chunk_bytes(cache);
    const std::int64_t position_bytes = cache.head_size * element_bytes(cache.dtype);
    Span span{};
    int known = 0;
    for (int s = 0; s < kSpanStrips; ++s) {
      const std::int64_t position = span_begin + s * kStrip;
      if (position + kStrip <= begin || position >= end) continue;
      const std::int64_t offset = position % cache.block_size;
      const std::int64_t at = (table[position / cache.block_size] * cache.kv_heads + kv_head) * chunk;
      const auto* keys = static_cast<const std::byte*>(cache.keys) + at;
      const auto* values = static_cast<const std::byte*>(cache.values) + at;
      const std::int64_t scales = cache.block_size * position_bytes + 4 * offset;
      span.keys[s] = keys + offset * position_bytes;
      span.values[s] = values + offset * position_bytes;
      span.key_scales[s] = reinterpret_cast<const float*>(keys + scales);
      span.value_scales[s] = reinterpret_cast<const float*>(values + scales);
      known = s;
    }
    for (int s = 0; s < kSpanStrips; ++s) {
      if (span.keys[s] != nullptr) continue;
      span.keys[s] = span.keys[known], span.values[s] = span.values[known];
      span.key_scales[s] = span.key_scales[known], span.value_scales[s] = span.value_scales[known];
    }
    return span;
  }

  // The same span widened to float32.
  Span stage(const Span& span, std::int64_t span_begin, std::int64_t begin, std::int64_t end) const {
    const std::int64_t size = args.cache.head_size;
    Span wide{};
    for (int s = 0; s < kSpanStrips; ++s) {
      float* keys = staged + s * kStrip * size;
      float* values = keys + kSpan * padded;
      wide.keys[s] = reinterpret_cast<const std::byte*>(keys);
      wide.values[s] = reinterpret_cast<const std::byte*>(values);
      const std::int64_t position = span_begin + s * kStrip;
      if (position + kStrip <= begin || position >= end) continue;
      Path::stage_keys(span.keys[s], size, keys);
      Path::stage_values(span.values[s], size, values);
    }
    return wide;
  }

  template <class Form, int kRows, bool kAhead>
  void score_rows(std::int64_t row, const Span& span, const Span& ahead, int strip, int strips, float* scores) {
    constexpr int kMost = Form::kSums / kRows < 4 ? Form::kSums / kRows : 4;
    const std::int64_t size = args.cache.head_size;
    if constexpr (kMost >= 4)
      for (; strips >= 4; strip += 4, strips -= 4)
        Form::template score<kRows, 4, kAhead>(queries, row, span, ahead, strip, size, scores);
    if constexpr (kMost >= 2)
      for (; strips >= 2; strip += 2, strips -= 2)
        Form::template score<kRows, 2, kAhead>(queries, row, span, ahead, strip, size, scores);
    for (; strips >= 1; ++strip, --strips)
      Form::template score<kRows, 1, kAhead>(queries, row, span, ahead, strip, size, scores);
  }

  template <class Form, int kRows, bool kAhead>
  void value_rows(std::int64_t row, const Span& span, const Span& ahead, Visible seen, const float* scores,
                  const std::byte* bytes, const float* scales) {
    constexpr int kMost = Form::kSums / kRows < 4 ? Form::kSums / kRows : 4;
    const std::int64_t size = args.cache.head_size, whole = size / kLanes * kLanes;
    float* to = partition[row].values;
    std::int64_t d = 0;
    if constexpr (kMost >= 4)
      for (; d + 4 * kLanes <= whole; d += 4 * kLanes)
        Form::template add_values<kRows, 4, false, kAhead>(scores, bytes, scales, span, ahead, seen, d, size, to,
                                                             padded);
    if constexpr (kMost >= 2)
      for (; d + 2 * kLanes <= whole; d += 2 * kLanes)
        Form::template add_values<kRows, 2, false, kAhead>(scores, bytes, scales, span, ahead, seen, d, size, to,
                                                             padded);
    for (; d < whole; d += kLanes)
      Form::template add_values<kRows, 1, false, kAhead>(scores, bytes, scales, span, ahead, seen, d, size, to, padded);
    if (d < size)
      Form::template add_values<kRows, 1, true, false>(scores, bytes, scales, span, ahead, seen, d, size, to, padded);
  }

  // The scores of one row become weights, and its sums are rescaled to them.
  template <class Form>
  PUNA_INLINE void weigh(std::int64_t r, const Span& span, Visible seen, float* scores, std::byte* bytes,
                         float* scale) {
    F powers[kSpanStrips];
    const bool cut = seen.begin > 0 || seen.end < kSpan;
    for (int s = 0; s < kSpanStrips; ++s) powers[s] = Form::scaled(load(scores + s * kStrip), queries, r, span, s);
    if (cut)
      for (int s = 0; s < kSpanStrips; ++s)
        powers[s] = lanes_between(powers[s], broadcast(kLowest), seen.begin - s * kStrip, seen.end - s * kStrip);
    const F largest = max(max(powers[0], powers[1]), max(powers[2], powers[3]));
    if (any_above(largest, *partition[r].top + kSlack)) rescale_sums(partition[r], maximum(largest), padded);
    const F top = broadcast(*partition[r].top);
    for (int s = 0; s < kSpanStrips; ++s) powers[s] = power2(powers[s] - top);
    if (cut)
      for (int s = 0; s < kSpanStrips; ++s)
        powers[s] = lanes_between(powers[s], zero(), seen.begin - s * kStrip, seen.end - s * kStrip);
    store(partition[r].total, load(partition[r].total) + ((powers[0] + powers[1]) + (powers[2] + powers[3])));
    Form::keep_weights(powers, span, seen, scores, bytes, scale);
  }

  template <class Form, int kRows, bool kAhead>
  void tile(std::int64_t row, const Span& span, const Span& ahead, std::int64_t span_begin) {
    alignas(64) float scores[kRows * kSpan];
    alignas(64) std::byte bytes[kRows * 2 * kSpan];
    float scales[kRows];
    Visible seen[kRows];
    int begin = kSpan, end = 0;
    bool same = true;
    for (int r = 0; r < kRows; ++r) {
      seen[r] = visible(row + r, span_begin);
      same &= seen[r].begin == seen[0].begin && seen[r].end == seen[0].end;
      if (seen[r].begin >= seen[r].end) continue;
      begin = seen[r].begin < begin ? seen[r].begin : begin;
      end = seen[r].end > end ? seen[r].end : end;
    }
    if (begin >= end) return;
    const int strip = begin / kStrip, strips = (end + kStrip - 1) / kStrip - strip;
    if (strips < kSpanStrips)
      for (float& score : scores) score = 0.0f;
    score_rows<Form, kRows, kAhead>(row, span, ahead, strip, strips, scores);
    for (int r = 0; r < kRows; ++r)
      if (seen[r].begin < seen[r].end)
        weigh<Form>(row + r, span, seen[r], scores + r * kSpan, bytes + r * 2 * kSpan, scales + r);
    if (same) return value_rows<Form, kRows, kAhead>(row, span, ahead, seen[0], scores, bytes, scales);
    // Values only for the positions that a row sees: rows that see the same ones go together. (Not in a lambda: arrays
    // that one captures by reference leave the registers, and the int8 form took 1.7 times as long.)
    for (int r = 0; r < kRows;) {
      int end_row = r + 1;
      while (end_row < kRows && seen[end_row].begin == seen[r].begin && seen[end_row].end == seen[r].end) ++end_row;
      if (seen[r].begin >= seen[r].end) r = end_row;
      if constexpr (kRows > 4)
        for (; r + 4 <= end_row; r += 4)
          value_rows<Form, 4, false>(row + r, span, ahead, seen[r], scores + r * kSpan, bytes + r * 2 * kSpan,
                                     scales + r);
      for (; r < end_row; ++r)
        value_rows<Form, 1, false>(row + r, span, ahead, seen[r], scores + r * kSpan, bytes + r * 2 * kSpan,
                                   scales + r);
    }
  }

  // From `row` on as many rows as a tile takes.
  template <class Form, bool kAhead>
  std::int64_t tile_at(std::int64_t row, const Span& span, const Span& ahead, std::int64_t span_begin) {
    const std::int64_t left = rows - row;
    if constexpr (Form::kTileRows >= 8)
      if (left >= 8) return tile<Form, 8, kAhead>(row, span, ahead, span_begin), 8;
    if constexpr (Form::kTileRows >= 4)
      if (left >= 4) return tile<Form, 4, kAhead>(row, span, ahead, span_begin), 4;
    if (left >= 2) return tile<Form, 2, kAhead>(row, span, ahead, span_begin), 2;
    return tile<Form, 1, kAhead>(row, span, ahead, span_begin), 1;
  }

  // Asks for all of a span.
  void ask_for(const Span& span) const {
    const std::int64_t bytes = kStrip * args.cache.head_size * element_bytes(args.cache.dtype);
    for (int s = 0; s < kSpanStrips; ++s) {
      for (std::int64_t at = 0; at < bytes; at += 64) prefetch_far(span.keys[s] + at);
      for (std::int64_t at = 0; at < bytes; at += 64) prefetch_far(span.values[s] + at);
    }
  }

  // Goes through the keys from position `from` to position `to`, as far as any row sees them. The sums of each
  // partition go into `all`, or where `partials` is given, into the rows' places there, of which partition 0 has the
  // first.
  void attend(std::int64_t from, std::int64_t to, float* partials) {
    const std::int64_t begin = begins[0] > from ? begins[0] : from;  // positions rise with the rows
    const std::int64_t end = ends[rows - 1] < to ? ends[rows - 1] : to;
    const std::int64_t first = begin / kSpan * kSpan;
    if (first >= end) return;
    Span ahead = find(first, begin, end);
    ask_for(ahead);
    for (std::int64_t at = first; at < end; at += kSpan) {
      const Span span = ahead;
      if (at + kSpan < end) ahead = find(at + kSpan, begin, end);
      std::int64_t row = 0;
      if constexpr (Path::kStages) {
        if (rows >= kStagedRows) {
          const Span wide = stage(span, at, begin, end);
          while (row < rows) row += tile_at<typename Path::Staged, false>(row, wide, wide, at);
        }
      }
      if (row == 0) row = tile_at<Path, true>(0, span, ahead, at);
      while (row < rows) row += tile_at<Path, false>(row, span, span, at);
      if ((at + kSpan) % kAttentionPartition != 0 && at + kSpan < end) continue;
      const std::int64_t part = at / kAttentionPartition;
      if (partials == nullptr) {
        finish_partition(part * kAttentionPartition);
      } else {
        for (std::int64_t r = 0; r < rows; ++r) {
          copy_sums(partial_sums(partials + (part * group + r) * partial_floats(padded)), partition[r], padded);
          clear_sums(partition[r], padded);
        }
      }
    }
  }

  void finish_partition(std::int64_t begin) {
    for (std::int64_t r = 0; r < rows; ++r) {
      if (begins[r] >= begin + kAttentionPartition || ends[r] <= begin) continue;
      if (any[r]) {
        merge_sums(all[r], partition[r], padded);
      } else {
        any[r] = true;
        const RowSums kept = all[r];
        all[r] = partition[r], partition[r] = kept;
      }
      clear_sums(partition[r], padded);
    }
  }

  // The rows of the output; zeros for those that saw nothing.
  void write() {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t token = args.query_starts[sequence] + (row_begin + r) / group;
      const std::int64_t head = kv_head * group + (row_begin + r) % group;
      if (!any[r]) {
        clear_sums(all[r], padded);
        *all[r].total = 1.0f;
      }
      write_row(args, (token * args.heads + head) * args.cache.head_size, all[r]);
    }
  }
};

// The tasks of a call in their order, which all threads find alike: first those of sequences with several query tokens,
// in each the last tokens first, as they see most; then those of single tokens, where a sequence may have a task for
// each partition of its keys.
struct AttentionTasks {
  const PagedAttentionArgs& args;
  std::int64_t group, partitions;
  bool may_split;

  // Partitions that a task of a single token takes: as many as leave each thread about eight tasks, since what comes
  // first in a task is waited for.
  std::int64_t partitions_per_task = 1;

  AttentionTasks(const PagedAttentionArgs& call, int threads)
      : args(call),
        group(call.heads / call.cache.kv_heads),
        partitions(attention_partitions(call)),
        may_split(paged_attention_scratch(call) != 0) {
    if (!may_split) return;
    std::int64_t all = 0;
    for (std::int64_t b = 0; b < call.sequences; ++b) all += parts(b) * call.cache.kv_heads;
    const std::int64_t most = all / (8 * threads);
    partitions_per_task = most < 1 ? 1 : most;
  }

  std::int64_t tokens(std::int64_t b) const { return args.query_starts[b + 1] - args.query_starts[b]; }
  std::int64_t length(std::int64_t b) const { return args.sequence_lengths[b]; }
  // The first position that the last token sees.
  std::int64_t begin(std::int64_t b) const {
    return args.window > 0 && length(b) > args.window ? length(b) - args.window : 0;
  }
  std::int64_t first_partition(std::int64_t b) const { return begin(b) / kAttentionPartition; }

  // Partitions of the keys of a sequence's one token, 1 where they are not split.
  std::int64_t parts(std::int64_t b) const {
    if (!may_split || tokens(b) != 1 || length(b) < 1 || length(b) > args.table_width * args.cache.block_size) return 1;
    return (length(b) + kAttentionPartition - 1) / kAttentionPartition - first_partition(b);
  }
  std::int64_t tasks_of_head(std::int64_t b) const {
    return (parts(b) + partitions_per_task - 1) / partitions_per_task;
  }
  std::int64_t row_blocks(std::int64_t b) const { return (tokens(b) * group + kRowsPerTask - 1) / kRowsPerTask; }
  // Tasks of run 0 .. 2 B - 1: the sequences with several tokens, then those with one.
  std::int64_t tasks_of_run(std::int64_t run) const {
    const std::int64_t b = run % args.sequences, count = tokens(b);
    if (count < 1 || (run < args.sequences) != (count > 1)) return 0;
    return row_blocks(b) * args.cache.kv_heads * tasks_of_head(b);
  }

  // Whether positions from .. to - 1 of a sequence are all in blocks that the cache has.
  bool blocks_are_valid(std::int64_t b, std::int64_t from, std::int64_t to) const {
    const std::int64_t block_size = args.cache.block_size;
    if (to > args.table_width * block_size) return false;
    const std::int32_t* table = args.block_tables + b * args.table_stride;
    bool valid = true;
    for (std::int64_t i = from / block_size; i * block_size < to; ++i)
      valid &= table[i] >= 0 && table[i] < args.cache.blocks;
    return valid;
  }

  float* partial(Worker& worker, std::int64_t b, std::int64_t kv_head, std::int64_t part, std::int64_t row) const {
    const std::int64_t index = (b * args.cache.kv_heads + kv_head) * partitions + part;
    return reinterpret_cast<float*>(worker.shared) +
           (index * group + row) * partial_floats(round_up(args.cache.head_size, kLanes));
  }
};

template <class Path>
inline void attend_task(const AttentionTasks& tasks, Worker& worker, std::int64_t b, std::int64_t index) {
  const PagedAttentionArgs& args = tasks.args;
  const std::int64_t tokens = tasks.tokens(b), kv_heads = args.cache.kv_heads;
  const std::int64_t parts = tasks.parts(b), row_blocks = tasks.row_blocks(b);
  const std::int64_t part = tasks.first_partition(b) + index % tasks.tasks_of_head(b) * tasks.partitions_per_task;
  index /= tasks.tasks_of_head(b);
  const std::int64_t kv_head = tokens > 1 ? index % kv_heads : index / row_blocks;
  const std::int64_t row_block = tokens > 1 ? row_blocks - 1 - index / kv_heads : index % row_blocks;
  const std::int64_t row_begin = row_block * kRowsPerTask, left = tokens * tasks.group - row_begin;
  RowTask<Path> task{args, worker, b, kv_head, row_begin, left < kRowsPerTask ? left : kRowsPerTask, tasks.group,
                     round_up(args.cache.head_size, kLanes), {}, {}, {}, {}, {}, {}, nullptr};
  task.prepare(tasks.length(b) - tokens);
  const std::int64_t end = task.ends[task.rows - 1];
  if (!tasks.blocks_are_valid(b, task.begins[0], end)) {
    worker.fail(Failure::block_out_of_range);
  } else if (parts > 1) {
    const std::int64_t from = part * kAttentionPartition;
    return task.attend(from, from + tasks.partitions_per_task * kAttentionPartition,
                       tasks.partial(worker, b, kv_head, 0, row_begin));
  } else {
    task.attend(0, end, nullptr);
  }
  task.write();
}

// What the partitions of single tokens came to.
inline void merge_partitions(const AttentionTasks& tasks, Worker& worker) {
  const PagedAttentionArgs& args = tasks.args;
  const std::int64_t padded = round_up(args.cache.head_size, kLanes);
  const Worker::Range range = worker.share(args.sequences * args.heads);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    const std::int64_t b = i / args.heads, head = i % args.heads, kv_head = head / tasks.group;
    const std::int64_t parts = tasks.parts(b), first = tasks.first_partition(b);
    if (parts <= 1 || !tasks.blocks_are_valid(b, tasks.begin(b), tasks.length(b))) continue;
    const RowSums sums = partial_sums(tasks.partial(worker, b, kv_head, first, head % tasks.group));
    for (std::int64_t part = first + 1; part < first + parts; ++part)
      merge_sums(sums, partial_sums(tasks.partial(worker, b, kv_head, part, head % tasks.group)), padded);
    write_row(args, (args.query_starts[b] * args.heads + head) * args.cache.head_size, sums);
  }
}

template <class Path>
inline void attend(const PagedAttentionArgs& args, Worker& worker) {
  const AttentionTasks tasks(args, worker.count);
  // What take() gives a thread rises, so each thread goes through the runs once.
  std::int64_t run = 0, base = 0, count = tasks.tasks_of_run(0);
  for (;;) {
    const std::int64_t index = worker.take();
    while (index >= base + count && ++run < 2 * args.sequences) base += count, count = tasks.tasks_of_run(run);
    if (run >= 2 * args.sequences) break;
    attend_task<Path>(tasks, worker, run % args.sequences, index - base);
  }
  bool any_split = false;
  for (std::int64_t b = 0; b < args.sequences; ++b) any_split |= tasks.parts(b) > 1;
  if (!any_split) return;
  worker.barrier();
  merge_partitions(tasks, worker);
}

inline void paged_attention(const PagedAttentionArgs& args, Worker& worker) {
  if (args.sequences < 1) return;
  switch (args.cache.dtype) {
    case Dtype::f32: return attend<FloatPath<Dtype::f32>>(args, worker);
    case Dtype::f16: return attend<FloatPath<Dtype::f16>>(args, worker);
    case Dtype::bf16: return attend<FloatPath<Dtype::bf16>>(args, worker);
    case Dtype::i8: return attend<BytePath>(args, worker);
  }
}

}  // namespace puna::PUNA_LEVEL
