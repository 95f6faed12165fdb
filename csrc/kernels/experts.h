// Mixtral's experts.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

inline void experts(const ExpertsArgs&, Worker&) {}

}  // namespace puna::PUNA_LEVEL
