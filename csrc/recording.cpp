#include "recording.h"

#include <stdexcept>

#include "dispatch.h"

namespace puna {

namespace {
thread_local Recording* recording = nullptr;
}

Recording::~Recording() {
  if (recording == this) recording = nullptr;
}

void Recording::begin() {
  if (recording) throw std::logic_error("this thread is recording already");
  if (done_) throw std::logic_error("this recording is done: make another");
  recording = this;
}

void Recording::end() {
  if (recording == this) recording = nullptr;
  done_ = true;
}

Failure Recording::run() const { return Pool::instance().run(tasks_.data(), tasks_.size()); }

Failure Recording::run_timed(std::vector<Timed>& timed) const {
  std::vector<std::int64_t> ends(tasks_.size());
  const Failure failure = Pool::instance().run(tasks_.data(), tasks_.size(), ends.data());
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < tasks_.size(); ++i) {
    timed.push_back({kernel_name(tasks_[i].kernel), ends[i] - begin});
    begin = ends[i];
  }
  return failure;
}

Recording* Recording::current() { return recording; }

}  // namespace puna
