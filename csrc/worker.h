// Worker: what a kernel is given on each thread of the pool. Kernels know this, and no more of the pool.
#pragma once

#include <cstddef>
#include <cstdint>

namespace puna {

class Pool;

// What went wrong inside a kernel. The pool keeps the first one, and Python gets it as an exception after the step.
enum class Failure : std::int32_t {
  none = 0,
  token_out_of_range = 1,  // a token id, or a row index, that the table of an embedding does not have
  block_out_of_range = 2,  // a cache block that the pool does not have
};

class Worker {
 public:
  int index = 0;  // 0 .. count - 1
  int count = 1;

  // Memory that all threads share while one task runs (its size is what the task asked for), on a 64-byte boundary.
  std::byte* shared = nullptr;
  // Memory of this thread alone, `kLocalBytes` long, on a 64-byte boundary.
  std::byte* local = nullptr;

  // Every thread of the task waits here for all the others. Does not change which thread does what: see `share`.
  void barrier();

  // The next of the chunks 0, 1, 2 ..., each given to one thread only; starts again at 0 after a barrier.
  std::int64_t take();

  // Records a failure; the kernel goes on with whatever is safe.
  void fail(Failure failure);

  // This thread's part of `total` items: static, contiguous, as even as `grain` allows.
  struct Range {
    std::int64_t begin, end;
  };
  Range share(std::int64_t total, std::int64_t grain = 1) const {
    const std::int64_t grains = (total + grain - 1) / grain;
    const std::int64_t begin = grains * index / count * grain;
    const std::int64_t end = grains * (index + 1) / count * grain;
    return {begin < total ? begin : total, end < total ? end : total};
  }

  static constexpr std::size_t kLocalBytes = 512 * 1024;

 private:
  friend class Pool;
  Pool* pool_ = nullptr;
};

}  // namespace puna
