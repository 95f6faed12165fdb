// What follows the sums of a linear layer: bias, gated activation, and the conversion to the dtype of y.
#pragma once

#include "../vec.h"
#include "activation.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// Stores the rows first_row .. first_row + rows - 1 of the outputs 32 * panel .. 32 * panel + 31; outputs past the last one
// are left out. `sums` [rows][32] are the float sums without bias; where the layer is gated, they are those of the gates,
// and `up_sums` [rows][32] those of the ups (else null). Gate and up are not rounded before they are multiplied.
inline void epilogue_store(const LinearArgs& a, const float* sums, const float* up_sums, std::int64_t first_row, int rows,
                           std::int64_t panel) {
  for (int half = 0; half < kPanel; half += kLanes) {
    const std::int64_t output = panel * kPanel + half;
    const std::int64_t left = a.outputs - output;
    if (left <= 0) return;
    const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
    F bias = zero(), up_bias = zero();
    if (a.bias != nullptr) {
      bias = load_as_n(a.bias, output, a.x_dtype, lanes);
      if (a.gated) up_bias = load_as_n(a.bias, a.outputs + output, a.x_dtype, lanes);
    }
    for (int row = 0; row < rows; ++row) {
      F y = load(sums + row * kPanel + half);
      if (a.bias != nullptr) y = y + bias;
      if (a.gated) {
        F up = load(up_sums + row * kPanel + half);
        if (a.bias != nullptr) up = up + up_bias;
        y = activate(y, a.activation) * up;
      }
      store_as_n(a.y, (first_row + row) * a.y_stride + output, y, a.y_dtype, lanes);
    }
  }
}

}  // namespace puna::PUNA_LEVEL
