// pool_stress [RUNS]: the pool under what an engine may do to it, for ThreadSanitizer and for a plain build. Two threads run
// lists of tasks at once, with barriers, chunks taken, scratch memory and failures, while a third one changes the number of
// threads.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../pool.h"

namespace {

using puna::Failure;
using puna::Pool;
using puna::Task;
using puna::Worker;

std::atomic<int> errors{0};

void expect(bool holds, const char* what) {
  if (!holds && errors.fetch_add(1) < 10) std::fprintf(stderr, "pool_stress: %s\n", what);
}

constexpr std::int64_t kItems = 1000;

struct SumArgs {
  std::int64_t* values;  // [kItems]
  std::int64_t* total;
  bool fails;
};

// Plain memory everywhere, so that a barrier which does not order it is a data race.
void sum(const void* data, Worker& worker) {
  const auto& args = *static_cast<const SumArgs*>(data);
  auto* parts = reinterpret_cast<std::int64_t*>(worker.shared);
  auto* own = reinterpret_cast<std::int64_t*>(worker.local);

  const Worker::Range range = worker.share(kItems, 16);
  for (std::int64_t i = range.begin; i < range.end; ++i) args.values[i] = i;
  worker.barrier();

  // Chunks of ten, each of which goes to one thread only.
  *own = 0;
  for (std::int64_t chunk = worker.take(); chunk < kItems / 10; chunk = worker.take())
    for (std::int64_t i = 10 * chunk; i < 10 * chunk + 10; ++i) *own += args.values[i]++;
  worker.barrier();
  parts[worker.index] = *own;
  if (args.fails && worker.index == worker.count - 1) worker.fail(Failure::block_out_of_range);
  worker.barrier();

  // The counter of chunks has begun again.
  if (worker.take() == 0) {
    *args.total = 0;
    for (int i = 0; i < worker.count; ++i) *args.total += parts[i];
  }
}

// Follows `sum` in a list: sees all that it wrote.
void verify(const void* data, Worker& worker) {
  const auto& args = *static_cast<const SumArgs*>(data);
  expect(*args.total == kItems * (kItems - 1) / 2, "the total is wrong");
  const Worker::Range range = worker.share(kItems);
  for (std::int64_t i = range.begin; i < range.end; ++i) expect(args.values[i] == i + 1, "a value was not taken once");
}

void call(int runs) {
  std::vector<std::int64_t> values(kItems);
  std::int64_t total = 0;
  for (int run = 0; run < runs; ++run) {
    const bool fails = run % 5 == 0;
    // More scratch memory in some runs than in those before: it moves.
    const std::size_t bytes = 64 * sizeof(std::int64_t) + static_cast<std::size_t>(run % 7) * 4096;
    const SumArgs args{values.data(), &total, fails};
    const Task summing = Task::of(sum, args, bytes), verifying = Task::of(verify, args);
    Task alone = verifying, summing_alone = summing;
    alone.serial = summing_alone.serial = true;
    // Tasks that one thread does alone between others, several in a row, and as the last one.
    const Task tasks[] = {summing, verifying, alone, summing, alone, alone, summing_alone, verifying, summing, alone};
    const Failure failure = Pool::instance().run(tasks, run % 3 == 0 ? 10 : 8);
    expect(Pool::instance().run(&alone, 1) == Failure::none, "a failure stays");
    expect(failure == (fails ? Failure::block_out_of_range : Failure::none), "the failure is wrong");
    if (run % 50 == 49) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the threads go to sleep
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 1000;
  Pool::instance().set_threads(3);
  std::atomic<bool> done{false};
  std::thread first(call, runs), second(call, runs);
  std::thread setter([&] {
    for (int count = 1; !done; count = count % 5 + 1) {
      Pool::instance().set_threads(count);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  });
  first.join();
  second.join();
  done = true;
  setter.join();
  Pool::instance().set_threads(1);
  return errors == 0 ? 0 : 1;
}
