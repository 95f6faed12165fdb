#include "recording.h"

#include <stdexcept>

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

Recording* Recording::current() { return recording; }

}  // namespace puna
