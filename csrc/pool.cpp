#include "pool.h"

#include <unistd.h>

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace puna {

namespace {

using Clock = std::chrono::steady_clock;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// How long a thread without work spins before it sleeps. Waking a sleeping thread takes 5 to 50 us, and the engine's
// own work between two decode steps about 100 us.
constexpr std::chrono::microseconds kIdleSpin{200};
// Spins at a barrier before the processor is offered to others: a few microseconds, as the threads of a step arrive
// together unless one of them was taken off its core.
constexpr int kBarrierSpins = 256;

std::byte* aligned(std::byte* memory) {
  return reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(memory) + 63) & ~std::uintptr_t{63});
}

}  // namespace

void Worker::barrier() {
  if (count > 1) {
    pool_->barrier();
  } else {
    pool_->chunk_.value.store(0, std::memory_order_relaxed);
  }
}

std::int64_t Worker::take() {
  return static_cast<std::int64_t>(pool_->chunk_.value.fetch_add(1, std::memory_order_relaxed));
}

void Worker::fail(Failure failure) {
  std::int32_t expected = 0;
  pool_->failure_.compare_exchange_strong(expected, static_cast<std::int32_t>(failure));
}

Pool& Pool::instance() {
  // Never destroyed: at the end of the process the threads are taken down with it, wherever they are.
  static Pool* pool = new Pool();
  return *pool;
}

Pool::~Pool() { stop(); }

void Pool::set_threads(int count) {
  std::lock_guard lock(mutex_);
  if (count == requested_.load()) return;
  stop();
  requested_ = count;
}

void Pool::start() {
  const int count = requested_.load();
  owner_ = static_cast<int>(getpid());
  stopping_ = false;
  arrived_.value = 0;
  chunk_.value = 0;
  parked_.value = 0;
  workers_.assign(count, Worker{});
  locals_.clear();
  for (int i = 0; i < count; ++i) {
    locals_.push_back(std::make_unique_for_overwrite<std::byte[]>(Worker::kLocalBytes + 64));
    workers_[i].index = i;
    workers_[i].count = count;
    workers_[i].local = aligned(locals_[i].get());
    workers_[i].pool_ = this;
  }
  alone_ = workers_[0];
  alone_.count = 1;
  // What a thread has seen is read here and not in the thread, which may start to run after the first job is given out.
  const std::uint64_t seen = job_.value.load();
  for (int i = 1; i < count; ++i) threads_.emplace_back([this, i, seen] { work(i, seen); });
}

void Pool::stop() {
  if (workers_.empty()) return;
  if (owner_ == static_cast<int>(getpid())) {
    stopping_ = true;
    job_.value.fetch_add(1);
    job_.value.notify_all();
    for (auto& thread : threads_) thread.join();
  } else {
    for (auto& thread : threads_) thread.detach();
  }
  threads_.clear();
  workers_.clear();
}

Failure Pool::run(const Task* tasks, std::size_t count, std::int64_t* ends) {
  std::lock_guard lock(mutex_);
  if (workers_.empty() || owner_ != static_cast<int>(getpid())) {
    stop();
    start();
  }
  std::size_t needed = 0;
  for (std::size_t i = 0; i < count; ++i) needed = tasks[i].shared_bytes > needed ? tasks[i].shared_bytes : needed;
  if (needed > scratch_bytes_) {
    scratch_.reset();
    scratch_ = std::make_unique_for_overwrite<std::byte[]>(needed + 64);
    scratch_bytes_ = needed;
    shared_ = aligned(scratch_.get());
  }
  failure_ = 0;
  if (count == 1 && tasks->serial && !ends) {  // nobody else need know
    run_alone(*tasks);
    return static_cast<Failure>(failure_.load());
  }
  tasks_ = tasks;
  task_count_ = count;
  ends_ = ends;
  if (workers_.size() > 1) {
    job_.value.fetch_add(1);  // sequentially consistent, like the increment of parked_ in wait_for_job: one sees the other
    if (parked_.value.load() != 0) job_.value.notify_all();
  }
  run_tasks(workers_[0]);
  return static_cast<Failure>(failure_.load());
}

void Pool::run_alone(const Task& task) {
  alone_.shared = shared_;
  task.kernel(task.args, alone_);
  chunk_.value.store(0, std::memory_order_relaxed);
}

void Pool::run_tasks(Worker& worker) {
  worker.shared = shared_;
  const Task* tasks = tasks_;
  const std::size_t count = task_count_;
  std::int64_t* ends = worker.index == 0 ? ends_ : nullptr;
  const auto begin = ends ? Clock::now() : Clock::time_point{};
  for (std::size_t i = 0; i < count; ++i) {
    if (tasks[i].serial) {
      // The other threads go ahead to the next task that is theirs too, and wait there.
      if (worker.index == 0) run_alone(tasks[i]);
    } else {
      tasks[i].kernel(tasks[i].args, worker);
    }
    // Between serial tasks nobody waits for anybody.
    if (!tasks[i].serial || i + 1 == count || !tasks[i + 1].serial) worker.barrier();
    if (ends) ends[i] = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
  }
}

void Pool::work(int index, std::uint64_t seen) {
  for (;;) {
    wait_for_job(seen);
    seen = job_.value.load(std::memory_order_acquire);
    if (stopping_) return;
    run_tasks(workers_[index]);
  }
}

void Pool::wait_for_job(std::uint64_t seen) {
  const auto until = Clock::now() + kIdleSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (job_.value.load(std::memory_order_acquire) != seen) return;
      relax();
    }
  } while (Clock::now() < until);
  parked_.value.fetch_add(1);
  while (job_.value.load() == seen) job_.value.wait(seen);
  parked_.value.fetch_sub(1);
}

void Pool::barrier() {
  const std::uint64_t phase = phase_.value.load(std::memory_order_relaxed);
  if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == workers_.size()) {
    arrived_.value.store(0, std::memory_order_relaxed);
    chunk_.value.store(0, std::memory_order_relaxed);
    phase_.value.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.value.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kBarrierSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace puna
