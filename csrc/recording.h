// Recording: a step as a list of tasks, appended while Python runs the model once, and replayed without Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pool.h"

namespace puna {

class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  ~Recording();  // one that is given up before its end is this thread's no more

  // From here on this thread's kernel calls are appended instead of run, until end(). Throws std::logic_error where this
  // thread is recording already, or this recording is done.
  void begin();
  void end();

  // All tasks in order on the pool's threads.
  Failure run() const;

  // The same, with the nanoseconds that each task took, barriers included, beside the name of its kernel.
  struct Timed {
    std::string kernel;
    std::int64_t nanoseconds;
  };
  Failure run_timed(std::vector<Timed>& timed) const;

  std::size_t size() const { return tasks_.size(); }

  // The recording of the calling thread, or null.
  static Recording* current();

  void append(const Task& task) { tasks_.push_back(task); }

 private:
  std::vector<Task> tasks_;
  bool done_ = false;
};

}  // namespace puna
