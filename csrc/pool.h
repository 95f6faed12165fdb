// Pool: the process's persistent threads, which run lists of tasks with a barrier after each.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels/args.h"
#include "worker.h"

namespace puna {

// A kernel and its arguments, by value: what is run at once, or appended to a recording and run many times.
struct Task {
  static constexpr std::size_t kArgsBytes = 192;

  Kernel kernel = nullptr;
  std::size_t shared_bytes = 0;  // of scratch memory
  bool serial = false;           // too little work to share: worker 0 does it all, as the only one
  alignas(16) std::byte args[kArgsBytes] = {};

  template <class Args>
  static Task of(Kernel kernel, const Args& args, std::size_t shared_bytes = 0) {
    static_assert(sizeof(Args) <= kArgsBytes && std::is_trivially_copyable_v<Args>);
    Task task;
    task.kernel = kernel;
    task.shared_bytes = shared_bytes;
    std::memcpy(task.args, &args, sizeof(Args));
    return task;
  }
};

// One per process, as the processor's cores are: two engines take turns, step by step, instead of getting in each
// other's way. The calling thread is worker 0. Not reentrant: a kernel must not call run().
class Pool {
 public:
  static Pool& instance();

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Ends the threads and starts others at the next run.
  void set_threads(int count);
  int threads() const { return requested_.load(); }

  // Runs the tasks in order on all threads; returns when all are done. The first failure of any kernel, if there was one.
  // With `ends`, the nanoseconds from the start to the end of each task are written there, one for each.
  Failure run(const Task* tasks, std::size_t count, std::int64_t* ends = nullptr);

 private:
  friend class Worker;

  Pool() = default;
  ~Pool();

  void start();
  void stop();
  void work(int index, std::uint64_t seen);
  void run_tasks(Worker& worker);
  void run_alone(const Task& task);
  void barrier();
  void wait_for_job(std::uint64_t seen);

  struct alignas(64) Line {
    std::atomic<std::uint64_t> value{0};
  };

  std::mutex mutex_;  // held for a whole run
  std::atomic<int> requested_{1};
  std::vector<std::thread> threads_;
  std::vector<Worker> workers_;
  Worker alone_;  // worker 0 where it is the only one
  std::unique_ptr<std::byte[]> scratch_;
  std::size_t scratch_bytes_ = 0;
  std::byte* shared_ = nullptr;
  std::vector<std::unique_ptr<std::byte[]>> locals_;
  int owner_ = 0;  // the process that started the threads: a fork's child has none of them

  const Task* tasks_ = nullptr;
  std::size_t task_count_ = 0;
  std::int64_t* ends_ = nullptr;
  bool stopping_ = false;

  Line job_;      // one higher for each run
  Line parked_;   // how many threads sleep in wait_for_job
  Line arrived_;  // at the current barrier
  Line phase_;    // one higher after each barrier
  Line chunk_;    // the next chunk of Worker::take
  std::atomic<std::int32_t> failure_{0};
};

}  // namespace puna
