// Rows of a table, row-major or in panels.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

inline void embedding(const EmbeddingArgs&, Worker&) {}

}  // namespace puna::PUNA_LEVEL
