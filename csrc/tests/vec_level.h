// What vec_tests.cpp calls of each level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace puna {

// `count` numbers (a multiple of 64) in each of x, y and z, any bits at all. What a wrapper gives for them goes to `emit`.
struct VecInputs {
  const float* x;
  const float* y;
  const float* z;
  std::int64_t count;
  float* room;  // for 65536 + 16 * `count` numbers
  void (*emit)(const char* name, const void* data, std::size_t bytes);
};

}  // namespace puna
