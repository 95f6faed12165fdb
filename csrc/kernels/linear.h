// Linear layers over weights in panels.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

inline void linear(const LinearArgs&, Worker&) {}

}  // namespace puna::PUNA_LEVEL
