// Linear layers over weights in panels: which kernel a format has.
#pragma once

#include "../vec.h"
#include "args.h"
#include "linear_dense.h"
#include "linear_groups.h"

namespace puna::PUNA_LEVEL {

inline void linear(const LinearArgs& a, Worker& worker) {
  if (a.format.bits != 0) {
    groups_linear(a, worker);
  } else {
    dense_linear(a, worker);
  }
}

}  // namespace puna::PUNA_LEVEL
